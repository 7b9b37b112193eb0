// Bitmaps and pictures: one as a PNG, the other as pixels.

import { encoded } from "./png.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */

const TAKEN = 16; // pixels by which the server lets shapes differ

/** @param {number} width @param {number} height */
export function drawable(width, height) {
  const canvas = new OffscreenCanvas(width, height);
  return /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
}

/** @param {Bitmap} bitmap @returns {Promise<Blob>} a PNG: of a canvas it would wait until the browser is idle, which it is not while one paints */
export async function toPng(bitmap) {
  return new Blob([await encoded(bitmap)], { type: "image/png" });
}

/**
 * A picture's pixels at a size: of one channel its brightness, or its opacity where some of it is transparent; of three
 * its colours, on black. Raises Error where the blob is no picture.
 * @param {Blob} blob @param {number} width @param {number} height @param {number} channels
 * @returns {Promise<Uint8ClampedArray>}
 */
export async function pixels(blob, width, height, channels) {
  const context = drawable(width, height), source = await decoded(blob);
  context.drawImage(source, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height), found = new Uint8ClampedArray(width * height * channels);
  let clear = false;
  for (let i = 3; i < data.length && !clear; i += 4) clear = data[i] < 255;
  for (let i = 0, at = 0; i < width * height; i++, at += 4) {
    const [red, green, blue, opacity] = [data[at], data[at + 1], data[at + 2], data[at + 3]];
    if (channels === 1) found[i] = clear ? opacity : 0.299 * red + 0.587 * green + 0.114 * blue;
    else found.set(clear ? [red, green, blue].map((value) => (value * opacity) / 255) : [red, green, blue], 3 * i);
  }
  return found;
}

/** @param {Blob} blob @returns {Promise<ImageBitmap>} Raises Error where it is no picture that this browser reads. */
export async function decoded(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    throw new Error(`${/** @type {File} */ (blob).name ?? "file"}: not a picture that this browser reads; expected PNG, JPEG or WebP`);
  }
}

/**
 * The middle of a picture, in the shape of another.
 * @param {ImageBitmap} picture @param {number} width @param {number} height of that other @returns {Promise<Blob>} a PNG
 */
export async function cropped(picture, width, height) {
  const scale = Math.min(picture.width / width, picture.height / height);
  const [w, h] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const context = drawable(w, h);
  context.drawImage(picture, (w - picture.width) / 2, (h - picture.height) / 2);
  return context.canvas.convertToBlob({ type: "image/png" });
}

/** @type {WeakMap<Blob, {size: string, made: Promise<Blob>}>} */
const shaped = new WeakMap();

/**
 * A picture to start from: its middle where its shape is another than what is drawn, which the server does not take.
 * @param {Blob} picture @param {{width: number, height: number}} drawn @returns {Promise<Blob>} for the same sizes the same one
 */
export function inShape(picture, { width, height }) {
  const size = `${width} x ${height}`;
  const make = async () => {
    const own = await decoded(picture), differs = Math.abs(width - (own.width * height) / own.height);
    return differs >= TAKEN || stretched(own, { width, height }) ? cropped(own, width, height) : picture;
  };
  let found = shaped.get(picture);
  if (found?.size !== size) shaped.set(picture, (found = { size, made: make() }));
  return found.made;
}

/** @param {string} text in base64 @param {string} [type] @returns {Blob} */
export function fromBase64(text, type = "image/png") {
  return new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type });
}

/** Whether two shapes differ by more than a pixel in a hundred. @param {{width: number, height: number}} a @param {{width: number, height: number}} b */
export function stretched(a, b) {
  return Math.abs(Math.log((a.width * b.height) / (a.height * b.width))) > 0.01;
}

// What is seen: the picture, the regions' masks over it in their colours and patterns, and the ink of the one at hand.

import { whole } from "./bitmap.js";
import { COLOURS, active } from "./regions.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./bitmap.js").Rect} Rect */
/** @typedef {import("./regions.js").Region} Region */

// An 8 x 8 cell for each colour, as bits: hatched so that regions differ without their colours
const PATTERNS = [
  (/** @type {number} */ x, /** @type {number} */ y) => (x + y) % 8 < 2,
  (/** @type {number} */ x, /** @type {number} */ y) => (x - y + 64) % 8 < 2,
  (/** @type {number} */ x, /** @type {number} */ _) => x % 8 < 2,
  (/** @type {number} */ _, /** @type {number} */ y) => y % 8 < 2,
  (/** @type {number} */ x, /** @type {number} */ y) => x % 8 < 3 && y % 8 < 3,
  (/** @type {number} */ x, /** @type {number} */ y) => x % 8 < 1 || y % 8 < 1,
  (/** @type {number} */ x, /** @type {number} */ y) => (x + y) % 8 < 2 || (x - y + 64) % 8 < 2,
  () => false,
];

/** A canvas that shows a bitmap, painted again only where that has changed. */
export class Layer {
  /** @param {Bitmap} bitmap @param {string} colour @param {number} pattern of PATTERNS, or -1 for none */
  constructor(bitmap, colour, pattern) {
    this.bitmap = bitmap;
    this.canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    this.context = /** @type {OffscreenCanvasRenderingContext2D} */ (this.canvas.getContext("2d"));
    this.rgb = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    this.pattern = pattern;
    this.update(whole(bitmap));
  }

  /** @param {Rect} rect */
  update(rect) {
    if (rect.width <= 0 || rect.height <= 0) return;
    const image = new ImageData(rect.width, rect.height), { data, width } = this.bitmap;
    const [red, green, blue] = this.rgb, hatched = PATTERNS[this.pattern];
    for (let y = 0, at = 0; y < rect.height; y++) {
      for (let x = 0; x < rect.width; x++, at += 4) {
        const value = data[(rect.y + y) * width + rect.x + x];
        image.data[at] = red;
        image.data[at + 1] = green;
        image.data[at + 2] = blue;
        image.data[at + 3] = hatched ? (hatched(rect.x + x, rect.y + y) ? value : value * 0.62) : value;
      }
    }
    this.context.putImageData(image, rect.x, rect.y);
  }
}

export class Scene {
  /** @param {HTMLCanvasElement} canvas @param {import("./view.js").View} view */
  constructor(canvas, view) {
    this.canvas = canvas;
    this.view = view;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    /** @type {Map<Bitmap, Layer>} */ this.layers = new Map();
    /** @type {CanvasImageSource | null} */ this.picture = null;
    /** @type {CanvasImageSource | null} */ this.before = null; // for comparison
    this.split = 1; // the share of the width that shows the picture, the rest `before`
    this.opacity = 0.5;
    this.asked = false;
    /** @type {() => {regions: Region[], chosen: Region | null, ink: boolean, width: number, height: number}} */
    this.state = () => ({ regions: [], chosen: null, ink: false, width: 1, height: 1 });
    /** @type {{x: number, y: number, radius: number} | null} */ this.brush = null;
    /** @type {import("./bitmap.js").Point[]} */ this.outline = [];
  }

  /** @param {Bitmap} bitmap @param {Rect} rect */
  changed(bitmap, rect) {
    this.layers.get(bitmap)?.update(rect);
    this.draw();
  }

  /** Paint with the next frame. */
  draw() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => {
      this.asked = false;
      this.paint();
    });
  }

  /** @param {Bitmap} bitmap @param {string} colour @param {number} pattern */
  layer(bitmap, colour, pattern) {
    let found = this.layers.get(bitmap);
    if (!found) this.layers.set(bitmap, (found = new Layer(bitmap, colour, pattern)));
    return found.canvas;
  }

  paint() {
    const { regions, chosen, ink, width, height } = this.state(), { context, view } = this;
    const used = new Set(regions.flatMap((each) => [each.mask, each.ink]));
    for (const bitmap of this.layers.keys()) if (!used.has(bitmap)) this.layers.delete(bitmap);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const dots = this.canvas.width / this.canvas.clientWidth || 1;
    context.setTransform(view.scale * dots, 0, 0, view.scale * dots, view.x * dots, view.y * dots);
    context.imageSmoothingEnabled = view.scale < 3;
    context.fillStyle = "#777";
    context.fillRect(0, 0, width, height);
    if (this.picture) context.drawImage(this.picture, 0, 0, width, height);
    if (this.before && this.split < 1) this.compare(width, height);
    context.imageSmoothingEnabled = false;
    context.globalAlpha = this.opacity;
    for (const each of active(regions)) {
      context.drawImage(this.layer(each.mask, COLOURS[each.colour], each.colour), 0, 0);
    }
    context.globalAlpha = 1;
    if (chosen && ink) context.drawImage(this.layer(chosen.ink, "#ffffff", -1), 0, 0);
    this.marks();
  }

  /** @param {number} width @param {number} height */
  compare(width, height) {
    const at = width * this.split, { context } = this;
    context.save();
    context.beginPath();
    context.rect(at, 0, width - at, height);
    context.clip();
    context.drawImage(/** @type {CanvasImageSource} */ (this.before), 0, 0, width, height);
    context.restore();
    context.fillStyle = "#fff";
    context.fillRect(at - 1 / this.view.scale, 0, 2 / this.view.scale, height);
  }

  /** The brush's ring, and the line of a lasso or a rectangle. */
  marks() {
    const { context } = this, thin = 1 / this.view.scale;
    const stroke = () => {
      for (const [colour, width] of /** @type {[string, number][]} */ ([["#000", 3], ["#fff", 1]])) {
        context.strokeStyle = colour;
        context.lineWidth = width * thin;
        context.stroke();
      }
    };
    if (this.outline.length > 1) {
      context.beginPath();
      this.outline.forEach((p, i) => (i ? context.lineTo(p.x, p.y) : context.moveTo(p.x, p.y)));
      context.closePath();
      stroke();
    }
    if (this.brush) {
      context.beginPath();
      context.arc(this.brush.x, this.brush.y, this.brush.radius, 0, 2 * Math.PI);
      stroke();
    }
  }
}

/** @param {Bitmap} bitmap @returns {Promise<Blob>} a grey PNG */
export async function toPng(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = new ImageData(bitmap.width, bitmap.height);
  for (let i = 0; i < bitmap.data.length; i++) {
    image.data.fill(bitmap.data[i], 4 * i, 4 * i + 3);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

/**
 * A picture's brightness at a size; of one that is transparent its opacity.
 * @param {Blob} blob @param {number} width @param {number} height @returns {Promise<Uint8ClampedArray>}
 */
export async function brightness(blob, width, height) {
  const source = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(width, height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.drawImage(source, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height), found = new Uint8ClampedArray(width * height);
  let clear = false;
  for (let i = 3; i < data.length && !clear; i += 4) clear = data[i] < 255;
  for (let i = 0; i < found.length; i++) {
    const at = 4 * i;
    found[i] = clear ? data[at + 3] : 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
  }
  return found;
}

// PNGs: written from pixels, and the text chunks that say of their making, read and written. No DOM.

import { crc32, joined } from "./zip.js";

const SIGNATURE = 0x89504e47;
const BEGIN = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const GREY = 0, RGB = 2, UP = 2; // colour types; the filter that notes the difference to the row above

/** @param {string} kind @param {Uint8Array} data @returns {Uint8Array<ArrayBuffer>} a chunk with its length and checksum */
function chunk(kind, data) {
  const made = new Uint8Array(12 + data.length), view = new DataView(made.buffer);
  view.setUint32(0, data.length);
  made.set(new TextEncoder().encode(kind), 4);
  made.set(data, 8);
  view.setUint32(8 + data.length, crc32(made.subarray(4, 8 + data.length)));
  return made;
}

/** @param {import("./bitmap.js").Bitmap} bitmap of 8 bits @returns {Promise<Uint8Array<ArrayBuffer>>} a PNG, grey or RGB */
export async function encoded({ width, height, channels, data }) {
  const row = width * channels, rows = new Uint8Array(height * (1 + row)), header = new Uint8Array(13), view = new DataView(header.buffer);
  for (let y = 0, at = 0, to = 0; y < height; y++) {
    rows[to++] = UP;
    for (let x = 0; x < row; x++, at++) rows[to++] = data[at] - (y ? data[at - row] : 0);
  }
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([8, channels === 1 ? GREY : RGB], 8);
  return joined([new Uint8Array(BEGIN), chunk("IHDR", header), chunk("IDAT", await deflated(rows)), chunk("IEND", new Uint8Array())]);
}

/** @param {Uint8Array<ArrayBuffer>} bytes @returns {Promise<Uint8Array<ArrayBuffer>>} without a blob, which would go by way of another process */
async function deflated(bytes) {
  const stream = new CompressionStream("deflate"), writer = stream.writable.getWriter(), reader = stream.readable.getReader();
  const written = writer.write(bytes).then(() => writer.close()), parts = [];
  for (let next = await reader.read(); !next.done; next = await reader.read()) parts.push(next.value);
  await written;
  return joined(parts);
}

/** @param {ArrayBuffer} buffer @returns {Record<string, string>} */
export function texts(buffer) {
  const view = new DataView(buffer), bytes = new Uint8Array(buffer);
  /** @type {Record<string, string>} */
  const found = {};
  if (bytes.length < 8 || view.getUint32(0) !== SIGNATURE) return found;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at), kind = latin(bytes.subarray(at + 4, at + 8));
    if (at + 12 + length > bytes.length) break;
    const data = bytes.subarray(at + 8, at + 8 + length), zero = data.indexOf(0);
    if (kind === "tEXt" && zero > 0) {
      found[latin(data.subarray(0, zero))] = latin(data.subarray(zero + 1));
    } else if (kind === "iTXt" && zero > 0 && data[zero + 1] === 0) {
      const language = data.indexOf(0, zero + 3), keyword = data.indexOf(0, language + 1);
      found[latin(data.subarray(0, zero))] = new TextDecoder().decode(data.subarray(keyword + 1));
    }
    at += 12 + length;
  }
  return found;
}

/** @param {ArrayBuffer} buffer of a PNG @returns {{width: number, height: number}} */
export function sizeOf(buffer) {
  const view = new DataView(buffer);
  return { width: view.getUint32(16), height: view.getUint32(20) };
}

/** The same PNG without a text of ours. @param {Uint8Array} bytes @param {string} keyword @returns {Uint8Array} */
function without(bytes, keyword) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), start = `iTXt${keyword}\0`;
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    if (latin(bytes.subarray(at + 4, at + 4 + start.length)) !== start) continue;
    const rest = bytes.subarray(at + 12 + view.getUint32(at)), made = new Uint8Array(at + rest.length);
    made.set(bytes.subarray(0, at));
    made.set(rest, at);
    return without(made, keyword);
  }
  return bytes;
}

/**
 * A PNG with a text, before its last chunk (the specification's iTXt), in place of one of the same keyword.
 * @param {Uint8Array} given @param {string} keyword @param {string} text @returns {Uint8Array<ArrayBuffer>}
 */
export function withText(given, keyword, text) {
  const bytes = without(given, keyword);
  const end = bytes.length - 12, added = chunk("iTXt", new TextEncoder().encode(`${keyword}\0\0\0\0\0${text}`));
  return joined([bytes.subarray(0, end), added, bytes.subarray(end)]);
}

/** @param {Uint8Array} bytes @returns {string} */
export function latin(bytes) {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}

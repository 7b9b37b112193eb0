// What a PNG says of its making: the text chunks, read and written. No DOM.

import { crc32 } from "./zip.js";

const SIGNATURE = 0x89504e47;

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
  const body = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${text}`), end = bytes.length - 12;
  const made = new Uint8Array(bytes.length + 8 + body.length), view = new DataView(made.buffer);
  made.set(bytes.subarray(0, end));
  view.setUint32(end, body.length - 4);
  made.set(body, end + 4);
  view.setUint32(end + 4 + body.length, crc32(body));
  made.set(bytes.subarray(end), end + 8 + body.length);
  return made;
}

/** @param {Uint8Array} bytes @returns {string} */
export function latin(bytes) {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}

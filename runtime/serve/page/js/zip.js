// A zip of stored files, written and read: pictures are compressed already. No DOM.

/** @typedef {{name: string, data: Uint8Array}} Entry */

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

/** @param {Uint8Array} data */
export function crc32(data) {
  let sum = 0xffffffff;
  for (const byte of data) sum = TABLE[(sum ^ byte) & 255] ^ (sum >>> 8);
  return (sum ^ 0xffffffff) >>> 0;
}

/** @param {Uint8Array} bytes */
export function isZip(bytes) {
  return bytes[0] === 0x50 && bytes[1] === 0x4b;
}

/** @param {Entry[]} entries @returns {Uint8Array<ArrayBuffer>} */
export function write(entries) {
  /** @type {Uint8Array[]} */ const parts = [];
  /** @type {Uint8Array[]} */ const directory = [];
  let offset = 0;
  for (const { name, data } of entries) {
    const path = new TextEncoder().encode(name);
    const about = [20, 0x800, 0, 0, 0x21]; // version, UTF-8 names, stored, time, date (1980-01-01)
    const sizes = [crc32(data), data.length, data.length];
    const head = fields([[4, 0x04034b50], ...about.map(two), ...sizes.map(four), [2, path.length], [2, 0]]);
    directory.push(
      fields([
        [4, 0x02014b50], [2, 20], ...about.map(two), ...sizes.map(four), [2, path.length], [2, 0], [2, 0], [2, 0], [2, 0],
        [4, 0], [4, offset],
      ]), path);
    parts.push(head, path, data);
    offset += head.length + path.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = fields([
    [4, 0x06054b50], [2, 0], [2, 0], [2, entries.length], [2, entries.length], [4, size], [4, offset], [2, 0],
  ]);
  return joined([...parts, ...directory, end]);
}

/** @param {Uint8Array} bytes @returns {Entry[]} Raises Error where it is no zip of stored files. */
export function read(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("project: cut short; expected a zip that this page has saved");
  let at = view.getUint32(end + 16, true);
  const found = [];
  let room = bytes.length;
  for (let i = view.getUint16(end + 10, true); i > 0; i--) {
    if (at + 46 > bytes.length || view.getUint16(at + 10, true) !== 0) {
      throw new Error("project: its files are compressed; expected a zip that this page has saved");
    }
    const size = view.getUint32(at + 20, true), name = view.getUint16(at + 28, true);
    const extra = view.getUint16(at + 30, true) + view.getUint16(at + 32, true), start = view.getUint32(at + 42, true);
    const data = start + 30 + view.getUint16(start + 26, true) + view.getUint16(start + 28, true);
    const entry = { name: new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + name)), data: bytes.subarray(data, data + size) };
    room -= size;
    if (room < 0 || entry.data.length !== size || crc32(entry.data) !== view.getUint32(at + 16, true)) {
      throw new Error(`project: ${entry.name} is damaged; expected a zip that this page has saved`);
    }
    found.push(entry);
    at += 46 + name + extra;
  }
  return found;
}

/** @param {number} value @returns {[number, number]} */
function two(value) {
  return [2, value];
}

/** @param {number} value @returns {[number, number]} */
function four(value) {
  return [4, value];
}

/** @param {number[][]} listed pairs of bytes and value */
function fields(listed) {
  const made = new Uint8Array(listed.reduce((sum, [size]) => sum + size, 0)), view = new DataView(made.buffer);
  let at = 0;
  for (const [size, value] of listed) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += size;
  }
  return made;
}

/** @param {Uint8Array[]} parts @returns {Uint8Array<ArrayBuffer>} */
export function joined(parts) {
  const made = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    made.set(part, at);
    at += part.length;
  }
  return made;
}

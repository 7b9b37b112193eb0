// What a PNG says of its making: the text chunks, read and written. No DOM.

/** @param {ArrayBuffer} buffer @returns {Record<string, string>} */
export function texts(buffer) {
  const view = new DataView(buffer), bytes = new Uint8Array(buffer);
  /** @type {Record<string, string>} */
  const found = {};
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return found;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at), kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
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

/** @param {Uint8Array} bytes */
function latin(bytes) {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}

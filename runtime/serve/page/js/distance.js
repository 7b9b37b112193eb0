// What needs distances: the edge of a mask made softer, the mask larger or smaller. No DOM.

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */

/**
 * Squared distances, in pixels, to the nearest pixel that `is` (Felzenszwalb and Huttenlocher, 2012), exact.
 * @param {Bitmap} bitmap @param {(value: number) => boolean} is @returns {Float64Array}
 */
export function distances(bitmap, is) {
  const { width, height, data } = bitmap, far = 1e12;
  const found = new Float64Array(width * height);
  for (let i = 0; i < found.length; i++) found[i] = is(data[i]) ? 0 : far;
  const most = Math.max(width, height);
  const line = new Float64Array(most), sites = new Int32Array(most), bounds = new Float64Array(most + 1);
  const pass = (/** @type {number} */ start, /** @type {number} */ step, /** @type {number} */ n) => {
    for (let i = 0; i < n; i++) line[i] = found[start + i * step];
    let k = 0;
    sites[0] = 0;
    bounds[0] = -Infinity;
    bounds[1] = Infinity;
    for (let q = 1; q < n; q++) {
      let s = 0;
      do {
        const v = sites[k];
        s = (line[q] + q * q - (line[v] + v * v)) / (2 * (q - v));
      } while (s <= bounds[k] && --k >= 0);
      k++;
      sites[k] = q;
      bounds[k] = s;
      bounds[k + 1] = Infinity;
    }
    k = 0;
    for (let q = 0; q < n; q++) {
      while (bounds[k + 1] < q) k++;
      const d = q - sites[k];
      found[start + q * step] = d * d + line[sites[k]];
    }
  };
  for (let x = 0; x < width; x++) pass(x, width, height);
  for (let y = 0; y < height; y++) pass(y * width, 1, width);
  return found;
}

/**
 * Soften the edge over `radius` pixels, inwards only: as `runtime.control.masks.feather`.
 * @param {Bitmap} bitmap @param {number} radius
 */
export function feather(bitmap, radius) {
  const { data } = bitmap;
  if (radius <= 0 || data.every((value) => value > 0)) return;
  const squared = distances(bitmap, (value) => value === 0);
  for (let i = 0; i < data.length; i++) {
    data[i] *= Math.min(1, Math.max(0, (Math.sqrt(squared[i]) - 0.5) / radius));
  }
}

/**
 * Grow what is white by some pixels, or shrink it where they are negative.
 * @param {Bitmap} bitmap @param {number} pixels
 */
export function grow(bitmap, pixels) {
  const { data } = bitmap;
  const squared = distances(bitmap, pixels > 0 ? (value) => value > 127 : (value) => value <= 127);
  for (let i = 0; i < data.length; i++) {
    const near = squared[i] <= pixels * pixels;
    if (pixels > 0 && near) data[i] = 255;
    if (pixels < 0 && near) data[i] = 0;
  }
}

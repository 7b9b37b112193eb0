// Masks and drawn conditions: 8-bit pictures of one channel, and what a hand does to them. No DOM: node tests it.

/** @typedef {{width: number, height: number, data: Uint8ClampedArray}} Bitmap */
/** @typedef {{x: number, y: number, width: number, height: number}} Rect  pixels; may be empty */
/** @typedef {{x: number, y: number}} Point  pixels from the top left corner */

/** @param {number} width @param {number} height @returns {Bitmap} all black */
export function create(width, height) {
  return { width, height, data: new Uint8ClampedArray(width * height) };
}

/** @param {Bitmap} bitmap @returns {Rect} */
export function whole(bitmap) {
  return { x: 0, y: 0, width: bitmap.width, height: bitmap.height };
}

/** @param {Rect} a @param {Rect} b @returns {Rect} the smallest that holds both */
export function join(a, b) {
  if (a.width <= 0 || a.height <= 0) return b;
  if (b.width <= 0 || b.height <= 0) return a;
  const x = Math.min(a.x, b.x), y = Math.min(a.y, b.y);
  return {
    x, y,
    width: Math.max(a.x + a.width, b.x + b.width) - x,
    height: Math.max(a.y + a.height, b.y + b.height) - y,
  };
}

/** @param {Bitmap} bitmap @param {number} left @param {number} top @param {number} right @param {number} bottom @returns {Rect} inside the bitmap */
export function clipped(bitmap, left, top, right, bottom) {
  const x = Math.max(0, Math.floor(left)), y = Math.max(0, Math.floor(top));
  const x1 = Math.min(bitmap.width, Math.ceil(right)), y1 = Math.min(bitmap.height, Math.ceil(bottom));
  return { x, y, width: Math.max(0, x1 - x), height: Math.max(0, y1 - y) };
}

/**
 * The pixels that a round brush touches on its way from one point to another.
 * @param {Bitmap} bitmap @param {Point} a @param {Point} b @param {number} radius
 */
export function reach(bitmap, a, b, radius) {
  const r = radius + 1;
  return clipped(
    bitmap, Math.min(a.x, b.x) - r, Math.min(a.y, b.y) - r, Math.max(a.x, b.x) + r, Math.max(a.y, b.y) + r);
}

/**
 * Draw a segment of a stroke: round, with an edge one pixel soft. A brush raises pixels to `value`, an eraser lowers them
 * to 0; radii at both ends may differ, as pressure does.
 * @param {Bitmap} bitmap @param {Point} a @param {Point} b @param {number} ra @param {number} rb
 * @param {boolean} erase @param {number} [value]
 * @returns {Rect} what may have changed
 */
export function segment(bitmap, a, b, ra, rb, erase, value = 255) {
  const rect = reach(bitmap, a, b, Math.max(ra, rb));
  const dx = b.x - a.x, dy = b.y - a.y, length = dx * dx + dy * dy;
  const { data, width } = bitmap;
  for (let y = rect.y; y < rect.y + rect.height; y++) {
    const py = y + 0.5 - a.y;
    for (let x = rect.x; x < rect.x + rect.width; x++) {
      const px = x + 0.5 - a.x;
      const t = length === 0 ? 0 : Math.min(1, Math.max(0, (px * dx + py * dy) / length));
      const ex = px - t * dx, ey = py - t * dy;
      const inside = ra + (rb - ra) * t + 0.5 - Math.sqrt(ex * ex + ey * ey);
      if (inside <= 0) continue;
      const cover = Math.min(1, inside), at = y * width + x;
      if (erase) data[at] = Math.min(data[at], 255 * (1 - cover));
      else data[at] = Math.max(data[at], value * cover);
    }
  }
  return rect;
}

/** @param {Bitmap} bitmap @param {Point} a @param {Point} b @param {number} value @returns {Rect} */
export function rectangle(bitmap, a, b, value) {
  const rect = clipped(
    bitmap, Math.round(Math.min(a.x, b.x)), Math.round(Math.min(a.y, b.y)),
    Math.round(Math.max(a.x, b.x)), Math.round(Math.max(a.y, b.y)));
  for (let y = rect.y; y < rect.y + rect.height; y++) {
    bitmap.data.fill(value, y * bitmap.width + rect.x, y * bitmap.width + rect.x + rect.width);
  }
  return rect;
}

/**
 * Fill what a closed line runs around (even-odd).
 * @param {Bitmap} bitmap @param {Point[]} points @param {number} value @returns {Rect}
 */
export function lasso(bitmap, points, value) {
  if (points.length < 3) return { x: 0, y: 0, width: 0, height: 0 };
  const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
  const rect = clipped(bitmap, Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys));
  for (let y = rect.y; y < rect.y + rect.height; y++) {
    /** @type {number[]} */
    const crossings = [];
    points.forEach((p, i) => {
      const q = points[(i + 1) % points.length];
      if (p.y <= y + 0.5 !== q.y <= y + 0.5) {
        crossings.push(p.x + ((y + 0.5 - p.y) / (q.y - p.y)) * (q.x - p.x));
      }
    });
    crossings.sort((m, n) => m - n);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const from = Math.max(0, Math.round(crossings[i])), to = Math.min(bitmap.width, Math.round(crossings[i + 1]));
      if (to > from) bitmap.data.fill(value, y * bitmap.width + from, y * bitmap.width + to);
    }
  }
  return rect;
}

/**
 * Fill the connected pixels that are on the same side of mid-grey as the one at a point.
 * @param {Bitmap} bitmap @param {Point} at @param {number} value @returns {Rect}
 */
export function flood(bitmap, at, value) {
  const { width, height, data } = bitmap;
  const x0 = Math.floor(at.x), y0 = Math.floor(at.y);
  let rect = { x: 0, y: 0, width: 0, height: 0 };
  if (x0 < 0 || y0 < 0 || x0 >= width || y0 >= height) return rect;
  const light = data[y0 * width + x0] > 127;
  if (light === value > 127) return rect;
  const same = (/** @type {number} */ i) => data[i] > 127 === light;
  const stack = [y0 * width + x0];
  while (stack.length) {
    const start = /** @type {number} */ (stack.pop());
    if (!same(start)) continue;
    const y = Math.floor(start / width), row = y * width;
    let left = start, right = start;
    while (left > row && same(left - 1)) left--;
    while (right + 1 < row + width && same(right + 1)) right++;
    data.fill(value, left, right + 1);
    rect = join(rect, { x: left - row, y, width: right - left + 1, height: 1 });
    for (const other of [row - width, row + width]) {
      if (other < 0 || other >= width * height) continue;
      for (let x = left - row; x <= right - row; x++) {
        if (same(other + x) && (x === left - row || !same(other + x - 1))) stack.push(other + x);
      }
    }
  }
  return rect;
}

/** @param {Bitmap} bitmap */
export function invert(bitmap) {
  const { data } = bitmap;
  for (let i = 0; i < data.length; i++) data[i] = 255 - data[i];
}

/** @param {Bitmap} bitmap */
export function isEmpty(bitmap) {
  return bitmap.data.every((value) => value === 0);
}

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

/**
 * The same picture at another size, by its nearest pixels.
 * @param {Bitmap} bitmap @param {number} width @param {number} height @returns {Bitmap}
 */
export function resized(bitmap, width, height) {
  const made = create(width, height);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * bitmap.height) / height) * bitmap.width;
    for (let x = 0; x < width; x++) {
      made.data[y * width + x] = bitmap.data[row + Math.floor(((x + 0.5) * bitmap.width) / width)];
    }
  }
  return made;
}

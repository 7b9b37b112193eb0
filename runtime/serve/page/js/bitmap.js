// Masks and drawn conditions: 8-bit pictures, and what a hand does to them. No DOM: node tests it.

/**
 * @typedef {{width: number, height: number, channels: number, data: Uint8ClampedArray}} Bitmap
 *   1 channel: a mask; 3: a condition, in colour; `data` by rows, a pixel's channels together
 */
/** @typedef {number[]} Paint  a value for each channel, 0 to 255 */
/** @typedef {{x: number, y: number, width: number, height: number}} Rect  pixels; may be empty */
/** @typedef {{x: number, y: number}} Point  pixels from the top left corner */

/** @param {number} width @param {number} height @param {number} [channels] @returns {Bitmap} all black */
export function create(width, height, channels = 1) {
  return { width, height, channels, data: new Uint8ClampedArray(width * height * channels) };
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
 * Draw a segment of a stroke: round, with an edge one pixel soft. Radii at both ends may differ, as pressure does.
 * What goes over the same edge twice leaves it as soft, in black and in white.
 * @param {Bitmap} bitmap @param {Point} a @param {Point} b @param {number} ra @param {number} rb @param {Paint} paint
 * @returns {Rect} what may have changed
 */
export function segment(bitmap, a, b, ra, rb, paint) {
  const rect = reach(bitmap, a, b, Math.max(ra, rb));
  const dx = b.x - a.x, dy = b.y - a.y, length = dx * dx + dy * dy;
  const { data, width, channels } = bitmap;
  for (let y = rect.y; y < rect.y + rect.height; y++) {
    const py = y + 0.5 - a.y;
    for (let x = rect.x; x < rect.x + rect.width; x++) {
      const px = x + 0.5 - a.x;
      const t = length === 0 ? 0 : Math.min(1, Math.max(0, (px * dx + py * dy) / length));
      const ex = px - t * dx, ey = py - t * dy;
      const inside = ra + (rb - ra) * t + 0.5 - Math.sqrt(ex * ex + ey * ey);
      if (inside <= 0) continue;
      const cover = Math.min(1, inside), first = (y * width + x) * channels;
      for (let c = 0; c < channels; c++) data[first + c] = covered(data[first + c], paint[c], cover);
    }
  }
  return rect;
}

/** @param {number} old @param {number} value @param {number} cover from 0 to 1 */
function covered(old, value, cover) {
  if (value === 255) return Math.max(old, 255 * cover);
  if (value === 0) return Math.min(old, 255 * (1 - cover));
  return old + (value - old) * cover;
}

/** Paint whole pixels of a row. @param {Bitmap} bitmap @param {number} from @param {number} to pixels, counted through @param {Paint} paint */
function run(bitmap, from, to, paint) {
  const { data, channels } = bitmap;
  if (channels === 1) data.fill(paint[0], from, to);
  else for (let i = from; i < to; i++) data.set(paint, i * channels);
}

/** @param {Bitmap} bitmap @param {Point} a @param {Point} b @param {Paint} paint @returns {Rect} */
export function rectangle(bitmap, a, b, paint) {
  const rect = clipped(
    bitmap, Math.round(Math.min(a.x, b.x)), Math.round(Math.min(a.y, b.y)),
    Math.round(Math.max(a.x, b.x)), Math.round(Math.max(a.y, b.y)));
  for (let y = rect.y; y < rect.y + rect.height; y++) {
    run(bitmap, y * bitmap.width + rect.x, y * bitmap.width + rect.x + rect.width, paint);
  }
  return rect;
}

/**
 * Fill what a closed line runs around (even-odd).
 * @param {Bitmap} bitmap @param {Point[]} points @param {Paint} paint @returns {Rect}
 */
export function lasso(bitmap, points, paint) {
  if (points.length < 3) return { x: 0, y: 0, width: 0, height: 0 };
  let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
  for (const { x, y } of points) {
    [left, right] = [Math.min(left, x), Math.max(right, x)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
  }
  const rect = clipped(bitmap, left, top, right, bottom);
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
      if (to > from) run(bitmap, y * bitmap.width + from, y * bitmap.width + to, paint);
    }
  }
  return rect;
}

/**
 * Draw a line through points, back to the first, by a round brush.
 * @param {Bitmap} bitmap @param {Point[]} points @param {number} radius @param {Paint} paint @returns {Rect}
 */
export function outline(bitmap, points, radius, paint) {
  return points.map((p, i) => segment(bitmap, p, points[(i + 1) % points.length], radius, radius, paint)).reduce(join);
}

const NEAR = 96; // values that are taken for one colour when a condition is filled

/** @param {Bitmap} bitmap @param {number} at a pixel @returns {(pixel: number) => boolean} whether another is like it */
function like(bitmap, at) {
  const { data, channels } = bitmap;
  if (channels === 1) {
    const light = data[at] > 127;
    return (i) => data[i] > 127 === light;
  }
  const own = data.slice(at * channels, (at + 1) * channels);
  return (i) => own.every((value, c) => Math.abs(data[i * channels + c] - value) <= NEAR);
}

/**
 * Fill the connected pixels that are like the one at a point: in a mask those on the same side of mid-grey.
 * @param {Bitmap} bitmap @param {Point} at @param {Paint} paint @returns {Rect}
 */
export function flood(bitmap, at, paint) {
  const { width, height } = bitmap;
  const x0 = Math.floor(at.x), y0 = Math.floor(at.y);
  let rect = { x: 0, y: 0, width: 0, height: 0 };
  if (x0 < 0 || y0 < 0 || x0 >= width || y0 >= height) return rect;
  const alike = like(bitmap, y0 * width + x0), filled = new Uint8Array(width * height);
  const same = (/** @type {number} */ i) => !filled[i] && alike(i);
  const stack = [y0 * width + x0];
  while (stack.length) {
    const start = /** @type {number} */ (stack.pop());
    if (!same(start)) continue;
    const y = Math.floor(start / width), row = y * width;
    let left = start, right = start;
    while (left > row && same(left - 1)) left--;
    while (right + 1 < row + width && same(right + 1)) right++;
    filled.fill(1, left, right + 1);
    run(bitmap, left, right + 1, paint);
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
  const { data } = bitmap, fours = data.length >> 2;
  return new Uint32Array(data.buffer, data.byteOffset, fours).every((four) => four === 0)
    && data.subarray(4 * fours).every((value) => value === 0);
}

/**
 * The same picture at another size, by its nearest pixels.
 * @param {Bitmap} bitmap @param {number} width @param {number} height @returns {Bitmap}
 */
export function resized(bitmap, width, height) {
  const { channels } = bitmap, made = create(width, height, channels);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * bitmap.height) / height) * bitmap.width;
    for (let x = 0; x < width; x++) {
      const from = (row + Math.floor(((x + 0.5) * bitmap.width) / width)) * channels, to = (y * width + x) * channels;
      for (let c = 0; c < channels; c++) made.data[to + c] = bitmap.data[from + c];
    }
  }
  return made;
}

// Undo and redo: steps that know both ways, kept as tiles of what they changed, and bounded in bytes. No DOM.

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./bitmap.js").Rect} Rect */
/** @typedef {{label: string, bytes: number, undo: () => void, redo: () => void}} Step */
/** @typedef {Map<number, Uint8ClampedArray | number>} Tiles  by their number; a number where all pixels are the same */

export const TILE = 64;
export const LEAST = 64; // steps that are kept, however large
export const MOST = 200; // steps, however small
export const MOST_BYTES = 256 * 2 ** 20;

export class History {
  constructor() {
    /** @type {Step[]} */ this.done = [];
    /** @type {Step[]} */ this.undone = [];
  }

  /** The newest step. @returns {Step | null} */
  get last() {
    return this.done[this.done.length - 1] ?? null;
  }

  /** @param {Step} step */
  add(step) {
    this.done.push(step);
    this.undone = [];
    let bytes = this.done.reduce((sum, each) => sum + each.bytes, 0);
    while (this.done.length > LEAST && (bytes > MOST_BYTES || this.done.length > MOST)) {
      bytes -= /** @type {Step} */ (this.done.shift()).bytes;
    }
  }

  /** @returns {string | null} what was undone */
  undo() {
    const step = this.done.pop();
    if (!step) return null;
    step.undo();
    this.undone.push(step);
    return step.label;
  }

  /** @returns {string | null} what was done again */
  redo() {
    const step = this.undone.pop();
    if (!step) return null;
    step.redo();
    this.done.push(step);
    return step.label;
  }
}

/** Notes the tiles of a bitmap before they change, and makes the step of it. */
export class Recording {
  /** @param {Bitmap} bitmap */
  constructor(bitmap) {
    this.bitmap = bitmap;
    /** @type {Tiles} */ this.before = new Map();
    this.columns = Math.ceil(bitmap.width / TILE);
  }

  /** Keep what is in a part of the bitmap, before it changes. @param {Rect} rect */
  keep(rect) {
    if (rect.width <= 0 || rect.height <= 0) return;
    const last = { x: rect.x + rect.width - 1, y: rect.y + rect.height - 1 };
    for (let row = Math.floor(rect.y / TILE); row <= Math.floor(last.y / TILE); row++) {
      for (let column = Math.floor(rect.x / TILE); column <= Math.floor(last.x / TILE); column++) {
        const number = row * this.columns + column;
        if (!this.before.has(number)) this.before.set(number, this.read(number));
      }
    }
  }

  /** @param {number} number @returns {Rect} */
  place(number) {
    const x = (number % this.columns) * TILE, y = Math.floor(number / this.columns) * TILE;
    return {
      x, y,
      width: Math.min(TILE, this.bitmap.width - x),
      height: Math.min(TILE, this.bitmap.height - y),
    };
  }

  /** @param {number} number @returns {Uint8ClampedArray | number} */
  read(number) {
    const { x, y, width, height } = this.place(number), { channels } = this.bitmap, line = width * channels;
    const tile = new Uint8ClampedArray(line * height);
    for (let row = 0; row < height; row++) {
      const start = ((y + row) * this.bitmap.width + x) * channels;
      tile.set(this.bitmap.data.subarray(start, start + line), row * line);
    }
    return tile.every((value) => value === tile[0]) ? tile[0] : tile;
  }

  /** @param {number} number @param {Uint8ClampedArray | number} tile */
  write(number, tile) {
    const { x, y, width, height } = this.place(number), { channels, data } = this.bitmap, line = width * channels;
    for (let row = 0; row < height; row++) {
      const start = ((y + row) * this.bitmap.width + x) * channels;
      if (typeof tile === "number") data.fill(tile, start, start + line);
      else data.set(tile.subarray(row * line, (row + 1) * line), start);
    }
  }

  /**
   * The step of all that has changed since; null where nothing has.
   * @param {string} label @param {(rect: Rect) => void} shown called with a part that was put back
   * @returns {Step | null}
   */
  step(label, shown) {
    /** @type {Tiles} */
    const after = new Map();
    for (const [number, tile] of [...this.before]) {
      const now = this.read(number);
      if (same(tile, now)) this.before.delete(number);
      else after.set(number, now);
    }
    if (!after.size) return null;
    const put = (/** @type {Tiles} */ tiles) => {
      for (const [number, tile] of tiles) {
        this.write(number, tile);
        shown(this.place(number));
      }
    };
    const bytes = [...this.before.values(), ...after.values()].reduce(
      (/** @type {number} */ sum, tile) => sum + (typeof tile === "number" ? 8 : tile.length), 0);
    return { label, bytes, undo: () => put(this.before), redo: () => put(after) };
  }
}

/** @param {Uint8ClampedArray | number} a @param {Uint8ClampedArray | number} b */
function same(a, b) {
  if (typeof a === "number" || typeof b === "number") return a === b;
  return a.every((value, i) => value === b[i]);
}

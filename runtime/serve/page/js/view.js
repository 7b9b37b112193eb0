// Where the picture lies on the screen: zoom and pan, as numbers. No DOM.

/** @typedef {import("./bitmap.js").Point} Point */

export const SMALLEST = 0.05, LARGEST = 64;

export class View {
  constructor() {
    this.scale = 1; // screen pixels of a picture's pixel
    this.x = 0; // of the picture's corner on the screen
    this.y = 0;
    this.width = this.height = 0; // of the picture it was fitted to
    this.fitted = true; // nobody has moved it since it was fitted
  }

  /** @param {Point} at on the screen @returns {Point} in the picture */
  toPicture(at) {
    return { x: (at.x - this.x) / this.scale, y: (at.y - this.y) / this.scale };
  }

  /** Zoom about a point of the screen, which keeps its place. @param {number} factor @param {Point} at */
  zoom(factor, at) {
    const scale = Math.min(LARGEST, Math.max(SMALLEST, this.scale * factor)), by = scale / this.scale;
    this.x = at.x - (at.x - this.x) * by;
    this.y = at.y - (at.y - this.y) * by;
    this.scale = scale;
    this.fitted = false;
  }

  /** @param {number} dx @param {number} dy */
  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
  }

  /** Show the whole picture. @param {number} width @param {number} height @param {number} w of the screen @param {number} h */
  fit(width, height, w, h) {
    Object.assign(this, { width, height });
    this.scale = Math.min(LARGEST, Math.max(SMALLEST, Math.min(w / width, h / height) * 0.94));
    this.x = (w - width * this.scale) / 2;
    this.y = (h - height * this.scale) / 2;
    this.fitted = true;
  }
}

// What is seen: the picture, the regions' masks over it in their colours and patterns, and the ink of the one at hand.

import { join, whole } from "./bitmap.js";
import { COLOURS, active } from "./regions.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./bitmap.js").Rect} Rect */
/** @typedef {import("./regions.js").Region} Region */

// The hatching of each colour's region, so that regions differ without their colours: strokes in a cell of CELL pixels
const CELL = 12;
/** @type {[number, number, number, number][][]} */
const HATCHES = [
  [[-3, 3, 3, -3], [-3, 15, 15, -3], [9, 15, 15, 9]], [[-3, 9, 3, 15], [-3, -3, 15, 15], [9, -3, 15, 3]], [[6, 0, 6, 12]], [[0, 6, 12, 6]],
  [[3, 6, 9, 6], [6, 3, 6, 9]], [[6, 0, 6, 12], [0, 6, 12, 6]], [[-3, -3, 15, 15], [-3, 15, 15, -3]], [[6, 6, 8, 6]],
];
const AROUND = 3; // pixels of the page around what is painted again: half a line's width, and its soft edge
const FLAT = 0.4, HATCHED = 0.9; // opacities of a mask's ground and of its hatching, before that of all masks

/** @param {number} colour @param {number} dots of the screen for each pixel of the page @returns {OffscreenCanvas} a cell of its hatching */
function cell(colour, dots) {
  const side = Math.max(1, Math.round(CELL * dots)), canvas = new OffscreenCanvas(side, side);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(side / CELL, side / CELL);
  context.strokeStyle = COLOURS[colour];
  context.lineWidth = 2;
  for (const [x0, y0, x1, y1] of HATCHES[colour]) {
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  }
  return canvas;
}

/** @param {number} colour @param {number} side pixels @returns {HTMLCanvasElement} a colour and its hatching */
export function swatch(colour, side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.globalAlpha = FLAT;
  context.fillStyle = COLOURS[colour];
  context.fillRect(0, 0, side, side);
  context.globalAlpha = 1;
  context.fillStyle = /** @type {CanvasPattern} */ (context.createPattern(cell(colour, 1), "repeat"));
  context.fillRect(0, 0, side, side);
  return canvas;
}

/** A canvas that shows a bitmap, painted again only where that has changed: a mask in its colour, a condition's light. */
export class Layer {
  /** @param {Bitmap} bitmap @param {number} colour of a mask, one of COLOURS */
  constructor(bitmap, colour) {
    this.bitmap = bitmap;
    this.canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    this.context = /** @type {OffscreenCanvasRenderingContext2D} */ (this.canvas.getContext("2d"));
    this.rgb = [1, 3, 5].reduce((sum, at, i) => sum | (parseInt(COLOURS[colour].slice(at, at + 2), 16) << (8 * i)), 0);
    this.update(whole(bitmap));
  }

  /** @param {Rect} rect */
  update(rect) {
    if (rect.width <= 0 || rect.height <= 0) return;
    const image = new ImageData(rect.width, rect.height), words = new Uint32Array(image.data.buffer);
    const fill = this.bitmap.channels === 1 ? this.mask : this.light;
    fill.call(this, rect, words);
    this.context.putImageData(image, rect.x, rect.y);
  }

  /** @param {Rect} rect @param {Uint32Array} words RGBA, little endian */
  mask(rect, words) {
    const { data, width } = this.bitmap;
    for (let y = 0, at = 0; y < rect.height; y++) {
      for (let x = 0; x < rect.width; x++, at++) {
        const value = data[(rect.y + y) * width + rect.x + x];
        if (value) words[at] = this.rgb | (value << 24);
      }
    }
  }

  /** @param {Rect} rect @param {Uint32Array} words RGBA, little endian */
  light(rect, words) {
    const { data, width } = this.bitmap;
    for (let y = 0, at = 0; y < rect.height; y++) {
      for (let x = 0; x < rect.width; x++, at++) {
        const first = 3 * ((rect.y + y) * width + rect.x + x), [r, g, b] = [data[first], data[first + 1], data[first + 2]];
        const most = Math.max(r, g, b);
        if (most) words[at] = (most << 24) | (((255 * b) / most) << 16) | (((255 * g) / most) << 8) | ((255 * r) / most);
      }
    }
  }
}

export class Scene {
  /** @param {HTMLCanvasElement} canvas @param {import("./view.js").View} view */
  constructor(canvas, view) {
    this.canvas = canvas;
    this.view = view;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    /** @type {Map<Bitmap, Layer>} */ this.layers = new Map();
    this.hatching = /** @type {OffscreenCanvasRenderingContext2D} */ (new OffscreenCanvas(1, 1).getContext("2d"));
    /** @type {Map<string, CanvasPattern>} */ this.hatches = new Map();
    this.part = { x: 0, y: 0, width: 1, height: 1 }; // what is painted at the moment, pixels of the screen
    /** @type {ImageBitmap | OffscreenCanvas | null} */ this.picture = null;
    /** @type {ImageBitmap | OffscreenCanvas | null} */ this.before = null; // for comparison
    this.split = 1; // the share of the width that shows the picture, the rest `before`
    this.opacity = 0.5; // of the masks over the picture
    /** @type {Rect | "all" | null} */ this.stale = null; // what the next frame paints, pixels of the picture
    this.painted = () => {}; // called after each frame
    /** @type {() => {regions: Region[], chosen: Region | null, ink: boolean, width: number, height: number}} */
    this.state = () => ({ regions: [], chosen: null, ink: false, width: 1, height: 1 });
    /** @type {{x: number, y: number, radius: number} | null} */ this.brush = null;
    /** @type {import("./bitmap.js").Point[]} */ this.outline = [];
  }

  /** @param {Bitmap} bitmap @param {Rect} rect */
  changed(bitmap, rect) {
    this.layers.get(bitmap)?.update(rect);
    this.draw(rect);
  }

  /** Paint with the next frame: all, or what has changed, in the picture's pixels. @param {Rect} [rect] */
  draw(rect) {
    const waits = this.stale !== null;
    this.stale = !rect || this.stale === "all" ? "all" : this.stale ? join(this.stale, rect) : rect;
    if (waits) return;
    requestAnimationFrame(() => {
      const stale = this.stale ?? "all";
      this.stale = null; // first: what goes wrong in one frame is not to hold up the next
      this.paint(stale);
      this.painted();
    });
  }

  /** Have the brush's ring elsewhere. @param {{x: number, y: number, radius: number} | null} brush */
  point(brush) {
    for (const each of [this.brush, brush]) {
      if (each) this.draw({ x: each.x - each.radius, y: each.y - each.radius, width: 2 * each.radius, height: 2 * each.radius });
    }
    this.brush = brush;
  }

  /** @param {Bitmap} bitmap @param {number} colour */
  layer(bitmap, colour) {
    let found = this.layers.get(bitmap);
    if (!found) this.layers.set(bitmap, (found = new Layer(bitmap, colour)));
    return found.canvas;
  }

  /** @param {Rect | "all"} [stale] where something has changed, in the picture's pixels: a whole screen at each brush event costs most of a core */
  paint(stale = "all") {
    if (!this.canvas.width || !this.canvas.height || !this.canvas.clientWidth) return;
    const { regions, width, height } = this.state(), { context } = this;
    const used = new Set(regions.flatMap((each) => [each.mask, each.ink]));
    for (const bitmap of this.layers.keys()) if (!used.has(bitmap)) this.layers.delete(bitmap);
    const dots = this.canvas.width / this.canvas.clientWidth;
    this.part = stale === "all" ? { x: 0, y: 0, width: this.canvas.width, height: this.canvas.height } : this.onScreen(stale, dots);
    this.within(context, () => this.compose(width, height, dots));
  }

  /** The screen's pixels of a part of the picture, with the width of a line around it. @param {Rect} rect @param {number} dots @returns {Rect} */
  onScreen(rect, dots) {
    const { scale, x, y } = this.view;
    const [left, top] = [rect.x * scale + x, rect.y * scale + y].map((edge) => Math.floor((edge - AROUND) * dots));
    const right = Math.ceil(((rect.x + rect.width) * scale + x + AROUND) * dots);
    const bottom = Math.ceil(((rect.y + rect.height) * scale + y + AROUND) * dots);
    return { x: left, y: top, width: right - left, height: bottom - top };
  }

  /** Draw in the part that is painted, and nowhere else. @param {CanvasRenderingContext2D | OffscreenCanvasRenderingContext2D} context @param {() => void} draw */
  within(context, draw) {
    const { x, y, width, height } = this.part;
    context.save();
    context.resetTransform();
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip();
    draw();
    context.restore();
  }

  /** @param {number} width @param {number} height of the picture @param {number} dots */
  compose(width, height, dots) {
    const { context, view } = this;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.setTransform(view.scale * dots, 0, 0, view.scale * dots, view.x * dots, view.y * dots);
    context.imageSmoothingEnabled = view.scale < 8;
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#808080";
    context.fillRect(0, 0, width, height);
    if (this.picture) this.whole(this.picture, width, height);
    if (this.before && this.split < 1) this.compare(width, height);
    context.imageSmoothingEnabled = false;
    if (this.opacity > 0) this.over(width, height, dots);
    context.globalAlpha = 1;
    this.marks();
  }

  /** A picture in its own shape. @param {ImageBitmap | OffscreenCanvas} picture @param {number} width @param {number} height */
  whole(picture, width, height) {
    const scale = Math.min(width / picture.width, height / picture.height), [w, h] = [picture.width * scale, picture.height * scale];
    this.context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
  }

  /** The masks, and the condition that is drawn. @param {number} width @param {number} height @param {number} dots */
  over(width, height, dots) {
    const { regions, chosen, ink } = this.state(), { context } = this, drawn = active(regions);
    for (const each of drawn) this.mask(this.layer(each.mask, each.colour), each.colour, dots);
    if (!chosen) return;
    context.globalAlpha = this.opacity;
    if (!drawn.includes(chosen)) context.drawImage(this.layer(chosen.mask, chosen.colour), 0, 0); // what is painted is seen
    if (!ink) return;
    context.globalAlpha = 0.8 * this.opacity;
    context.fillStyle = "#000"; // a condition is light on dark
    context.fillRect(0, 0, width, height);
    context.globalAlpha = 1;
    context.drawImage(this.layer(chosen.ink, 0), 0, 0);
  }

  /** A mask in its colour, hatched by the screen's pixels. @param {OffscreenCanvas} layer @param {number} colour @param {number} dots */
  mask(layer, colour, dots) {
    const { context, hatching, canvas } = this, over = hatching.canvas, at = context.getTransform();
    context.globalAlpha = this.opacity * FLAT;
    context.drawImage(layer, 0, 0);
    if (over.width !== canvas.width || over.height !== canvas.height) Object.assign(over, { width: canvas.width, height: canvas.height });
    const key = `${colour} ${dots}`;
    if (this.hatches.size > 100) this.hatches.clear(); // of window sizes that were
    if (!this.hatches.has(key)) this.hatches.set(key, /** @type {CanvasPattern} */ (hatching.createPattern(cell(colour, dots), "repeat")));
    this.within(hatching, () => {
      hatching.setTransform(at);
      hatching.globalCompositeOperation = "copy";
      hatching.imageSmoothingEnabled = false;
      hatching.drawImage(layer, 0, 0);
      hatching.resetTransform();
      hatching.globalCompositeOperation = "source-in";
      hatching.fillStyle = /** @type {CanvasPattern} */ (this.hatches.get(key));
      hatching.fillRect(0, 0, over.width, over.height);
    });
    context.globalAlpha = this.opacity * HATCHED;
    context.resetTransform();
    context.drawImage(over, 0, 0);
    context.setTransform(at);
  }

  /** @param {number} width @param {number} height */
  compare(width, height) {
    const at = width * this.split, { context } = this;
    context.save();
    context.beginPath();
    context.rect(at, 0, width - at, height);
    context.clip();
    if (this.before) this.whole(this.before, width, height);
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

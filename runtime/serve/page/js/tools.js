// Hands on the canvas: mouse, pen and fingers, as strokes of the tool at hand; and the view's moves.

import { flood, lasso, outline, reach, rectangle, segment, whole } from "./bitmap.js";
import { Recording } from "./history.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./bitmap.js").Point} Point */
/** @typedef {"brush" | "eraser" | "rectangle" | "lasso" | "fill"} Tool */

export class Hands {
  /**
   * @param {import("./canvas.js").Scene} scene @param {import("./view.js").View} view
   * @param {import("./painting.js").Painting} painting @param {{resized: () => void, wanted: () => void, split: (share: number) => void}} page
   *   resized: the brush is of another size; wanted: a region to paint on; split: the divider of what is compared is moved
   */
  constructor(scene, view, painting, page) {
    this.scene = scene;
    this.view = view;
    this.painting = painting;
    this.page = page;
    /** @type {Tool} */ this.tool = "brush";
    this.sizes = { mask: 16, ink: 2 }; // the brush's diameter, pixels of the picture: a condition is thin lines
    this.colour = [255, 255, 255]; // of a condition's ink
    /** @type {Recording | null} */ this.recording = null;
    /** @type {import("./history.js").Step | null} */ this.added = null; // the region that was made for the stroke at hand
    /** @type {Point[]} */ this.path = [];
    /** @type {Point | null} */ this.lastEnd = null; // of the last stroke, for shift-click
    this.radius = 8;
    this.erases = false;
    /** @type {number | null} */ this.pointer = null; // the one that draws
    this.drawing = ""; // what kind of pointer it is
    this.pen = -Infinity; // when a pen was last seen, ms: fingers near it are a hand that rests
    /** @type {Map<number, Point>} */ this.fingers = new Map();
    /** @type {"pan" | "size" | "split" | null} */ this.mode = null;
    this.space = false;
    const { canvas } = scene;
    for (const [name, handle] of /** @type {[string, (event: any) => void][]} */ ([
      ["pointerdown", this.down], ["pointermove", this.move], ["pointerup", this.up], ["pointercancel", this.up], ["lostpointercapture", this.up],
      ["pointerleave", this.leave], ["wheel", this.wheel], ["contextmenu", (e) => e.preventDefault()],
    ])) canvas.addEventListener(name, handle.bind(this), { passive: false });
  }

  get size() {
    return this.sizes[this.painting.ink ? "ink" : "mask"];
  }

  /** @param {MouseEvent} event @returns {Point} on the canvas */
  onScreen(event) {
    const box = this.scene.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** @param {PointerEvent} event */
  down(event) {
    const at = this.onScreen(event);
    if (event.pointerType === "pen") {
      this.pen = performance.now();
      if (this.fingers.size) this.abandon(); // what the palm began before the pen came down
      this.fingers.clear();
    }
    if (event.pointerType === "touch") {
      if (this.drawing === "pen" || performance.now() - this.pen < 1000) return; // the palm of a hand that holds a pen
      this.fingers.set(event.pointerId, at);
      if (this.fingers.size === 2) return this.abandon(); // a pinch has begun as a stroke
    }
    if (this.pointer !== null || this.fingers.size > 1) return;
    this.scene.canvas.setPointerCapture(event.pointerId); // a stroke that leaves the canvas goes on
    this.pointer = event.pointerId;
    this.drawing = event.pointerType;
    this.mode = event.button === 1 || this.space ? "pan" : event.altKey ? "size" : this.atDivider(at) ? "split" : null;
    this.path = [at];
    if (!this.mode && (event.button === 0 || event.button === 5)) this.begin(event, this.view.toPicture(at));
  }

  /** Whether a point is on the line between what is compared. @param {Point} at on the canvas */
  atDivider(at) {
    const { scene, view } = this, divider = view.x + scene.split * this.painting.settings.width * view.scale;
    return scene.before !== null && Math.abs(at.x - divider) < 8;
  }

  /** @param {PointerEvent} event @param {Point} at */
  begin(event, at) {
    if (!this.painting.target) {
      this.page.wanted();
      this.added = this.painting.history.last;
    }
    const bitmap = this.painting.target;
    if (!bitmap) return;
    this.erases = this.tool === "eraser" || event.button === 5; // 5: a pen's other end
    this.recording = new Recording(bitmap);
    this.radius = this.radiusOf(event);
    this.path = [at];
    if (this.tool === "brush" || this.tool === "eraser") {
      const from = event.shiftKey && this.lastEnd ? this.lastEnd : at;
      this.stroke(bitmap, from, at, this.radius);
      this.lastEnd = at;
    }
  }

  /** @param {Bitmap} bitmap @param {boolean} erase @returns {import("./bitmap.js").Paint} */
  paint(bitmap, erase) {
    if (erase) return Array(bitmap.channels).fill(0);
    return bitmap.channels === 1 ? [255] : this.colour;
  }

  /** @param {PointerEvent} event */
  radiusOf(event) {
    const pressure = event.pointerType === "pen" ? Math.max(0.1, event.pressure) : 1;
    return (this.size / 2) * pressure;
  }

  /** @param {Bitmap} bitmap @param {Point} a @param {Point} b @param {number} radius */
  stroke(bitmap, a, b, radius) {
    const before = this.radius;
    this.recording?.keep(reach(bitmap, a, b, Math.max(before, radius)));
    this.painting.touch(bitmap, segment(bitmap, a, b, before, radius, this.paint(bitmap, this.erases)));
    this.radius = radius;
  }

  /** @param {PointerEvent} event */
  move(event) {
    const at = this.onScreen(event);
    if (event.pointerType === "pen") this.pen = performance.now();
    if (this.fingers.has(event.pointerId) && this.fingers.size === 2) return this.pinch(event.pointerId, at);
    this.scene.point({ ...this.view.toPicture(at), radius: this.radiusShown() });
    this.scene.canvas.style.cursor = this.atDivider(at) ? "ew-resize" : "";
    if (event.pointerId === this.pointer) {
      if (this.mode === "pan") this.view.pan(at.x - this.path[0].x, at.y - this.path[0].y);
      if (this.mode === "split") this.page.split(this.view.toPicture(at).x / this.painting.settings.width);
      if (this.mode === "size") this.resize(this.size * Math.exp((at.x - this.path[0].x) / 120));
      if (this.mode) this.path = [at];
      else for (const each of steps(event)) this.extend(each);
      if (this.mode || this.scene.outline.length) this.scene.draw();
    }
  }

  /** @param {PointerEvent} event */
  extend(event) {
    const bitmap = this.recording?.bitmap, at = this.view.toPicture(this.onScreen(event));
    if (!bitmap) return;
    if (this.tool === "brush" || this.tool === "eraser") {
      this.stroke(bitmap, this.path[this.path.length - 1], at, this.radiusOf(event));
      this.path = [at];
      this.lastEnd = at;
    } else if (this.tool !== "fill") {
      this.path = this.tool === "rectangle" ? [this.path[0], at] : [...this.path, at];
      const [a, b] = [this.path[0], at];
      this.scene.outline = this.tool === "lasso" ? this.path : [a, { x: b.x, y: a.y }, b, { x: a.x, y: b.y }];
    }
  }

  /** @param {PointerEvent} event */
  up(event) {
    this.fingers.delete(event.pointerId);
    if (event.pointerId !== this.pointer) return;
    const bitmap = this.recording?.bitmap;
    if (bitmap && this.tool !== "brush" && this.tool !== "eraser") {
      this.recording?.keep(whole(bitmap));
      this.painting.touch(bitmap, this.shape(bitmap, event.shiftKey));
    }
    this.end();
  }

  /**
   * Fill from a point, a mask's rectangle or lasso; of a condition, which is lines, draw its outline. Erasing takes all that is inside.
   * @param {Bitmap} bitmap @param {boolean} erase
   */
  shape(bitmap, erase) {
    if (this.tool === "fill") return flood(bitmap, this.path[0], this.paint(bitmap, erase));
    const paint = this.paint(bitmap, erase), [a, b] = [this.path[0], this.path[this.path.length - 1]];
    const corners = this.tool === "lasso" ? this.path : [a, { x: b.x, y: a.y }, b, { x: a.x, y: b.y }];
    if (this.painting.ink && !erase) return outline(bitmap, corners, this.size / 2, paint);
    return this.tool === "lasso" ? lasso(bitmap, corners, paint) : rectangle(bitmap, a, b, paint);
  }

  /** The radius of the ring under the pointer: none where the tool is no brush. */
  radiusShown() {
    return this.tool === "brush" || this.tool === "eraser" ? this.size / 2 : 0;
  }

  end() {
    const recording = this.recording;
    this.pointer = this.recording = this.mode = this.added = null;
    this.drawing = "";
    this.scene.outline = [];
    if (recording) this.painting.commit(recording, this.tool);
    this.scene.draw();
  }

  /** Take back a stroke that was none, and the region that was made for it. */
  abandon() {
    const { recording, added } = this;
    this.pointer = this.recording = this.mode = this.added = null;
    this.drawing = "";
    this.scene.outline = [];
    recording?.step("", (rect) => this.painting.touch(recording.bitmap, rect))?.undo();
    if (added && added === this.painting.history.last) this.painting.withdraw();
  }

  /** @param {number} id @param {Point} at */
  pinch(id, at) {
    const before = [...this.fingers.values()];
    this.fingers.set(id, at);
    const after = [...this.fingers.values()];
    const middle = (/** @type {Point[]} */ p) => ({ x: (p[0].x + p[1].x) / 2, y: (p[0].y + p[1].y) / 2 });
    const apart = (/** @type {Point[]} */ p) => Math.hypot(p[0].x - p[1].x, p[0].y - p[1].y) || 1;
    const [from, to] = [middle(before), middle(after)];
    this.view.pan(to.x - from.x, to.y - from.y);
    this.view.zoom(apart(after) / apart(before), to);
    this.scene.draw();
  }

  leave() {
    this.scene.point(null);
  }

  /** @param {WheelEvent} event */
  wheel(event) {
    event.preventDefault();
    this.view.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : event.ctrlKey ? 0.01 : 0.0015)), this.onScreen(event));
    this.scene.draw();
  }

  /** @param {number} size */
  resize(size) {
    this.sizes[this.painting.ink ? "ink" : "mask"] = Math.min(400, Math.max(1, size));
    if (this.scene.brush) this.scene.brush.radius = this.radiusShown();
    this.page.resized();
    this.scene.draw();
  }
}

/** What a pointer did since the last event. @param {PointerEvent} event @returns {PointerEvent[]} */
function steps(event) {
  const found = event.getCoalescedEvents?.() ?? [];
  return found.length ? found : [event];
}

// What the picture is compared with: the one before, the same without control, or its edges in two colours, as in the
// sheet of `runtime.generate`.

import * as api from "./api.js";
import { get, input, say } from "./dom.js";
import { drawable } from "./image.js";
import { active } from "./regions.js";
import { said } from "./runner.js";

/** @typedef {import("./results.js").Result} Result */

const INSIDE = [230, 159, 0], OUTSIDE = [86, 180, 233]; // as runtime.control.sheet has them

export class Compare {
  /** @param {import("./canvas.js").Scene} scene @param {(result: Result) => Promise<any>} bodyOf the request of a result */
  constructor(scene, bodyOf) {
    this.scene = scene;
    this.bodyOf = bodyOf;
    /** @type {Result | null} */ this.result = null;
    /** @type {Result | null} */ this.previous = null;
    /** @type {AbortController | null} */ this.asking = null;
    /** @type {Map<string, Blob>} */ this.free = new Map(); // pictures without control, by their requests
    input("against").addEventListener("input", () => this.update());
    input("split").addEventListener("input", () => this.draw());
  }

  /** Show another result. @param {Result | null} result @param {Result | null} previous */
  show(result, previous) {
    this.result = result;
    this.previous = previous;
    return this.update();
  }

  async update() {
    const against = input("against").value, { result } = this;
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    input("split").hidden = against === "";
    get("legend").hidden = against !== "edges";
    this.put(null);
    if (!result || !against) return;
    try {
      const found = against === "previous" ? await this.before() : against === "free" ? await this.without(result, asking.signal) : await this.edges(result);
      if (asking === this.asking) this.put(found);
    } catch (error) {
      if (asking === this.asking && !asking.signal.aborted) say(said(error), true);
    }
  }

  /** @param {ImageBitmap | OffscreenCanvas | null} picture */
  put(picture) {
    const before = this.scene.before;
    this.scene.before = picture;
    if (before instanceof ImageBitmap) before.close();
    this.draw();
  }

  /** Move the divider. @param {number} share of the width */
  slide(share) {
    input("split").value = String(100 * share);
    this.draw();
  }

  draw() {
    this.scene.split = input("split").valueAsNumber / 100;
    this.scene.draw();
  }

  async before() {
    return this.previous && createImageBitmap(this.previous.picture);
  }

  /** @param {Result} result @param {AbortSignal} signal @returns {Promise<ImageBitmap>} */
  async without(result, signal) {
    const { regions, outside, ...body } = await this.bodyOf(result), key = JSON.stringify(body);
    let found = this.free.get(key);
    if (!found) {
      say("Drawing the same without control ...");
      found = await api.generate(body, signal);
      this.free.set(key, found);
      if (this.free.size > 20) this.free.delete([...this.free.keys()][0]);
      say("");
    }
    return createImageBitmap(found);
  }

  /** @param {Result} result @returns {Promise<OffscreenCanvas>} */
  async edges({ picture, packed }) {
    const { width, height } = await createImageBitmap(picture);
    const lines = drawable(width, height), masks = drawable(width, height);
    lines.drawImage(await createImageBitmap(await api.condition(picture, "canny", width, height)), 0, 0, width, height);
    masks.globalCompositeOperation = "lighter";
    for (const each of active(packed.regions)) masks.drawImage(await createImageBitmap(each.mask), 0, 0, width, height);
    const image = lines.getImageData(0, 0, width, height), inside = masks.getImageData(0, 0, width, height).data;
    for (let at = 0; at < image.data.length; at += 4) {
      const colour = inside[at] ? INSIDE : OUTSIDE, edge = image.data[at] > 0;
      for (let c = 0; c < 3; c++) image.data[at + c] = edge ? colour[c] : 0;
    }
    lines.putImageData(image, 0, 0);
    return lines.canvas;
  }
}

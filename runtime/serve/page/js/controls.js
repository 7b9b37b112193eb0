// Buttons, fields and keys: what each has the page do.

import { invert, rectangle } from "./bitmap.js";
import { feather, grow } from "./distance.js";
import { clicks, get, hear, input, say } from "./dom.js";
import * as files from "./files.js";
import * as keys from "./keys.js";
import * as panel from "./panel.js";
import { signed, toZip } from "./project.js";
import * as settings from "./settings.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./page.js").Page} Page */
/** @typedef {import("./results.js").Result} Result */

const IMAGES = "image/png, image/jpeg, image/webp, image/*";
const TOOLS = { b: "brush", e: "eraser", r: "rectangle", l: "lasso", g: "fill" };

/** Hear of buttons and fields. @param {Page} page */
export function listen(page) {
  const { painting, hands, scene, can } = page;
  panel.listen(painting, can.adapters);
  settings.listen(painting, can);
  const rework = (/** @type {string} */ label, /** @type {(bitmap: Bitmap) => void} */ work) => painting.rework(painting.target, label, work);
  const amount = () => Math.max(1, input("amount").valueAsNumber || 1);
  const box = (/** @type {number} */ value) => {
    const form = /** @type {HTMLFormElement} */ (get("box"));
    if (!form.reportValidity()) return;
    const [x, y, w, h] = ["box-x", "box-y", "box-w", "box-h"].map((id) => input(id).valueAsNumber);
    rework("Rectangle", (bitmap) => rectangle(bitmap, { x, y }, { x: x + w, y: y + h }, Array(bitmap.channels).fill(value)));
  };
  clicks({
    add: () => page.add(), undo: () => page.step(false), redo: () => page.step(true), fit: () => page.fit(), cancel: () => page.cancel(),
    actual: () => page.zoom(1 / page.view.scale), larger: () => page.zoom(1.25), smaller: () => page.zoom(0.8),
    "on-mask": () => page.paints(false), "on-ink": () => page.paints(true), dice: () => page.reseed(),
    "do-clear": () => rework("Clear", ({ data }) => data.fill(0)), "do-invert": () => rework("Invert", invert),
    "do-feather": () => rework("Feather", (bitmap) => feather(bitmap, amount())),
    "do-grow": () => rework("Grow", (bitmap) => grow(bitmap, amount())),
    "do-shrink": () => rework("Shrink", (bitmap) => grow(bitmap, -amount())),
    "do-load": () => page.tried(files.choose(IMAGES).then((file) => page.load(file, painting.ink))),
    "do-save": () => page.tried(save(page)), "box-erase": () => box(0),
    start: () => page.tried(files.choose(IMAGES).then((file) => page.startFrom(file))),
    nostart: () => painting.set({ start: null }, "Start"),
    import: () => page.tried(files.choose(`${IMAGES}, .zip`).then((file) => page.take(file, true))),
    export: () => page.tried(exported(page)),
    help: () => /** @type {HTMLDialogElement} */ (get("keys")).showModal(),
  });
  onResult(page);
  get("run").addEventListener("submit", (event) => {
    event.preventDefault();
    page.order();
  });
  get("box").addEventListener("submit", (event) => {
    event.preventDefault();
    box(255);
  });
  hear("live", (on) => {
    page.save();
    if (on) page.draw();
    else page.live.stop();
  });
  hear("size", (size) => hands.resize(size));
  hear("opacity", (value) => {
    scene.opacity = value / 100;
    scene.draw();
  });
  input("colour").addEventListener("input", () => (hands.colour = [1, 3, 5].map((at) => parseInt(input("colour").value.slice(at, at + 2), 16))));
  for (const button of get("tools").querySelectorAll("button")) {
    button.addEventListener("click", () => page.tool(/** @type {any} */ (button.dataset.tool)));
  }
}

/** Save the project, with the picture that is shown. @param {Page} page */
async function exported({ painting, pngs, results, can }) {
  const packed = await pngs.pack(painting.state), picture = results.current?.picture ?? null;
  files.download(await toZip(painting.state, packed, can.model, picture), `${named(painting.settings.prompt)}.zip`);
}

/** A file's name by what it shows. @param {string} prompt */
function named(prompt) {
  return prompt.slice(0, 60).trim() || "picture";
}

/** Save the mask or the condition that is at hand. @param {Page} page */
async function save({ painting, pngs }) {
  const { target, chosen, ink } = painting;
  if (target && chosen) files.download(await pngs.of(target), `${chosen.name} ${ink ? "condition" : "mask"}.png`);
}

/** What can be done with the picture that is shown. @param {Page} page */
function onResult(page) {
  const on = (/** @type {(result: Result) => Promise<any>} */ act) => () => page.results.current && page.tried(act(page.results.current));
  clicks({
    again: on((result) => page.restore(result.packed, "Settings of a result")),
    "as-start": on((result) => page.startFrom(result.picture)),
    "as-condition": on((result) => page.load(result.picture, true)),
    pin: on(async (result) => {
      await page.results.pin(result);
      say(`Result ${result.id} is ${result.pinned ? "" : "no longer "}pinned.`);
    }),
    discard: on(async (result) => {
      await page.look(await page.results.remove(result));
      say(`Result ${result.id} is deleted.`);
    }),
    "bring-back": () => page.tried(page.results.bring().then((result) => page.look(result))),
    save: on(async ({ id, picture, packed, about }) => files.download(await signed(picture, packed), `${named(packed.settings.prompt)} ${about.seed}-${id}.png`)),
  });
}

/** Hear of keys. @param {Page} page */
export function listenToKeys(page) {
  const { hands, scene, painting } = page;
  const masks = () => {
    scene.opacity = scene.opacity ? 0 : 0.5;
    input("opacity").value = String(100 * scene.opacity);
    scene.draw();
  };
  // in the middle of a stroke nothing else begins
  const idle = (/** @type {Record<string, () => void>} */ acts) => Object.fromEntries(
    Object.entries(acts).map(([key, act]) => [key, () => hands.pointer === null && act()]));
  const tools = Object.entries(TOOLS).map(([key, name]) => [key, () => page.tool(/** @type {any} */ (name))]);
  keys.listen({
    always: { "ctrl+enter": () => page.order(), escape: () => page.cancel() },
    control: { z: () => page.step(false), "shift+z": () => page.step(true), y: () => page.step(true) },
    plain: idle({
      ...Object.fromEntries(tools), n: () => page.add(), x: () => page.paints(!painting.ink), m: masks, 0: () => page.fit(),
      1: () => page.zoom(1 / page.view.scale), "+": () => page.zoom(1.25), "=": () => page.zoom(1.25), "-": () => page.zoom(0.8),
      "[": () => hands.resize(hands.size / 1.15), "]": () => hands.resize(hands.size * 1.15), "?": () => get("help").click(),
    }),
  }, (held) => (hands.space = held));
}

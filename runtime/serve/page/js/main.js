// The page: how its parts hear of each other.

import * as api from "./api.js";
import { grow, feather } from "./distance.js";
import { invert, rectangle } from "./bitmap.js";
import { Scene } from "./canvas.js";
import { Compare } from "./compare.js";
import { clicks, get, hear, input, say } from "./dom.js";
import { example } from "./example.js";
import * as files from "./files.js";
import { pixels, decoded, stretched } from "./image.js";
import * as keys from "./keys.js";
import { Live } from "./live.js";
import { Painting } from "./painting.js";
import * as panel from "./panel.js";
import { conditionOf } from "./photo.js";
import { Pngs, signed, toZip, unpack } from "./project.js";
import { acting, request } from "./regions.js";
import { restored } from "./restore.js";
import { Results } from "./results.js";
import { Runner, said } from "./runner.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { Hands } from "./tools.js";
import { unlock } from "./unlock.js";
import { View } from "./view.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./project.js").Packed} Packed */
/** @typedef {import("./results.js").Result} Result */

const IMAGES = "image/png, image/jpeg, image/webp, image/*";
const TOOLS = { b: "brush", e: "eraser", r: "rectangle", l: "lasso", g: "fill" };

/** The page once it knows its server and what was painted before. */
class Page {
  /** @param {any} can the server's capabilities @param {import("./painting.js").State} state @param {string} tab */
  constructor(can, state, tab) {
    this.can = can;
    this.tab = tab;
    this.view = new View();
    this.scene = new Scene(/** @type {HTMLCanvasElement} */ (get("canvas")), this.view);
    this.painting = new Painting(state, {
      shown: (bitmap, rect) => {
        this.scene.changed(bitmap, rect);
        this.touched();
      },
      changed: () => {
        if (!this.runner.busy) say("");
        this.refresh();
        this.touched();
      },
    });
    this.pngs = new Pngs((bitmap) => this.painting.version(bitmap));
    /** @type {WeakMap<Blob, Promise<string>>} */ this.sent = new WeakMap(); // files that the server has
    this.hands = new Hands(this.scene, this.view, this.painting, {
      resized: () => this.sized(), wanted: () => this.add(), split: (share) => this.compare.slide(share),
    });
    this.live = new Live(() => this.draw());
    this.results = new Results((result) => this.present(result));
    this.compare = new Compare(this.scene, (result) => request([], result.packed.settings, (what) => this.fileOf(what)));
    this.runner = new Runner(this.running(), tab);
    this.live.painting = () => this.hands.pointer !== null;
    this.live.busy = () => this.runner.busy;
    /** @type {string[]} */ this.names = []; // of the regions that were sent
    this.pace = { changed: 0, drawn: 0, took: /** @type {number[]} */ ([]) }; // ms: the last change, the one that is drawn; to its picture
    /** @type {any} */ this.saving = null;
    /** @type {Promise<any>} */ this.saved = Promise.resolve();
    this.scene.state = () => {
      const { painting } = this, { width, height } = painting.settings;
      return { regions: painting.state.regions, chosen: painting.chosen, ink: painting.ink, width, height };
    };
  }

  /** What the runner tells. @returns {import("./runner.js").Page} */
  running() {
    const busy = (/** @type {boolean} */ on) => {
      input("cancel").disabled = !on;
      /** @type {HTMLProgressElement} */ (get("progress")).value = 0;
    };
    return {
      begun: () => {
        this.pace.drawn = this.pace.changed;
        busy(true);
        say("Waiting for the first step ...");
      },
      progress: (step, steps) => {
        /** @type {HTMLProgressElement} */ (get("progress")).value = step / steps;
        say(`Step ${step} of ${steps}`);
      },
      preview: async (image) => {
        const shown = await createImageBitmap(image);
        if (!this.runner.busy) return;
        this.scene.picture = shown;
        this.scene.draw();
      },
      done: async (picture, about, { packed, passing }) => {
        busy(false);
        const result = passing ? this.results.pass(picture, about, packed) : await this.results.add(picture, about, packed);
        await this.present(result);
        if (this.pace.drawn) this.pace.took.push(performance.now() - this.pace.drawn);
        this.pace.took.splice(0, this.pace.took.length - 500);
        say(this.named([`Drawn in ${about.timings.running.toFixed(2)} s`, ...about.warnings].join(" · ")));
      },
      ended: (message, wrong) => {
        busy(false);
        this.live.drawn();
        if (message) say(this.named(message), wrong);
      },
    };
  }

  /** What the server says, with names for the regions that it counts. @param {string} message */
  named(message) {
    return message.replaceAll(/\bregions[.[](\d+)\]?/g, (text, i) => this.names[i] ?? text);
  }

  /** Something has changed: keep it, and draw it where the page is live. */
  touched() {
    this.pace.changed = performance.now();
    get("hint").hidden = this.painting.state.regions.length > 0;
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.save(), 300);
    if (input("live").checked) this.live.change();
  }

  /** Keep the painting in this browser; one after the other, so that the newest stays. */
  save() {
    clearTimeout(this.saving);
    const packed = this.pngs.pack(this.painting.state), live = input("live").checked, { tab } = this;
    this.saved = this.saved.then(async () => store.save({ tab, when: Date.now(), packed: await packed, live })).catch((error) =>
      say(`This browser does not keep what is painted: ${error?.message ?? error}. Save the project as a file.`, true));
    return this.saved;
  }

  /** Show everything but pixels as it is. */
  refresh() {
    const { painting } = this, { history } = painting, { width, height } = painting.settings;
    if (this.view.width !== width || this.view.height !== height) this.fit();
    panel.showList(painting);
    panel.showPanel(painting);
    settings.showSettings(painting);
    input("undo").disabled = !history.done.length;
    input("redo").disabled = !history.undone.length;
    this.scene.draw();
  }

  /** @param {Bitmap | Blob} what @returns {Promise<string>} the id of its file, sent once for as long as it is the same */
  async fileOf(what) {
    const blob = what instanceof Blob ? what : await this.pngs.of(what);
    let id = this.sent.get(blob);
    if (!id) {
      this.sent.set(blob, (id = api.keep(blob)));
      id.catch(() => this.sent.delete(blob));
    }
    return id;
  }

  /** Draw what is painted now. */
  draw() {
    this.live.stop();
    const { painting } = this, passing = this.live.painting();
    return this.runner.draw(async (anew) => {
      if (anew) this.sent = new WeakMap();
      this.names = acting(painting.state.regions).map(({ region }) => region.name);
      const drawn = passing ? settings.draft(painting.settings, this.can) : painting.settings;
      const [packed, body] = await Promise.all([
        this.pngs.pack(painting.state), request(painting.state.regions, drawn, (what) => this.fileOf(what)),
      ]);
      return { body, painted: { packed, passing } };
    });
  }

  /** Draw because somebody wants to: with another seed, where it is not fixed. */
  order() {
    if (!input("fixed").checked) this.reseed();
    this.draw();
  }

  reseed() {
    this.painting.set({ seed: crypto.getRandomValues(new Uint32Array(1))[0] }, "Seed");
  }

  /** @param {Result} result */
  async present(result) {
    const { kept } = this.results, at = kept.indexOf(result);
    this.scene.picture = await createImageBitmap(result.picture);
    this.scene.draw();
    await this.compare.show(result, kept[(at < 0 ? kept.length : at) - 1] ?? null);
  }

  /** @param {Packed} packed @param {string} label @param {Blob | null} [picture] what was drawn of it; none: what is shown stays */
  async restore(packed, label, picture) {
    this.painting.replace(await unpack(packed), label);
    if (picture) await this.present(await this.results.add(picture, { seed: packed.settings.seed }, packed));
  }

  /** @param {Blob} picture */
  async startFrom(picture) {
    const size = await decoded(picture);
    this.painting.set({ start: picture }, "Start");
    const shape = stretched(size, this.painting.settings) ? `, stretched from ${size.width} x ${size.height}` : "";
    say(`The next one starts from that picture${shape}: see Start in the settings.`);
  }

  add() {
    this.painting.add(this.can.default_adapter ?? "");
  }

  /** Have the chosen region's mask or condition from a picture. @param {Blob} picture @param {boolean} ink */
  async load(picture, ink) {
    if (!this.painting.chosen) this.add();
    const { painting } = this, { width, height } = painting.settings, region = painting.chosen;
    const found = ink ? await conditionOf(picture, this.can.preprocessors, { width, height }) : await pixels(picture, width, height, 1);
    if (!found || !region) return;
    this.paints(ink);
    painting.rework(ink ? region.ink : region.mask, ink ? "Load a condition" : "Load a mask", ({ data }) => data.set(found));
    const size = await decoded(picture);
    if (!ink && stretched(size, { width, height })) say(`The mask was ${size.width} x ${size.height} and has been stretched.`);
    this.refresh();
  }

  /** Take a file that was dropped, pasted or opened. @param {File} file @param {boolean} [start] whether any other picture is to start from */
  async take(file, start = false) {
    const found = await restored(file);
    if (found) {
      await this.restore(found.packed, `Open ${file.name}`, found.picture);
      say(found.missing.length ? `Opened, but without ${found.missing.join(", ")}` : `Opened ${file.name}`, found.missing.length > 0);
    } else if (start) await this.startFrom(file);
    else await this.load(file, this.painting.ink);
  }

  /** @param {Promise<any>} work what goes wrong in it is said */
  tried(work) {
    work.catch((error) => say(said(error), true));
  }

  /** @param {import("./tools.js").Tool} name */
  tool(name) {
    this.hands.tool = name;
    for (const button of get("tools").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.tool === name));
    }
  }

  /** The brush is of another size. */
  sized() {
    input("size").value = String(Math.round(this.hands.size));
    get("size-said").textContent = String(Math.round(this.hands.size));
  }

  /** @param {boolean} ink whether the tools draw the condition */
  paints(ink) {
    if (this.hands.pointer !== null) return; // in the middle of a stroke
    this.painting.ink = ink;
    this.sized();
    this.refresh();
  }

  /** @param {boolean} forth */
  step(forth) {
    if (this.hands.pointer !== null) return; // in the middle of a stroke
    const label = forth ? this.painting.redo() : this.painting.undo();
    if (label !== null) say(forth ? `Again: ${label}` : `Undone: ${label}`);
  }

  fit() {
    const { canvas } = this.scene, { width, height } = this.painting.settings;
    this.view.fit(width, height, canvas.clientWidth, canvas.clientHeight);
    this.scene.draw();
  }

  /** @param {number} factor */
  zoom(factor) {
    const { canvas } = this.scene;
    this.view.zoom(factor, { x: canvas.clientWidth / 2, y: canvas.clientHeight / 2 });
    this.scene.draw();
  }

  /** Keep the canvas as large as its place, and the picture in its middle. */
  resized() {
    const { canvas } = this.scene, dots = devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * dots);
    canvas.height = Math.round(canvas.clientHeight * dots);
    if (this.view.fitted) this.fit();
    else this.scene.draw();
  }
}

/** Hear of buttons and fields. @param {Page} page */
function listen(page) {
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
    add: () => page.add(), undo: () => page.step(false), redo: () => page.step(true), fit: () => page.fit(), cancel: () => page.runner.cancel(),
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
    save: on(async ({ id, picture, packed, about }) => files.download(await signed(picture, packed), `${named(packed.settings.prompt)} ${about.seed}-${id}.png`)),
  });
}

/** Hear of keys. @param {Page} page */
function listenToKeys(page) {
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
    always: { "ctrl+enter": () => page.order(), escape: () => page.runner.cancel() },
    control: { z: () => page.step(false), "shift+z": () => page.step(true), y: () => page.step(true) },
    plain: idle({
      ...Object.fromEntries(tools), n: () => page.add(), x: () => page.paints(!painting.ink), m: masks, 0: () => page.fit(),
      1: () => page.zoom(1 / page.view.scale), "+": () => page.zoom(1.25), "=": () => page.zoom(1.25), "-": () => page.zoom(0.8),
      "[": () => hands.resize(hands.size / 1.15), "]": () => hands.resize(hands.size * 1.15), "?": () => get("help").click(),
    }),
  }, (held) => (hands.space = held));
}

async function begin() {
  api.keyFrom(unlock);
  const can = await api.capabilities();
  const { tab, kept, pending } = await store.claim().catch(() => ({ tab: store.unique(), kept: null, pending: null }));
  const page = new Page(can, kept ? await unpack(kept.packed) : example(can), tab);
  Object.assign(window, { localcontrol: page }); // for tests, and the curious
  get("model").textContent = `${can.model.split("/").pop()} on ${can.device}`;
  listen(page);
  listenToKeys(page);
  files.listen((file) => page.tried(page.take(file)));
  document.addEventListener("visibilitychange", () => document.hidden && page.save());
  new ResizeObserver(() => page.resized()).observe(page.scene.canvas);
  page.scene.painted = () => (get("zoom").textContent = `${Math.round(100 * page.view.scale)} %`);
  page.fit();
  page.sized();
  page.refresh();
  await page.results.load().catch(() => {});
  if (page.results.current) await page.present(page.results.current);
  if (kept) {
    input("live").checked = kept.live;
    if (pending) await page.runner.resume(pending);
  } else {
    get("hint").textContent = "Paint. Write. Draw.";
    get("hint").hidden = false;
    page.draw();
  }
}

begin().catch((error) => say(`The page could not begin: ${said(error)}`, true));

// The page: one painting, its pictures, and how the parts hear of each other.

import { Scene } from "./canvas.js";
import { Compare } from "./compare.js";
import { get, input, say } from "./dom.js";
import { decoded, pixels, stretched } from "./image.js";
import { Live } from "./live.js";
import { Painting, copied } from "./painting.js";
import * as panel from "./panel.js";
import { conditionOf } from "./photo.js";
import * as progress from "./progress.js";
import { Pngs, unpack } from "./project.js";
import { acting, usual } from "./regions.js";
import { restored } from "./restore.js";
import { Results } from "./results.js";
import { Runner, said } from "./runner.js";
import { Sent } from "./sent.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { Hands } from "./tools.js";
import { View } from "./view.js";

/** @typedef {import("./project.js").Packed} Packed */
/** @typedef {import("./results.js").Result} Result */

const MOST_UNSAVED = 2000; // ms, of a stroke that goes on and on

/** The page once it knows its server and what was painted before. */
export class Page {
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
        this.save();
      },
    });
    this.pngs = new Pngs((bitmap) => this.painting.version(bitmap));
    this.sent = new Sent(this.pngs);
    this.hands = new Hands(this.scene, this.view, this.painting, {
      resized: () => this.sized(), wanted: () => this.add(), split: (share) => this.compare.slide(share),
    });
    this.live = new Live(() => this.draw());
    this.results = new Results((result) => this.present(result));
    this.compare = new Compare(this.scene, (result) => this.sent.request([], result.packed.settings));
    this.runner = new Runner(this.running(), tab);
    this.live.painting = () => this.hands.pointer !== null;
    this.live.busy = () => this.runner.busy;
    /** @type {string[]} */ this.names = []; // of the regions that were sent
    this.pace = { changed: 0, drawn: 0, took: /** @type {number[]} */ ([]) }; // ms: the last change, the one that is drawn; to its picture
    /** @type {ImageBitmap | null} */ this.shown = null; // the picture of the result that is looked at
    /** @type {any} */ this.saving = null;
    this.unsaved = 0; // ms: since when something is not kept; 0 where all is
    this.scene.state = () => {
      const { painting } = this, { width, height } = painting.settings;
      return { regions: painting.state.regions, chosen: painting.chosen, ink: painting.ink, width, height };
    };
  }

  /** What the runner tells. @returns {import("./runner.js").Page} */
  running() {
    return {
      begun: () => {
        this.pace.drawn = this.pace.changed;
        progress.begin();
      },
      progress: progress.step,
      preview: async (image) => {
        const shown = await createImageBitmap(image);
        if (this.runner.busy) this.show(shown);
        else shown.close();
      },
      done: async (picture, told, { packed, passing, steps }) => {
        progress.end();
        const about = { ...told, steps };
        const result = passing ? this.results.pass(picture, about, packed) : await this.results.add(picture, about, packed);
        await this.present(result);
        if (this.pace.drawn) this.pace.took.push(performance.now() - this.pace.drawn);
        this.pace.took.splice(0, this.pace.took.length - 500);
        if (result.id < 0) return say("This browser has no room for the picture: save it as a file.", true);
        say(this.named([`Drawn in ${about.timings.running.toFixed(2)} s`, ...about.warnings].join(" · ")));
      },
      ended: (message, wrong) => {
        progress.end();
        this.show(this.shown); // and no preview of what did not come
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
    this.unsaved ||= performance.now();
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.save(), Math.min(300, Math.max(0, this.unsaved + MOST_UNSAVED - performance.now())));
    if (input("live").checked) this.live.change();
  }

  /** Keep the painting in this browser, as it is now. */
  save() {
    clearTimeout(this.saving);
    this.unsaved = 0;
    const { tab, painting } = this;
    return store.save(tab, painting.state, input("live").checked, (bitmap) => painting.version(bitmap)).catch((error) =>
      say(`This browser does not keep what is painted: ${error?.message ?? error}. Save the project as a file.`, true));
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

  /** Draw what is painted now. */
  draw() {
    this.live.stop();
    const { painting } = this, passing = this.live.painting();
    return this.runner.draw(async (anew) => {
      if (anew) this.sent.forget();
      const state = copied(painting.state); // as it is now, whatever is changed while its files are sent
      this.names = acting(state.regions).map(({ region }) => region.name);
      const drawn = passing ? settings.draft(state.settings, this.can) : state.settings;
      const [packed, body] = await Promise.all([
        this.pngs.pack(state), this.sent.request(state.regions, drawn),
      ]);
      return { body, painted: { packed, passing, steps: drawn.steps } };
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

  /** @param {ImageBitmap | null} picture of a result, or on the way to one */
  show(picture) {
    const before = /** @type {ImageBitmap | null} */ (this.scene.picture);
    this.scene.picture = picture;
    if (before !== this.shown && before !== picture) before?.close(); // a preview
    this.scene.draw();
  }

  /** Show a picture that is no result, or none. @param {ImageBitmap | null} picture */
  shows(picture) {
    this.results.current = null;
    this.results.show();
    const before = this.shown;
    this.show((this.shown = picture));
    before?.close();
    return this.compare.show(null, null);
  }

  /** Stop what is drawn, also what would be next. */
  cancel() {
    this.live.stop();
    return this.runner.cancel();
  }

  /** @param {Result} result */
  async present(result) {
    const { kept } = this.results, at = kept.indexOf(result);
    const made = await createImageBitmap(result.picture), before = this.shown;
    if (this.results.current !== result) return made.close(); // another has been chosen meanwhile
    this.show((this.shown = made));
    before?.close();
    await this.compare.show(result, kept[(at < 0 ? kept.length : at) - 1] ?? null);
  }

  /** @param {Result | null} result */
  look(result) {
    return result ? this.present(result) : this.shows(null);
  }

  /** @param {Packed} packed @param {string} label @param {Blob | null} [picture] what was drawn of it; none: what is shown stays */
  async restore(packed, label, picture) {
    this.painting.replace(await unpack(packed), label);
    if (picture) await this.present(await this.results.add(picture, packed.settings, packed));
  }

  /** @param {Blob} picture */
  async startFrom(picture) {
    const size = await decoded(picture);
    this.painting.set({ start: picture }, "Start");
    const shape = stretched(size, this.painting.settings) ? `, cropped from ${size.width} x ${size.height}` : "";
    say(`The next one starts from that picture${shape}: see Start in the settings.`);
  }

  add() {
    this.painting.add(usual(this.can));
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
    const found = await restored(file, this.painting.settings);
    if (found) {
      await this.restore(found.packed, `Open ${file.name}`, found.drawn ? found.picture : null);
      if (!found.drawn) this.shows(found.picture && (await decoded(found.picture)));
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

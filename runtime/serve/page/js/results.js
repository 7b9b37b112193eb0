// The pictures drawn: a strip of the last ones, each with all that made it.

import { get, make } from "./dom.js";
import * as store from "./store.js";

/** @typedef {{id: number, picture: Blob, about: any, packed: import("./project.js").Packed, when: number}} Result  packed: the painting it was drawn from */

export const MOST = 50;

export class Results {
  /** @param {(result: Result) => void} chosen */
  constructor(chosen) {
    this.chosen = chosen;
    /** @type {Result[]} */ this.kept = [];
    /** @type {Result | null} */ this.current = null;
    /** @type {Map<number, string>} */ this.addresses = new Map();
  }

  /** Those of before. */
  async load() {
    this.kept = (await store.results()).sort((/** @type {Result} */ a, /** @type {Result} */ b) => a.id - b.id);
    this.prune();
    this.current = this.kept[this.kept.length - 1] ?? null;
    this.show();
  }

  /** @param {Blob} picture @param {any} about @param {any} packed @returns {Promise<Result>} */
  async add(picture, about, packed) {
    const made = { picture, about, packed, when: Date.now() };
    // what this browser has no room for is still shown
    const id = await store.keep(made).catch(() => (this.kept[this.kept.length - 1]?.id ?? 0) + 1);
    const result = { ...made, id };
    this.kept.push(result);
    this.prune();
    this.current = result;
    this.show();
    return result;
  }

  /** Show one that is not kept, as of a stroke that goes on. @param {Blob} picture @param {any} about @param {any} packed @returns {Result} */
  pass(picture, about, packed) {
    this.current = { id: 0, picture, about, packed, when: Date.now() };
    this.show();
    return this.current;
  }

  prune() {
    while (this.kept.length > MOST) {
      const old = /** @type {Result} */ (this.kept.shift());
      URL.revokeObjectURL(this.addresses.get(old.id) ?? "");
      this.addresses.delete(old.id);
      store.forget(old.id).catch(() => {});
    }
  }

  show() {
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset?.result;
    get("results").replaceChildren(...[...this.kept].reverse().map((each) => make("li", {}, this.button(each))));
    if (focused) /** @type {HTMLElement | null} */ (document.querySelector(`[data-result="${focused}"]`))?.focus();
    get("result").hidden = this.current === null;
    if (this.current) get("result-said").textContent = get("result-said").title = said(this.current);
    get("results").querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** @param {Result} result */
  button(result) {
    if (!this.addresses.has(result.id)) this.addresses.set(result.id, URL.createObjectURL(result.picture));
    const label = `Result ${result.id}: ${said(result)}`;
    const act = () => {
      this.current = result;
      this.show();
      this.chosen(result);
    };
    return make("button", {
      type: "button", "aria-label": label, title: label, "data-result": result.id, "aria-current": String(result === this.current), onclick: act,
    }, make("img", { alt: "", src: this.addresses.get(result.id) }));
  }
}

/** @param {Result} result */
function said({ about, packed }) {
  const { prompt, width, height, steps } = packed.settings;
  const outside = about.pixels_changed_outside === undefined ? "" : ` · ${about.pixels_changed_outside} pixels changed outside`;
  return `${prompt || "no words"} · ${width} x ${height}, ${steps} steps, seed ${about.seed}${outside}`;
}

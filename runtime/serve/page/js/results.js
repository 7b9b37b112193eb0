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
    /** @type {Map<number, HTMLElement>} */ this.items = new Map(); // of the strip, by their results' numbers
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
    // what this browser has no room for is still shown, under a number that none of its own can have
    const id = await store.keep(made).catch(() => -Date.now());
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
      URL.revokeObjectURL(this.items.get(old.id)?.querySelector("img")?.src ?? "");
      this.items.get(old.id)?.remove();
      this.items.delete(old.id);
      if (old.id > 0) store.forget(old.id).catch(() => {});
    }
  }

  show() {
    for (const each of this.kept) {
      if (!this.items.has(each.id)) {
        this.items.set(each.id, make("li", {}, this.button(each)));
        get("results").prepend(/** @type {HTMLElement} */ (this.items.get(each.id)));
      }
      this.items.get(each.id)?.firstElementChild?.setAttribute("aria-current", String(each === this.current));
    }
    get("result").hidden = this.current === null;
    if (this.current) get("result-said").textContent = get("result-said").title = said(this.current);
    get("results").querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** @param {Result} result */
  button(result) {
    const label = `Result ${result.id}: ${said(result)}`;
    const act = () => {
      this.current = result;
      this.show();
      this.chosen(result);
    };
    return make("button", {
      type: "button", "aria-label": label, title: label, onclick: act,
    }, make("img", { alt: "", src: URL.createObjectURL(result.picture) }));
  }
}

/** @param {Result} result */
function said({ about, packed }) {
  const { prompt } = packed.settings, { width, height, steps } = { ...packed.settings, ...about };
  const outside = about.pixels_changed_outside === undefined ? "" : ` · ${about.pixels_changed_outside} pixels changed outside`;
  return `${prompt || "no words"} · ${width} x ${height}, ${steps} steps, seed ${about.seed}${outside}`;
}

// The pictures drawn: a strip of the last ones, each with all that made it.

import { make } from "./panel.js";
import * as store from "./store.js";

/** @typedef {{id: number, picture: Blob, about: any, state: any, when: number}} Result */

export const MOST = 50;

export class Results {
  /** @param {HTMLElement} list @param {(result: Result) => void} chosen */
  constructor(list, chosen) {
    this.list = list;
    this.chosen = chosen;
    /** @type {Result[]} */ this.kept = [];
    /** @type {Map<number, string>} */ this.addresses = new Map();
  }

  /** Those of before. */
  async load() {
    this.kept = (await store.results()).sort((/** @type {Result} */ a, /** @type {Result} */ b) => a.id - b.id);
    this.show(null);
  }

  /** @param {Blob} picture @param {any} about @param {any} state @returns {Promise<Result>} */
  async add(picture, about, state) {
    const id = 1 + (this.kept[this.kept.length - 1]?.id ?? 0);
    const result = { id, picture, about, state, when: Date.now() };
    this.kept.push(result);
    while (this.kept.length > MOST) {
      const old = /** @type {Result} */ (this.kept.shift());
      URL.revokeObjectURL(this.addresses.get(old.id) ?? "");
      this.addresses.delete(old.id);
      store.forget(old.id);
    }
    this.show(id);
    await store.keep(result);
    return result;
  }

  /** @param {number | null} current */
  show(current) {
    this.list.replaceChildren(
      ...[...this.kept].reverse().map((each) => {
        if (!this.addresses.has(each.id)) this.addresses.set(each.id, URL.createObjectURL(each.picture));
        const label = `Result ${each.id}, seed ${each.about.seed}, ${each.state.settings.prompt}`;
        return make("li", {}, make("button", {
          type: "button", "aria-label": label, title: label, "aria-current": String(each.id === current),
          onclick: () => {
            this.show(each.id);
            this.chosen(each);
          },
        }, make("img", { alt: "", src: this.addresses.get(each.id) })));
      }));
  }
}

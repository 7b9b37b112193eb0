// The pictures drawn: a strip of the last ones, each with all that made it.

import { get, make } from "./dom.js";
import * as store from "./store.js";

/** @typedef {{id: number, picture: Blob, about: any, packed: import("./project.js").Packed, when: number, pinned?: boolean}} Result  packed: the painting it was drawn from */

export const MOST = 50;
export const MOST_PINNED = 25; // so that there is room for those that come

export class Results {
  /** @param {(result: Result) => void} chosen */
  constructor(chosen) {
    this.chosen = chosen;
    /** @type {Result[]} */ this.kept = [];
    /** @type {Result | null} */ this.current = null;
    /** @type {Result | null} */ this.deleted = null; // the last one, which can be brought back
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

  /** The oldest go, but for those that are pinned. */
  prune() {
    while (this.kept.length > MOST) {
      const old = this.kept.splice(this.kept.findIndex((each) => !each.pinned), 1)[0];
      this.forget(old).catch(() => {});
    }
  }

  /** @param {Result} result @returns {Promise<any>} */
  async forget({ id }) {
    URL.revokeObjectURL(this.items.get(id)?.querySelector("img")?.src ?? "");
    this.items.get(id)?.remove();
    this.items.delete(id);
    if (id > 0) await store.forget(id);
  }

  /** Keep one however many come, or no longer. @param {Result} result Raises Error where too many are pinned. */
  async pin(result) {
    if (!result.pinned && this.kept.filter((each) => each.pinned).length >= MOST_PINNED) {
      throw new Error(`${MOST_PINNED} pictures are pinned; expected at most as many: unpin one first`);
    }
    result.pinned = !result.pinned;
    this.show();
    if (result.id > 0) await store.replace(result);
  }

  /** @param {Result} result @returns {Promise<Result | null>} the one that is looked at now */
  async remove(result) {
    const at = this.kept.indexOf(result);
    this.kept.splice(at, 1);
    this.deleted = result;
    this.current = this.kept[at] ?? this.kept[at - 1] ?? null;
    const gone = this.forget(result);
    this.show();
    await gone;
    return this.current;
  }

  /** Bring back the one that was deleted last. @returns {Promise<Result | null>} it */
  async bring() {
    const result = this.deleted;
    if (!result) return null;
    this.deleted = null;
    this.kept.push(result);
    this.kept.sort((a, b) => a.when - b.when);
    this.prune();
    this.current = result;
    this.show();
    if (result.id > 0 && this.kept.includes(result)) await store.replace(result);
    return result;
  }

  show() {
    this.kept.forEach((each, i) => {
      const item = this.items.get(each.id) ?? this.item(each, this.items.get(this.kept[i + 1]?.id));
      item.classList.toggle("pinned", each.pinned === true);
      item.firstElementChild?.setAttribute("aria-current", String(each === this.current));
    });
    const kept = this.current !== null && this.kept.includes(this.current);
    get("pin").hidden = get("discard").hidden = !kept;
    get("pin").setAttribute("aria-pressed", String(this.current?.pinned === true));
    get("bring-back").hidden = this.deleted === null;
    get("result").hidden = this.current === null && this.deleted === null;
    get("of-result").hidden = get("result-said").hidden = this.current === null;
    if (this.current) get("result-said").textContent = get("result-said").title = said(this.current);
    get("results").querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Put one into the strip, whose newest is the first. @param {Result} result @param {HTMLElement} [newer] @returns {HTMLElement} */
  item(result, newer) {
    const made = make("li", {}, this.button(result));
    this.items.set(result.id, made);
    if (newer) newer.after(made);
    else get("results").prepend(made);
    return made;
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

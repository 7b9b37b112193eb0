// What is painted and asked for, and every change of it as a step that can be undone. No DOM.

import { History, Recording } from "./history.js";
import { whole } from "./bitmap.js";
import * as regions from "./regions.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./bitmap.js").Rect} Rect */
/** @typedef {regions.Region} Region */
/** @typedef {{regions: Region[], chosen: number, settings: regions.Settings}} State */

export class Painting {
  /**
   * @param {State} state
   * @param {{shown: (bitmap: Bitmap, rect: Rect) => void, changed: () => void}} heard
   *   shown: some pixels are others; changed: anything else is
   */
  constructor(state, heard) {
    this.state = state;
    this.heard = heard;
    this.history = new History();
    this.ink = false; // whether the tools draw the condition, and not the mask
    /** @type {WeakMap<Bitmap, number>} */ this.versions = new WeakMap();
    /** @type {string | null} */ this.open = null; // the edit that goes on while something is slid or typed
  }

  get settings() {
    return this.state.settings;
  }

  /** @returns {Region | null} */
  get chosen() {
    return this.state.regions.find((each) => each.id === this.state.chosen) ?? null;
  }

  /** @returns {Bitmap | null} what the tools paint on */
  get target() {
    return this.chosen?.[this.ink ? "ink" : "mask"] ?? null;
  }

  /** @param {Bitmap} bitmap @returns {number} another one after each change of its pixels */
  version(bitmap) {
    return this.versions.get(bitmap) ?? 0;
  }

  /** Some pixels are others. @param {Bitmap} bitmap @param {Rect} rect */
  touch(bitmap, rect) {
    this.versions.set(bitmap, this.version(bitmap) + 1);
    this.heard.shown(bitmap, rect);
  }

  /** Make a step of the pixels that were recorded. @param {Recording} recording @param {string} label */
  commit(recording, label) {
    const step = recording.step(label, (rect) => this.touch(recording.bitmap, rect));
    if (!step) return;
    this.open = null;
    this.history.add(step);
    this.heard.changed();
  }

  /** Change a whole bitmap as one step. @param {Bitmap | null} bitmap @param {string} label @param {(bitmap: Bitmap) => void} work */
  rework(bitmap, label, work) {
    if (!bitmap) return;
    const recording = new Recording(bitmap);
    recording.keep(whole(bitmap));
    work(bitmap);
    this.touch(bitmap, whole(bitmap));
    this.commit(recording, label);
  }

  /**
   * Change anything but pixels as one step; edits of the same name in a row are one.
   * @param {string} label @param {(state: State) => void} work @param {string} [name]
   */
  edit(label, work, name) {
    const before = copied(this.state);
    work(this.state);
    const after = copied(this.state), put = (/** @type {State} */ state) => {
      this.state = copied(state);
      this.open = null;
    };
    const { last } = this.history;
    if (name && name === this.open && last && !this.history.undone.length) last.redo = () => put(after);
    else this.history.add({ label, bytes: 1000 + lost(before, after), undo: () => put(before), redo: () => put(after) });
    this.open = name ?? null;
    this.heard.changed();
  }

  /** Change a field of the chosen region. @param {Partial<Region>} fields @param {string} label */
  change(fields, label) {
    const { chosen } = this;
    if (chosen) this.edit(label, () => Object.assign(chosen, fields), `${chosen.id} ${label}`);
  }

  /** Change settings. @param {Partial<regions.Settings>} fields @param {string} label */
  set(fields, label) {
    this.edit(label, (state) => Object.assign(state.settings, fields), label);
  }

  /** @param {number} id */
  choose(id) {
    this.state.chosen = id;
    this.open = null;
    this.heard.changed();
  }

  /** @param {string} adapter */
  add(adapter) {
    this.edit("Add a region", (state) => {
      const made = regions.region(free(state), state.settings.width, state.settings.height, adapter);
      state.regions.push(made);
      state.chosen = made.id;
    });
  }

  /** @param {Region} region */
  copy(region) {
    this.edit("Copy a region", (state) => {
      const made = regions.duplicate(region, free(state));
      state.regions.push(made);
      state.chosen = made.id;
    });
  }

  /** @param {Region} region */
  remove(region) {
    this.edit("Delete a region", (state) => {
      const at = state.regions.indexOf(region);
      state.regions.splice(at, 1);
      state.chosen = (state.regions[at] ?? state.regions[at - 1])?.id ?? 0;
    });
  }

  /** @param {Region} region @param {number} by places */
  move(region, by) {
    this.edit("Move a region", (state) => {
      const at = state.regions.indexOf(region);
      state.regions.splice(at, 1);
      state.regions.splice(Math.max(0, at + by), 0, region);
    });
  }

  /** @param {number} width @param {number} height */
  resize(width, height) {
    this.edit("Another size", (state) => {
      Object.assign(state.settings, { width, height });
      regions.resize(state.regions, width, height);
    });
  }

  /** Put another painting in place of this one. @param {State} next @param {string} label */
  replace(next, label) {
    this.edit(label, () => (this.state = next));
  }

  /** @returns {string | null} what was undone */
  undo() {
    return this.told(this.history.undo());
  }

  /** @returns {string | null} what was done again */
  redo() {
    return this.told(this.history.redo());
  }

  /** Take back the newest step as if it had never been: it cannot be done again. */
  withdraw() {
    const label = this.history.undo();
    this.history.undone = [];
    this.told(label);
  }

  /** @param {string | null} label */
  told(label) {
    if (label !== null) this.heard.changed();
    return label;
  }
}

/** The smallest number that no region has. @param {State} state */
function free(state) {
  let id = 1;
  while (state.regions.some((each) => each.id === id)) id++;
  return id;
}

/** The same state in other objects; bitmaps are shared. @param {State} state @returns {State} */
export function copied(state) {
  return {
    ...state, settings: { ...state.settings },
    regions: state.regions.map((each) => ({ ...each, levels: [...each.levels] })),
  };
}

/** The bytes of bitmaps that only one of two states has. @param {State} a @param {State} b */
function lost(a, b) {
  const all = [a, b].map((state) => new Set(state.regions.flatMap((each) => [each.mask, each.ink])));
  const only = [...all[0]].filter((each) => !all[1].has(each)).concat([...all[1]].filter((each) => !all[0].has(each)));
  return only.reduce((sum, bitmap) => sum + bitmap.data.length, 0);
}

// The files that the server has: each is sent once, for as long as it is the same.

import * as api from "./api.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */

export class Sent {
  /** @param {import("./project.js").Pngs} pngs */
  constructor(pngs) {
    this.pngs = pngs;
    /** @type {WeakMap<Blob, Promise<string>>} */ this.ids = new WeakMap();
  }

  /** Send all anew: the server may have lost them. */
  forget() {
    this.ids = new WeakMap();
  }

  /** @param {Bitmap | Blob} what @returns {Promise<string>} the id of its file */
  async id(what) {
    const { ids } = this, blob = what instanceof Blob ? what : await this.pngs.of(what);
    let id = ids.get(blob);
    if (!id) {
      ids.set(blob, (id = api.keep(blob)));
      id.catch(() => ids.delete(blob));
    }
    return id;
  }
}

// The files that the server has: each is sent once, for as long as it is the same.

import * as api from "./api.js";
import { inShape } from "./image.js";
import { request } from "./regions.js";

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

  /** The request that the server takes, once it has its pictures. @param {import("./regions.js").Region[]} regions @param {import("./regions.js").Settings} settings */
  request(regions, settings) {
    return request(regions, settings, async (what) => this.id(what instanceof Blob ? await inShape(what, settings) : what));
  }
}

// Drawing: one request at a time as a job of the server, a newer one in place of an older, found again after a reload.

import * as api from "./api.js";
import { fromBase64 } from "./image.js";
import * as store from "./store.js";

/**
 * @typedef {{
 *   begun: () => void, progress: (step: number, steps: number) => void, preview: (image: Blob) => void,
 *   done: (picture: Blob, result: any, painted: any) => Promise<void>, ended: (message: string, wrong: boolean) => void,
 * }} Page  painted: what was given to `draw` with the request
 */

const SOON = 1000; // ms: of a picture that is there by then, previews would only delay it
const ENDS = ["failed", "cancelled", "interrupted"];

export class Runner {
  /** @param {Page} page @param {string} tab whose drawing it is */
  constructor(page, tab) {
    this.page = page;
    this.tab = tab;
    /** @type {AbortController | null} */ this.following = null;
    /** @type {string | null} */ this.job = null;
    /** @type {Promise<string | null>} */ this.submitting = Promise.resolve(null); // the last one's sending
    this.begun = 0; // ms: when the picture was asked for that is drawn now; 0 of one that was found again
    this.took = Infinity; // ms that the last picture took
  }

  get busy() {
    return this.following !== null;
  }

  /**
   * Draw a request; one that is drawn for this page gives way.
   * @param {(anew: boolean) => Promise<{body: any, painted: any}>} prepare anew: the server has lost files it was sent
   */
  draw(prepare) {
    const send = async (/** @type {AbortController} */ following, /** @type {boolean} */ anew) => {
      const { body, painted } = await api.again(() => prepare(anew), following.signal);
      if (following.signal.aborted) return;
      const sent = { ...body, session: this.tab, previews: this.took > SOON }, key = store.unique();
      await this.send({ tab: this.tab, key, sent, painted }, following);
    };
    this.begun = performance.now();
    return this.run((following) => send(following, false).catch((error) => {
      if (error instanceof api.Refused && error.status === 404 && !this.job) return send(following, true);
      throw error;
    }));
  }

  /** Find again what was drawn when the page was left. @param {any} pending */
  resume(pending) {
    this.begun = 0;
    return this.run((following) => this.send(pending, following));
  }

  /** @param {(following: AbortController) => Promise<void>} work */
  async run(work) {
    this.following?.abort();
    const following = (this.following = new AbortController());
    this.job = null;
    this.page.begun();
    try {
      await work(following);
    } catch (error) {
      if (following === this.following) this.end(said(error), true);
    }
  }

  /** Send a request, if the server has not got it yet, and follow it. @param {any} pending @param {AbortController} following */
  async send(pending, following) {
    store.expect(pending);
    const before = this.submitting; // an older one that comes later would take this one's place
    const submitted = (async () => {
      await Promise.race([before.catch(() => {}), new Promise((resolve) => setTimeout(resolve, 3000))]);
      if (following !== this.following) return null;
      return pending.id ?? (await api.again(() => api.submit(pending.sent, pending.key), following.signal)).id;
    })();
    this.submitting = submitted;
    const id = await submitted;
    if (id !== null && following.signal.aborted) api.cancel(id).catch(() => {}); // it was cancelled while it was sent
    if (id === null || following !== this.following) return;
    this.job = id;
    store.expect({ ...pending, id });
    for (let end = "interrupted", tries = 0; end === "interrupted" && tries < 5; tries++) {
      if (tries) await api.again(() => api.retry(id), following.signal);
      end = await this.follow(id, pending.painted, following, tries === 4);
    }
  }

  /**
   * @param {string} id @param {any} painted @param {AbortController} following @param {boolean} last whether an interrupted job is an error
   * @returns {Promise<string>} how it ended
   */
  async follow(id, painted, following, last) {
    for await (const { kind, data } of api.events(id, following.signal)) {
      if (following !== this.following) return "left";
      if (kind === "step") this.page.progress(data.step, data.steps);
      else if (kind === "preview") this.page.preview(fromBase64(data.images[0], "image/jpeg"));
      else if (kind === "done") {
        const picture = await api.again(() => api.picture(id, following.signal), following.signal);
        if (following !== this.following) return "left";
        this.following = this.job = null;
        if (this.begun) this.took = performance.now() - this.begun;
        await this.page.done(picture, data, painted);
        if (!this.busy) this.end("", false);
        return kind;
      } else if (ENDS.includes(kind) && (kind !== "interrupted" || last)) {
        this.end(data.error?.message ?? kind, kind !== "cancelled");
        return kind;
      } else if (ENDS.includes(kind)) return kind;
    }
    return "left";
  }

  /** Stop what is drawn. */
  async cancel() {
    const { job, following } = this;
    if (!following) return;
    following.abort();
    this.end("Cancelled.", false);
    if (job) await api.cancel(job).catch(() => {});
  }

  /** @param {string} message @param {boolean} wrong */
  end(message, wrong) {
    this.following = this.job = null;
    store.settled(this.tab);
    this.page.ended(message, wrong);
  }
}

/** @param {any} error */
export function said(error) {
  return error instanceof Error ? error.message : String(error);
}

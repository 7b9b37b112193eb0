// Drawing: one request at a time as a job of the server, a newer one in place of an older, found again after a reload.

import * as api from "./api.js";

/**
 * @typedef {{
 *   begun: () => void, progress: (step: number, steps: number) => void, preview: (image: Blob) => void,
 *   done: (picture: Blob, result: any, body: any) => void, ended: (message: string, wrong: boolean) => void,
 * }} Page
 */

const PENDING = "localcontrol.job";

export class Runner {
  /** @param {Page} page */
  constructor(page) {
    this.page = page;
    /** @type {AbortController | null} */ this.following = null;
    /** @type {string | null} */ this.job = null;
    this.number = 0;
    this.session = sessionStorage.getItem("localcontrol.session") ?? crypto.randomUUID();
    sessionStorage.setItem("localcontrol.session", this.session);
  }

  get busy() {
    return this.following !== null;
  }

  /** Draw a request; one that is drawn for this page gives way. @param {any} body */
  async draw(body) {
    const number = ++this.number, key = crypto.randomUUID();
    this.following?.abort();
    const following = (this.following = new AbortController());
    this.page.begun();
    const sent = { ...body, session: this.session, previews: true };
    try {
      sessionStorage.setItem(PENDING, JSON.stringify({ key, sent }));
      const { id } = await again(() => api.submit(sent, key), following.signal);
      sessionStorage.setItem(PENDING, JSON.stringify({ key, sent, id }));
      if (number === this.number) await this.follow(id, sent, following);
    } catch (error) {
      if (number === this.number) this.end(following.signal.aborted ? "Cancelled." : said(error), !following.signal.aborted);
    }
  }

  /** @param {string} id @param {any} body @param {AbortController} following */
  async follow(id, body, following) {
    this.job = id;
    for await (const { kind, data } of api.events(id, following.signal)) {
      if (following !== this.following) return;
      if (kind === "step") this.page.progress(data.step, data.steps);
      else if (kind === "preview") this.page.preview(await decoded(data.images[0]));
      else if (kind === "done") {
        const picture = await api.picture(`/v1/jobs/${id}/images/0`);
        if (following !== this.following) return;
        this.page.done(picture, data, body);
        this.end("", false);
      } else if (["failed", "cancelled", "interrupted"].includes(kind)) {
        this.end(data.error?.message ?? kind, kind !== "cancelled");
      }
    }
  }

  /** Stop what is drawn. */
  async cancel() {
    const { job, following } = this;
    if (!following) return;
    this.number++;
    following.abort();
    this.end("Cancelled.", false);
    if (job) await api.cancel(job).catch(() => {});
  }

  /** Find again what was drawn when the page was left, or send it again where the server had not got it. */
  async resume() {
    const kept = sessionStorage.getItem(PENDING);
    if (!kept) return;
    const { key, sent, id } = JSON.parse(kept), number = ++this.number;
    const following = (this.following = new AbortController());
    this.page.begun();
    try {
      const known = id ?? (await again(() => api.submit(sent, key), following.signal)).id;
      if (number === this.number) await this.follow(known, sent, following);
    } catch (error) {
      if (number === this.number) this.end(said(error), true);
    }
  }

  /** @param {string} message @param {boolean} wrong */
  end(message, wrong) {
    this.following = this.job = null;
    sessionStorage.removeItem(PENDING);
    this.page.ended(message, wrong);
  }
}

/**
 * Try until the server has room or is there again.
 * @template T @param {() => Promise<T>} call @param {AbortSignal} signal @returns {Promise<T>}
 */
async function again(call, signal) {
  for (let tries = 0; ; tries++) {
    try {
      return await call();
    } catch (error) {
      const later = !(error instanceof api.Refused) || [429, 503].includes(error.status);
      if (!later || signal.aborted || tries >= 40) throw error;
      await new Promise((resolve) => setTimeout(resolve, 250 + 250 * Math.min(tries, 8)));
      if (signal.aborted) throw error;
    }
  }
}

/** @param {string} base64 */
async function decoded(base64) {
  return new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/jpeg" });
}

/** @param {any} error */
function said(error) {
  return error instanceof api.Refused ? error.message : "The server does not answer; your painting is safe here.";
}

// When a change is drawn while the page is live: as soon as it is quiet; of a stroke that goes on, picture by picture.

export const QUIET = 250; // ms without a change
export const LATEST = 3000; // ms after the first change that was not drawn, at most

export class Live {
  /**
   * @param {() => void} draw
   * @param {{now: () => number, set: (f: () => void, ms: number) => any, clear: (timer: any) => void}} [clock]
   */
  constructor(draw, clock) {
    this.draw = draw;
    this.clock = clock ?? { now: () => performance.now(), set: setTimeout.bind(null), clear: clearTimeout.bind(null) };
    this.painting = () => false; // whether a stroke goes on
    this.busy = () => false; // whether a picture is drawn
    this.waiting = false; // for the picture that is drawn: to replace each one would show none
    /** @type {number | null} */ this.first = null;
    /** @type {any} */ this.timer = null;
  }

  /** Something has changed. */
  change() {
    const now = this.clock.now(), patience = this.painting() ? QUIET : LATEST;
    this.first ??= now;
    this.clock.clear(this.timer);
    this.timer = this.clock.set(() => this.fire(), Math.max(0, Math.min(QUIET, this.first + patience - now)));
  }

  /** Draw now, or after the picture that is drawn while a stroke goes on. */
  fire() {
    const waits = this.painting() && this.busy();
    this.stop();
    this.waiting = waits;
    if (!waits) this.draw();
  }

  /** A picture is there. */
  drawn() {
    if (this.waiting) this.fire();
  }

  /** Forget what has changed. */
  stop() {
    this.clock.clear(this.timer);
    this.first = this.timer = null;
    this.waiting = false;
  }
}

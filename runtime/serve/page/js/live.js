// When a change is drawn while the page is live: as soon as it is quiet, and now and then while it is not.

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
    this.took = LATEST; // ms that the last picture took: while one paints on, a new one is begun that often
    /** @type {number | null} */ this.first = null;
    /** @type {any} */ this.timer = null;
  }

  /** Something has changed. */
  change() {
    const now = this.clock.now(), patience = Math.min(LATEST, Math.max(QUIET, 1.2 * this.took));
    this.first ??= now;
    this.clock.clear(this.timer);
    this.timer = this.clock.set(() => this.fire(), Math.max(0, Math.min(QUIET, this.first + patience - now)));
  }

  /** Draw now. */
  fire() {
    this.stop();
    this.draw();
  }

  /** Forget what has changed. */
  stop() {
    this.clock.clear(this.timer);
    this.first = this.timer = null;
  }
}

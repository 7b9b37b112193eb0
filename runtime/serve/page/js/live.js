// When to draw while somebody paints: a while after the last change, but not later than a longer one after the first.

export const QUIET = 250; // ms without a change
export const LATEST = 3000; // ms after the first change that was not drawn

export class Live {
  /**
   * @param {() => void} draw
   * @param {{now: () => number, set: (f: () => void, ms: number) => any, clear: (timer: any) => void}} [clock]
   */
  constructor(draw, clock) {
    this.draw = draw;
    this.clock = clock ?? { now: () => performance.now(), set: setTimeout.bind(null), clear: clearTimeout.bind(null) };
    /** @type {number | null} */ this.first = null;
    /** @type {any} */ this.timer = null;
  }

  /** Something has changed. */
  change() {
    const now = this.clock.now();
    this.first ??= now;
    this.clock.clear(this.timer);
    this.timer = this.clock.set(() => this.fire(), Math.max(0, Math.min(QUIET, this.first + LATEST - now)));
  }

  /** Draw now, if anything has changed. */
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

import assert from "node:assert/strict";
import { test } from "node:test";

import { LATEST, Live, QUIET } from "../../runtime/serve/page/js/live.js";

test("live waits for quiet, but not for ever", () => {
  let now = 0, timers = [], drawn = [];
  const clock = {
    now: () => now,
    set: (f, ms) => (timers = [{ f, at: now + ms }])[0],
    clear: (timer) => (timers = timers.filter((each) => each !== timer)),
  };
  const live = new Live(() => drawn.push(now), clock);
  const until = (time) => {
    while (timers.length && timers[0].at <= time) {
      now = timers[0].at;
      const { f } = timers.shift();
      f();
    }
    now = time;
  };
  live.change();
  until(1000);
  assert.deepEqual(drawn, [QUIET]);
  for (let t = 1000; t <= 9000; t += 100) {
    until(t);
    live.change();
  }
  assert.ok(drawn.length >= 3);
  assert.ok(drawn.slice(1).every((at, i) => at - (i ? drawn[i] : 1000) <= LATEST + 100));
  live.stop();
  drawn = [];
  live.painting = () => true; // a stroke that goes on is drawn picture by picture, each of 300 ms
  live.busy = () => drawn.length > 0 && now < drawn[drawn.length - 1] + 300;
  for (let t = 10000; t <= 12000; t += 20) {
    until(t);
    if (!live.busy()) live.drawn();
    live.change();
  }
  assert.ok(drawn.length >= 6 && drawn.slice(1).every((at, i) => at - drawn[i] >= 300 && at - drawn[i] <= 320), drawn);
  live.painting = () => false; // at its end the newest takes the running one's place
  drawn = [now];
  live.change();
  until(now + 250);
  assert.deepEqual(drawn, [now - 250, now]);
  live.change();
  live.stop();
  until(20000);
  assert.equal(drawn.length, 2);
});

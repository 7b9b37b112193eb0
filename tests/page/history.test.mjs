import assert from "node:assert/strict";
import { test } from "node:test";

import { create, invert, segment, whole } from "../../runtime/serve/page/js/bitmap.js";
import { History, LEAST, MOST, MOST_BYTES, Recording } from "../../runtime/serve/page/js/history.js";

test("a hundred strokes are undone and done again, to the pixel", () => {
  const bitmap = create(200, 150), history = new History(), states = [bitmap.data.slice()];
  for (let i = 0; i < 100; i++) {
    const recording = new Recording(bitmap);
    const a = { x: (i * 37) % 200, y: (i * 53) % 150 }, b = { x: (i * 71) % 200, y: (i * 29) % 150 };
    recording.keep(whole(bitmap));
    if (i % 10 === 9) invert(bitmap);
    else segment(bitmap, a, b, 2 + (i % 9), 2 + (i % 9), i % 4 === 3 ? [0] : [255]);
    const step = recording.step("stroke", () => {});
    if (step) {
      history.add(step);
      states.push(bitmap.data.slice());
    }
  }
  assert.ok(states.length > 64);
  for (let i = states.length - 2; i >= 0; i--) {
    assert.equal(history.undo(), "stroke");
    assert.deepEqual(bitmap.data, states[i]);
  }
  assert.equal(history.undo(), null);
  for (let i = 1; i < states.length; i++) {
    history.redo();
    assert.deepEqual(bitmap.data, states[i]);
  }
  assert.equal(history.redo(), null);
});

test("only what was touched is kept, and one colour as a number", () => {
  const bitmap = create(1024, 1024), recording = new Recording(bitmap);
  recording.keep({ x: 60, y: 60, width: 10, height: 10 });
  segment(bitmap, { x: 64, y: 64 }, { x: 64, y: 64 }, 3, 3, [255]);
  const step = recording.step("dot", () => {});
  assert.ok(step.bytes < 5 * 64 * 64);
  const all = new Recording(create(2048, 2048));
  all.keep(whole(all.bitmap));
  invert(all.bitmap);
  assert.ok(all.step("invert", () => {}).bytes < 20000);
});

test("what changed nothing is no step", () => {
  const recording = new Recording(create(10, 10));
  recording.keep({ x: 0, y: 0, width: 10, height: 10 });
  assert.equal(recording.step("nothing", () => {}), null);
});

test("bounded in bytes, but never below the least", () => {
  const history = new History(), step = () => ({ label: "x", bytes: MOST_BYTES / 70, undo() {}, redo() {} });
  for (let i = 0; i < 200; i++) history.add(step());
  assert.equal(history.done.length, 70);
  for (let i = 0; i < 300; i++) history.add({ ...step(), bytes: 1 });
  assert.equal(history.done.length, MOST);
  for (let i = 0; i < 200; i++) history.add({ ...step(), bytes: MOST_BYTES });
  assert.equal(history.done.length, LEAST);
});

test("what is done after an undo takes the place of what was undone", () => {
  const history = new History(), said = [];
  for (const label of ["a", "b"]) history.add({ label, bytes: 1, undo: () => said.push(`-${label}`), redo: () => said.push(label) });
  history.undo();
  history.add({ label: "c", bytes: 1, undo() {}, redo() {} });
  assert.equal(history.redo(), null);
  assert.deepEqual([history.undo(), history.undo(), said], ["c", "a", ["-b", "-a"]]);
});

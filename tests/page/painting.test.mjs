import assert from "node:assert/strict";
import { test } from "node:test";

import { invert } from "../../runtime/serve/page/js/bitmap.js";
import { Painting } from "../../runtime/serve/page/js/painting.js";
import { region } from "../../runtime/serve/page/js/regions.js";

const settings = { prompt: "a", negative_prompt: "", width: 8, height: 8, steps: 10, guidance: 5, scheduler: "", preset: "", seed: 1, held: false, start: null, strength: 0.6, draftSize: 1, draftSteps: 6, draftPreset: "" };
const made = () => {
  const heard = { shown: 0, changed: 0 };
  const painting = new Painting({ regions: [region(1, 8, 8, "canny")], chosen: 1, settings: { ...settings } }, {
    shown: () => heard.shown++, changed: () => heard.changed++,
  });
  return { painting, heard };
};
const names = ({ state }) => state.regions.map((each) => each.name);

test("every change of the list is undone and done again", () => {
  const { painting } = made(), states = [names(painting)];
  const steps = [
    () => painting.add("canny"), () => painting.copy(painting.state.regions[0]), () => painting.move(painting.state.regions[2], -2),
    () => painting.change({ name: "sky" }, "Name"), () => painting.remove(painting.state.regions[1]),
  ];
  for (const step of steps) {
    step();
    states.push(names(painting));
  }
  for (let i = states.length - 2; i >= 0; i--) {
    painting.undo();
    assert.deepEqual(names(painting), states[i]);
  }
  assert.equal(painting.undo(), null);
  for (let i = 1; i < states.length; i++) {
    painting.redo();
    assert.deepEqual(names(painting), states[i]);
  }
});

test("what is slid or typed is one step, and another field is another", () => {
  const { painting } = made();
  for (const scale of [0.9, 0.8, 0.7]) painting.change({ scale }, "Strength");
  for (const prompt of ["a", "a b", "a b c"]) painting.set({ prompt }, "Prompt");
  painting.change({ scale: 0.1 }, "Strength");
  assert.equal(painting.history.done.length, 3);
  painting.undo();
  assert.equal(painting.chosen.scale, 0.7);
  painting.undo();
  assert.deepEqual([painting.settings.prompt, painting.chosen.scale], ["a", 0.7]);
  painting.undo();
  assert.equal(painting.chosen.scale, 1);
  painting.redo();
  assert.equal(painting.chosen.scale, 0.7);
  painting.change({ scale: 0.2 }, "Strength"); // not the slide of before
  painting.undo();
  assert.equal(painting.chosen.scale, 0.7);
});

test("pixels, sizes and whole paintings are undone together, in their order", () => {
  const { painting } = made(), first = painting.chosen.mask;
  painting.rework(painting.target, "Invert", invert);
  painting.resize(16, 16);
  painting.rework(painting.target, "Clear", ({ data }) => data.fill(0));
  assert.equal(painting.chosen.mask.width, 16);
  painting.undo();
  assert.ok(painting.chosen.mask.data.every((value) => value === 255));
  painting.undo();
  assert.equal(painting.chosen.mask, first);
  painting.undo();
  assert.ok(first.data.every((value) => value === 0));
  for (let i = 0; i < 3; i++) painting.redo();
  assert.ok(painting.chosen.mask.width === 16 && painting.chosen.mask.data.every((value) => value === 0));
  const version = painting.version(painting.chosen.mask);
  painting.undo();
  assert.ok(painting.version(painting.chosen.mask) > version); // its file is sent again
  painting.replace({ ...made().painting.state, chosen: 0, regions: [] }, "Open");
  assert.equal(painting.target, null);
  painting.undo();
  assert.equal(painting.target.width, 16);
});

test("a region's number is the smallest that is free", () => {
  const { painting } = made(), ids = () => painting.state.regions.map((each) => each.id);
  for (let i = 0; i < 3; i++) painting.add("canny");
  painting.remove(painting.state.regions[1]);
  painting.add("canny");
  assert.deepEqual(ids(), [1, 3, 4, 2]);
  painting.undo();
  painting.undo();
  assert.deepEqual(ids(), [1, 2, 3, 4]);
});

test("a copy shares nothing with its original", () => {
  const { painting } = made();
  painting.copy(painting.chosen);
  painting.rework(painting.target, "Invert", invert);
  painting.change({ levels: [0, 0, 0, 0] }, "Level 1");
  const [one, two] = painting.state.regions;
  assert.ok(one.mask.data[0] === 0 && two.mask.data[0] === 255 && one.levels[0] === 1);
});

test("what changed nothing is no step, and nothing to paint on is no error", () => {
  const { painting } = made();
  painting.rework(painting.target, "Clear", ({ data }) => data.fill(0));
  painting.remove(painting.chosen);
  painting.rework(painting.target, "Clear", ({ data }) => data.fill(0));
  assert.equal(painting.history.done.length, 1);
});

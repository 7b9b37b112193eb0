import assert from "node:assert/strict";
import { test } from "node:test";

import { fromSettings } from "../../runtime/serve/page/js/metadata.js";

const page = { draftSize: 1, draftSteps: 6, draftPreset: "" };
const size = { width: 64, height: 64 };
const said = {
  prompt: "a star", negative_prompt: "", steps: "3", guidance: "5.0", width: "64", height: "64", seed: "7", strength: "1.0",
  scheduler: "EulerDiscreteScheduler", outside: "free", regions: "[]", mask_resize: "area", software: "localcontrol 0.1.0",
};

test("a picture's settings are the page's again, with nothing missing", async () => {
  const { packed, missing } = await fromSettings(said, page, size);
  assert.deepEqual(missing, []);
  assert.deepEqual([packed.settings.prompt, packed.settings.seed, packed.settings.guidance, packed.settings.scheduler], ["a star", 7, 5, ""]);
});

test("what the page cannot draw in the same way is named", async () => {
  assert.deepEqual((await fromSettings({ ...said, mask_resize: "nearest" }, page, size)).missing, ["mask_resize"]);
  const { missing } = await fromSettings({ ...said, seed: "9007199254740993" }, page, size); // Number makes ...992 of it
  assert.equal(missing.length, 1);
  assert.match(missing[0], /seed, 9007199254740993/);
});

test("an edit, whose size is its image's own, has that of its picture", async () => {
  const edit = { ...said, width: "null", height: "null", outside: "held", image: "a".repeat(64) };
  const { packed, missing } = await fromSettings(edit, page, { width: 60, height: 81 });
  assert.deepEqual([packed.settings.width, packed.settings.height, packed.settings.held], [64, 96, true]);
  assert.deepEqual(missing, ["image"]);
});

import assert from "node:assert/strict";
import { test } from "node:test";

import * as regions from "../../runtime/serve/page/js/regions.js";

const settings = { prompt: "a", negative_prompt: "", width: 8, height: 8, steps: 10, guidance: 5, scheduler: "", preset: "", seed: 1, held: false, start: null, strength: 0.6, draftSize: 1, draftSteps: 6, draftPreset: "" };

test("what is asked for is what is painted, and what is missing is said", async () => {
  const one = regions.region(1, 8, 8, "canny"), two = regions.region(2, 8, 8, "canny");
  assert.match(regions.warnings([one], settings)[0].text, /mask is empty/);
  one.mask.data.fill(255, 0, 8);
  assert.match(regions.warnings([one], settings)[0].text, /no words and no condition/);
  one.words = "a door";
  assert.deepEqual(regions.warnings([one], settings), []);
  two.mask.data.fill(255);
  two.ink.data.fill(255, 3, 9);
  Object.assign(two, { start: 0.5, end: 0.52 });
  assert.match(regions.warnings([two], settings)[0].text, /less than one step/);
  const body = await regions.request([one, two], { ...settings, held: true }, async (bitmap) => `${bitmap.channels}:${bitmap.data[0]}`);
  assert.deepEqual(body.regions, [
    { mask: "1:255", start: 0, end: 1, prompt: "a door" },
    { mask: "1:255", start: 0.5, end: 0.52, condition: "3:0", adapter: "canny", scale: 1, levels: [1, 1, 1, 1] },
  ]);
  assert.equal(body.outside, "held");
  two.solo = true;
  assert.equal((await regions.request([one, two], settings, async () => "x")).regions.length, 1);
});

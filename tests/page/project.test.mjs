import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { test } from "node:test";

import { checked, command, fromText, fromZip, toText, toZip } from "../../runtime/serve/page/js/project.js";
import { region } from "../../runtime/serve/page/js/regions.js";

const settings = { prompt: "it's $HOME", negative_prompt: "", width: 16, height: 16, steps: 10, guidance: 5, scheduler: "euler", preset: "", seed: 1, held: true, start: null, strength: 0.6, draftSize: 1, draftSteps: 6, draftPreset: "" };
const blob = (text) => new Blob([text], { type: "image/png" });
const painted = () => {
  const one = region(3, 16, 16, "canny");
  one.mask.data.fill(255);
  one.ink.data.fill(9);
  const state = { regions: [one, region(5, 16, 16, "sketch")], chosen: 5, settings };
  const packed = { ...state, regions: state.regions.map((each) => ({ ...each, mask: blob(`m${each.id}`), ink: blob(`i${each.id}`) })) };
  return { state, packed };
};
const texts = (regions) => Promise.all(regions.flatMap((each) => [each.mask.text(), each.ink.text()]));

test("a project's zip is opened as it was saved, and says what runtime.generate reads", async () => {
  const { state, packed } = painted(), bytes = new Uint8Array(await (await toZip(state, packed, "embedded", blob("drawn"))).arrayBuffer());
  const { packed: found, picture } = fromZip(bytes);
  assert.equal(await picture.text(), "drawn");
  assert.deepEqual(await texts(found.regions), ["m3", "i3", "m5", "i5"]);
  assert.deepEqual({ ...found.settings }, settings);
  assert.deepEqual([found.chosen, found.regions[1].adapter], [2, "sketch"]);
  const text = new TextDecoder().decode(bytes), listed = JSON.parse(text.slice(text.indexOf("[\n  {"), text.indexOf("\n]\n") + 2));
  assert.deepEqual(listed, [{ mask: "mask-3.png", start: 0, end: 1, condition: "condition-3.png", adapter: "canny", scale: 1, levels: [1, 1, 1, 1] }]);
});

test("the command's words reach the program as they are", () => {
  const { state } = painted(), line = command(state, "embedded");
  const said = execFileSync("sh", ["-c", line.replace("python -m runtime.generate", "printf '%s\\n'")]).toString().trim().split("\n");
  assert.deepEqual(said, [
    "--prompt=it's $HOME", "--width=16", "--height=16", "--steps=10", "--guidance=5", "--seed=1", "--scheduler=euler",
    "--regions=regions.json", "--outside=held", "--out=picture.png",
  ]);
});

test("a painting as text is the same painting", async () => {
  const { packed } = painted(), found = fromText(await toText(packed));
  assert.deepEqual(await texts(found.regions), ["m3", "i3", "m5", "i5"]);
  const started = fromText(await toText({ ...packed, settings: { ...settings, start: blob("start") } }));
  assert.equal(await started.settings.start.text(), "start");
});

test("what is wrong in a stranger's project is named", async () => {
  const good = JSON.parse(await toText(painted().packed));
  const refused = (change, said) => {
    const bad = structuredClone(good);
    change(bad);
    assert.throws(() => checked(JSON.stringify(bad), blob, null), said);
  };
  assert.throws(() => fromText("{"), /project: its description is cut short/);
  refused((each) => delete each.settings.seed, /settings.seed: undefined; expected a number/);
  refused((each) => (each.settings.width = 1e9), /settings.width: 1000000000; expected 16 to/);
  refused((each) => (each.regions[1].scale = "strong"), /regions\[1\].scale: string; expected a number/);
  refused((each) => (each.regions[0].levels = [1]), /regions\[0\].levels: expected four numbers/);
  refused((each) => (each.regions = 3), /regions: missing; expected a list/);
  refused((each) => (each.regions[0] = null), /regions\[0\].name: undefined/);
  refused((each) => (each.regions[0].colour = 99), /regions\[0\].colour/);
});

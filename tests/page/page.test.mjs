import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { blocks, parse } from "../../runtime/serve/page/js/api.js";
import { LATEST, Live, QUIET } from "../../runtime/serve/page/js/live.js";
import { texts } from "../../runtime/serve/page/js/png.js";
import * as regions from "../../runtime/serve/page/js/regions.js";
import { View } from "../../runtime/serve/page/js/view.js";
import * as zip from "../../runtime/serve/page/js/zip.js";

test("events come whole, however the network cuts them", async () => {
  const text = 'id: 1\nevent: step\ndata: {"step": 1, "word": "ä"}\n\n: still here\n\nid: 2\nevent: done\ndata: {}\n\n';
  const bytes = new TextEncoder().encode(text);
  for (const size of [1, 3, 1000]) {
    const stream = new ReadableStream({
      start(controller) {
        for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
        controller.close();
      },
    });
    const found = [];
    for await (const block of blocks(stream)) found.push(parse(block));
    assert.deepEqual(found, [
      { kind: "step", data: { step: 1, word: "ä" }, number: "1" }, null, { kind: "done", data: {}, number: "2" },
    ]);
  }
});

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
});

test("zooming keeps the point under the cursor", () => {
  const view = new View();
  view.fit(128, 64, 800, 600);
  for (const factor of [1.3, 7, 0.01, 1000]) {
    const at = { x: 321, y: 123 }, before = view.toPicture(at);
    view.zoom(factor, at);
    const after = view.toPicture(at);
    assert.ok(Math.hypot(after.x - before.x, after.y - before.y) < 1e-6);
  }
});

const settings = { prompt: "a", negative_prompt: "", width: 8, height: 8, steps: 10, guidance: 5, scheduler: "", preset: "", seed: 1, held: false, start: null, strength: 0.6 };

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
  const body = await regions.request([one, two], { ...settings, held: true }, async (bitmap) => `id${bitmap.data[0]}`);
  assert.deepEqual(body.regions, [
    { mask: "id255", start: 0, end: 1, prompt: "a door" },
    { mask: "id255", start: 0.5, end: 0.52, condition: "id0", adapter: "canny", scale: 1, levels: [1, 1, 1, 1] },
  ]);
  assert.equal(body.outside, "held");
  two.solo = true;
  assert.equal((await regions.request([one, two], settings, async () => "x")).regions.length, 1);
});

test("a project's zip is one that others read, and is read again", () => {
  const entries = [{ name: "a/ä.txt", data: new TextEncoder().encode("hello") }, { name: "b.bin", data: new Uint8Array(1000).fill(7) }];
  const bytes = zip.write(entries);
  assert.deepEqual(zip.read(bytes), entries);
  const file = join(mkdtempSync(join(tmpdir(), "zip-")), "a.zip");
  writeFileSync(file, bytes);
  const said = execFileSync("python3", ["-c", "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); assert z.testzip() is None; print(z.namelist())", file]);
  assert.equal(said.toString().trim(), "['a/ä.txt', 'b.bin']");
  assert.throws(() => zip.read(new Uint8Array(50)), /not a project/);
});

test("a PNG's texts are read, whichever chunk has them", () => {
  const file = join(mkdtempSync(join(tmpdir(), "png-")), "a.png");
  execFileSync("python3", ["-c", `
import sys, zlib, struct
def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
open(sys.argv[1], "wb").write(b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"tEXt", b"seed\\x007") + chunk(b"iTXt", "prompt\\0\\0\\0\\0\\0ein Fuß".encode()) + chunk(b"IEND", b""))`, file]);
  const data = readFileSync(file);
  assert.deepEqual(texts(data.buffer.slice(data.byteOffset, data.byteOffset + data.length)), { seed: "7", prompt: "ein Fuß" });
  assert.deepEqual(texts(new ArrayBuffer(4)), {});
});

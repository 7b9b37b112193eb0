import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { encoded, texts, withText } from "../../runtime/serve/page/js/png.js";

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

test("a text is written where every reader finds it, and the picture stays as it was", () => {
  const file = join(mkdtempSync(join(tmpdir(), "png-")), "a.png");
  execFileSync("python3", ["-c", `
import sys, zlib, struct
def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
open(sys.argv[1], "wb").write(b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\\0\\x7f")) + chunk(b"IEND", b""))`, file]);
  const made = withText(readFileSync(file), "painting", "{\"ä\": 1}");
  assert.equal(texts(made.buffer).painting, "{\"ä\": 1}");
  assert.equal(withText(made, "painting", "{\"ä\": 1}").length, made.length); // in its place, and not beside it
  writeFileSync(file, made);
  const said = execFileSync("python3", ["-c", `
import sys, zlib, struct
data, at = open(sys.argv[1], "rb").read(), 8
while at < len(data):
    size, kind = struct.unpack(">I4s", data[at:at + 8])
    assert zlib.crc32(data[at + 4:at + 8 + size]) == struct.unpack(">I", data[at + 8 + size:at + 12 + size])[0]
    print(kind.decode(), end=" ")
    at += 12 + size`, file]);
  assert.equal(said.toString().trim(), "IHDR IDAT iTXt IEND");
});

test("pixels are written as a PNG that others read, grey and in colour", async () => {
  for (const channels of [1, 3]) {
    const width = 5, height = 4, data = Uint8ClampedArray.from({ length: width * height * channels }, (_, i) => (i * 97) % 256);
    const made = await encoded({ width, height, channels, data });
    const read = execFileSync("python3", ["-c", `
import sys, zlib, struct
data, at, chunks = sys.stdin.buffer.read(), 8, {}
while at < len(data):
    size, kind = struct.unpack(">I4s", data[at:at + 8])
    assert zlib.crc32(data[at + 4:at + 8 + size]) == struct.unpack(">I", data[at + 8 + size:at + 12 + size])[0]
    chunks[kind] = data[at + 8:at + 8 + size]
    at += 12 + size
width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
row = width * {0: 1, 2: 3}[colour]
rows, before, found = zlib.decompress(chunks[b"IDAT"]), bytes(row), []
for y in range(height):
    line = rows[y * (1 + row):(y + 1) * (1 + row)]
    assert line[0] == 2  # the difference to the row above
    before = bytes((a + b) % 256 for a, b in zip(line[1:], before))
    found += before
print([width, height, depth, found], rest)`], { input: made });
    assert.equal(read.toString().trim().replaceAll(" ", ""), `[${width},${height},8,[${data}]][0,0,0]`);
  }
});

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import * as zip from "../../runtime/serve/page/js/zip.js";

test("a project's zip is one that others read, and is read again", () => {
  const entries = [{ name: "a/ä.txt", data: new TextEncoder().encode("hello") }, { name: "b.bin", data: new Uint8Array(1000).fill(7) }];
  const bytes = zip.write(entries);
  assert.deepEqual(zip.read(bytes), entries);
  const file = join(mkdtempSync(join(tmpdir(), "zip-")), "a.zip");
  writeFileSync(file, bytes);
  const said = execFileSync("python3", ["-c", "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); assert z.testzip() is None; print(z.namelist())", file]);
  assert.equal(said.toString().trim(), "['a/ä.txt', 'b.bin']");
  assert.throws(() => zip.read(new Uint8Array(50)), /project: cut short/);
});

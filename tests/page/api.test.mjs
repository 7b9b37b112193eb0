import assert from "node:assert/strict";
import { test } from "node:test";

import { blocks, parse } from "../../runtime/serve/page/js/api.js";

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

import assert from "node:assert/strict";
import { test } from "node:test";

import { View } from "../../runtime/serve/page/js/view.js";

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

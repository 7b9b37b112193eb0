import assert from "node:assert/strict";
import { test } from "node:test";

import * as b from "../../runtime/serve/page/js/bitmap.js";
import { distances, feather, grow } from "../../runtime/serve/page/js/distance.js";

const rows = (bitmap) => Array.from({ length: bitmap.height }, (_, y) =>
  [...bitmap.data.subarray(y * bitmap.width, (y + 1) * bitmap.width)].map((v) => (v > 127 ? "#" : ".")).join(""));
const of = (...lines) => {
  const made = b.create(lines[0].length, lines.length);
  lines.join("").split("").forEach((c, i) => (made.data[i] = c === "#" ? 255 : 0));
  return made;
};

test("a dot is round and its edge soft", () => {
  const made = b.create(9, 9);
  const rect = b.segment(made, { x: 4.5, y: 4.5 }, { x: 4.5, y: 4.5 }, 2, 2, [255]);
  assert.deepEqual(rows(made).slice(2, 7), ["....#....", "...###...", "..#####..", "...###...", "....#...."]);
  assert.ok(made.data.some((v) => v > 0 && v < 255));
  assert.deepEqual(rect, { x: 1, y: 1, width: 7, height: 7 });
});

test("a stroke leaves no gap, whichever way it goes, and stays inside", () => {
  for (const [dx, dy] of [[30, 0], [0, 30], [30, 30], [-30, 13]]) {
    const made = b.create(40, 40);
    b.segment(made, { x: 20 - dx / 2, y: 20 - dy / 2 }, { x: 20 + dx / 2, y: 20 + dy / 2 }, 1.5, 1.5, [255]);
    for (let t = -0.5; t <= 0.5; t += 0.01) {
      assert.ok(made.data[Math.floor(20 + t * dy) * 40 + Math.floor(20 + t * dx)] > 100);
    }
  }
  const made = b.create(8, 8);
  assert.deepEqual(b.segment(made, { x: -50, y: -50 }, { x: -40, y: -40 }, 3, 3, false).width * 1, 0);
  b.segment(made, { x: -5, y: 4 }, { x: 20, y: 4 }, 2, 2, [255]);
  assert.equal(rows(made)[4], "########");
});

test("an eraser takes away, and only there", () => {
  const made = b.create(20, 5);
  made.data.fill(255);
  b.segment(made, { x: 10, y: 2.5 }, { x: 10, y: 2.5 }, 2, 2, [0]);
  assert.equal(made.data[2 * 20 + 10], 0);
  assert.equal(made.data[2 * 20 + 3], 255);
});

test("pressure changes the width along the way", () => {
  const made = b.create(60, 20);
  b.segment(made, { x: 5, y: 10 }, { x: 55, y: 10 }, 1, 8, [255]);
  const height = (x) => rows(made).filter((row) => row[x] === "#").length;
  assert.ok(height(10) < height(30) && height(30) < height(50));
});

test("rectangle, lasso and fill", () => {
  const made = b.create(6, 4);
  b.rectangle(made, { x: 4, y: 3 }, { x: 1, y: 1 }, [255]);
  assert.deepEqual(rows(made), ["......", ".###..", ".###..", "......"]);
  const star = b.create(10, 10);
  b.lasso(star, [{ x: 0, y: 0 }, { x: 10, y: 0 }, { x: 10, y: 10 }], [255]);
  assert.deepEqual([0, 5, 9].map((y) => rows(star)[y]), [".#########", "......####", ".........."]);
  const ring = of("#####", "#...#", "#.#.#", "#...#", "#####");
  b.flood(ring, { x: 1.5, y: 1.5 }, [255]);
  assert.deepEqual(rows(ring), Array(5).fill("#####"));
  b.flood(ring, { x: 0, y: 0 }, [0]);
  assert.ok(b.isEmpty(ring));
  assert.equal(b.flood(ring, { x: -3, y: 0 }, [255]).width, 0);
});

test("distances are exact", () => {
  const made = b.create(23, 17), spots = [[3, 4], [20, 2], [11, 16]];
  for (const [x, y] of spots) made.data[y * 23 + x] = 255;
  const found = distances(made, (v) => v > 0);
  for (let y = 0; y < 17; y++) {
    for (let x = 0; x < 23; x++) {
      assert.equal(found[y * 23 + x], Math.min(...spots.map(([a, c]) => (a - x) ** 2 + (c - y) ** 2)));
    }
  }
});

test("feathering softens inwards only, as the program's own does", () => {
  const made = b.create(20, 1);
  made.data.fill(255, 5, 15);
  feather(made, 4);
  // runtime.control.masks.feather: (distance - 0.5) / radius, of a distance of 1 at the edge
  assert.deepEqual([...made.data.subarray(4, 10)], [0, 32, 96, 159, 223, 255]);
  const full = b.create(4, 4);
  full.data.fill(255);
  feather(full, 3);
  assert.ok(full.data.every((v) => v === 255));
});

test("growing and shrinking undo each other on a plain shape", () => {
  const made = b.create(21, 21);
  b.rectangle(made, { x: 6, y: 6 }, { x: 15, y: 15 }, [255]);
  const before = made.data.slice();
  grow(made, 3);
  assert.equal(made.data[10 * 21 + 3], 255);
  assert.equal(made.data[10 * 21 + 2], 0);
  grow(made, -3);
  assert.deepEqual(made.data, before);
});

test("a condition is painted in colour, and its edges stay as soft however often", () => {
  const made = b.create(12, 3, 3), dot = [{ x: 6, y: 1.5 }, { x: 6, y: 1.5 }, 2, 2];
  for (let i = 0; i < 9; i++) b.segment(made, ...dot, [255, 128, 0]);
  assert.deepEqual([...made.data.subarray(3 * 18, 3 * 18 + 3)], [255, 128, 0]);
  const white = [1, 9].map((times) => {
    const one = b.create(12, 3, 3);
    for (let i = 0; i < times; i++) b.segment(one, ...dot, [255, 255, 255]);
    return one.data;
  });
  assert.deepEqual(white[0], white[1]);
  b.flood(made, { x: 0, y: 0 }, [0, 0, 200]);
  assert.deepEqual([...made.data.subarray(0, 3), ...made.data.subarray(3 * 18, 3 * 18 + 3)], [0, 0, 200, 255, 128, 0]);
  const square = b.create(20, 20, 3);
  b.outline(square, [{ x: 4, y: 4 }, { x: 16, y: 4 }, { x: 16, y: 16 }, { x: 4, y: 16 }], 1, [255, 255, 255]);
  assert.deepEqual([[4, 10], [16, 10], [10, 4], [10, 10]].map(([x, y]) => square.data[3 * (20 * y + x)] > 127), [true, true, true, false]);
  b.rectangle(made, { x: 0, y: 0 }, { x: 12, y: 3 }, [0, 0, 0]);
  assert.ok(b.isEmpty(made));
  assert.deepEqual([...b.resized(b.create(2, 2, 3), 4, 4).data], Array(48).fill(0));
});

test("another size keeps the picture", () => {
  assert.deepEqual(rows(b.resized(of("#.", ".#"), 4, 4)), ["##..", "##..", "..##", "..##"]);
});

test("a brush event on a large mask is quick", () => {
  const made = b.create(2048, 2048), start = performance.now();
  for (let i = 0; i < 100; i++) b.segment(made, { x: 10 * i, y: 900 }, { x: 10 * i + 10, y: 905 }, 20, 20, [255]);
  assert.ok((performance.now() - start) / 100 < 16);
});

// What is there at the first visit: a region that is painted, with a heart drawn in it.

import { lasso, segment } from "./bitmap.js";
import { region } from "./regions.js";

/** @param {any} can the server's capabilities @returns {any} */
export function example(can) {
  const side = can.sizes.default, at = (/** @type {number} */ x, /** @type {number} */ y) => ({ x: x * side, y: y * side });
  const first = region(1, side, side, can.default_adapter);
  first.name = "A star";
  const star = Array.from({ length: 10 }, (_, i) => {
    const angle = (Math.PI * i) / 5 - Math.PI / 2, radius = i % 2 ? 0.1 : 0.24;
    return at(0.32 + radius * Math.cos(angle), 0.5 + radius * Math.sin(angle));
  });
  star.forEach((p, i) => segment(first.ink, p, star[(i + 1) % 10], side / 128, side / 128, false));
  lasso(first.mask, [at(0.03, 0.2), at(0.6, 0.2), at(0.6, 0.8), at(0.03, 0.8)], 255);
  return {
    regions: [first], chosen: 1, next: 2,
    settings: {
      prompt: "a yellow star and a blue circle at night", negative_prompt: "", width: side, height: side,
      steps: can.model === "embedded" ? 12 : 20, guidance: 5, scheduler: "", preset: "", seed: 7, held: false, start: null, strength: 0.6,
    },
  };
}

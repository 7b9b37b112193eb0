// What is there at the first visit: a region that is painted, with a star drawn in it.

import { lasso, segment } from "./bitmap.js";
import { region, usual } from "./regions.js";

/** @param {any} can the server's capabilities @returns {import("./painting.js").State} */
export function example(can) {
  const whole = can.model === "embedded", { multiple } = can.sizes, least = can.sizes.width?.[0] ?? multiple;
  const most = Math.min(can.sizes.width?.[1] ?? can.sizes.most, 1000 * Math.sqrt(can.limits.megapixels));
  const side = Math.floor(Math.min(most, Math.max(least, can.sizes.default)) / multiple) * multiple, white = [255, 255, 255];
  const steps = (/** @type {number} */ count) => Math.min(count, can.limits.steps);
  const at = (/** @type {number} */ x, /** @type {number} */ y) => ({ x: x * side, y: y * side });
  const first = region(1, side, side, usual(can));
  Object.assign(first, { name: "A star", words: first.control ? "" : "a red star" });
  const star = Array.from({ length: 10 }, (_, i) => {
    const angle = (Math.PI * i) / 5 - Math.PI / 2, radius = i % 2 ? 0.11 : 0.22;
    return at(0.28 + radius * Math.cos(angle), 0.5 + radius * Math.sin(angle));
  });
  star.forEach((p, i) => segment(first.ink, p, star[(i + 1) % 10], side / 128, side / 128, white));
  lasso(first.mask, [at(0.03, 0.16), at(0.52, 0.16), at(0.52, 0.84), at(0.03, 0.84)], [255]);
  return {
    regions: [first], chosen: 1,
    settings: {
      prompt: "a red star and a blue circle on sand", negative_prompt: "", width: side, height: side, steps: steps(whole ? 12 : 20),
      guidance: 5, scheduler: "", preset: "", seed: 1, held: false, start: null, strength: 0.6,
      draftSize: whole ? 1 : 0.5, draftSteps: steps(whole ? 6 : 12), draftPreset: whole ? "" : "fast",
    },
  };
}

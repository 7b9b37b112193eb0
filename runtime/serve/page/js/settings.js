// The settings in their fields: how the picture is drawn.

import { get, hear, input, options, show } from "./dom.js";

/** @typedef {import("./painting.js").Painting} Painting */

const SAME = { // fields of settings that are shown as they are
  prompt: "prompt", negative: "negative_prompt", held: "held", scheduler: "scheduler", preset: "preset", steps: "steps",
  guidance: "guidance", width: "width", height: "height", seed: "seed", strength: "strength", "draft-size": "draftSize", "draft-steps": "draftSteps",
  "draft-preset": "draftPreset",
};
const LABELS = { held: "Hold the outside", prompt: "Prompt" };

/** @param {Painting} painting @param {any} can the server's capabilities */
export function listen(painting, can) {
  options("scheduler", can.schedulers);
  for (const id of ["preset", "draft-preset"]) options(id, Object.keys(can.presets));
  for (const id of ["steps", "draft-steps"]) input(id).max = String(can.limits.steps);
  for (const side of ["width", "height"]) limit(side, can.sizes);
  const back = () => showSettings(painting);
  for (const id of ["prompt", "negative", "held", "seed", "strength", "draft-steps", "draft-preset"]) {
    const name = /** @type {Record<string, string>} */ (SAME)[id];
    hear(id, (value) => painting.set({ [name]: value }, /** @type {any} */ (LABELS)[id] ?? name), back);
  }
  hear("draft-size", (value) => painting.set({ draftSize: Number(value) }, "Size while painting"));
  for (const name of ["scheduler", "steps", "guidance"]) hear(name, (value) => painting.set({ [name]: value, preset: "" }, name), back);
  hear("preset", (preset) => painting.set(preferred(preset, painting.settings, can), "Preset"));
  for (const side of ["width", "height"]) {
    input(side).addEventListener("change", () => {
      const { settings } = painting, next = { width: settings.width, height: settings.height, [side]: Number(input(side).value) };
      if (input(side).validity.valid && input(side).value) painting.resize(next.width, next.height);
    });
    hear(side, () => {}, back);
  }
}

/**
 * What a choice of preset sets; none brings back what was set before one was chosen.
 * @param {string} preset @param {import("./regions.js").Settings} settings @param {any} can the server's capabilities
 */
export function preferred(preset, settings, can) {
  const { scheduler, steps, guidance } = settings, own = settings.preset ? settings.own : { scheduler, steps, guidance };
  return preset ? { preset, own, ...can.presets[preset] } : { preset, ...own };
}

/** Bound a side's field by what the server draws. @param {string} side @param {any} sizes */
function limit(side, sizes) {
  const [least, most] = Array.isArray(sizes[side]) ? sizes[side] : [sizes.multiple, sizes.most];
  Object.assign(input(side), { min: String(least), max: String(most), step: String(sizes.multiple) });
}

/** @type {Blob | null} */
let pictured = null; // the picture to start from that is shown

/** @param {Painting} painting */
export function showSettings({ settings }) {
  for (const [id, name] of Object.entries(SAME)) {
    if (input(id) !== document.activeElement || input(id).validity.valid) show(id, /** @type {any} */ (settings)[name]);
  }
  get("strength-field").hidden = get("nostart").hidden = settings.start === null;
  get("strength-said").textContent = `${Math.round(100 * settings.strength)} %`;
  get("start-said").textContent = settings.start === null ? "from noise" : "from a picture";
  const shown = /** @type {HTMLImageElement} */ (get("start-picture"));
  shown.hidden = settings.start === null;
  if (settings.start !== pictured) {
    URL.revokeObjectURL(shown.src);
    if (settings.start) shown.src = URL.createObjectURL(settings.start);
    pictured = settings.start;
  }
}

/**
 * The settings while somebody paints live: smaller, in fewer steps, by another preset, where that is asked for.
 * @param {import("./regions.js").Settings} settings @param {any} can the server's capabilities
 */
export function draft(settings, can) {
  const { multiple } = can.sizes, least = (/** @type {"width" | "height"} */ side) => can.sizes[side]?.[0] ?? multiple;
  const side = (/** @type {"width" | "height"} */ name) =>
    Math.max(least(name), Math.round((settings[name] * settings.draftSize) / multiple) * multiple);
  const found = { ...settings, ...can.presets[settings.draftPreset], width: side("width"), height: side("height") };
  return { ...found, steps: Math.min(found.steps, settings.draftSteps) };
}

// What a picture's settings restore of its painting, where nothing else does: those that `runtime.generate` and the
// server write into every PNG. Masks and conditions are in them by the names of their files.

import * as api from "./api.js";
import { create } from "./bitmap.js";
import { toPng } from "./image.js";
import { checkedRegions, checkedSettings } from "./project.js";
import { region } from "./regions.js";

/** @typedef {import("./project.js").Packed} Packed */
/** @typedef {import("./project.js").PackedRegion} PackedRegion */

const FIELDS = ["scale", "start", "end", "levels"], OTHERS = ["mask", "condition", "prompt", "preprocess", "adapter"];
const NUMBERS = ["steps", "guidance", "width", "height", "seed", "strength"];
const MULTIPLE = 16; // of a size that is drawn
/** What this page has no field for, and what each is where nothing was asked for. @type {Record<string, string>} */
const PLAIN = {
  prompt_syntax: "plain", clip_skip: "0", guidance_range: "[0.0, 1.0]", guidance_rescale: "0.0", cache_interval: "1", image: "null",
  mask_resize: "area",
};

/**
 * @param {Record<string, string>} said the texts of a PNG
 * @param {import("./regions.js").Settings} settings of the page, of which those while painting live stay
 * @param {{width: number, height: number}} size of the picture
 * @returns {Promise<{packed: Packed, missing: string[]}>} missing: what could not be restored
 */
export async function fromSettings(said, { draftSize, draftSteps, draftPreset }, size) {
  // of an image whose outside was held nothing says a size: it has its own
  for (const side of /** @type {("width" | "height")[]} */ (["width", "height"])) {
    if (said[side] === "null") said = { ...said, [side]: String(Math.ceil(size[side] / MULTIPLE) * MULTIPLE) };
  }
  const numbers = Object.fromEntries(NUMBERS.map((name) => [name, said[name] === undefined ? undefined : Number(said[name])]));
  const settings = checkedSettings({
    ...numbers, prompt: said.prompt ?? "", negative_prompt: said.negative_prompt ?? "", held: said.outside === "held",
    scheduler: said.scheduler?.endsWith("Scheduler") ? "" : (said.scheduler ?? ""), draftSize, draftSteps, draftPreset,
  });
  const missing = Object.keys(PLAIN).filter((name) => (said[name] ?? PLAIN[name]) !== PLAIN[name]);
  if (!Number.isSafeInteger(settings.seed)) missing.push(`its own seed, ${said.seed}, which is more than a browser counts to`);
  const given = JSON.parse(said.regions ?? "[]");
  const made = checkedRegions(Array.isArray(given) ? given.map((each, i) => fieldsOf(each, i + 1, missing)) : given);
  const regions = [];
  for (const [i, each] of made.entries()) regions.push(await withPictures(each, given[i], settings, missing));
  return { packed: { settings, regions, chosen: regions.length ? 1 : 0 }, missing };
}

/** A region's fields as this page has them. @param {any} given @param {number} id @param {string[]} missing */
function fieldsOf(given, id, missing) {
  const made = { ...region(id, 1, 1, given.adapter ?? ""), words: given.prompt ?? "", control: Boolean(given.condition) };
  for (const [name, value] of Object.entries(given)) {
    if (FIELDS.includes(name) && typeof value === typeof /** @type {any} */ (made)[name] && value !== null) Object.assign(made, { [name]: value });
    else if (!OTHERS.includes(name) && !usual(name, value)) missing.push(`region ${id}'s ${name}`);
  }
  return made;
}

/**
 * A region with its mask and its condition, as far as the server has them.
 * @param {import("./regions.js").Region} made @param {any} given @param {{width: number, height: number}} size @param {string[]} missing
 * @returns {Promise<PackedRegion>}
 */
async function withPictures(made, given, { width, height }, missing) {
  const picture = async (/** @type {"mask" | "condition"} */ name) => {
    const file = await kept(given[name]);
    if (file && name === "condition" && given.preprocess) return api.condition(file, given.preprocess, width, height);
    if (!file && given[name]) missing.push(`region ${made.id}'s ${name}, which this server does not have`);
    return file;
  };
  const everywhere = create(width, height);
  everywhere.data.fill(255);
  const [mask, ink] = [await picture("mask"), await picture("condition")];
  return {
    ...made, mask: mask ?? (await toPng(given.mask ? create(width, height) : everywhere)), ink: ink ?? (await toPng(create(width, height, 3))),
  };
}

/** Whether a field that this page does not have says nothing out of the ordinary. @param {string} name @param {any} value */
function usual(name, value) {
  return value === null || value === false || (["prompt_weight", "uncond_scale"].includes(name) && value === 1);
}

/** @param {any} name @returns {Promise<Blob | null>} the file that the server has by this name */
async function kept(name) {
  if (!/^[0-9a-f]{64}$/.test(name ?? "")) return null;
  return api.file(name).catch(() => null);
}

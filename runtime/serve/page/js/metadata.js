// What a picture's settings restore of its painting, where nothing else does: those that `runtime.generate` and the
// server write into every PNG. Masks and conditions are in them by the names of their files.

import * as api from "./api.js";
import { create } from "./bitmap.js";
import { toPng } from "./image.js";
import { region } from "./regions.js";

/** @typedef {import("./project.js").Packed} Packed */
/** @typedef {import("./project.js").PackedRegion} PackedRegion */

const NUMBERS = ["steps", "guidance", "width", "height", "seed", "strength"];
/** What this page has no field for, and what each is where nothing was asked for. @type {Record<string, string>} */
const PLAIN = {
  prompt_syntax: "plain", clip_skip: "0", guidance_range: "[0.0, 1.0]", guidance_rescale: "0.0", cache_interval: "1", image: "null",
};

/**
 * @param {Record<string, string>} said the texts of a PNG
 * @returns {Promise<{packed: Packed, missing: string[]}>} missing: what could not be restored
 */
export async function fromSettings(said) {
  /** @type {any} */
  const settings = {
    prompt: said.prompt ?? "", negative_prompt: said.negative_prompt ?? "", preset: "", start: null,
    held: said.outside === "held", strength: 1, draftSize: 1, draftPreset: "",
    scheduler: said.scheduler?.endsWith("Scheduler") ? "" : (said.scheduler ?? ""),
  };
  for (const name of NUMBERS) {
    const value = Number(said[name]);
    if (said[name] === undefined || !Number.isFinite(value)) throw new Error(`${name}: ${said[name]}; expected the number that every PNG of ours has`);
    settings[name] = value;
  }
  const missing = Object.keys(PLAIN).filter((name) => (said[name] ?? PLAIN[name]) !== PLAIN[name]);
  const listed = JSON.parse(said.regions ?? "[]");
  const regions = [];
  for (const [i, given] of listed.entries()) regions.push(await regionOf(given, i + 1, settings, missing));
  return { packed: { settings, regions, chosen: regions.length ? 1 : 0 }, missing };
}

/**
 * @param {any} given @param {number} id @param {{width: number, height: number}} size @param {string[]} missing
 * @returns {Promise<PackedRegion>}
 */
async function regionOf(given, id, { width, height }, missing) {
  const made = region(id, 1, 1, given.adapter ?? "");
  Object.assign(made, { words: given.prompt ?? "", control: Boolean(given.condition) });
  const picture = async (/** @type {string} */ name) => {
    const file = await kept(given[name]);
    if (file && name === "condition" && given.preprocess) return api.condition(file, given.preprocess, width, height);
    if (!file && given[name]) missing.push(`region ${id}'s ${name}, which this server does not have`);
    return file;
  };
  for (const [name, value] of Object.entries(given)) {
    const restored = name in made && !["mask", "id", "name"].includes(name);
    if (restored && typeof value === typeof /** @type {any} */ (made)[name]) Object.assign(made, { [name]: value });
    else if (!["mask", "condition", "prompt", "preprocess", "adapter"].includes(name) && !usual(name, value)) missing.push(`region ${id}'s ${name}`);
  }
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

// Regions and settings: what is to be drawn, and the request that it makes. No DOM.

import { create, isEmpty, resized } from "./bitmap.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/**
 * @typedef {{
 *   id: number, name: string, colour: number, shown: boolean, solo: boolean,
 *   mask: Bitmap, ink: Bitmap, photo: string | null,
 *   control: boolean, adapter: string, words: string, scale: number, start: number, end: number, levels: number[],
 * }} Region  mask and ink at the picture's size; photo: a file's id, which is then the condition, and not the ink
 */
/**
 * @typedef {{
 *   prompt: string, negative_prompt: string, width: number, height: number, steps: number, guidance: number,
 *   scheduler: string, preset: string, seed: number, held: boolean, start: string | null, strength: number,
 * }} Settings
 */

// Okabe and Ito's colours, which the colour-blind can tell apart, each with a pattern of its own
export const COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#888888"];

/** @param {number} id @param {number} width @param {number} height @param {string} adapter @returns {Region} */
export function region(id, width, height, adapter) {
  return {
    id, name: `Region ${id}`, colour: (id - 1) % COLOURS.length, shown: true, solo: false,
    mask: create(width, height), ink: create(width, height), photo: null,
    control: true, adapter, words: "", scale: 1, start: 0, end: 1, levels: [1, 1, 1, 1],
  };
}

/** @param {Region} original @param {number} id @returns {Region} */
export function duplicate(original, id) {
  const copied = (/** @type {Bitmap} */ b) => ({ ...b, data: b.data.slice() });
  return {
    ...original, id, name: `${original.name} copy`, colour: (id - 1) % COLOURS.length,
    mask: copied(original.mask), ink: copied(original.ink), levels: [...original.levels],
  };
}

/** Those that are drawn: all that are shown, or the solo ones. @param {Region[]} regions */
export function active(regions) {
  const solo = regions.filter((each) => each.solo);
  return solo.length ? solo : regions.filter((each) => each.shown);
}

/** Bring every bitmap to another size of the picture. @param {Region[]} regions @param {number} width @param {number} height */
export function resize(regions, width, height) {
  for (const each of regions) {
    each.mask = resized(each.mask, width, height);
    each.ink = resized(each.ink, width, height);
  }
}

/**
 * What should be said before anything runs: a line each, with the region it is about.
 * @param {Region[]} regions @param {Settings} settings @returns {{region: number, text: string}[]}
 */
export function warnings(regions, settings) {
  const found = [];
  for (const each of active(regions)) {
    const inked = each.photo !== null || !isEmpty(each.ink);
    const say = (/** @type {string} */ text) => found.push({ region: each.id, text });
    if (isEmpty(each.mask)) say("its mask is empty: paint where it acts");
    else if (!each.words.trim() && !(each.control && inked)) say("it has no words and no condition: write, or draw");
    if (each.end <= each.start) say("it begins to act after it stops");
    else if ((each.end - each.start) * settings.steps < 1 && settings.steps > 1) say("less than one step reaches it");
    if (each.control && inked && each.scale === 0) say("its strength is 0");
  }
  if (settings.held && !active(regions).some((each) => !isEmpty(each.mask))) {
    found.push({ region: 0, text: "the outside is held and nothing is painted, so nothing would change" });
  }
  return found;
}

/**
 * The request that the server takes. files: gives the id of a bitmap's or a picture's file.
 * @param {Region[]} regions @param {Settings} settings @param {(bitmap: Bitmap) => Promise<string>} files
 */
export async function request(regions, settings, files) {
  const listed = [];
  for (const each of active(regions)) {
    const shows = each.control && (each.photo !== null || !isEmpty(each.ink));
    if (isEmpty(each.mask) || (!shows && !each.words.trim())) continue;
    /** @type {Record<string, any>} */
    const found = { mask: await files(each.mask), start: each.start, end: each.end };
    if (shows) {
      found.condition = each.photo ?? (await files(each.ink));
      Object.assign(found, { adapter: each.adapter, scale: each.scale, levels: each.levels });
    }
    if (each.words.trim()) found.prompt = each.words;
    listed.push(found);
  }
  /** @type {Record<string, any>} */
  const body = {
    prompt: settings.prompt, negative_prompt: settings.negative_prompt, seed: settings.seed, regions: listed,
    steps: settings.steps, guidance: settings.guidance,
  };
  if (settings.scheduler) body.scheduler = settings.scheduler;
  if (settings.start !== null) Object.assign(body, { image: settings.start, strength: settings.strength });
  Object.assign(body, { width: settings.width, height: settings.height });
  if (settings.held && listed.length) body.outside = "held";
  return body;
}

// Regions and settings: what is to be drawn, and the request that it makes. No DOM.

import { create, isEmpty, resized } from "./bitmap.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/**
 * @typedef {{
 *   id: number, name: string, colour: number, shown: boolean, solo: boolean,
 *   mask: Bitmap, ink: Bitmap,
 *   control: boolean, adapter: string, words: string, scale: number, start: number, end: number, levels: number[],
 * }} Region  mask and ink, which is the condition, at the picture's size
 */
/**
 * @typedef {{
 *   prompt: string, negative_prompt: string, width: number, height: number, steps: number, guidance: number,
 *   scheduler: string, preset: string, seed: number, held: boolean, start: Blob | null, strength: number,
 *   draftSize: number, draftSteps: number, draftPreset: string,
 *   own?: {scheduler: string, steps: number, guidance: number},
 * }} Settings  draft...: while somebody paints live; own: what was set before a preset
 */

// Okabe and Ito's colours, which the colour-blind can tell apart, each with a pattern of its own
export const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#888888"];

/** @param {number} id @param {number} width @param {number} height @param {string} adapter none: words alone @returns {Region} */
export function region(id, width, height, adapter) {
  return {
    id, name: `Region ${id}`, colour: (id - 1) % COLOURS.length, shown: true, solo: false,
    mask: create(width, height), ink: create(width, height, 3),
    control: adapter !== "", adapter, words: "", scale: 1, start: 0, end: 1, levels: [1, 1, 1, 1],
  };
}

/** The adapter of a new region; none where the server has none. @param {any} can the server's capabilities @returns {string} */
export function usual({ adapters, default_adapter }) {
  return adapters.length ? default_adapter : "";
}

/** @param {Region} original @param {number} id @returns {Region} */
export function duplicate(original, id) {
  const copied = (/** @type {Bitmap} */ b) => ({ ...b, data: b.data.slice() });
  return {
    ...original, id, name: `${original.name} copy`, colour: (id - 1) % COLOURS.length,
    mask: copied(original.mask), ink: copied(original.ink), levels: [...original.levels],
  };
}

/**
 * Those that are drawn: all that are shown, or the solo ones.
 * @template {{solo: boolean, shown: boolean}} T @param {T[]} regions @returns {T[]}
 */
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
    const inked = !isEmpty(each.ink);
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
 * What of the regions can act: each with what it shows and says.
 * @param {Region[]} regions @returns {{region: Region, shows: boolean, words: string}[]}
 */
export function acting(regions) {
  return active(regions)
    .map((region) => ({ region, shows: region.control && !isEmpty(region.ink), words: region.words.trim() }))
    .filter(({ region, shows, words }) => !isEmpty(region.mask) && (shows || words));
}

/**
 * A region as the server and `runtime.generate --regions` take it.
 * @template T @param {{region: Region, shows: boolean, words: string}} one
 * @param {T} mask @param {T | undefined} condition what names its pictures
 */
export function asked({ region, shows, words }, mask, condition) {
  const { adapter, scale, levels, start, end } = region;
  return {
    mask, start, end,
    ...(shows ? { condition, adapter, scale, levels } : {}),
    ...(words ? { prompt: words } : {}),
  };
}

/**
 * The request that the server takes.
 * @param {Region[]} regions @param {Settings} settings
 * @param {(what: Bitmap | Blob) => Promise<string>} file the id of the file of it that the server has
 */
export async function request(regions, settings, file) {
  const listed = await Promise.all(acting(regions).map(async (one) => {
    const { mask, ink } = one.region;
    const [first, second] = await Promise.all([file(mask), one.shows ? file(ink) : undefined]);
    return asked(one, first, second);
  }));
  const { prompt, negative_prompt, seed, steps, guidance, width, height, scheduler, start, strength, held } = settings;
  return {
    prompt, negative_prompt, seed, steps, guidance, width, height, regions: listed,
    ...(scheduler ? { scheduler } : {}),
    ...(start ? { image: await file(start), strength } : {}),
    ...(held && listed.length ? { outside: "held" } : {}),
  };
}

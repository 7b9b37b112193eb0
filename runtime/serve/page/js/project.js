// A painting as one thing that can be kept: with its pictures as blobs, as a zip that `python -m runtime.generate` draws
// from too, and as text inside a PNG.

import { create } from "./bitmap.js";
import { fromBase64, inShape, pixels, toPng } from "./image.js";
import * as png from "./png.js";
import { COLOURS, acting, asked, region } from "./regions.js";
import * as zip from "./zip.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./painting.js").Painting} Painting */
/** @typedef {import("./painting.js").State} State */
/** @typedef {Omit<import("./regions.js").Region, "mask" | "ink"> & {mask: Blob, ink: Blob}} PackedRegion */
/** @typedef {Omit<State, "regions"> & {regions: PackedRegion[]}} Packed  its bitmaps as PNGs */

export const CHUNK = "localcontrol-painting"; // the text of a PNG that holds all of this
const SETTINGS = {
  prompt: "", negative_prompt: "", width: 1, height: 1, steps: 1, guidance: 1, scheduler: "", seed: 1, held: false, strength: 1,
  draftSize: 1, draftSteps: 1, draftPreset: "",
};
const DRAWN = "drawn.png"; // in a project: the picture that was seen last
const START = "start.png", WHOLE = "start-whole.png"; // the picture to start from, as it is drawn from, and uncropped
const MOST_SIDE = 8192, MOST_REGIONS = 64;

/** Makes PNGs of bitmaps, once for as long as they are the same. */
export class Pngs {
  /** @param {(bitmap: Bitmap) => number} version */
  constructor(version) {
    this.version = version;
    /** @type {WeakMap<Bitmap, {version: number, png: Promise<Blob>}>} */ this.made = new WeakMap();
  }

  /** @param {Bitmap} bitmap @returns {Promise<Blob>} of its pixels as they are now */
  of(bitmap) {
    const version = this.version(bitmap);
    let found = this.made.get(bitmap);
    if (found?.version !== version) this.made.set(bitmap, (found = { version, png: toPng(bitmap) }));
    return found.png;
  }

  /** @param {State} state @returns {Promise<Packed>} as it is now, whatever is painted meanwhile */
  async pack(state) {
    const regions = state.regions.map(async (each) => {
      const [mask, ink] = await Promise.all([this.of(each.mask), this.of(each.ink)]);
      return { ...each, levels: [...each.levels], mask, ink };
    });
    const kept = { ...state, settings: { ...state.settings } };
    return { ...kept, regions: await Promise.all(regions) };
  }
}

/** @param {Packed} packed @returns {Promise<State>} */
export async function unpack(packed) {
  const { width, height } = packed.settings;
  const bitmap = async (/** @type {Blob} */ blob, /** @type {number} */ channels) => {
    const made = create(width, height, channels);
    made.data.set(await pixels(blob, width, height, channels));
    return made;
  };
  const regions = packed.regions.map(async (each) => {
    const [mask, ink] = await Promise.all([bitmap(each.mask, 1), bitmap(each.ink, 3)]);
    return { ...each, levels: [...each.levels], mask, ink };
  });
  return { ...packed, settings: { ...packed.settings }, regions: await Promise.all(regions) };
}

/** The command that draws what a project's regions.json asks for. @param {State} state @param {string} model */
export function command({ settings, regions }, model) {
  const quoted = (/** @type {string | number} */ value) => `'${String(value).replaceAll("'", "'\\''")}'`;
  const options = {
    prompt: settings.prompt, "negative-prompt": settings.negative_prompt, width: settings.width, height: settings.height,
    steps: settings.steps, guidance: settings.guidance, seed: settings.seed, scheduler: settings.scheduler,
    ...(settings.start ? { image: START, strength: settings.strength } : {}),
    ...(acting(regions).length ? { regions: "regions.json", outside: settings.held ? "held" : "" } : {}),
    model: model === "embedded" ? "" : model, out: "picture.png",
  };
  const given = Object.entries(options).filter(([name, value]) => value !== "" || name === "prompt");
  return `python -m runtime.generate ${given.map(([name, value]) => `--${name}=${quoted(value)}`).join(" ")}\n`;
}

/** @param {State} state @param {Packed} packed the same @param {string} model @param {Blob | null} picture what it gave @returns {Promise<Blob>} */
export async function toZip(state, packed, model, picture) {
  const text = (/** @type {any} */ value) => new Blob([`${JSON.stringify(value, null, 2)}\n`]);
  const names = (/** @type {number} */ id) => ({ mask: `mask-${id}.png`, ink: `condition-${id}.png` });
  const listed = acting(state.regions).map((one) => {
    const { mask, ink } = names(one.region.id);
    return asked(one, mask, ink);
  });
  /** @type {[string, Blob][]} */
  const files = [
    ["regions.json", text(listed)],
    ["command.txt", new Blob([command(state, model)])],
    ["project.json", text({ ...packed, settings: { ...packed.settings, start: undefined }, regions: packed.regions.map(
      (each) => ({ ...each, mask: names(each.id).mask, ink: names(each.id).ink })) })],
  ];
  for (const each of packed.regions) files.push([names(each.id).mask, each.mask], [names(each.id).ink, each.ink]);
  const { start } = packed.settings, cut = start && await inShape(start, packed.settings);
  if (cut) files.push([START, cut]);
  if (start && cut !== start) files.push([WHOLE, start]); // of which another size takes another part
  if (picture) files.push([DRAWN, picture]);
  const entries = await Promise.all(files.map(async ([name, blob]) => ({ name, data: new Uint8Array(await blob.arrayBuffer()) })));
  return new Blob([zip.write(entries)], { type: "application/zip" });
}

/** @param {Uint8Array} bytes @returns {{packed: Packed, picture: Blob | null}} Raises Error where it is no project. */
export function fromZip(bytes) {
  const files = new Map(zip.read(bytes).map(({ name, data }) => [name, data]));
  const picture = (/** @type {string} */ name) => {
    const data = files.get(name);
    if (!data) throw new Error(`project: it has no ${name}; it may have been changed since it was saved`);
    return new Blob([data.slice()], { type: "image/png" });
  };
  const project = files.get("project.json");
  if (!project) throw new Error("project: it has no project.json; expected a zip that this page has saved");
  const start = [WHOLE, START].find((name) => files.has(name));
  return { packed: checked(new TextDecoder().decode(project), picture, start ? picture(start) : null), picture: files.has(DRAWN) ? picture(DRAWN) : null };
}

/** @param {Packed} packed @returns {Promise<string>} */
export async function toText(packed) {
  const regions = await Promise.all(packed.regions.map(async (each) => ({
    ...each, mask: await base64(each.mask), ink: await base64(each.ink),
  })));
  const start = packed.settings.start ? await base64(packed.settings.start) : undefined;
  return JSON.stringify({ ...packed, settings: { ...packed.settings, start: undefined }, start, regions });
}

/** @param {string} text @returns {Packed} */
export function fromText(text) {
  const { start } = parsed(text);
  return checked(text, (name) => fromBase64(String(name)), typeof start === "string" ? fromBase64(start) : null);
}

/**
 * What a project's text says, if it is one.
 * @param {string} text @param {(name: any) => Blob} picture what a name in it stands for @param {Blob | null} start
 * @returns {Packed} Raises Error, naming what is wrong.
 */
export function checked(text, picture, start) {
  const given = parsed(text), settings = checkedSettings({ ...given.settings, start });
  const regions = checkedRegions(given.regions).map((each, i) => ({
    ...each, mask: picture(given.regions[i].mask), ink: picture(given.regions[i].ink),
  }));
  const chosen = given.regions.findIndex((/** @type {any} */ each) => each.id === given.chosen) + 1;
  return { settings, regions, chosen: chosen || (regions.length ? 1 : 0) };
}

/** Settings of the right kinds and sizes. @param {any} given @returns {import("./regions.js").Settings} Raises Error. */
export function checkedSettings(given) {
  const settings = { preset: "", start: given.start ?? null, ...taken(given, SETTINGS, "settings") };
  for (const side of ["width", "height"]) {
    const value = settings[side];
    if (!Number.isInteger(value) || value < 16 || value > MOST_SIDE) throw new Error(`settings.${side}: ${value}; expected 16 to ${MOST_SIDE}`);
  }
  return settings;
}

/** Regions of the right kinds, numbered anew, their bitmaps empty. @param {any} given @returns {import("./regions.js").Region[]} Raises Error. */
export function checkedRegions(given) {
  if (!Array.isArray(given)) throw new Error("regions: missing; expected a list");
  if (given.length > MOST_REGIONS) throw new Error(`regions: ${given.length}; expected at most ${MOST_REGIONS}`);
  const { mask, ink, id, ...fields } = region(1, 1, 1, "");
  return given.map((/** @type {any} */ each, /** @type {number} */ i) => {
    const found = taken(each, fields, `regions[${i}]`);
    if (found.levels.length !== 4 || !found.levels.every(Number.isFinite)) throw new Error(`regions[${i}].levels: expected four numbers`);
    if (!Number.isInteger(found.colour) || !(found.colour in COLOURS)) throw new Error(`regions[${i}].colour: ${found.colour}; expected 0 to ${COLOURS.length - 1}`);
    return { ...region(i + 1, 1, 1, ""), ...found };
  });
}

/** @param {string} text */
function parsed(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    throw new Error("project: its description is cut short or changed; expected what this page has saved");
  }
}

/** The fields of an object that a template has, of the same types. @param {any} given @param {any} template @param {string} where @returns {any} */
function taken(given, template, where) {
  const kind = (/** @type {any} */ value) => (Array.isArray(value) ? "list" : typeof value);
  return Object.fromEntries(Object.entries(template).map(([name, like]) => {
    const value = given?.[name];
    if (kind(value) !== kind(like)) throw new Error(`${where}.${name}: ${kind(value)}; expected a ${kind(like)}`);
    return [name, value];
  }));
}

/** @param {Blob} blob @returns {Promise<string>} */
async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

/** A picture that says how it was painted. @param {Blob} picture @param {Packed} packed @returns {Promise<Blob>} */
export async function signed(picture, packed) {
  const bytes = new Uint8Array(await picture.arrayBuffer());
  return new Blob([png.withText(bytes, CHUNK, await toText(packed))], { type: "image/png" });
}

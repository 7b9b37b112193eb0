// Projects: a zip of the pictures and of regions.json, which `python -m runtime.generate --regions` runs; and PNGs that
// say how they were made.

import { isEmpty } from "./bitmap.js";
import { brightness, toPng } from "./canvas.js";
import * as png from "./png.js";
import { active, region } from "./regions.js";
import * as zip from "./zip.js";

/** @typedef {import("./regions.js").Region} Region */

/** @param {any} state @returns {Promise<Blob>} */
export async function saveProject(state) {
  /** @type {import("./zip.js").Entry[]} */
  const entries = [];
  const listed = [];
  const put = async (/** @type {string} */ name, /** @type {Blob} */ blob) => {
    entries.push({ name, data: new Uint8Array(await blob.arrayBuffer()) });
    return name;
  };
  const text = (/** @type {string} */ name, /** @type {any} */ value) =>
    entries.push({ name, data: new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`) });
  const drawn = new Set(active(state.regions));
  for (const [i, each] of state.regions.entries()) {
    const names = { mask: `mask-${i + 1}.png`, ink: `condition-${i + 1}.png` };
    await put(names.mask, await toPng(each.mask));
    if (!isEmpty(each.ink)) await put(names.ink, await toPng(each.ink));
    const shows = each.control && !isEmpty(each.ink), words = each.words.trim();
    if (!drawn.has(each) || isEmpty(each.mask) || (!shows && !words)) continue;
    listed.push({
      mask: names.mask, start: each.start, end: each.end,
      ...(shows ? { condition: names.ink, adapter: each.adapter, scale: each.scale, levels: each.levels } : {}),
      ...(words ? { prompt: each.words } : {}),
    });
  }
  text("regions.json", listed);
  text("project.json", {
    settings: state.settings,
    regions: state.regions.map((/** @type {Region} */ each) => ({ ...each, mask: undefined, ink: undefined })),
  });
  return new Blob([zip.write(entries)], { type: "application/zip" });
}

/**
 * What a file restores: a project, or the settings that a PNG of ours has; null for any other picture.
 * @param {File} file @param {any} state @param {any} can @returns {Promise<any>}
 */
export async function openFile(file, state, can) {
  const buffer = await file.arrayBuffer();
  if (file.name.endsWith(".zip")) return fromZip(new Uint8Array(buffer), can);
  const said = png.texts(buffer);
  return said.software?.startsWith("localcontrol") ? fromTexts(said, state) : null;
}

/** @param {Uint8Array} bytes @param {any} can */
async function fromZip(bytes, can) {
  const files = new Map(zip.read(bytes).map(({ name, data }) => [name, data]));
  const project = files.get("project.json");
  if (!project) throw new Error("not a project: it has no project.json");
  const { settings, regions: listed } = JSON.parse(new TextDecoder().decode(project));
  const regions = [];
  for (const [i, given] of listed.entries()) {
    const made = { ...region(i + 1, settings.width, settings.height, can.default_adapter), ...given, id: i + 1 };
    for (const [name, bitmap] of /** @type {const} */ ([["mask", made.mask], ["condition", made.ink]])) {
      const data = files.get(`${name}-${i + 1}.png`);
      if (data) bitmap.data.set(await brightness(new Blob([data.slice()]), settings.width, settings.height));
    }
    regions.push(made);
  }
  return { regions, chosen: regions[0]?.id ?? 0, next: regions.length + 1, settings };
}

/** @param {Record<string, string>} said @param {any} state */
async function fromTexts(said, state) {
  const settings = { ...state.settings }, made = [];
  for (const name of ["steps", "guidance", "width", "height", "seed", "strength"]) {
    if (said[name] !== undefined && said[name] !== "null") settings[name] = Number(said[name]);
  }
  Object.assign(settings, { prompt: said.prompt, negative_prompt: said.negative_prompt ?? "", held: said.outside === "held" });
  settings.scheduler = said.scheduler?.endsWith("Scheduler") ? "" : (said.scheduler ?? "");
  for (const [i, given] of JSON.parse(said.regions ?? "[]").entries()) {
    const each = region(i + 1, settings.width, settings.height, given.adapter ?? "canny");
    Object.assign(each, { words: given.prompt ?? "", control: Boolean(given.condition) });
    for (const name of /** @type {const} */ (["scale", "start", "end"])) {
      if (typeof given[name] === "number") each[name] = given[name];
    }
    if (Array.isArray(given.levels)) each.levels = given.levels;
    for (const [name, bitmap] of /** @type {const} */ ([["mask", each.mask], ["condition", each.ink]])) {
      const known = /^[0-9a-f]{64}$/.test(given[name] ?? "") ? await fetch(`/v1/files/${given[name]}`) : null;
      if (known?.ok) bitmap.data.set(await brightness(await known.blob(), settings.width, settings.height));
    }
    made.push(each);
  }
  return { regions: made, chosen: made[0]?.id ?? 0, next: made.length + 1, settings };
}

// The regions as a list, and the fields of the chosen one.

import { swatch } from "./canvas.js";
import { get, hear, input, make, show } from "./dom.js";
import { warnings } from "./regions.js";

/** @typedef {import("./painting.js").Painting} Painting */
/** @typedef {import("./regions.js").Region} Region */

/** @param {number} colour @param {number} number */
function mark(colour, number) {
  return make("span", { class: "swatch", "aria-hidden": "true" }, swatch(colour, 22), make("b", {}, String(number)));
}

/** @param {Painting} painting */
export function showList(painting) {
  const { regions } = painting.state, { chosen, settings } = painting, list = get("regions");
  const wrong = warnings(regions, settings), focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset?.key;
  list.replaceChildren(...regions.map((each, i) => {
    const said = wrong.filter((one) => one.region === each.id).map((one) => make("p", { class: "warning" }, one.text));
    const current = each === chosen, last = i === regions.length - 1;
    return make("li", { "aria-current": String(current) }, first(painting, each), ...(current ? [acts(painting, each, i, last)] : []), ...said);
  }));
  const current = list.querySelector("[aria-current=true]");
  if (painting.state.chosen !== seen) current?.scrollIntoView({ block: "nearest" });
  seen = painting.state.chosen;
  if (focused) {
    // a button that has gone, or is of no use now, hands the focus to its region's name, or to what adds one
    const same = list.querySelector(`[data-key="${focused}"]:enabled`) ?? list.querySelector("[aria-current=true] .name");
    /** @type {HTMLElement} */ (same ?? get("add")).focus();
  }
  const nowhere = get("nowhere"), about = wrong.find((one) => one.region === 0);
  nowhere.hidden = !about;
  nowhere.textContent = about?.text ?? "";
}

let seen = 0; // the region that was chosen when the list was shown last

/** @param {string} key @param {string} text @param {Record<string, any>} options a button that keeps the focus when the list is made anew */
function button(key, text, options) {
  return make("button", { class: "small", type: "button", "data-key": key, ...options }, text);
}

/** @param {Painting} painting @param {Region} region */
function first(painting, region) {
  const toggle = (/** @type {"shown" | "solo"} */ field, /** @type {string} */ name, /** @type {string} */ title) =>
    button(`${field}-${region.id}`, name, {
      "aria-pressed": String(region[field]), "aria-label": `${name}: ${region.name}`, title,
      onclick: () => painting.edit(name, () => (region[field] = !region[field])),
    });
  const name = button(`name-${region.id}`, "", { class: "name", onclick: () => painting.choose(region.id) });
  name.append(mark(region.colour, region.id), make("span", {}, region.name));
  return make("div", { class: "row" }, name, 
    toggle("shown", "On", "Off: it neither acts nor is seen"), toggle("solo", "Solo", "Only this one acts"));
}

/** @param {Painting} painting @param {Region} region @param {number} i its place @param {boolean} last */
function acts(painting, region, i, last) {
  const act = (/** @type {string} */ text, /** @type {() => void} */ onclick, off = false) =>
    button(`${text}-${region.id}`, text, { "aria-label": `${text} ${region.name}`, disabled: off, onclick });
  return make("div", { class: "row acts" },
    act("Up", () => painting.move(region, -1), i === 0), act("Down", () => painting.move(region, 1), last),
    act("Duplicate", () => painting.copy(region)), act("Delete", () => painting.remove(region)));
}

const LEVELS = ["finest", "fine", "coarse", "coarsest"];

/** Make the fields, and hear of them. @param {Painting} painting @param {string[]} adapters */
export function listen(painting, adapters) {
  get("r-adapter").append(...(adapters.length ? adapters.map((name) => new Option(name, name)) : [new Option("no adapter is loaded", "")]));
  input("r-adapter").disabled = !adapters.length;
  get("levels").append(...LEVELS.map((name, i) =>
    make("label", {}, name, make("input", { type: "number", id: `r-level-${i}`, min: -2, max: 2, step: 0.1 }))));
  hear("r-name", (name) => name && painting.change({ name }, "Name"), () => showPanel(painting));
  hear("r-words", (words) => painting.change({ words }, "Words"));
  hear("r-control", (control) => painting.change({ control }, "Control"));
  hear("r-adapter", (adapter) => painting.change({ adapter }, "Adapter"));
  hear("r-scale", (scale) => painting.change({ scale }, "Strength"));
  hear("r-start", (start) => painting.change({ start }, "Start"));
  hear("r-end", (end) => painting.change({ end }, "End"));
  LEVELS.forEach((_, i) => hear(`r-level-${i}`, (value) => {
    const levels = (painting.chosen?.levels ?? []).map((old, at) => (at === i ? value : old));
    painting.change({ levels }, `Level ${i + 1}`);
  }, () => showPanel(painting)));
}

/** @param {Painting} painting */
export function showPanel(painting) {
  const { chosen: region, ink, settings } = painting;
  get("panel").hidden = !region;
  for (const [id, on] of /** @type {[string, boolean][]} */ ([["on-mask", !ink], ["on-ink", ink]])) get(id).setAttribute("aria-pressed", String(on));
  get("ink-colour").hidden = get("edge").hidden = true;
  get(ink ? "ink-colour" : "edge").hidden = false;
  if (!region) return;
  get("panel-title").textContent = region.name;
  get("target-said").textContent = ink ? "The condition" : "The mask";
  show("r-name", region.name);
  show("r-words", region.words);
  show("r-control", region.control);
  input("r-control").disabled = !region.adapter && !region.control;
  const adapter = /** @type {HTMLSelectElement} */ (get("r-adapter"));
  if (![...adapter.options].some((each) => each.value === region.adapter)) adapter.add(new Option(region.adapter ? `${region.adapter} (not here)` : "none", region.adapter));
  show("r-adapter", region.adapter);
  show("r-scale", region.scale);
  get("r-scale-said").textContent = region.scale.toFixed(2);
  show("r-start", region.start);
  show("r-end", region.end);
  region.levels.forEach((value, i) => show(`r-level-${i}`, value));
  showSpan(region, settings.steps);
}

/** @param {Region} region @param {number} steps */
function showSpan({ start, end }, steps) {
  const bar = /** @type {HTMLElement} */ (document.querySelector(".span i")), share = Math.max(0, end - start);
  bar.style.left = `${100 * start}%`;
  bar.style.width = `${100 * share}%`;
  bar.style.setProperty("--step", share ? `${100 / (share * steps)}%` : "100%");
  get("r-span-said").textContent = share === 1 ? `Acts in all ${steps} steps` : `Acts from ${percent(start)} to ${percent(end)} of ${steps} steps`;
  input("r-start").setAttribute("aria-valuetext", percent(start));
  input("r-end").setAttribute("aria-valuetext", percent(end));
}

/** @param {number} share */
function percent(share) {
  return `${Math.round(100 * share)} %`;
}

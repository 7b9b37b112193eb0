// The regions as a list, and what the chosen one is.

import { COLOURS, warnings } from "./regions.js";

/** @typedef {import("./regions.js").Region} Region */
/**
 * @typedef {{
 *   choose: (id: number) => void, change: (region: Region, label: string, edit: () => void) => void,
 *   mask: (work: string, amount?: number) => void, remove: (region: Region) => void, copy: (region: Region) => void,
 *   move: (region: Region, by: number) => void, box: (numbers: number[]) => void, ink: (on: boolean) => void,
 *   load: (what: "mask" | "condition" | "photo") => void, save: () => void,
 * }} Acts
 */

/**
 * An element. @param {string} tag @param {Record<string, any>} [options] attributes; on... are listeners
 * @param {(Node | string)[]} children @returns {HTMLElement}
 */
export function make(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else made.setAttribute(name, String(value));
  }
  made.append(...children);
  return made;
}

/** @param {number} colour @param {number} number */
function swatch(colour, number) {
  const made = make("span", { class: "swatch", "aria-hidden": "true" }, String(number));
  made.style.background = COLOURS[colour];
  return made;
}

/**
 * @param {HTMLElement} list @param {Region[]} regions @param {Region | null} chosen
 * @param {import("./regions.js").Settings} settings @param {Acts} acts
 */
export function showList(list, regions, chosen, settings, acts) {
  const wrong = warnings(regions, settings);
  list.replaceChildren(
    ...regions.map((each, i) => {
      const toggle = (/** @type {"shown" | "solo"} */ field, /** @type {string} */ name) =>
        make("button", {
          class: "small", type: "button", "aria-pressed": String(each[field]), "aria-label": `${name} ${each.name}`,
          onclick: () => acts.change(each, name, () => (each[field] = !each[field])),
        }, name);
      const button = (/** @type {string} */ text, /** @type {string} */ label, /** @type {() => void} */ act, off = false) =>
        make("button", { class: "small", type: "button", "aria-label": `${label} ${each.name}`, disabled: off, onclick: act }, text);
      const name = make("button", { class: "name", type: "button", onclick: () => acts.choose(each.id) },
        swatch(each.colour, i + 1), make("span", {}, each.name));
      const row = make("li", { "aria-current": String(each === chosen) }, name, toggle("shown", "Show"), toggle("solo", "Solo"));
      if (each === chosen) {
        row.append(make("div", { class: "row acts" }, button("Up", "Move up", () => acts.move(each, -1), i === 0),
          button("Down", "Move down", () => acts.move(each, 1), i === regions.length - 1),
          button("Copy", "Copy", () => acts.copy(each)), button("Delete", "Delete", () => acts.remove(each))));
      }
      const said = wrong.filter((one) => one.region === each.id);
      return said.length ? make("div", {}, row, ...said.map((one) => make("p", { class: "warning" }, one.text))) : row;
    }),
    ...wrong.filter((one) => !one.region).map((one) => make("p", { class: "warning" }, one.text)));
}

/** @param {HTMLElement} panel @param {Region | null} region @param {string[]} adapters @param {boolean} ink @param {Acts} acts */
export function showPanel(panel, region, adapters, ink, acts) {
  if (!region) return panel.replaceChildren();
  const held = /** @type {HTMLInputElement | null} */ (panel.contains(document.activeElement) ? document.activeElement : null);
  const place = held ? [...panel.querySelectorAll("input, textarea, select, button, summary")].indexOf(held) : -1;
  const caret = held?.tagName === "TEXTAREA" ? [held.selectionStart, held.selectionEnd] : null;
  const open = [...panel.querySelectorAll("details")].map((each) => each.open);
  const field = (/** @type {string} */ label, /** @type {HTMLElement} */ input) => make("label", {}, label, input);
  const number = (/** @type {"scale" | "start" | "end"} */ name, /** @type {number} */ most) =>
    make("input", {
      type: "range", min: 0, max: most, step: 0.05, value: region[name], "aria-label": name,
      oninput: (/** @type {any} */ e) => acts.change(region, name, () => (region[name] = Number(e.target.value))),
    });
  const button = (/** @type {string} */ text, /** @type {() => void} */ act) =>
    make("button", { type: "button", onclick: act }, text);
  const name = /** @type {HTMLInputElement} */ (make("input", {
    value: region.name, onchange: (/** @type {any} */ e) => acts.change(region, "Name", () => (region.name = e.target.value)),
  }));
  const words = make("textarea", {
    rows: 2, maxlength: 4000, oninput: (/** @type {any} */ e) => acts.change(region, "Words", () => (region.words = e.target.value)),
  }, region.words);
  const adapter = make("select", {
    onchange: (/** @type {any} */ e) => acts.change(region, "Adapter", () => (region.adapter = e.target.value)),
  }, ...adapters.map((each) => make("option", { value: each, selected: each === region.adapter }, each)));
  const target = (/** @type {boolean} */ on, /** @type {string} */ text) =>
    make("button", { type: "button", "aria-pressed": String(ink === on), onclick: () => acts.ink(on) }, text);
  const amount = /** @type {HTMLInputElement} */ (make("input", { type: "number", value: 4, min: 1, max: 200, "aria-label": "pixels" }));
  const pixels = () => Number(amount.value) || 1;
  const box = ["x", "y", "width", "height"].map((each) => /** @type {HTMLInputElement} */ (make("input", { type: "number", "aria-label": `box ${each}`, placeholder: each })));
  const span = make("div", { class: "span", "aria-hidden": "true" }, make("i"));
  const bar = /** @type {HTMLElement} */ (span.firstChild);
  bar.style.left = `${100 * region.start}%`;
  bar.style.width = `${100 * Math.max(0, region.end - region.start)}%`;
  const levels = region.levels.map((value, i) =>
    make("input", {
      type: "number", step: 0.1, value, "aria-label": `level ${i + 1}`,
      onchange: (/** @type {any} */ e) => acts.change(region, "Level", () => (region.levels[i] = Number(e.target.value))),
    }));
  panel.replaceChildren(
    field("Name", name),
    make("div", { class: "row", role: "group", "aria-label": "What the tools paint" }, target(false, "Paint the mask"), target(true, "Draw the condition")),
    make("div", { class: "row" }, button("Clear", () => acts.mask("Clear")), button("Invert", () => acts.mask("Invert")),
      button("Load ...", () => acts.load(ink ? "condition" : "mask")), button("Save", acts.save)),
    make("div", { class: "row" }, amount, button("Feather", () => acts.mask("Feather", pixels())),
      button("Grow", () => acts.mask("Grow", pixels())), button("Shrink", () => acts.mask("Grow", -pixels()))),
    make("details", {}, make("summary", {}, "A rectangle by numbers"),
      make("div", { class: "row" }, ...box, button("Fill it", () => acts.box(box.map((each) => Number(each.value)))))),
    field("Words", words),
    make("label", { class: "switch" }, make("input", {
      type: "checkbox", checked: region.control,
      onchange: (/** @type {any} */ e) => acts.change(region, "Control", () => (region.control = e.target.checked)),
    }), "Control by the condition"),
    field("Adapter", adapter),
    make("div", { class: "row" }, button("Condition from a photo ...", () => acts.load("photo"))),
    field(`Strength ${region.scale.toFixed(2)}`, number("scale", 2)),
    field(`From ${region.start.toFixed(2)} to ${region.end.toFixed(2)} of the steps`, span), number("start", 1), number("end", 1),
    make("details", {}, make("summary", {}, "More"), make("div", { class: "row" }, "Levels, fine to coarse", ...levels)));
  panel.querySelectorAll("details").forEach((each, i) => (each.open = open[i] ?? false));
  const next = /** @type {HTMLInputElement | undefined} */ (
    [...panel.querySelectorAll("input, textarea, select, button, summary")][place]);
  next?.focus();
  if (next && caret) next.setSelectionRange(caret[0], caret[1]);
}

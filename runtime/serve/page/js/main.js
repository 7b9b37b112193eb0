// The page: what is painted, what is asked for, and how each part hears of the others.

import * as api from "./api.js";
import { feather, grow, invert, rectangle } from "./bitmap.js";
import { Scene, brightness, toPng } from "./canvas.js";
import { example } from "./example.js";
import { History } from "./history.js";
import { Live } from "./live.js";
import { showList, showPanel } from "./panel.js";
import { openFile, saveProject } from "./project.js";
import * as regions from "./regions.js";
import { Results } from "./results.js";
import { Runner } from "./runner.js";
import * as store from "./store.js";
import { Hands } from "./tools.js";
import { View } from "./view.js";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./regions.js").Region} Region */
/** @typedef {{regions: Region[], chosen: number, next: number, settings: regions.Settings}} State */

/** @template {HTMLElement} T @param {string} id @returns {T} */
const get = (id) => /** @type {T} */ (document.getElementById(id));
const input = (/** @type {string} */ id) => /** @type {HTMLInputElement} */ (get(id));

/** @type {State} */
let state;
/** @type {any} */
let can;
let ink = false; // whether the tools draw the condition
/** @type {Map<Bitmap, {version: number, id: Promise<string>}>} */
const sent = new Map(); // bitmaps that the server has, as they were
/** @type {Map<Bitmap, number>} */
const versions = new Map();
const view = new View(), history = new History();
const scene = new Scene(get("canvas"), view);
const live = new Live(() => draw());
const results = new Results(get("results"), (result) => showResult(result));
/** @type {{state: any, at: number, took: number[]}} */
const pace = { state: null, at: 0, took: [] }; // from the last change to the picture, ms

const hands = new Hands(scene, view, history, {
  target: () => chosen()?.[ink ? "ink" : "mask"] ?? null,
  changed() {
    const bitmap = chosen()?.[ink ? "ink" : "mask"];
    if (bitmap) versions.set(bitmap, (versions.get(bitmap) ?? 0) + 1);
    touched();
  },
  released: () => refresh(),
});

const runner = new Runner({
  begun() {
    pace.state = snapshot();
    input("cancel").disabled = false;
    get("progress").hidden = false;
    say("Waiting ...");
  },
  progress(step, steps) {
    /** @type {HTMLProgressElement} */ (get("progress")).value = step / steps;
    say(`Step ${step} of ${steps}`);
  },
  async preview(image) {
    if (!runner.busy) return;
    scene.picture = await createImageBitmap(image);
    scene.draw();
  },
  async done(picture, about) {
    await present(picture);
    pace.took.push(performance.now() - pace.at);
    const seconds = about.timings.running.toFixed(2);
    const outside = about.pixels_changed_outside;
    say([`Seed ${about.seed}, ${seconds} s`, outside === undefined ? "" : `${outside} pixels changed outside`,
      ...about.warnings].filter(Boolean).join(" · "));
    await results.add(picture, about, pace.state);
  },
  ended(message, wrong) {
    input("cancel").disabled = true;
    get("progress").hidden = true;
    if (message) say(message, wrong);
  },
});

/** @returns {Region | null} */
function chosen() {
  return state?.regions.find((each) => each.id === state.chosen) ?? null;
}

/** @param {string} text @param {boolean} [wrong] */
function say(text, wrong = false) {
  get("status").textContent = text;
  get("status").classList.toggle("wrong", wrong);
}

/** Something has changed that is kept, and drawn where the page is live. */
function touched() {
  pace.at = performance.now();
  clearTimeout(saving);
  saving = setTimeout(() => store.save({ ...state, live: input("live").checked }), 300);
  if (input("live").checked) live.change();
}
/** @type {any} */
let saving;

/** Show the list, the panel and the buttons as they are. */
function refresh() {
  const adapters = can.adapters;
  showList(get("regions"), state.regions, chosen(), state.settings, acts);
  showPanel(get("panel"), chosen(), adapters, ink, acts);
  input("undo").disabled = !history.done.length;
  input("redo").disabled = !history.undone.length;
  get("hint").hidden = state.regions.length > 0;
  get("nostart").hidden = state.settings.start === null;
  scene.draw();
}

/** What is kept of a result: all that was asked for. @returns {any} */
function snapshot() {
  return structuredClone(state);
}

/** @param {Bitmap} bitmap @returns {Promise<string>} the id of its file, sent once for as long as it is the same */
function fileOf(bitmap) {
  const version = versions.get(bitmap) ?? 0, known = sent.get(bitmap);
  if (known && known.version === version) return known.id;
  const id = toPng(bitmap).then(api.keep);
  sent.set(bitmap, { version, id });
  id.catch(() => sent.delete(bitmap));
  for (const old of [...sent.keys()].slice(0, Math.max(0, sent.size - 64))) sent.delete(old);
  return id;
}

async function draw() {
  live.stop();
  if (!input("fixed").checked && !input("live").checked) setSeed();
  try {
    await runner.draw(await regions.request(state.regions, state.settings, fileOf));
  } catch (error) {
    say(error instanceof api.Refused ? error.message : "The server does not answer; your painting is safe here.", true);
  }
}

function setSeed() {
  state.settings.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  input("seed").value = String(state.settings.seed);
}

/** @param {Blob} picture */
async function present(picture) {
  const shown = await createImageBitmap(picture);
  scene.before = last;
  last = shown;
  scene.picture = shown;
  get("compare").hidden = scene.before === null;
  scene.draw();
}
/** @type {ImageBitmap | null} */
let last = null;

/** @param {import("./results.js").Result} result */
async function showResult(result) {
  await present(result.picture);
  say(`Seed ${result.about.seed}. `);
  const use = document.createElement("button");
  use.textContent = "Use these settings again";
  use.onclick = () => restore(result.state, "Settings of a result");
  const start = document.createElement("button");
  start.textContent = "Start from it";
  start.onclick = () => startFrom(result.picture);
  get("status").append(use, " ", start);
}

/** Put another state in place of this one, as a step that can be undone. @param {State} next @param {string} label */
function restore(next, label) {
  const before = state, after = structuredClone(next);
  const put = (/** @type {State} */ one) => {
    state = one;
    fill();
    view.fit(state.settings.width, state.settings.height, scene.canvas.clientWidth, scene.canvas.clientHeight);
    refresh();
    touched();
  };
  history.add({ label, bytes: 1e6, undo: () => put(before), redo: () => put(after) });
  put(after);
}

/** @param {Blob} picture */
async function startFrom(picture) {
  state.settings.start = await api.keep(picture);
  refresh();
  touched();
}

/** Change the list of regions, as a step that can be undone. @param {string} label @param {Region[]} next @param {number} chosen */
function relist(label, next, chosen) {
  const before = { list: state.regions, chosen: state.chosen };
  const put = (/** @type {Region[]} */ list, /** @type {number} */ id) => {
    state.regions = list;
    state.chosen = id;
    refresh();
    touched();
  };
  history.add({ label, bytes: 1000, undo: () => put(before.list, before.chosen), redo: () => put(next, chosen) });
  put(next, chosen);
}

/** @type {import("./panel.js").Acts} */
const acts = {
  choose(id) {
    state.chosen = id;
    refresh();
  },
  change(region, label, edit) {
    const before = { ...region, levels: [...region.levels] };
    edit();
    const after = { ...region, levels: [...region.levels] }, previous = history.done[history.done.length - 1];
    const put = (/** @type {Region} */ one) => {
      Object.assign(region, one);
      refresh();
      touched();
    };
    // what is typed or slid is one step
    if (previous && /** @type {any} */ (previous).edits === `${region.id} ${label}`) previous.redo = () => put(after);
    else {
      history.add(/** @type {any} */ ({
        label, bytes: 200, undo: () => put(before), redo: () => put(after), edits: `${region.id} ${label}`,
      }));
    }
    refresh();
    touched();
  },
  mask(work, amount = 0) {
    const bitmap = chosen()?.[ink ? "ink" : "mask"];
    if (!bitmap) return;
    hands.whole(bitmap, work, () => {
      if (work === "Clear") bitmap.data.fill(0);
      if (work === "Invert") invert(bitmap);
      if (work === "Feather") feather(bitmap, amount);
      if (work === "Grow") grow(bitmap, amount);
    });
  },
  box([x, y, width, height]) {
    const bitmap = chosen()?.[ink ? "ink" : "mask"];
    if (bitmap) hands.whole(bitmap, "Rectangle", () => rectangle(bitmap, { x, y }, { x: x + width, y: y + height }, 255));
  },
  remove(region) {
    const rest = state.regions.filter((each) => each !== region);
    relist("Delete a region", rest, rest[0]?.id ?? 0);
  },
  copy(region) {
    const made = regions.duplicate(region, state.next++);
    relist("Copy a region", [...state.regions, made], made.id);
  },
  move(region, by) {
    const list = [...state.regions], at = list.indexOf(region);
    list.splice(at, 1);
    list.splice(at + by, 0, region);
    relist("Move a region", list, region.id);
  },
  ink(on) {
    ink = on;
    refresh();
  },
  async save() {
    const region = chosen();
    if (region) download(await toPng(region[ink ? "ink" : "mask"]), `${region.name}.png`);
  },
  load: (what) => choose(what),
};

function add() {
  const made = regions.region(state.next++, state.settings.width, state.settings.height, can.default_adapter);
  relist("Add a region", [...state.regions, made], made.id);
}

/** @param {Blob} blob @param {string} name */
function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** Ask for a file. @param {string} what it is for */
function choose(what) {
  const file = input("file");
  file.value = "";
  file.accept = what === "open" ? "image/*,.zip" : "image/*";
  file.onchange = () => file.files?.[0] && take(file.files[0], what);
  file.click();
}

/** Take a file that was chosen, dropped or pasted. @param {File} file @param {string} what */
async function take(file, what) {
  try {
    if (what === "start") return await startFrom(file);
    if (what === "open") return await opened(file);
    const region = chosen() ?? (add(), chosen());
    if (!region) return;
    const { width, height } = state.settings, bitmap = what === "mask" ? region.mask : region.ink;
    let source = /** @type {Blob} */ (file);
    if (what === "photo") {
      const way = prompt(`What to compute of it: ${can.preprocessors.join(", ")}`, "sketch");
      if (!way) return;
      source = await api.condition(file, way, width, height);
      ink = true;
    }
    const values = await brightness(source, width, height);
    hands.whole(bitmap, what === "mask" ? "Load a mask" : "Load a condition", () => bitmap.data.set(values));
    refresh();
  } catch (error) {
    say(error instanceof Error ? error.message : String(error), true);
  }
}

/** @param {File} file a project or a picture */
async function opened(file) {
  const found = await openFile(file, state, can);
  if (found) restore(found, "Open");
  else await startFrom(file);
}

/** Show the settings in their fields. */
function fill() {
  const { settings } = state;
  input("prompt").value = settings.prompt;
  input("negative").value = settings.negative_prompt;
  for (const name of /** @type {const} */ (["steps", "guidance", "width", "height", "seed", "strength", "scheduler"])) {
    input(name).value = String(settings[name]);
  }
  input("held").checked = settings.held;
}

/** Hear of every field. */
function listen() {
  const set = (/** @type {string} */ id, /** @type {(value: HTMLInputElement) => void} */ act) => {
    input(id).addEventListener("input", () => {
      act(input(id));
      refresh();
      touched();
    });
  };
  set("prompt", (e) => (state.settings.prompt = e.value));
  set("negative", (e) => (state.settings.negative_prompt = e.value));
  set("held", (e) => (state.settings.held = e.checked));
  set("scheduler", (e) => (state.settings.scheduler = e.value));
  for (const name of /** @type {const} */ (["steps", "guidance", "seed", "strength"])) {
    set(name, (e) => e.value !== "" && (state.settings[name] = Number(e.value)));
  }
  set("preset", (e) => {
    const found = can.presets[e.value] ?? {};
    Object.assign(state.settings, found);
    fill();
  });
  for (const name of /** @type {const} */ (["width", "height"])) {
    input(name).addEventListener("change", () => {
      const next = structuredClone(state);
      next.settings[name] = Math.max(16, Math.round(Number(input(name).value) / 16) * 16);
      regions.resize(next.regions, next.settings.width, next.settings.height);
      restore(next, "Another size");
    });
  }
  input("live").addEventListener("input", () => (input("live").checked ? draw() : live.stop()));
  get("run").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  /** @type {Record<string, () => void>} */
  const clicks = {
    cancel: () => runner.cancel(), add, undo: () => undo(), redo: () => redo(), fit, actual: () => view.zoom(1 / view.scale, middle()),
    dice: () => { setSeed(); touched(); }, start: () => choose("start"), import: () => choose("open"),
    nostart: () => { state.settings.start = null; refresh(); touched(); },
    export: async () => download(await saveProject(state), "project.zip"),
  };
  for (const [id, act] of Object.entries(clicks)) {
    get(id).addEventListener("click", () => {
      act();
      scene.draw();
    });
  }
  input("size").addEventListener("input", () => hands.resize(Number(input("size").value)));
  document.addEventListener("brushsize", () => (input("size").value = String(Math.round(hands.size))));
  input("split").addEventListener("input", () => {
    scene.split = Number(input("split").value) / 100;
    scene.draw();
  });
  for (const button of get("tools").querySelectorAll("button")) {
    button.addEventListener("click", () => tool(/** @type {any} */ (button.dataset.tool)));
  }
}

/** @param {import("./tools.js").Tool} name */
function tool(name) {
  hands.tool = name;
  for (const button of get("tools").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === name));
  }
}

function undo() {
  const label = history.undo();
  if (label !== null) say(`Undone: ${label}`);
}

function redo() {
  const label = history.redo();
  if (label !== null) say(`Again: ${label}`);
}

function middle() {
  return { x: scene.canvas.clientWidth / 2, y: scene.canvas.clientHeight / 2 };
}

function fit() {
  view.fit(state.settings.width, state.settings.height, scene.canvas.clientWidth, scene.canvas.clientHeight);
  scene.draw();
}

/** Keys by what they mean, so that they are where each keyboard has them. */
function keys() {
  /** @type {Record<string, () => void>} */
  const plain = {
    b: () => tool("brush"), e: () => tool("eraser"), r: () => tool("rectangle"), l: () => tool("lasso"), g: () => tool("fill"),
    n: add, "0": fit, "1": () => view.zoom(1 / view.scale, middle()),
    "[": () => hands.resize(hands.size / 1.15), "]": () => hands.resize(hands.size * 1.15),
    "+": () => view.zoom(1.25, middle()), "-": () => view.zoom(0.8, middle()),
  };
  document.addEventListener("keydown", (event) => {
    const control = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
    const typing = /** @type {HTMLElement} */ (event.target).matches("input:not([type=range], [type=checkbox]), textarea, select");
    if (control && key === "enter") return draw();
    if (event.key === "Escape") return runner.cancel();
    if (typing) return;
    if (control && key === "z") {
      event.preventDefault();
      return event.shiftKey ? redo() : undo();
    }
    if (control && key === "y") {
      event.preventDefault();
      return redo();
    }
    if (event.key === " " && event.target === scene.canvas) {
      event.preventDefault();
      hands.space = true;
    } else if (!control && !event.altKey && plain[key]) {
      plain[key]();
      scene.draw();
    }
  });
  document.addEventListener("keyup", (event) => {
    if (event.key === " ") hands.space = false;
  });
}

/** What is dropped or pasted. */
function drops() {
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer?.files[0];
    if (!file) return;
    const onCanvas = event.target === scene.canvas;
    take(file, file.name.endsWith(".zip") || !onCanvas ? "open" : ink ? "condition" : "mask");
  });
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) take(file, ink ? "condition" : "mask");
  });
}

/** Keep the canvas as large as its place. */
function resized() {
  const { canvas } = scene, dots = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * dots);
  canvas.height = Math.round(canvas.clientHeight * dots);
  scene.draw();
}

async function begin() {
  can = await api.capabilities();
  for (const [id, names] of /** @type {[string, string[]][]} */ ([["scheduler", can.schedulers], ["preset", Object.keys(can.presets)]])) {
    get(id).append(...names.map((name) => new Option(name, name)));
  }
  const kept = await store.load().catch(() => null);
  state = kept ?? example(can);
  scene.state = () => ({
    regions: state.regions, chosen: chosen(), ink, width: state.settings.width, height: state.settings.height,
  });
  history.changed = refresh;
  listen();
  keys();
  drops();
  fill();
  new ResizeObserver(resized).observe(scene.canvas);
  resized();
  fit();
  refresh();
  await results.load().catch(() => {});
  const newest = results.kept[results.kept.length - 1];
  if (newest) await present(newest.picture);
  if (kept) {
    input("live").checked = Boolean(kept.live);
    await runner.resume();
  } else draw();
}

// What tests and the curious may look at
Object.assign(window, { localcontrol: { get state() { return state; }, view, history, pace, hands, runner, scene } });

begin().catch((error) => say(`The page could not begin: ${error.message}`, true));

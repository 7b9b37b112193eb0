// How far the picture is: seen step by step, read aloud now and then.

import { get, input, say } from "./dom.js";

const SEEN = 150, HEARD = 5000; // ms between what is shown, and between what is read aloud
let seen = 0, heard = 0;

export function begin() {
  input("cancel").disabled = false;
  seen = heard = performance.now();
  show("Drawing ...", 0);
  say("");
}

/** @param {number} step @param {number} steps */
export function step(step, steps) {
  const now = performance.now(), text = `Step ${step} of ${steps}`;
  if (now - seen > SEEN) {
    seen = now;
    show(text, step / steps);
  }
  if (now - heard > HEARD) {
    heard = now;
    say(text);
  }
}

export function end() {
  input("cancel").disabled = true;
  show("", 0);
}

/** @param {string} text @param {number} share */
function show(text, share) {
  get("step").textContent = text;
  /** @type {HTMLProgressElement} */ (get("progress")).value = share;
}

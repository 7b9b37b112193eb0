// The key of a server that wants one.

import { get, input } from "./dom.js";

/** @param {boolean} wrong whether one was given that the server does not know @returns {Promise<string>} */
export function unlock(wrong) {
  const dialog = /** @type {HTMLDialogElement} */ (get("unlock"));
  if (wrong) get("unlock-said").textContent = "The server does not know that key. Enter another.";
  input("unlock-key").value = "";
  dialog.oncancel = (event) => event.preventDefault();
  dialog.showModal();
  return new Promise((resolve) => (dialog.onclose = () => resolve(input("unlock-key").value.trim())));
}

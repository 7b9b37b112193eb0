// A condition from a picture: what is computed of it is shown before anything runs.

import * as api from "./api.js";
import { get, input } from "./dom.js";
import { cropped, decoded, pixels, stretched } from "./image.js";
import { said } from "./runner.js";

const AS_IT_IS = "nothing: it is a condition";

/**
 * Ask what to make of a picture. Raises Error where it is none.
 * @param {Blob} given @param {string[]} ways what the server computes @param {{width: number, height: number}} size
 * @returns {Promise<Uint8ClampedArray | null>} the condition's pixels, three channels; null where nothing is wanted
 */
export async function conditionOf(given, ways, size) {
  const dialog = /** @type {HTMLDialogElement} */ (get("photo")), picture = await decoded(given);
  const shape = stretched(picture, size), way = input("photo-way"), crop = input("photo-crop");
  way.replaceChildren(...[AS_IT_IS, ...ways].map((name) => new Option(name, name)));
  way.value = ways.includes("canny") ? "canny" : AS_IT_IS;
  crop.checked = true;
  /** @type {HTMLElement} */ (crop.parentElement).hidden = !shape;
  /** @type {Blob | null} */ let made = null;
  let turn = 0;
  const update = async () => {
    const mine = ++turn;
    input("photo-yes").disabled = true;
    get("photo-warning").textContent = shape && !crop.checked ? `It is ${picture.width} x ${picture.height} and will be stretched to ${size.width} x ${size.height}.` : "";
    try {
      const source = shape && crop.checked ? await cropped(picture, size.width, size.height) : given;
      const found = way.value === AS_IT_IS ? source : await api.condition(source, way.value, size.width, size.height);
      if (mine !== turn) return;
      made = found;
      picturesOf(source, found);
      input("photo-yes").disabled = false;
    } catch (error) {
      if (mine === turn) get("photo-warning").textContent = said(error);
    }
  };
  way.oninput = crop.oninput = update;
  dialog.showModal();
  update();
  const wanted = await closed(dialog);
  turn++;
  return wanted && made ? pixels(made, size.width, size.height, 3) : null;
}

/** @param {Blob} given @param {Blob} made */
function picturesOf(given, made) {
  for (const [id, blob] of /** @type {[string, Blob][]} */ ([["photo-given", given], ["photo-made", made]])) {
    const image = /** @type {HTMLImageElement} */ (get(id));
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(blob);
  }
}

/** @param {HTMLDialogElement} dialog @returns {Promise<boolean>} whether it was agreed to */
function closed(dialog) {
  return new Promise((resolve) => {
    get("photo-yes").onclick = () => dialog.close("yes");
    get("photo-no").onclick = () => dialog.close("");
    dialog.returnValue = "";
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}

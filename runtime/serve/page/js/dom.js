// Elements of the page: found, made, and bound to what they show.

/** @template {HTMLElement} T @param {string} id @returns {T} */
export const get = (id) => /** @type {T} */ (document.getElementById(id));

/** @param {string} id */
export const input = (id) => /** @type {HTMLInputElement} */ (get(id));

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

/** Call a function when elements are clicked, by their ids. @param {Record<string, () => any>} acts */
export function clicks(acts) {
  for (const [id, act] of Object.entries(acts)) get(id).addEventListener("click", () => act());
}

/** Say something where it is seen and read aloud. @param {string} text @param {boolean} [wrong] */
export function say(text, wrong = false) {
  const status = get("status");
  status.classList.toggle("wrong", wrong);
  if (status.textContent !== text) status.textContent = text;
}

/** Show a value, but leave alone what is being typed. @param {string} id @param {string | number | boolean} value */
export function show(id, value) {
  const field = input(id);
  if (typeof value === "boolean") field.checked = value;
  else if (field.value !== String(value) && !(field === document.activeElement && isTyped(field, value))) field.value = String(value);
}

/**
 * Whether what is in a field is on its way to be a number, or is this one in other signs: -0, from which -0.5 is to come.
 * @param {HTMLInputElement} field @param {string | number} value
 */
function isTyped(field, value) {
  return !field.validity.valid || (field.type === "number" && field.value !== "" && Number(field.value) === value);
}

/**
 * Hear of a field, whatever it is: text, a number within its bounds, a switch, a choice. What is no such number is marked,
 * said, and not taken; when the field is left it shows again what is taken.
 * @param {string} id @param {(value: any) => void} taken @param {() => void} [left]
 */
export function hear(id, taken, left) {
  const field = input(id), number = field.type === "number" || field.type === "range";
  field.addEventListener("input", () => {
    if (!number) return taken(field.type === "checkbox" ? field.checked : field.value);
    if (field.value !== "" && field.validity.valid) return taken(Number(field.value));
    say(`${field.labels?.[0]?.textContent?.trim() ?? id}: expected ${bounds(field)}`, true);
  });
  if (left) field.addEventListener("blur", left);
}

/** @param {HTMLInputElement} field */
function bounds({ min, max, step }) {
  const kind = step === "" || Number(step) === 1 ? "a whole number" : `a number in steps of ${step}`;
  if (min && max) return `${kind} from ${min} to ${max}`;
  return min ? `${kind} of ${min} or more` : kind;
}

/** Fill a choice. @param {string} id @param {string[]} names */
export function options(id, names) {
  get(id).append(...names.map((name) => new Option(name, name)));
}

// Keys by what they mean, so that they are where each keyboard has them.

/** Whether something is a field for words or numbers. @param {EventTarget | null} target */
export function typing(target) {
  return target instanceof HTMLElement && target.matches("input:not([type=range], [type=checkbox], [type=color]), textarea, select");
}

/**
 * @param {{always: Record<string, () => void>, control: Record<string, () => void>, plain: Record<string, () => void>}} acts
 *   by the key's meaning, in lower case: always with Ctrl or alone, even in a text; with Ctrl; alone
 * @param {(held: boolean) => void} space whether the space bar is held, over the canvas
 */
export function listen(acts, space) {
  let led = false; // whether the keyboard has led to what has the focus, whose the space bar then is
  document.addEventListener("pointerdown", () => (led = false), true);
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const control = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
    const within = typing(event.target), graph = event.getModifierState("AltGraph"); // AltGr, which comes as Ctrl and Alt, writes [ and ]
    if (event.key === "Tab") led = true;
    const over = document.activeElement?.id === "canvas" || (!led && document.querySelector("#canvas:hover"));
    if (event.key === " " && !typing(event.target) && over) {
      event.preventDefault();
      return space(true);
    }
    const act = acts.always[control ? `ctrl+${key}` : key]
      ?? (within ? undefined : control && !graph ? acts.control[event.shiftKey ? `shift+${key}` : key] : !event.altKey || graph ? acts.plain[key] : undefined);
    if (!act) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("keyup", (event) => event.key === " " && space(false));
  window.addEventListener("blur", () => space(false));
}

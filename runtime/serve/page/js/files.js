// Files that come in, chosen, dropped or pasted, and go out.

import { input, say } from "./dom.js";
import { typing } from "./keys.js";

/** Ask for a file. @param {string} accept @returns {Promise<File>} never, where none is chosen */
export function choose(accept) {
  const file = input("file");
  file.value = "";
  file.accept = accept;
  file.click();
  return new Promise((resolve) => (file.onchange = () => file.files?.[0] && resolve(file.files[0])));
}

/** @param {Blob} blob @param {string} name */
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name.replaceAll(/[^\p{L}\p{N} ._-]+/gu, "_");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

/** Hear of what is dropped and pasted. @param {(file: File) => void} taken */
export function listen(taken) {
  const words = (/** @type {DragEvent} */ event) => typing(event.target) && !event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => words(event) || event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (words(event)) return; // which are dragged into a field, or within it
    event.preventDefault();
    const files = event.dataTransfer?.files ?? [];
    if (files.length > 1) say(`${files.length} files at once; drop one, as each has its own use.`, true);
    else if (files.length) taken(files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (!file || (typing(event.target) && event.clipboardData?.types.includes("text/plain"))) return; // an office program's words come with their picture
    event.preventDefault();
    taken(file);
  });
}

// What a file restores: a project, or what one of our PNGs says of its painting.

import { fromSettings } from "./metadata.js";
import * as png from "./png.js";
import { CHUNK, fromText, fromZip } from "./project.js";
import { isZip } from "./zip.js";

/**
 * @param {File} file @param {import("./regions.js").Settings} settings of the page
 * @returns {Promise<{packed: import("./project.js").Packed, picture: Blob | null, drawn: boolean, missing: string[]} | null>}
 *   null for any other file; picture: the one that was seen with it; drawn: whether it was drawn of it, for sure; missing: what this page has no field for, or the server no file. Raises Error where it is broken.
 */
export async function restored(file, settings) {
  const buffer = await file.arrayBuffer();
  try {
    if (isZip(new Uint8Array(buffer))) return { ...fromZip(new Uint8Array(buffer)), drawn: false, missing: [] };
    const said = png.texts(buffer);
    if (said[CHUNK]) return { packed: fromText(said[CHUNK]), picture: file, drawn: true, missing: [] };
    return said.software?.startsWith("localcontrol") ? { ...(await fromSettings(said, settings, png.sizeOf(buffer))), picture: file, drawn: true } : null;
  } catch (error) {
    throw new Error(`${file.name}: ${error instanceof Error ? error.message : error}`);
  }
}

// Where the page begins.

import * as api from "./api.js";
import { listen, listenToKeys } from "./controls.js";
import { get, input, say } from "./dom.js";
import { example } from "./example.js";
import * as files from "./files.js";
import { Page } from "./page.js";
import { unpack } from "./project.js";
import { said } from "./runner.js";
import * as store from "./store.js";
import { unlock } from "./unlock.js";

async function begin() {
  api.keyFrom(unlock);
  const can = await api.capabilities();
  const { tab, kept, pending } = await store.claim().catch(() => ({ tab: store.unique(), kept: null, pending: null }));
  const page = new Page(can, kept ? await unpack(kept.packed) : example(can), tab);
  Object.assign(window, { localcontrol: page }); // for tests, and the curious
  get("model").textContent = `${can.model.split("/").pop()} on ${can.device}`;
  listen(page);
  listenToKeys(page);
  files.listen((file) => page.tried(page.take(file)));
  document.addEventListener("visibilitychange", () => document.hidden && page.save());
  new ResizeObserver(() => page.resized()).observe(page.scene.canvas);
  page.scene.painted = () => (get("zoom").textContent = `${Math.round(100 * page.view.scale)} %`);
  page.fit();
  page.sized();
  page.refresh();
  await page.results.load().catch(() => {});
  if (page.results.current) await page.present(page.results.current);
  if (kept) {
    input("live").checked = kept.live;
    if (pending) await page.runner.resume(pending);
  } else {
    get("hint").textContent = "Paint. Write. Draw.";
    get("hint").hidden = false;
    page.draw();
  }
}

begin().catch((error) => say(`The page could not begin: ${said(error)}`, true));

// Where the page begins.

import * as api from "./api.js";
import { listen, listenToKeys } from "./controls.js";
import { get, input, say } from "./dom.js";
import { example } from "./example.js";
import * as files from "./files.js";
import { Page } from "./page.js";
import { said } from "./runner.js";
import * as store from "./store.js";
import { unlock } from "./unlock.js";

async function begin() {
  api.keyFrom(unlock);
  const can = await api.again(() => api.capabilities());
  let { tab, kept, pending } = await store.claim().catch(() => ({ tab: store.unique(), kept: null, pending: null }));
  let state = null, broken = "";
  if (kept) {
    state = await store.restored(kept).catch((error) => {
      broken = `What was kept here cannot be opened: ${said(error)}.`;
      tab = store.unique(); // and it stays as it is
      kept = pending = null;
      return null;
    });
  }
  const page = new Page(can, state ?? example(can), tab);
  Object.assign(window, { localcontrol: page }); // for tests, and the curious
  get("model").textContent = `${can.model.split("/").pop()} on ${can.device}`;
  listen(page);
  listenToKeys(page);
  files.listen((file) => page.tried(page.take(file)));
  for (const event of ["visibilitychange", "pagehide"]) addEventListener(event, () => page.save(), true);
  new ResizeObserver(() => page.resized()).observe(page.scene.canvas);
  page.scene.painted = () => (get("zoom").textContent = `${Math.round(100 * page.view.scale)} %`);
  page.fit();
  page.sized();
  page.refresh();
  await page.results.load().catch(() => {});
  if (page.results.current) await page.present(page.results.current);
  if (broken) say(broken, true);
  else if (kept) {
    input("live").checked = kept.live;
    if (pending) await page.runner.resume(pending);
  } else {
    get("hint").textContent = "Paint. Write. Draw.";
    get("hint").hidden = false;
    page.draw();
  }
}

begin().catch((error) => say(`The page could not begin: ${said(error)}`, true));

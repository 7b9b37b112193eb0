// What outlives a reload, a closed tab and a crash, in IndexedDB: each tab's painting, and the pictures drawn.

const NAME = "localcontrol", VERSION = 3;
const TABS = 8; // paintings that are kept, the newest
const TAB = "localcontrol.tab";

/** @typedef {import("./bitmap.js").Bitmap} Bitmap */
/** @typedef {import("./painting.js").State} State */
/** @typedef {{tab: string, when: number, live: boolean, state: any}} Kept  a tab's painting, its bitmaps by their keys */
/** @typedef {{tab: string, key: string, sent: any, id?: string}} Pending  what is drawn for a tab */

const TABLES = /** @type {[string, IDBObjectStoreParameters][]} */ ([
  ["paintings", { keyPath: "tab" }], ["bitmaps", {}], ["pending", { keyPath: "tab" }], ["results", { keyPath: "id", autoIncrement: true }],
]);

/** @type {IDBDatabase | null} */
let database = null; // once it is open, so that what is saved when the page goes is saved at once

/** @returns {Promise<IDBDatabase>} */
function open() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, VERSION);
    asked.onupgradeneeded = () => {
      for (const name of asked.result.objectStoreNames) asked.result.deleteObjectStore(name);
      for (const [name, options] of TABLES) asked.result.createObjectStore(name, options);
    };
    asked.onsuccess = () => {
      database = asked.result;
      database.onversionchange = () => database?.close(); // a newer page in another tab wants it
      resolve(database);
    };
    asked.onerror = () => reject(asked.error);
    asked.onblocked = () => reject(new Error("another tab has an older version of this page open; close it"));
  });
}

/** @type {Promise<IDBDatabase> | null} */
let opened = null;

/**
 * @template T @param {string} table @param {IDBTransactionMode} mode @param {(store: IDBObjectStore) => IDBRequest<T>} ask
 * @returns {Promise<T>} once it is on the disk
 */
async function run(table, mode, ask) {
  const transaction = (database ?? (await (opened ??= open()))).transaction(table, mode);
  const asked = ask(transaction.objectStore(table));
  await ended(transaction);
  return asked.result;
}

/** @param {IDBTransaction} transaction @returns {Promise<void>} once it is on the disk */
function ended(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** @returns {string} a name that nothing else has; also where the page is not at https or localhost */
export function unique() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Find this tab's painting, or the one left last where the tab is new. One that another tab has open stays that tab's.
 * @returns {Promise<{tab: string, kept: Kept | null, pending: Pending | null}>}
 */
export async function claim() {
  const all = (await run("paintings", "readonly", (store) => store.getAll())).sort((a, b) => b.when - a.when);
  const held = new Set((await navigator.locks?.query())?.held?.map((lock) => lock.name));
  const own = sessionStorage.getItem(TAB); // after a crash its lock is not held, and others may be newer
  for (const old of all.slice(TABS)) if (old.tab !== own && !held.has(lockOf(old.tab))) forgetTab(old.tab);
  const found = all.find((each) => each.tab === own) ?? all[0] ?? null;
  // only pages at https and localhost have locks; elsewhere a new tab begins with a copy
  const mine = found !== null && (navigator.locks ? await hold(found.tab) : found.tab === own), tab = mine ? found.tab : unique();
  if (!mine && navigator.locks) await hold(tab);
  sessionStorage.setItem(TAB, tab);
  const pending = mine ? await run("pending", "readonly", (store) => store.get(tab)) : null;
  return { tab, kept: found, pending: pending ?? null };
}

/** @param {string} tab */
function lockOf(tab) {
  return `localcontrol.${tab}`;
}

/** @param {string} tab */
function forgetTab(tab) {
  run("paintings", "readwrite", (store) => store.delete(tab));
  run("bitmaps", "readwrite", (store) => store.delete(IDBKeyRange.bound(`${tab} `, `${tab} ~`)));
  settled(tab);
}

/** Hold a tab's name for as long as the page is open. @param {string} tab @returns {Promise<boolean>} whether it was free */
function hold(tab) {
  return new Promise((resolve) => {
    navigator.locks.request(lockOf(tab), { ifAvailable: true }, (lock) => {
      resolve(lock !== null);
      return lock ? new Promise(() => {}) : undefined;
    });
  });
}

/**
 * Keep a tab's painting as it is now: all of it, or what was kept before; bitmaps only where they have changed.
 * @param {string} tab @param {State} state @param {boolean} live @param {(bitmap: Bitmap) => number} version of a bitmap's pixels
 */
export async function save(tab, state, live, version) {
  if (!database) await (opened ??= open());
  const transaction = /** @type {IDBDatabase} */ (database).transaction(["paintings", "bitmaps"], "readwrite", { durability: "strict" });
  const bitmaps = transaction.objectStore("bitmaps"), used = new Set();
  const kept = (/** @type {Bitmap} */ bitmap) => {
    const now = version(bitmap), key = keys.get(bitmap) ?? `${tab} ${unique()}`;
    if (written.get(bitmap) !== now || !there.has(key)) bitmaps.put(bitmap, key);
    keys.set(bitmap, key);
    written.set(bitmap, now);
    there.add(key);
    used.add(key);
    return key;
  };
  const regions = state.regions.map((each) => ({ ...each, mask: kept(each.mask), ink: kept(each.ink) }));
  transaction.objectStore("paintings").put({ tab, when: Date.now(), live, state: { ...state, regions } });
  const gone = [...there].filter((key) => !used.has(key) && key.startsWith(`${tab} `));
  for (const key of gone) {
    bitmaps.delete(key);
    there.delete(key);
  }
  transaction.commit(); // now, and without a question: a page that is closed answers none, and what waits behind it is lost
  try {
    await ended(transaction);
  } catch (error) {
    for (const each of state.regions) [each.mask, each.ink].forEach((bitmap) => written.delete(bitmap));
    for (const key of gone) there.add(key);
    throw error;
  }
}
/** @type {WeakMap<Bitmap, string>} */
const keys = new WeakMap(); // of bitmaps that are kept
/** @type {WeakMap<Bitmap, number>} */
const written = new WeakMap(); // the version that is
/** @type {Set<string>} */
let there = new Set(); // the keys of those that were in use when it was saved last

/** @param {Kept} kept @returns {Promise<State>} Raises Error where some of it is not there. */
export async function restored(kept) {
  there = new Set(kept.state.regions.flatMap((/** @type {any} */ each) => [each.mask, each.ink]));
  const bitmap = async (/** @type {string} */ key) => {
    const found = await run("bitmaps", "readonly", (store) => store.get(key));
    if (!found) throw new Error("a mask of it is missing");
    return found;
  };
  const regions = kept.state.regions.map(async (/** @type {any} */ each) => {
    const [mask, ink] = await Promise.all([bitmap(each.mask), bitmap(each.ink)]);
    return { ...each, mask, ink };
  });
  return { ...kept.state, regions: await Promise.all(regions) };
}

/** @param {Pending} pending */
export const expect = (pending) => run("pending", "readwrite", (store) => store.put(pending));

/** @param {string} tab */
export const settled = (tab) => run("pending", "readwrite", (store) => store.delete(tab));

/** @param {any} result @returns {Promise<number>} its number */
export const keep = (result) => run("results", "readwrite", (store) => store.add(result)).then(Number);
export const results = () => run("results", "readonly", (store) => store.getAll());

/** @param {any} result */
export const replace = (result) => run("results", "readwrite", (store) => store.put(result));

/** @param {number} id */
export const forget = (id) => run("results", "readwrite", (store) => store.delete(id));

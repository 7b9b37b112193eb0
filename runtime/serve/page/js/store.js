// What outlives a reload, a closed tab and a crash, in IndexedDB: each tab's painting, and the pictures drawn.

const NAME = "localcontrol", VERSION = 2;
const TABS = 8; // paintings that are kept, the newest
const TAB = "localcontrol.tab";

/** @typedef {{tab: string, when: number, packed: any, live: boolean}} Kept  a tab's painting */
/** @typedef {{tab: string, key: string, sent: any, id?: string}} Pending  what is drawn for a tab */

/** @returns {Promise<IDBDatabase>} */
function open() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, VERSION);
    asked.onupgradeneeded = () => {
      const there = asked.result.objectStoreNames;
      for (const [name, options] of /** @type {[string, IDBObjectStoreParameters][]} */ ([
        ["paintings", { keyPath: "tab" }], ["pending", { keyPath: "tab" }], ["results", { keyPath: "id", autoIncrement: true }],
      ])) {
        if (there.contains(name)) asked.result.deleteObjectStore(name);
        asked.result.createObjectStore(name, options);
      }
    };
    asked.onsuccess = () => {
      asked.result.onversionchange = () => asked.result.close(); // a newer page in another tab wants it
      resolve(asked.result);
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
  const database = await (opened ??= open());
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(table, mode);
    const asked = ask(transaction.objectStore(table));
    transaction.oncomplete = () => resolve(asked.result);
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
  for (const old of all.slice(TABS)) run("paintings", "readwrite", (store) => store.delete(old.tab));
  const own = sessionStorage.getItem(TAB), found = all.find((each) => each.tab === own) ?? all[0] ?? null;
  // only pages at https and localhost have locks; elsewhere a new tab begins with a copy
  const mine = found !== null && (navigator.locks ? await hold(found.tab) : found.tab === own), tab = mine ? found.tab : unique();
  if (!mine && navigator.locks) await hold(tab);
  sessionStorage.setItem(TAB, tab);
  const pending = mine ? await run("pending", "readonly", (store) => store.get(tab)) : null;
  return { tab, kept: found, pending: pending ?? null };
}

/** Hold a tab's name for as long as the page is open. @param {string} tab @returns {Promise<boolean>} whether it was free */
function hold(tab) {
  return new Promise((resolve) => {
    navigator.locks.request(`localcontrol.${tab}`, { ifAvailable: true }, (lock) => {
      resolve(lock !== null);
      return lock ? new Promise(() => {}) : undefined;
    });
  });
}

/** @param {Kept} kept */
export const save = (kept) => run("paintings", "readwrite", (store) => store.put(kept));

/** @param {Pending} pending */
export const expect = (pending) => run("pending", "readwrite", (store) => store.put(pending));

/** @param {string} tab */
export const settled = (tab) => run("pending", "readwrite", (store) => store.delete(tab));

/** @param {any} result @returns {Promise<number>} its number */
export const keep = (result) => run("results", "readwrite", (store) => store.add(result)).then(Number);
export const results = () => run("results", "readonly", (store) => store.getAll());

/** @param {number} id */
export const forget = (id) => run("results", "readwrite", (store) => store.delete(id));

// What outlives a reload: one record of everything painted, and the pictures drawn, in IndexedDB.

const NAME = "localcontrol", VERSION = 1;

/** @returns {Promise<IDBDatabase>} */
function open() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, VERSION);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("state");
      asked.result.createObjectStore("results", { keyPath: "id" });
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
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

/** @param {any} state */
export const save = (state) => run("state", "readwrite", (store) => store.put(state, "now"));
export const load = () => run("state", "readonly", (store) => store.get("now"));

/** @param {any} result */
export const keep = (result) => run("results", "readwrite", (store) => store.put(result));
export const results = () => run("results", "readonly", (store) => store.getAll());

/** @param {number} id */
export const forget = (id) => run("results", "readwrite", (store) => store.delete(id));

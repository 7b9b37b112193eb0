// The server's routes: one function each, and its events as they come.

/** @typedef {{kind: string, data: any}} ServerEvent */
/** @typedef {Omit<RequestInit, "headers"> & {headers?: Record<string, string>}} Asked */

export class Refused extends Error {
  /** @param {number} status @param {{message: string, param?: string | null}} error */
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.field = error.param ?? null;
  }
}

/** No answer at all. */
export class Away extends Error {
  constructor() {
    super("The server does not answer. What you have painted is kept in this browser.");
  }
}

const LATER = [429, 502, 503, 504]; // statuses of a server, or of a proxy before it, that may answer another time

/** @param {any} error */
function passes(error) {
  return error instanceof Away || (error instanceof Refused && LATER.includes(error.status));
}

/**
 * Try until the server has room or is there again.
 * @template T @param {() => Promise<T>} call @param {AbortSignal} [signal] @returns {Promise<T>}
 */
export async function again(call, signal) {
  for (let tries = 0; ; tries++) {
    try {
      return await call();
    } catch (error) {
      if (!passes(error) || signal?.aborted || tries >= 40) throw error;
      await new Promise((resolve) => setTimeout(resolve, 250 + 250 * Math.min(tries, 8)));
      if (signal?.aborted) throw error;
    }
  }
}

const KEY = "localcontrol.key"; // of this tab: the API key that a server with keys wants

/** Asks the person for the server's key. @type {(wrong: boolean) => Promise<string>} */
let askKey = () => Promise.reject(new Refused(401, { message: "the server wants an API key" }));

/** @param {(wrong: boolean) => Promise<string>} ask wrong: whether one was given that the server does not know */
export function keyFrom(ask) {
  askKey = ask;
}

/** @type {Promise<string> | null} */
let asked = null; // however many requests want it, a person is asked once

/**
 * @param {string} path @param {Asked} [options]
 * @returns {Promise<Response>} Raises Refused where it is an error.
 */
async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers }).catch((error) => {
      throw options.signal?.aborted ? error : new Away();
    });
    if (answer.ok) return answer;
    if (answer.status === 401) {
      if (sessionStorage.getItem(KEY) === key) sessionStorage.setItem(KEY, await (asked ??= askKey(key !== null)));
      asked = null;
      continue;
    }
    const body = await answer.json().catch(() => null);
    throw new Refused(answer.status, body?.error ?? { message: `the server answered ${answer.status}` });
  }
}

/** @param {string} path @param {any} body @param {Asked} [options] */
async function post(path, body, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  return ask(path, { ...options, method: "POST", headers, body: JSON.stringify(body) });
}

export async function capabilities() {
  return (await ask("/v1/capabilities")).json();
}

/** @param {Blob} blob @returns {Promise<string>} the file's id */
export async function keep(blob) {
  return (await (await ask("/v1/files", { method: "POST", body: blob })).json()).id;
}

/** @param {string} id @returns {Promise<Blob>} */
export async function file(id) {
  return (await ask(`/v1/files/${id}`)).blob();
}

/** @param {Blob} blob @param {string} preprocess @param {number} width @param {number} height @returns {Promise<Blob>} */
export async function condition(blob, preprocess, width, height) {
  const image = await keep(blob);
  return (await post("/v1/conditions", { image, preprocess, width, height })).blob();
}

/** @param {any} body @param {AbortSignal} signal @returns {Promise<Blob>} a picture that nobody has to find again */
export async function generate(body, signal) {
  return (await post("/v1/generate", body, { signal })).blob();
}

/** @param {any} body @param {string} key @returns {Promise<{id: string}>} a job, the same one however often it is sent */
export async function submit(body, key) {
  return (await post("/v1/jobs", body, { headers: { "Idempotency-Key": key } })).json();
}

/** @param {string} id */
export async function cancel(id) {
  return (await ask(`/v1/jobs/${id}`, { method: "DELETE" })).json();
}

/** Queue a job again that a server's end has interrupted. @param {string} id */
export async function retry(id) {
  return (await ask(`/v1/jobs/${id}/retry`, { method: "POST" })).json();
}

/** @param {string} id @param {AbortSignal} signal @returns {Promise<Blob>} the picture of a job that is done */
export async function picture(id, signal) {
  return (await ask(`/v1/jobs/${id}/images/0`, { signal })).blob();
}

/**
 * A job's events as they come, from after a number on; connected again where the connection breaks.
 * @param {string} id @param {AbortSignal} signal @returns {AsyncGenerator<ServerEvent>}
 */
export async function* events(id, signal) {
  let last = "0", tries = 0;
  for (;;) {
    try {
      const headers = { "Last-Event-ID": last };
      const answer = await ask(`/v1/jobs/${id}/events`, { headers, signal });
      for await (const block of blocks(/** @type {ReadableStream<Uint8Array>} */ (answer.body))) {
        const event = parse(block);
        if (!event) continue;
        last = event.number ?? last;
        tries = 0;
        yield { kind: event.kind, data: event.data };
        if (["done", "failed", "cancelled", "interrupted"].includes(event.kind)) return;
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Refused && !passes(error)) || ++tries > 20) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(5000, 200 * 2 ** tries)));
  }
}

/** @param {ReadableStream<Uint8Array>} stream @returns {AsyncGenerator<string>} */
export async function* blocks(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    text += value ? decoder.decode(value, { stream: true }) : "";
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      yield text.slice(0, end);
      text = text.slice(end + 2);
    }
    if (done) return;
  }
}

/** @param {string} block @returns {{kind: string, data: any, number?: string} | null} null for a comment */
export function parse(block) {
  /** @type {Record<string, string>} */
  const fields = {};
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
  }
  if (!fields.event) return null;
  return { kind: fields.event, data: JSON.parse(fields.data ?? "{}"), number: fields.id };
}

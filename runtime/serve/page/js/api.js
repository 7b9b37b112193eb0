// The server's routes: one function each, and its events as they come.

/** @typedef {{kind: string, data: any}} ServerEvent */

export class Refused extends Error {
  /** @param {number} status @param {{message: string, param?: string | null}} error */
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.field = error.param ?? null;
  }
}

/** @param {Response} answer @returns {Promise<Response>} Raises Refused where it is an error. */
async function taken(answer) {
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refused(answer.status, body?.error ?? { message: `the server answered ${answer.status}` });
}

/** @param {string} path @param {any} body @param {AbortSignal} [signal] */
async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return taken(await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }));
}

export async function capabilities() {
  return (await taken(await fetch("/v1/capabilities"))).json();
}

/** @param {Blob} blob @returns {Promise<string>} the file's id */
export async function keep(blob) {
  const answer = await taken(await fetch("/v1/files", { method: "POST", body: blob }));
  return (await answer.json()).id;
}

/** @param {Blob} blob @param {string} preprocess @param {number} width @param {number} height @returns {Promise<Blob>} */
export async function condition(blob, preprocess, width, height) {
  const image = await keep(blob);
  return (await post("/v1/conditions", { image, preprocess, width, height })).blob();
}

/** @param {any} body @param {string} key @returns {Promise<{id: string}>} a job, the same one however often it is sent */
export async function submit(body, key) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  const answer = await taken(await fetch("/v1/jobs", { method: "POST", headers, body: JSON.stringify(body) }));
  return answer.json();
}

/** @param {string} id */
export async function job(id) {
  return (await taken(await fetch(`/v1/jobs/${id}`))).json();
}

/** @param {string} id */
export async function cancel(id) {
  return (await taken(await fetch(`/v1/jobs/${id}`, { method: "DELETE" }))).json();
}

/** @param {string} path @returns {Promise<Blob>} */
export async function picture(path) {
  return (await taken(await fetch(path))).blob();
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
      const answer = await taken(await fetch(`/v1/jobs/${id}/events`, { headers, signal }));
      for await (const block of blocks(/** @type {ReadableStream<Uint8Array>} */ (answer.body))) {
        const event = parse(block);
        if (!event) continue;
        last = event.number ?? last;
        tries = 0;
        yield { kind: event.kind, data: event.data };
        if (["done", "failed", "cancelled", "interrupted"].includes(event.kind)) return;
      }
    } catch (error) {
      if (signal.aborted || error instanceof Refused || ++tries > 20) throw error;
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

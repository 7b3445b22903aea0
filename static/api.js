// SPDX-License-Identifier: Apache-2.0
// The way to the server: fetch and WebSocket, relative to this page, with the token when there is one.

/** The folder this page lives in: "/" or the path a reverse proxy put us under. */
export const root = new URL(".", location.href);
root.search = "";
root.hash = "";

const TOKEN = "aiperf.token";

/** The token comes once in the page's address; it is taken out of sight and kept for this tab. */
function takeToken() {
  const here = new URL(location.href);
  const given = here.searchParams.get("token");
  if (given !== null) {
    here.searchParams.delete("token");
    history.replaceState(null, "", here);
    setToken(given);
  }
  try {
    return sessionStorage.getItem(TOKEN) ?? given ?? "";
  } catch {
    return given ?? "";
  }
}

let token = "";

export function setToken(value) {
  token = value;
  try {
    sessionStorage.setItem(TOKEN, value);
  } catch {
    /* no storage: it lasts until the next reload */
  }
}

token = takeToken();

export const hasToken = () => token !== "";

/** An answer that is not 2xx. */
export class AnswerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The raw answer to GET `path` (relative to the root, without a leading slash). */
export function request(path, { signal, headers = {} } = {}) {
  const all = token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
  return fetch(new URL(path, root), { signal, headers: all, cache: "no-store", credentials: "same-origin" });
}

/** The JSON answer to GET `path`. Throws AnswerError, or what fetch throws when nobody answers within 10 s. */
export async function getJSON(path) {
  const giveUp = new AbortController();
  const timer = setTimeout(() => giveUp.abort(), 10_000);
  try {
    const answer = await request(path, { signal: giveUp.signal });
    if (!answer.ok) {
      const body = await answer.json().catch(() => ({}));
      throw new AnswerError(answer.status, String(body.error ?? answer.statusText));
    }
    return await answer.json();
  } finally {
    clearTimeout(timer);
  }
}

/** A message's JSON, or undefined if it is none. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** The address of the WebSocket. */
export function socketURL() {
  const url = new URL("ws", root);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url;
}

// RFC 6455 4.1: a subprotocol is an HTTP token; anything else has to travel in the query.
const HTTP_TOKEN = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/;

function openSocket() {
  const url = socketURL();
  if (!token) return new WebSocket(url);
  if (HTTP_TOKEN.test(token)) return new WebSocket(url, ["aiperf", `aiperf.token.${token}`]);
  url.searchParams.set("token", token);
  return new WebSocket(url);
}

const BACK_OFF_SEC = [0.5, 1, 2, 4, 8, 15];
const PING_SEC = 15;
const SILENT_SEC = 40;

// The type stands first in what AIPerf sends; reading it without parsing lets a burst of states cost next to nothing.
const LEADING_TYPE = /^\s*\{\s*"message_type"\s*:\s*"([A-Za-z0-9_.-]+)"/;

/**
 * A WebSocket that stays: it subscribes, reconnects with growing pauses, and notices a line that went dead.
 *
 * `onMessage(type, text)` gets bus messages unparsed, `onControl(object)` the server's own ({"type": …}),
 * `onState("open" | "waiting", retryAtMs)` the ups and downs.
 */
export class Feed {
  constructor({ types, snapshot = true, onMessage, onControl = () => {}, onState = () => {} }) {
    Object.assign(this, { types, snapshot, onMessage, onControl, onState });
    this.failures = 0;
    this.stopped = false;
    this.timer = 0;
    this.wake = () => {
      if (!this.stopped && !this.socket) this.connect();
    };
    addEventListener("online", this.wake);
    this.connect();
  }

  connect() {
    clearTimeout(this.timer);
    const socket = (this.socket = openSocket());
    let heard = Date.now();
    const watch = setInterval(() => {
      if (Date.now() - heard > SILENT_SEC * 1000) socket.close();
      else if (socket.readyState === WebSocket.OPEN) socket.send('{"type":"ping"}');
    }, PING_SEC * 1000);
    socket.onopen = () => {
      socket.send(JSON.stringify({ type: "subscribe", message_types: this.types, snapshot: this.snapshot }));
    };
    socket.onmessage = (event) => {
      heard = Date.now();
      this.receive(event.data);
    };
    socket.onclose = () => {
      clearInterval(watch);
      if (this.socket !== socket) return;
      this.socket = null;
      if (!this.stopped) this.retry();
    };
  }

  receive(text) {
    const leading = LEADING_TYPE.exec(text);
    if (leading) {
      this.onMessage(leading[1], text);
      return;
    }
    const message = parsed(text);
    if (message && typeof message.message_type === "string") this.onMessage(message.message_type, text);
    else if (message && message.type === "subscribed") {
      this.failures = 0;
      this.onState("open", 0);
      this.onControl(message);
    } else if (message && message.type !== "pong") this.onControl(message);
  }

  retry() {
    const pause = BACK_OFF_SEC[Math.min(this.failures++, BACK_OFF_SEC.length - 1)] * (0.8 + 0.4 * Math.random());
    this.onState("waiting", Date.now() + pause * 1000);
    this.timer = setTimeout(this.wake, pause * 1000);
  }

  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    removeEventListener("online", this.wake);
    this.socket?.close();
  }
}

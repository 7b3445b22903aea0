// SPDX-License-Identifier: Apache-2.0
// The tables. A row keeps its elements for as long as its key lives; an update writes the cells that changed.

import { copyButton, h, setAttribute, setChildren, setText } from "./dom.js";
import { better } from "./direction.js";
import { bytes, count, csvLine, known, number, phrase, timeOfDay, unitLabel } from "./format.js";

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/**
 * A table that can be sorted. `columns`: `{id, label, text?: left-aligned, value: row => sortable, show: row => string,
 * cell?: (td, row) => void, csv?: row => value}`. Rows carry a `key`.
 */
class Table {
  constructor({ columns, caption, sort, empty }) {
    Object.assign(this, { columns, sort, empty });
    this.elements = new Map(); // key -> {tr, cells}
    this.rows = [];
    this.filter = "";
    this.head = columns.map((column) => this.heading(column));
    this.body = h("tbody");
    this.nothing = h("p", { class: "nothing" });
    this.table = h("table", {}, h("caption", { class: "sr" }, caption), h("thead", {}, h("tr", {}, ...this.head)), this.body);
    this.scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": caption }, this.table);
    this.element = h("div", {}, this.scroller, this.nothing);
    this.show([]);
  }

  heading(column) {
    const button = h("button", { type: "button", title: column.title }, column.label);
    button.addEventListener("click", () => {
      const descending = this.sort?.id === column.id ? !this.sort.descending : !column.text;
      this.sort = { id: column.id, descending };
      this.show(this.rows);
    });
    return h("th", { scope: "col", class: column.text ? "text" : null }, button);
  }

  setFilter(text) {
    this.filter = text.trim().toLowerCase();
    this.show(this.rows);
  }

  /** The rows as shown: filtered and sorted. */
  ordered() {
    const rows = this.filter ? this.rows.filter((row) => row.search.toLowerCase().includes(this.filter)) : [...this.rows];
    const column = this.columns.find(({ id }) => id === this.sort?.id);
    if (!column) return rows;
    const sign = this.sort.descending ? -1 : 1;
    return rows.sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (x === undefined || x === null) return y === undefined || y === null ? 0 : 1; // nothing comes last both ways
      if (y === undefined || y === null) return -1;
      return sign * (known(x) && known(y) ? x - y : collator.compare(String(x), String(y))) || collator.compare(a.key, b.key);
    });
  }

  show(rows) {
    this.rows = rows;
    this.columns.forEach((column, at) => setAttribute(this.head[at], "aria-sort",
      this.sort?.id === column.id ? (this.sort.descending ? "descending" : "ascending") : "none"));
    const wanted = this.ordered().map((row) => this.row(row));
    setChildren(this.body, wanted);
    const live = new Set(rows.map(({ key }) => key));
    for (const key of this.elements.keys()) if (!live.has(key)) this.elements.delete(key);
    this.scroller.hidden = rows.length === 0;
    this.nothing.hidden = wanted.length > 0;
    if (!wanted.length) setText(this.nothing, rows.length ? "Nothing matches the search." : this.empty());
  }

  row(row) {
    let known = this.elements.get(row.key);
    if (!known) {
      const cells = this.columns.map(({ text, kind }) => h("td", { class: [text && "text", kind].filter(Boolean).join(" ") || null }));
      known = { tr: h("tr", {}, ...cells), cells };
      this.elements.set(row.key, known);
    }
    this.columns.forEach((column, at) => {
      if (column.cell) column.cell(known.cells[at], row);
      else setText(known.cells[at], column.show(row));
    });
    return known.tr;
  }

  csv() {
    const lines = this.ordered().map((row) => csvLine(this.columns.map((column) => (column.csv ?? column.value)(row))));
    return csvLine(this.columns.map(({ id }) => id)) + lines.join("");
  }
}

const search = (table, what) => {
  const input = h("input", { type: "search", placeholder: `Search ${what}`, "aria-label": `Search ${what}`, spellcheck: "false" });
  input.addEventListener("input", () => table.setFilter(input.value));
  return input;
};

const stat = (id, label = id) => ({ id, label, value: (row) => row.stats[id], show: (row) => cell(row.stats[id]) });
const cell = (value) => (known(value) ? number(value) : value === undefined || value === null ? "" : String(value));

function twoLines(td, first, second) {
  if (!td.firstChild) td.append(h("span"), h("span", { class: "tag" }));
  setText(td.firstChild, first);
  setText(td.lastChild, second);
  setAttribute(td, "title", second ? `${first} (${second})` : first);
}

// What people look for first stands first.
const FIRST = ["output_token_throughput", "request_throughput", "time_to_first_token", "inter_token_latency",
  "request_latency", "output_token_throughput_per_user", "request_count", "completed_request_count", "error_request_count",
  "request_error_rate", "goodput", "time_to_second_token", "output_sequence_length", "input_sequence_length"];
const rank = (tag) => (FIRST.includes(tag) ? FIRST.indexOf(tag) : FIRST.length);

/** All metrics. `rows` of update(): Map tag -> {header, unit, …statistics}. */
export class MetricsTable {
  constructor(pane, { empty }) {
    this.rows = new Map();
    this.table = new Table({
      caption: "All metrics",
      empty,
      columns: [
        { id: "metric", label: "Metric", text: true, kind: "name", value: ({ header }) => header, cell: (td, row) => twoLines(td, row.header, row.key), csv: ({ key }) => key },
        { id: "unit", label: "Unit", text: true, kind: "unit", value: ({ unit }) => unit, show: ({ unit }) => unitLabel(unit) },
        { id: "better", label: "Better", text: true, kind: "better", value: ({ better }) => better, show: ({ better }) => ({ larger: "▲ larger", smaller: "▼ smaller" })[better] ?? "" },
        ...["avg", "min", "p50", "p90", "p95", "p99", "max", "std", "count", "sum"].map((id) => stat(id)),
      ],
    });
    pane.append(h("div", { class: "tools" }, search(this.table, "metrics"), h("span", { class: "grow" }),
      copyButton(() => this.table.csv(), "Copy CSV"), copyButton(() => JSON.stringify(Object.fromEntries(this.rows), null, 2), "Copy JSON")), this.table.element);
  }

  update(rows) {
    this.rows = rows;
    const list = [...rows].map(([tag, { header, unit, ...stats }]) => ({
      key: tag, header: header ?? tag, unit, stats, better: better(tag, unit), search: `${tag} ${header ?? ""}`,
    }));
    this.table.show(list.sort((a, b) => rank(a.key) - rank(b.key) || collator.compare(a.header, b.header)));
    return list.length;
  }

  csv() {
    return this.table.csv();
  }
}

/** "NVIDIA GPU Power Usage | 127.0.0.1:19400 | GPU 0 | NVIDIA H200" in parts. */
export function gpuHeader(header, tag) {
  const [measure = tag, source = "", gpu = "", model = ""] = String(header ?? tag).split(" | ");
  return { measure: measure.replace(/^(NVIDIA|AMD) (GPU )?/, ""), source, gpu: gpu || tag, model };
}

/** The present value of a telemetry row. */
export const present = (row) => row.current ?? row.avg;

/** The measures people look for first, in that order. */
export const MEASURES = ["Power Usage", "Utilization", "Memory Used", "Temperature", "SM Utilization", "Memory Utilization"];

/** GPUs, one row each, one column per measure, as they come. */
export class GPUTable {
  constructor(pane, { empty }) {
    Object.assign(this, { pane, empty, shape: null });
    this.build([]);
  }

  build(measures) {
    const shape = measures.map(({ name, unit }) => `${name}|${unit}`).join();
    if (shape === this.shape) return;
    this.shape = shape;
    this.table = new Table({
      caption: "GPUs, present values",
      empty: this.empty,
      sort: { id: "gpu", descending: false },
      columns: [
        { id: "gpu", label: "GPU", text: true, kind: "name", value: ({ key }) => key, cell: (td, row) => twoLines(td, `${row.gpu} ${row.model}`, row.source) },
        ...measures.map(({ name, unit }) => ({
          id: name, label: unit && unit !== "count" ? `${name}, ${unit}` : name, value: (row) => row.values.get(name), show: (row) => cell(row.values.get(name)),
        })),
      ],
    });
    setChildren(this.pane, [h("div", { class: "tools" }, h("span", { class: "grow" }), copyButton(() => this.table.csv(), "Copy CSV")), this.table.element]);
  }

  update(telemetry) {
    const gpus = new Map();
    const measures = new Map();
    for (const [tag, row] of telemetry) {
      const { measure, source, gpu, model } = gpuHeader(row.header, tag);
      const key = `${source} ${gpu}`;
      if (!gpus.has(key)) gpus.set(key, { key, source, gpu, model, values: new Map(), search: key });
      gpus.get(key).values.set(measure, present(row));
      measures.set(measure, { name: measure, unit: row.unit });
    }
    const place = ({ name }) => (MEASURES.includes(name) ? MEASURES.indexOf(name) : MEASURES.length);
    this.build([...measures.values()].sort((a, b) => place(a) - place(b) || collator.compare(a.name, b.name)));
    this.table.show([...gpus.values()]);
    return gpus.size;
  }
}

/** Inference-server metrics. */
export class ServerTable {
  constructor(pane, { empty }) {
    this.table = new Table({
      caption: "Inference-server metrics",
      empty,
      columns: [
        { id: "metric", label: "Metric", text: true, kind: "name", value: ({ name }) => name, cell: (td, row) => twoLines(td, row.name, row.description) },
        { id: "labels", label: "Labels", text: true, kind: "name unit", value: ({ labels }) => labels, show: ({ labels }) => labels },
        { id: "endpoint", label: "Endpoint", text: true, value: ({ endpoint }) => endpoint, show: ({ endpoint }) => endpoint },
        { id: "type", label: "Type", text: true, value: ({ type }) => type, show: ({ type }) => type },
        stat("avg"), stat("min"), stat("max"),
        { id: "p50", label: "p50", value: quantile("p50"), show: (row) => cell(quantile("p50")(row)) },
        { id: "p99", label: "p99", value: quantile("p99"), show: (row) => cell(quantile("p99")(row)) },
        { id: "rate", label: "Rate/s", value: rate, show: (row) => cell(rate(row)) },
        { id: "total", label: "Total", value: total, show: (row) => cell(total(row)) },
      ],
    });
    pane.append(h("div", { class: "tools" }, search(this.table, "server metrics"), h("span", { class: "grow" }), copyButton(() => this.table.csv(), "Copy CSV")), this.table.element);
  }

  update(server) {
    const rows = [];
    for (const [endpoint, { metrics = {} }] of Object.entries(server?.endpoint_summaries ?? {})) {
      for (const [name, { type = "", description = "", series = [] }] of Object.entries(metrics)) {
        for (const { labels, stats } of series) {
          const text = Object.entries(labels ?? {}).map(([key, value]) => `${key}=${value}`).join(", ");
          rows.push({ key: `${endpoint} ${name} ${text}`, name, labels: text, endpoint, type, description, stats: stats ?? {}, search: `${name} ${text} ${endpoint}` });
        }
      }
    }
    this.table.show(rows);
    return rows.length;
  }
}

const quantile = (name) => ({ stats }) => stats[name] ?? stats[`${name}_estimate`];
const rate = ({ stats }) => stats.rate ?? stats.count_rate;
const total = ({ stats }) => stats.total ?? stats.count;

const STATUS = { healthy: "healthy", high_load: "high load", error: "error", idle: "idle", stale: "stale" };

/** Workers: /api/workers. */
export class WorkersTable {
  constructor(pane, { empty }) {
    this.summary = h("p", { class: "muted" });
    this.table = new Table({
      caption: "Workers",
      empty,
      sort: { id: "worker", descending: false },
      columns: [
        { id: "worker", label: "Worker", text: true, value: ({ key }) => key, show: ({ key }) => key },
        { id: "status", label: "Status", text: true, value: ({ status }) => status, cell: statusCell },
        { id: "tasks", label: "Tasks", value: ({ tasks }) => tasks.total, show: ({ tasks }) => count(tasks.total) },
        { id: "completed", label: "Completed", value: ({ tasks }) => tasks.completed, show: ({ tasks }) => count(tasks.completed) },
        { id: "failed", label: "Failed", value: ({ tasks }) => tasks.failed, show: ({ tasks }) => count(tasks.failed) },
        { id: "cpu", label: "CPU", value: ({ health }) => health.cpu_usage, show: ({ health }) => phrase(health.cpu_usage, "%", 3) },
        { id: "memory", label: "Memory", value: ({ health }) => health.memory_usage, show: ({ health }) => bytes(health.memory_usage) },
        { id: "threads", label: "Threads", value: ({ health }) => health.num_threads, show: ({ health }) => count(health.num_threads) },
      ],
    });
    pane.append(h("div", { class: "tools" }, this.summary, h("span", { class: "grow" }), copyButton(() => this.table.csv(), "Copy CSV")), this.table.element);
  }

  update(answer) {
    const statuses = answer?.worker_statuses ?? {};
    const workers = answer?.workers ?? {};
    const ids = [...new Set([...Object.keys(statuses), ...Object.keys(workers)])];
    const rows = ids.map((key) => ({
      key, search: key, status: workers[key]?.status ?? statuses[key] ?? "unknown",
      tasks: workers[key]?.task_stats ?? {}, health: workers[key]?.health ?? {},
    }));
    const tally = new Map();
    for (const { status } of rows) tally.set(status, (tally.get(status) ?? 0) + 1);
    setText(this.summary, rows.length ? [...tally].map(([status, n]) => `${n} ${STATUS[status] ?? status}`).join(" · ") : "");
    this.table.show(rows);
    return rows.length;
  }
}

function statusCell(td, { status }) {
  if (!td.firstChild) td.append(h("span", { class: "status" }, h("i", { "aria-hidden": "true" }), h("span")));
  setAttribute(td.firstChild, "data-status", STATUS[status] ? status : "unknown");
  setText(td.firstChild.lastChild, STATUS[status] ?? String(status));
}

const MAX_EVENTS = 500;
const KINDS = { all: "All", phase: "Phases", state: "State", error: "Errors", line: "Connection" };

/** The event log, newest first. */
export class EventLog {
  constructor(pane) {
    this.events = []; // newest first: {key, at, kind, what, text, element}
    this.kind = "all";
    this.list = h("ol", { class: "events", tabindex: "0", "aria-label": "Events, newest first" });
    this.nothing = h("p", { class: "nothing" }, "No events yet.");
    this.buttons = Object.entries(KINDS).map(([kind, label]) => {
      const button = h("button", { type: "button", "aria-pressed": String(kind === "all") }, label);
      button.addEventListener("click", () => {
        this.kind = kind;
        this.buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
        this.show();
      });
      return button;
    });
    this.input = h("input", { type: "search", placeholder: "Filter events", "aria-label": "Filter events", spellcheck: "false" });
    this.input.addEventListener("input", () => this.show());
    pane.append(h("div", { class: "tools" }, h("div", { class: "segmented", role: "group", "aria-label": "Kind of event" }, ...this.buttons), this.input,
      h("span", { class: "grow" }), copyButton(() => this.csv(), "Copy CSV")), this.list, this.nothing);
  }

  /** Adds an event once: the same key again changes nothing. `at` in ms since the epoch. */
  add({ key, at, kind, what, text }) {
    if (key && this.events.some((event) => event.key === key)) return;
    const element = h("li", { "data-kind": kind }, h("time", { datetime: new Date(at).toISOString() }, timeOfDay(at)), h("span", { class: "what" }, what), h("span", { class: "text" }, text));
    let place = this.events.findIndex((event) => event.at <= at);
    if (place < 0) place = this.events.length;
    this.events.splice(place, 0, { key, at, kind, what, text, element });
    this.events.length = Math.min(this.events.length, MAX_EVENTS);
    this.show();
  }

  clear() {
    this.events = this.events.filter(({ kind }) => kind === "line");
    this.show();
  }

  show() {
    const wanted = this.input.value.trim().toLowerCase();
    const shown = this.events.filter(({ kind, what, text }) => (this.kind === "all" || kind === this.kind) && `${what} ${text}`.toLowerCase().includes(wanted));
    setChildren(this.list, shown.map(({ element }) => element));
    this.nothing.hidden = shown.length > 0;
    this.list.hidden = shown.length === 0;
    setText(this.nothing, this.events.length ? "No such event." : "No events yet.");
  }

  csv() {
    return csvLine(["time", "kind", "event", "text"]) + this.events.map(({ at, kind, what, text }) => csvLine([new Date(at).toISOString(), kind, what, text])).join("");
  }
}

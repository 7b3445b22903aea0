// SPDX-License-Identifier: Apache-2.0
// The tables. A row keeps its elements for as long as its key lives; an update writes the cells that changed.

import { copyButton, h, setAttribute, setChildren, setText, svg } from "./dom.js";
import { better } from "./direction.js";
import { changeOf, gpuParts, measureRank } from "./figures.js";
import { bytes, count, csvText, known, natural, number, phrase, timeOfDay, unitLabel } from "./format.js";

const STATISTICS = [
  "avg", "min", "max", "std", "p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "count", "sum", "current",
];

/**
 * A table that can be sorted. `columns`: `{id, label, text?: left-aligned, plain?: sorted by code point, kind?: class,
 * value: row => sortable, show: row => string, cell?: (td, row) => void}`. Rows carry a `key`.
 */
class Table {
  constructor({ columns, caption, sort }) {
    Object.assign(this, { columns, sort });
    this.elements = new Map(); // key -> {tr, cells}
    this.rows = [];
    this.filter = "";
    this.empty = "";
    this.head = columns.map((column) => this.heading(column));
    this.body = h("tbody");
    this.nothing = h("p", { class: "nothing" });
    const table = h(
      "table", {}, h("caption", { class: "sr" }, caption), h("thead", {}, h("tr", {}, ...this.head)), this.body,
    );
    this.scroller = h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": caption }, table);
    this.element = h("div", {}, this.scroller, this.nothing);
  }

  heading(column) {
    const button = h("button", { type: "button", title: column.title }, column.label);
    button.addEventListener("click", () => {
      const descending = this.sort?.id === column.id ? !this.sort.descending : !column.text;
      this.sort = { id: column.id, descending };
      this.show(this.rows);
    });
    return h(
      "th", { scope: "col", class: [column.text && "text", column.kind].filter(Boolean).join(" ") || null }, button,
    );
  }

  setFilter(text) {
    this.filter = text.trim().toLowerCase();
    this.show(this.rows);
  }

  /** The rows as shown: filtered and sorted. */
  ordered() {
    const rows = this.filter
      ? this.rows.filter((row) => row.search.toLowerCase().includes(this.filter))
      : [...this.rows];
    const column = this.columns.find(({ id }) => id === this.sort?.id);
    if (!column) return rows;
    const sign = this.sort.descending ? -1 : 1;
    const words = column.plain ? (a, b) => (a < b ? -1 : a > b ? 1 : 0) : natural.compare;
    return rows.sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (x === undefined || x === null) return y === undefined || y === null ? 0 : 1; // nothing comes last both ways
      if (y === undefined || y === null) return -1;
      return sign * (known(x) && known(y) ? x - y : words(String(x), String(y))) || words(a.key, b.key);
    });
  }

  show(rows, empty = this.empty) {
    Object.assign(this, { rows, empty });
    this.columns.forEach((column, at) =>
      setAttribute(
        this.head[at], "aria-sort",
        this.sort?.id === column.id ? (this.sort.descending ? "descending" : "ascending") : "none",
      ),
    );
    const wanted = this.ordered().map((row) => this.row(row));
    setChildren(this.body, wanted);
    const live = new Set(rows.map(({ key }) => key));
    for (const key of this.elements.keys()) if (!live.has(key)) this.elements.delete(key);
    this.scroller.hidden = rows.length === 0;
    this.nothing.hidden = wanted.length > 0;
    if (!wanted.length) setText(this.nothing, rows.length ? "Nothing matches the search." : empty);
  }

  row(row) {
    let own = this.elements.get(row.key);
    if (!own) {
      const cells = this.columns.map(({ text, kind }) =>
        h("td", { class: [text && "text", kind].filter(Boolean).join(" ") || null }),
      );
      own = { tr: h("tr", {}, ...cells), cells };
      this.elements.set(row.key, own);
    }
    this.columns.forEach((column, at) => {
      if (column.cell) column.cell(own.cells[at], row);
      else setText(own.cells[at], column.show(row));
    });
    return own.tr;
  }

  csv() {
    const rows = this.ordered().map((row) => this.columns.map((column) => column.value(row)));
    return csvText([this.columns.map(({ id }) => id), ...rows]);
  }
}

/** The line of tools above a table. */
const tools = (...children) => h("div", { class: "tools" }, ...children);
const grow = () => h("span", { class: "grow" });

function search(table, what) {
  const input = h("input", {
    type: "search", placeholder: `Search ${what}`, "aria-label": `Search ${what}`, spellcheck: "false",
  });
  input.addEventListener("input", () => table.setFilter(input.value));
  return input;
}

const shown = (value) => (known(value) ? number(value) : value === undefined || value === null ? "" : String(value));
const stat = (id, label = id) => ({ id, label, value: (row) => row.stats[id], show: (row) => shown(row.stats[id]) });

function twoLines(td, first, second) {
  if (!td.firstChild) td.append(h("bdi", {}), h("span", { class: "tag" }));
  setText(td.firstChild, first);
  setText(td.lastChild, second);
  setAttribute(td, "title", second ? `${first} (${second})` : first);
}

function changeCell(td, change) {
  setText(td, change?.text ?? "");
  setAttribute(td, "data-verdict", change?.verdict || null);
  setAttribute(td, "title", change?.verdict || null);
}

// What people look for first stands first.
const FIRST = [
  "output_token_throughput", "request_throughput", "time_to_first_token", "inter_token_latency", "request_latency",
  "output_token_throughput_per_user", "request_count", "completed_request_count", "error_request_count",
  "request_error_rate", "goodput", "time_to_second_token", "output_sequence_length", "input_sequence_length",
];
const rank = (tag) => (FIRST.includes(tag) ? FIRST.indexOf(tag) : FIRST.length);

/** All metrics. `show({rows: Map tag -> {header, unit, …statistics}, empty, base})`. */
export class MetricsTable {
  constructor(pane) {
    this.rows = new Map();
    this.table = new Table({
      caption: "All metrics",
      columns: [
        {
          id: "metric", label: "Metric", text: true, kind: "name", value: ({ header }) => header,
          cell: (td, row) => twoLines(td, row.header, [row.key, unitLabel(row.unit)].filter(Boolean).join(" · ")),
        },
        {
          id: "better", label: "Better", text: true, kind: "roomy", value: (row) => row.better,
          show: (row) => ({ larger: "▲ larger", smaller: "▼ smaller" })[row.better] ?? "",
        },
        {
          id: "change", label: "Change", kind: "change", value: ({ change }) => change?.change,
          title: "Of the average, against the baseline", cell: (td, { change }) => changeCell(td, change),
        },
        {
          id: "unit", label: "Unit", text: true, kind: "roomy unit", value: ({ unit }) => unit,
          show: ({ unit }) => unitLabel(unit),
        },
        ...["avg", "p50", "p90", "p95", "p99", "min", "max", "std", "count", "sum"].map((id) => stat(id)),
      ],
    });
    pane.append(
      tools(
        search(this.table, "metrics"), grow(), copyButton(() => this.csv(), "Copy CSV"),
        copyButton(() => JSON.stringify(Object.fromEntries(this.rows), null, 2), "Copy JSON"),
      ),
      this.table.element,
    );
  }

  show({ rows, empty, base }) {
    this.rows = rows;
    const list = [...rows].map(([tag, row]) => {
      const { header, unit, ...stats } = row;
      return {
        key: tag, header: header ?? tag, unit, stats, better: better(tag, unit), search: `${tag} ${header ?? ""}`,
        change: changeOf(tag, row, base),
      };
    });
    this.table.element.classList.toggle("compared", Boolean(base));
    this.table.show(list.sort((a, b) => rank(a.key) - rank(b.key) || natural.compare(a.header, b.header)), empty);
  }

  /** Every metric with every statistic, whatever the search says. */
  csv() {
    const rows = [...this.rows].map(([tag, row]) => [tag, row.header, row.unit, ...STATISTICS.map((id) => row[id])]);
    return csvText([["metric", "header", "unit", ...STATISTICS], ...rows]);
  }
}

/** GPUs, one row each, one column per measure, as they come. */
export class GPUTable {
  constructor(pane) {
    Object.assign(this, { pane, shape: null });
    this.build([]);
  }

  build(measures) {
    const shape = measures.map(({ name, unit }) => `${name}|${unit}`).join();
    if (shape === this.shape) return;
    this.shape = shape;
    this.table = new Table({
      caption: "GPUs, present values", sort: { id: "gpu", descending: false },
      columns: [
        {
          id: "gpu", label: "GPU", text: true, kind: "name", value: ({ key }) => key,
          cell: (td, row) => twoLines(td, `${row.gpu} ${row.model}`, row.source),
        },
        ...measures.map(({ name, unit }) => ({
          id: name, label: unit && unit !== "count" ? `${name}, ${unit}` : name,
          value: (row) => row.values.get(name), show: (row) => shown(row.values.get(name)),
        })),
      ],
    });
    setChildren(this.pane, [tools(grow(), copyButton(() => this.table.csv(), "Copy CSV")), this.table.element]);
  }

  show({ rows, empty }) {
    const gpus = new Map();
    const measures = new Map();
    for (const [tag, row] of rows) {
      const { measure, source, gpu, model } = gpuParts(row.header, tag);
      const key = `${source} ${gpu}`;
      if (!gpus.has(key)) gpus.set(key, { key, source, gpu, model, values: new Map(), search: key });
      gpus.get(key).values.set(measure, row.current ?? row.avg);
      measures.set(measure, { name: measure, unit: row.unit });
    }
    const order = (a, b) => measureRank(a.name) - measureRank(b.name) || natural.compare(a.name, b.name);
    this.build([...measures.values()].sort(order));
    this.table.show([...gpus.values()], empty);
  }
}

const quantile =
  (name) =>
  ({ stats }) =>
    stats[name] ?? stats[`${name}_estimate`];
const rateOf = ({ stats }) => stats.rate ?? stats.count_rate;
const totalOf = ({ stats }) => stats.total ?? stats.count;

/** Inference-server metrics. */
export class ServerTable {
  constructor(pane) {
    const figure = (id, label, value) => ({ id, label, value, show: (row) => shown(value(row)) });
    this.table = new Table({
      caption: "Inference-server metrics",
      columns: [
        {
          id: "metric", label: "Metric", text: true, kind: "name", value: ({ name }) => name,
          cell: (td, row) => twoLines(td, row.name, row.description),
        },
        stat("avg"), figure("p50", "p50", quantile("p50")), figure("p99", "p99", quantile("p99")), stat("min"),
        stat("max"), figure("rate", "Rate/s", rateOf), figure("total", "Total", totalOf),
        {
          id: "labels", label: "Labels", text: true, kind: "name unit", value: ({ labels }) => labels,
          show: ({ labels }) => labels,
        },
        {
          id: "endpoint", label: "Endpoint", text: true, value: ({ endpoint }) => endpoint,
          show: ({ endpoint }) => endpoint,
        },
        { id: "type", label: "Type", text: true, value: ({ type }) => type, show: ({ type }) => type },
      ],
    });
    pane.append(
      tools(search(this.table, "server metrics"), grow(), copyButton(() => this.table.csv(), "Copy CSV")),
      this.table.element,
    );
  }

  show({ rows: server, empty }) {
    const rows = [];
    for (const [endpoint, { metrics = {} }] of Object.entries(server?.endpoint_summaries ?? {})) {
      for (const [name, { type = "", description = "", series = [] }] of Object.entries(metrics)) {
        for (const { labels: given, stats } of series) {
          const labels = Object.entries(given ?? {})
            .map(([key, value]) => `${key}=${value}`)
            .join(", ");
          rows.push({
            key: `${endpoint} ${name} ${labels}`, name, labels, endpoint, type, description, stats: stats ?? {},
            search: `${name} ${labels} ${endpoint}`,
          });
        }
      }
    }
    this.table.show(rows, empty);
  }
}

const STATUS = { healthy: "healthy", high_load: "high load", error: "error", idle: "idle", stale: "stale" };

/** Workers: /api/workers. */
export class WorkersTable {
  constructor(pane) {
    this.summary = h("p", { class: "muted" });
    const task = (id, label) => ({
      id, label, value: ({ tasks }) => tasks[id], show: ({ tasks }) => count(tasks[id]),
    });
    this.table = new Table({
      caption: "Workers", sort: { id: "worker", descending: false },
      columns: [
        {
          id: "worker", label: "Worker", text: true, plain: true, kind: "name", value: ({ key }) => key,
          show: ({ key }) => key,
        },
        { id: "status", label: "Status", text: true, value: ({ status }) => status, cell: statusCell },
        task("total", "Tasks"), task("completed", "Completed"), task("failed", "Failed"),
        {
          id: "cpu", label: "CPU", value: ({ health }) => health.cpu_usage,
          show: ({ health }) => phrase(health.cpu_usage, "%", 3),
        },
        {
          id: "memory", label: "Memory", value: ({ health }) => health.memory_usage,
          show: ({ health }) => bytes(health.memory_usage),
        },
        {
          id: "threads", label: "Threads", value: ({ health }) => health.num_threads,
          show: ({ health }) => count(health.num_threads),
        },
      ],
    });
    pane.append(tools(this.summary, grow(), copyButton(() => this.table.csv(), "Copy CSV")), this.table.element);
  }

  show({ rows: answer, empty }) {
    const [statuses, workers] = [answer?.worker_statuses ?? {}, answer?.workers ?? {}];
    const rows = [...new Set([...Object.keys(statuses), ...Object.keys(workers)])].map((key) => ({
      key, search: key, status: workers[key]?.status ?? statuses[key] ?? "unknown",
      tasks: workers[key]?.task_stats ?? {}, health: workers[key]?.health ?? {},
    }));
    const tally = new Map();
    for (const { status } of rows) tally.set(status, (tally.get(status) ?? 0) + 1);
    setText(this.summary, [...tally].map(([status, n]) => `${n} ${STATUS[status] ?? status}`).join(" · "));
    this.table.show(rows, empty);
  }
}

function statusCell(td, { status }) {
  if (!td.firstChild) td.append(h("span", { class: "status" }, h("i", { "aria-hidden": "true" }), h("span")));
  setAttribute(td.firstChild, "data-status", STATUS[status] ? status : "unknown");
  setText(td.firstChild.lastChild, STATUS[status] ?? String(status));
}

/** Errors by type, as the results sum them up. */
export class ErrorTable {
  constructor(pane) {
    this.table = new Table({
      caption: "Errors by type", sort: { id: "count", descending: true },
      columns: [
        {
          id: "type", label: "Type", text: true, kind: "name", value: ({ type }) => type,
          cell: (td, row) => twoLines(td, row.type, row.code),
        },
        { id: "count", label: "Requests", value: (row) => row.count, show: (row) => count(row.count) },
        {
          id: "message", label: "Message", text: true, kind: "long", value: ({ message }) => message,
          show: ({ message }) => message,
        },
      ],
    });
    pane.append(this.table.element);
  }

  show({ rows, more, empty }) {
    const list = rows.map(({ code, type, message, count: n }, at) => ({
      key: String(at), search: "", type: String(type ?? "error"),
      code: code === null || code === undefined ? "" : `code ${code}`, message: String(message ?? ""), count: n,
    }));
    if (more) list.push({ key: "more", search: "", type: "others", code: "", message: "", count: more });
    this.table.show(list, empty);
  }
}

/** Runs side by side, and throughput against latency. */
export class CompareTable {
  constructor(pane) {
    this.pane = pane;
    this.plot = h("div", { class: "tradeoff" });
    this.box = h("div");
    pane.append(this.box, this.plot);
  }

  build(columns) {
    const shape = columns.join();
    if (this.shape === shape) return;
    this.shape = shape;
    this.table = new Table({
      caption: "Runs compared",
      columns: [
        {
          id: "run", label: "Run", text: true, kind: "name", value: ({ name }) => name,
          cell: (td, row) =>
            twoLines(
              td, row.mine ? `${row.name} (shown)` : row.name, [row.load, row.state].filter(Boolean).join(" · "),
            ),
        },
        {
          id: "requests", label: "Requests", value: ({ requests }) => requests,
          show: ({ requests }) => (known(requests) ? count(requests) : ""),
        },
        {
          id: "errors", label: "Errors", value: ({ errors }) => errors,
          show: ({ errors }) => (known(errors) ? count(errors) : ""),
        },
        ...columns.map(([tag, statistic, label]) => {
          const value = (row) => row.rows.get(tag)?.[statistic];
          return { id: `${tag}_${statistic}`, label, value, show: (row) => shown(value(row)) };
        }),
      ],
    });
    this.box.replaceChildren(tools(grow(), copyButton(() => this.table.csv(), "Copy CSV")), this.table.element);
  }

  show({ rows, columns, points, empty }) {
    this.build(columns);
    this.table.show(rows.map((row) => ({ ...row, search: row.name })), empty);
    const what = JSON.stringify(points);
    if (what === this.drawn) return;
    this.drawn = what;
    this.plot.replaceChildren(...(points.length > 1 ? [tradeoffPlot(points)] : []));
  }
}

const pointWords = ({ name, x, y }) => `${name}: ${number(x, 3)} per second, p99 ${number(y, 3)} ms`;

/** Throughput against p99 latency, one point a run. */
function tradeoffPlot(points) {
  const [width, height, left, bottom] = [640, 260, 56, 36];
  const top = (of) => 1.12 * Math.max(...points.map(of)) || 1;
  const [maxX, maxY] = [top(({ x }) => x), top(({ y }) => y)];
  const x = (value) => left + (value / maxX) * (width - left - 20);
  const y = (value) => height - bottom - (value / maxY) * (height - bottom - 20);
  const ticks = (max) => {
    const power = 10 ** Math.floor(Math.log10(max / 2));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => max / one < 5.5);
    return Array.from({ length: Math.floor(max / step) + 1 }, (_, at) => at * step);
  };
  const text = (at, upwards, words, anchor, kind) =>
    svg("text", { x: at, y: upwards, "text-anchor": anchor, class: kind }, words);
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Throughput against latency: ${points.map(pointWords).join("; ")}`,
    },
    ...ticks(maxY).map((value) =>
      svg("line", { x1: left, x2: width - 20, y1: y(value), y2: y(value), class: "grid" }),
    ),
    ...ticks(maxY).map((value) => text(left - 6, y(value) + 4, number(value), "end", "tick")),
    ...ticks(maxX).map((value) => text(x(value), height - bottom + 16, number(value), "middle", "tick")),
    text(width - 20, height - 4, "throughput (per second) →", "end", "tick"),
    text(left, 12, "↑ request latency p99, ms", "start", "tick"),
    svg("polyline", { points: points.map((one) => `${x(one.x)},${y(one.y)}`).join(" "), class: "curve" }),
    ...points.map((one) => svg("circle", { cx: x(one.x), cy: y(one.y), r: 5, class: one.mine ? "mine" : "point" })),
    ...points.map((one, at) => {
      const right = one.x > 0.75 * maxX; // its name stands to the left; every second one below
      const place = [x(one.x) + (right ? -8 : 8), y(one.y) + (at % 2 ? 18 : -8)];
      return text(...place, one.name, right ? "end" : "start", "label");
    }),
  );
}

const EVENTS_SHOWN = 500;
const KINDS = { all: "All", phase: "Phases", state: "State", error: "Errors", line: "Connection" };

/** The event log, newest first. */
export class EventLog {
  constructor(pane) {
    this.events = [];
    this.elements = new Map();
    this.kind = "all";
    this.list = h("ol", { class: "events", tabindex: "0", "aria-label": "Events, newest first" });
    this.nothing = h("p", { class: "nothing" }, "No events yet.");
    this.buttons = Object.entries(KINDS).map(([kind, label]) => {
      const button = h("button", { type: "button", "aria-pressed": String(kind === "all") }, label);
      button.addEventListener("click", () => {
        this.kind = kind;
        this.buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
        this.draw();
      });
      return button;
    });
    this.input = h("input", {
      type: "search", placeholder: "Filter events", "aria-label": "Filter events", spellcheck: "false",
    });
    this.input.addEventListener("input", () => this.draw());
    pane.append(
      tools(
        h("div", { class: "segmented", role: "group", "aria-label": "Kind of event" }, ...this.buttons), this.input,
        grow(), copyButton(() => this.csv(), "Copy CSV"),
      ),
      this.list, this.nothing,
    );
  }

  show({ rows }) {
    this.events = rows.slice(0, EVENTS_SHOWN);
    this.draw();
  }

  draw() {
    const wanted = this.input.value.trim().toLowerCase();
    const some = this.events.filter(
      ({ kind, what, text }) =>
        (this.kind === "all" || kind === this.kind) && `${what} ${text}`.toLowerCase().includes(wanted),
    );
    const kept = new Map();
    setChildren(
      this.list,
      some.map((event) => {
        const key = `${event.at} ${event.what} ${event.text}`;
        const element =
          this.elements.get(key) ??
          h(
            "li", { "data-kind": event.kind },
            h("time", { datetime: new Date(event.at).toISOString() }, timeOfDay(event.at)),
            h("span", { class: "what" }, event.what), h("span", { class: "text" }, event.text),
          );
        kept.set(key, element);
        return element;
      }),
    );
    this.elements = kept;
    this.nothing.hidden = some.length > 0;
    this.list.hidden = some.length === 0;
    setText(this.nothing, this.events.length ? "No such event." : "No events yet.");
  }

  csv() {
    const rows = this.events.map(({ at, kind, what, text }) => [new Date(at).toISOString(), kind, what, text]);
    return csvText([["time", "kind", "event", "text"], ...rows]);
  }
}

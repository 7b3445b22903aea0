// SPDX-License-Identifier: Apache-2.0
// The dashboard: the live run on the page. Live gathers, view() says, the parts of page.js draw; here they are joined.

import { readAddress, writeAddress } from "./address.js";
import { request, setToken } from "./api.js";
import { timeline } from "./charts.js";
import { baselineOf, readReport, runLabel } from "./compare.js";
import { byId, download, setAttribute, setText } from "./dom.js";
import { Live } from "./live.js";
import { Cards, Levels, Overlay, RunHead, chartsOf, forPaper, levelForm, rangeButtons, tablesOf } from "./page.js";
import { goodputLevels } from "./slo.js";
import { StreamPanel } from "./stream.js";
import { Tabs } from "./tabs.js";

const BASELINES_MAX = 20;
const TABLE_EVERY_MS = 2000;
const ADDRESS_AFTER_MS = 300;

const address = readAddress(location.search);
document.body.toggleAttribute("data-kiosk", address.kiosk);
timeline.zoom = address.zoom;
timeline.follow = address.follow;

const live = new Live({ onView: show, onToken: askToken, choice: address.choice, levels: address.levels });
const { page } = live;

// What is drawn

const head = new RunHead(byId("run"));
const cards = new Cards(byId("cards"));
const overlay = new Overlay(byId("overlay"));
const charts = chartsOf({
  onPick: (id, value) => {
    page.choice = { ...page.choice, [id]: value };
    live.due.add("history");
    live.soon(0);
    keepAddress();
  },
});
const levels = new Levels(byId("levels"), {
  onRemove: (level) => setLevels(page.levels.filter((one) => one !== level)),
});
const showRanges = rangeButtons(byId("ranges"), () => keepAddress());
const tables = tablesOf((name) => byId(`pane-${name}`));
forPaper(cards);
const stream = new StreamPanel(byId("pane-stream"));
const tabs = new Tabs(byId("tabs"), opened);

let seen; // the newest view
let drawnAt = 0; // of the charts: a snapshot that has no new points is not drawn again
let drawnOf = null;

function show(view, snapshot, why) {
  seen = view;
  head.show(view);
  overlay.show(view);
  byId("body").hidden = Boolean(view.overlay);
  byId("keep").hidden = !view.hasData;
  document.body.toggleAttribute("data-overlay", Boolean(view.overlay));
  document.body.toggleAttribute("data-dim", view.dim);
  setText(byId("connection").lastElementChild, view.connection.text);
  setAttribute(byId("connection"), "data-tone", view.connection.tone);
  setText(byId("origin"), view.origin);
  byId("origin").hidden = !view.origin;
  setText(byId("announce"), view.announce);
  if (document.title !== view.title) document.title = view.title;
  if (why === "new run") timeline.setFollow(timeline.follow);
  ownLevels(snapshot);
  if (why === "tick") return;
  cards.show(view);
  levels.show(view);
  for (const [name, { count }] of Object.entries(view.tables)) tabs.count(name, count);
  fill();
  const moment = [
    snapshot.history.last, snapshot.loaded, view.state.name, view.final, page.baselines.length, page.levels.length,
    view.tables.metrics.empty,
  ].join();
  if (drawnAt !== moment || drawnOf !== page.choice || why === "new run") {
    drawnAt = moment;
    drawnOf = page.choice;
    charts.show(view.charts, view.axis);
    showRanges();
  }
}

// Tables: the open one is filled, at most every two seconds, while it is in sight

const inSight = new Set();
const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) inSight.add(target.id);
    else inSight.delete(target.id);
  }
  fill();
});
for (const pane of document.querySelectorAll(".pane")) sight.observe(pane);

let filledAt = -Infinity;
let filledWhat = "";
let fillTimer = 0;

function fill(now = false) {
  const { name } = tabs;
  if (!seen || name === "stream") return;
  const part = seen.tables[name];
  const what = [name, seen.state.name, seen.final, part.count, part.empty, part.base?.name].join();
  const wait = filledAt + TABLE_EVERY_MS - performance.now();
  if (!now && what === filledWhat && !inSight.has(`pane-${name}`)) return;
  if (!now && what === filledWhat && wait > 0) {
    fillTimer ||= setTimeout(() => {
      fillTimer = 0;
      fill();
    }, wait);
    return;
  }
  filledAt = performance.now();
  filledWhat = what;
  tables[name].show(part);
}

function opened(name) {
  live.watchWorkers = name === "workers";
  if (live.watchWorkers) {
    live.due.add("workers");
    live.soon(0);
  }
  if (name === "stream") stream.open();
  keepAddress();
  fill(true);
}

// The address

let addressTimer = 0;

/** Soon: fingers that zoom change it with every move, and browsers allow only so many changes. */
function keepAddress() {
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => {
    const { zoom, follow } = timeline;
    const query = writeAddress({ ...page, zoom, follow, tab: tabs.name, kiosk: address.kiosk });
    if (query !== location.search) history.replaceState(null, "", `${location.pathname}${query}`);
  }, ADDRESS_AFTER_MS);
}

// Service levels

function setLevels(list) {
  page.levels = list;
  keepAddress();
  live.due.add("history");
  live.soon(0);
  live.show();
}

let ownOf = null;
/** The run's own goodput thresholds come and go with its configuration. */
function ownLevels({ config }) {
  if (config === ownOf) return;
  ownOf = config;
  const own = goodputLevels(config);
  if (own.length || page.levels.some((level) => level.own)) {
    page.levels = [...own, ...page.levels.filter((level) => !level.own)];
  }
}

levelForm((level) => setLevels([...page.levels, level]));

// Reports: to keep, and to compare with

byId("download-csv").addEventListener("click", () => {
  download(`aiperf-${fileName()}.csv`, "text/csv", tables.metrics.csv());
});
byId("download-json").addEventListener("click", () => {
  const { metrics, status, progress, server } = live.snapshot();
  const all = { ...metrics, status, progress, server_metrics: server };
  download(`aiperf-${fileName()}.json`, "application/json", JSON.stringify(all, null, 2));
});
byId("download-report").addEventListener("click", async (event) => {
  event.preventDefault();
  const answer = await request("report.html").catch(() => null);
  if (answer?.ok) download(`aiperf-${fileName()}.html`, "text/html", await answer.text());
  else setText(byId("compare-problem"), "The server did not give a report.");
});
const fileName = () => {
  const { status, metrics } = live.snapshot();
  return [status?.benchmark_id ?? "run", metrics?.final ? "final" : "so-far"].join("-").replace(/[^\w.-]+/g, "_");
};

async function addBaselines(files) {
  const problems = [];
  for (const file of files) {
    try {
      const blob = readReport(await file.text());
      const name = runLabel(blob, file.name.replace(/\.html?$/, ""));
      const taken = page.baselines.filter((base) => base.name.startsWith(name)).length;
      page.baselines = [...page.baselines, baselineOf(blob, taken ? `${name} (${taken + 1})` : name)].slice(
        0, BASELINES_MAX,
      );
    } catch (error) {
      problems.push(`${file.name}: ${error.message}`);
    }
  }
  setText(byId("compare-problem"), problems.join(" "));
  baselinesChanged();
}

function baselinesChanged() {
  const names = page.baselines.map(({ name }) => name);
  setText(byId("compare-names"), names.length ? `Compared with ${names.join(", ")}` : "");
  byId("compare-clear").hidden = !names.length;
  live.show();
  fill(true);
}

byId("compare-file").addEventListener("change", (event) => addBaselines([...event.target.files]));
byId("compare-clear").addEventListener("click", () => {
  page.baselines = [];
  byId("compare-file").value = "";
  baselinesChanged();
});
for (const type of ["dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    document.body.toggleAttribute("data-drop", type === "dragover");
    if (type === "drop") addBaselines([...event.dataTransfer.files]);
  });
}

// The token: this tab's has become old; the server's own page asks for a new one

function askToken() {
  setToken("");
  location.reload();
}

globalThis.aiperf = { live, timeline, view: () => seen }; // for the console
tabs.open(address.tab || "metrics");
live.show();
live.start();

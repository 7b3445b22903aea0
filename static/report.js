// SPDX-License-Identifier: Apache-2.0
// The report: one run in one file, drawn by the same parts as the dashboard. Nothing here asks a network for anything.

import { readReport, snapshotOf } from "./compare.js";
import { byId, download, h, setText } from "./dom.js";
import { csvLine } from "./format.js";
import { Cards, Levels, RunHead, chartsOf, forPaper, levelForm, rangeButtons, tablesOf } from "./page.js";
import { goodputLevels } from "./slo.js";
import { view } from "./view.js";

const blob = readReport(byId("run").textContent);
const run = snapshotOf(blob);
run.levels = goodputLevels(run.config);
const parts = {
  head: new RunHead(byId("run-box")), cards: new Cards(byId("cards")),
  tables: tablesOf((name) => byId(`pane-${name}`)),
  levels: new Levels(byId("levels"), {
    onRemove: (level) => {
      run.levels = run.levels.filter((one) => one !== level);
      showReport();
    },
  }),
  charts: chartsOf({
    eager: true,
    onPick: (id, value) => {
      run.choice = { ...run.choice, [id]: value };
      showReport();
    },
  }),
  ranges: rangeButtons(byId("ranges")),
};

function showReport() {
  const seen = view(run);
  const name = blob.status?.benchmark_id ? `Benchmark ${blob.status.benchmark_id}` : "AIPerf benchmark";
  const model = blob.metrics?.model ? `, ${blob.metrics.model}` : "";
  setText(byId("title"), `${name}${model}`);
  document.title = `${name} · AIPerf report`;
  const began = run.status?.started_ns ? new Date(run.status.started_ns / 1e6).toISOString().slice(0, 19) : "";
  setText(
    byId("subtitle"),
    [began && `Began ${began.replace("T", " ")} UTC`, `written by aiperf-api ${blob.server_version ?? ""}`]
      .filter(Boolean)
      .join(" · "),
  );
  byId("verdict").replaceChildren(
    ...seen.verdict.map(({ tone, text }) =>
      h("li", { "data-tone": tone || null }, h("i", { "aria-hidden": "true" }), h("span", {}, text)),
    ),
  );
  parts.head.show(seen);
  parts.cards.show(seen);
  parts.levels.show(seen);
  parts.charts.show(seen.charts, seen.axis);
  parts.ranges();
  for (const [name, table] of Object.entries(parts.tables)) {
    const part = seen.tables[name];
    table.show(part);
    byId(`section-${name}`).hidden = part.count === 0;
  }
  const lines = flatten(blob.config ?? {});
  byId("section-config").hidden = !lines.length;
  byId("config").replaceChildren(
    ...lines.map(([key, value]) => h("div", {}, h("dt", { title: key }, key), h("dd", {}, value))),
  );
}

/** A configuration as lines: nested names joined by dots, what is empty left out. */
function flatten(value, path = "") {
  if (value === null || value === undefined || value === "") return [];
  if (Array.isArray(value) && value.every((one) => typeof one !== "object"))
    return value.length ? [[path, value.join(", ")]] : [];
  if (typeof value === "object") {
    return Object.entries(value).flatMap(([key, inner]) => flatten(inner, path ? `${path}.${key}` : key));
  }
  return [[path, String(value)]];
}

levelForm((level) => {
  run.levels = [...run.levels, level];
  showReport();
});

const fileStem = `aiperf-${String(blob.status?.benchmark_id ?? "run").replace(/[^\w.-]+/g, "_")}`;
byId("download-csv").addEventListener("click", () =>
  download(`${fileStem}.csv`, "text/csv", parts.tables.metrics.csv()),
);
byId("download-json").addEventListener("click", () =>
  download(`${fileStem}.json`, "application/json", JSON.stringify(blob)),
);
byId("download-series").addEventListener("click", () => {
  let text = csvLine(["time_ns", "tag", "stat", "unit", "value"]);
  for (const answer of blob.histories ?? []) {
    for (const { tag, stat, unit, values } of answer?.series ?? []) {
      values.forEach((value, at) => {
        if (value !== null) text += csvLine([String(answer.times[at]), tag, stat, unit, value]);
      });
    }
  }
  download(`${fileStem}-over-time.csv`, "text/csv", text);
});
byId("print").addEventListener("click", () => print());
forPaper(parts.cards);

showReport();

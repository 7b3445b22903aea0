// SPDX-License-Identifier: Apache-2.0
// What the page's address keeps: range of time, series, service levels, tab and kiosk, so that a link shows the same.

import { parseLevel } from "./slo.js";

const CHOICES = ["latency1", "latency2", "latency3", "gpu", "server"];

/** {choice, levels, problems, zoom, follow, tab, kiosk} of a query. */
export function readAddress(search) {
  const query = new URLSearchParams(search);
  const choice = {};
  for (const name of CHOICES) if (query.get(name)) choice[name] = query.get(name);
  const parsed = query.getAll("slo").map(parseLevel);
  const [from, to] = (query.get("range") ?? "").split("-").map(Number);
  const last = Number(query.get("last"));
  return {
    choice, levels: parsed.filter(({ problem }) => !problem),
    zoom: Number.isFinite(from) && Number.isFinite(to) && to > from ? [from, to] : null,
    follow: last > 0 ? last : null, tab: query.get("tab") ?? "", kiosk: query.has("kiosk"),
  };
}

/** The query that says so; what is as it always is is left out. */
export function writeAddress({ choice, levels, zoom, follow, tab, kiosk }) {
  const query = new URLSearchParams();
  if (kiosk) query.set("kiosk", "");
  for (const name of CHOICES) if (choice[name]) query.set(name, choice[name]);
  for (const { own, text } of levels) if (!own) query.append("slo", text);
  if (zoom) query.set("range", zoom.map((at) => +at.toFixed(1)).join("-"));
  else if (follow) query.set("last", String(follow));
  if (tab && tab !== "metrics") query.set("tab", tab);
  const text = query.toString().replace(/^kiosk=(&|$)/, "kiosk$1");
  return text ? `?${text}` : "";
}

// SPDX-License-Identifier: Apache-2.0
// A panel is a uPlot chart with a legend of buttons. All panels share the crosshair, the zoom and the time axis.

import uPlot from "./vendor/uPlot.esm.js";
import { h, setText, setAttribute } from "./dom.js";
import { clock, known, number, unitLabel } from "./format.js";

const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400];
const FONT_SIZE = 11;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colours = new Map();

/** The value of a colour variable in the present theme. */
export function colour(name) {
  let value = colours.get(name);
  if (!value) colours.set(name, (value = css(name)));
  return value;
}
addEventListener("themechange", () => colours.clear());

const font = () => `${FONT_SIZE}px ${colour("--sans")}`;

/** The time axis that all panels share: seconds since the first phase began. */
export const timeline = {
  panels: new Set(),
  zero: 0, // the axis' zero in seconds since the epoch of the bus
  begin: 0, // before the first phase there is the configuring
  end: 10,
  zoom: null, // [from, to], or null for the whole run
  phases: [], // [{name, start, end}] in the axis' seconds
  onZoom: () => {},

  range() {
    return this.zoom ?? [this.begin, Math.max(this.begin + 10, this.end)];
  },

  setZoom(zoom) {
    this.zoom = zoom;
    for (const panel of this.panels) panel.rescale();
    this.onZoom(zoom);
  },
};

function axisNumber(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}B`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size >= 1000 ? value.toLocaleString("en-US") : String(+value.toPrecision(4));
}

/** Vertical lines where the phases begin and end, and their names. */
function drawPhases(u) {
  const { ctx, bbox } = u;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top - 16 * ratio, bbox.width, bbox.height + 16 * ratio);
  ctx.clip();
  ctx.strokeStyle = colour("--line-strong");
  ctx.fillStyle = colour("--axis");
  ctx.font = `${10 * ratio}px ${colour("--sans")}`;
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.lineWidth = ratio;
  ctx.setLineDash([3 * ratio, 3 * ratio]);
  for (const { name, start, ended, end } of timeline.phases) {
    for (const [at, label] of ended ? [[start, name], [end, ""]] : [[start, name]]) {
      const x = Math.round(u.valToPos(at, "x", true)) + 0.5;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      // A name stands inside its phase or, for the one that goes on, to the right of its start.
      const room = (ended ? u.valToPos(end, "x", true) : bbox.left + bbox.width) - x;
      if (label && room > ctx.measureText(label).width + 8 * ratio) ctx.fillText(label, x + 4 * ratio, bbox.top - 3 * ratio);
    }
  }
  ctx.restore();
}

/** The unit of each axis above it. */
function drawUnits(u) {
  const { ctx, bbox } = u;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.fillStyle = colour("--axis");
  ctx.font = `${FONT_SIZE * ratio}px ${colour("--sans")}`;
  ctx.textBaseline = "alphabetic";
  for (const axis of u.axes.slice(1)) {
    if (!axis.show || !axis.unit) continue;
    const right = axis.side === 1;
    ctx.textAlign = right ? "right" : "left";
    ctx.fillText(axis.unit, right ? u.width * ratio - 2 * ratio : 2 * ratio, bbox.top - 7 * ratio);
  }
  ctx.restore();
}

/**
 * One chart.
 *
 * `lines()` returns what to draw now: `{data: [x, y…], lines: [{label, unit, scale, colour, dash, width, title}]}`, or a
 * string that says why there is nothing. The DOM is rebuilt only when the list of lines changes.
 */
export class Panel {
  constructor({ title, controls = [], lines, summary }) {
    Object.assign(this, { title, lines, summary });
    this.off = new Set(); // labels toggled off
    this.shape = "";
    this.plot = null;
    this.visible = false;
    this.stale = true;
    this.legend = h("div", { class: "legend" });
    this.canvas = h("div", { class: "plot", role: "img", "aria-label": title });
    this.empty = h("p", { class: "plot-empty" });
    this.element = h("section", { class: "panel", "aria-label": title },
      h("header", {}, h("h3", {}, title), ...controls), this.legend, h("div", { class: "plot-box" }, this.canvas, this.empty));
    timeline.panels.add(this);
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    new IntersectionObserver((entries) => {
      this.visible = entries[entries.length - 1].isIntersecting;
      if (this.visible && this.stale) this.draw();
    }, { rootMargin: "80px" }).observe(this.element);
    addEventListener("themechange", () => this.recolour());
  }

  /** New data has come: draws when on screen, else remembers to. */
  update() {
    this.stale = true;
    if (this.visible) this.draw();
  }

  draw() {
    this.stale = false;
    const wanted = this.lines();
    const none = typeof wanted === "string";
    setText(this.empty, none ? wanted : "");
    this.legend.classList.toggle("idle", none);
    this.canvas.classList.toggle("idle", none);
    if (none) return this.clear();
    const shape = JSON.stringify(wanted.lines);
    if (shape !== this.shape) this.build(wanted, shape);
    else {
      this.plot.setData(wanted.data, false);
      this.rescale();
    }
    this.showValues(null);
    setAttribute(this.canvas, "aria-label", `${this.title}: ${this.legendText()}`);
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
    this.shape = "";
    this.legend.replaceChildren();
  }

  build({ data, lines }, shape) {
    this.clear();
    this.shape = shape;
    this.specs = lines;
    const scales = [...new Set(lines.map(({ scale }) => scale))];
    this.values = lines.map((line) => this.legendEntry(line));
    this.plot = new uPlot({
      width: Math.max(120, this.canvas.clientWidth),
      height: this.height(),
      padding: [20, scales.length > 1 ? 8 : 18, 0, 0],
      legend: { show: false },
      scales: Object.fromEntries([
        ["x", { time: false, range: () => timeline.range() }],
        ...scales.map((name, at) => [name, { range: (u, low, high) => fromZero(low, high, at ? 1.45 : 1.12) }]),
      ]),
      series: [{}, ...lines.map((line) => ({
        label: line.label,
        scale: line.scale,
        stroke: () => colour(line.colour),
        width: line.width ?? 1.5,
        dash: line.dash,
        spanGaps: true,
        show: !this.off.has(line.label),
        points: { show: (u, index) => u.data[index].length < 3, size: 5 },
      }))],
      axes: [
        { scale: "x", incrs: TIME_STEPS, space: 56, size: 26, gap: 4, font: font(), stroke: () => colour("--axis"),
          values: (u, splits) => splits.map(clock), grid: { show: false },
          ticks: { stroke: () => colour("--line"), width: 1, size: 4 } },
        ...scales.map((name, at) => ({
          scale: name, side: at ? 1 : 3, size: 46, gap: 4, space: 26, font: font(), stroke: () => colour("--axis"),
          values: (u, splits) => splits.map(axisNumber), ticks: { show: false }, unit: unitLabel(name),
          grid: { show: at === 0, stroke: () => colour("--grid"), width: 1 },
        })),
      ],
      cursor: {
        y: false,
        points: { size: 6 },
        sync: { key: "run", setSeries: false, filters: { sub: (type) => type === "mousemove" || type === "mouseleave" } },
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => { timeline.setZoom(null); return null; } },
      },
      hooks: {
        drawAxes: [drawPhases, drawUnits],
        setCursor: [(u) => this.showValues(u.cursor.idx)],
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          timeline.setZoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        }],
      },
    }, data, this.canvas);
  }

  legendEntry(line) {
    const value = h("span", { class: "value" });
    const swatch = h("span", { class: line.dash ? "swatch dashed" : "swatch", "aria-hidden": "true" });
    swatch.style.color = `var(${line.colour})`;
    const button = h("button", { type: "button", "aria-pressed": String(!this.off.has(line.label)), title: `${line.title ?? line.label}, ${unitLabel(line.unit)}` },
      swatch, h("span", { class: "name" }, line.label), value);
    button.addEventListener("click", () => {
      if (!this.off.delete(line.label)) this.off.add(line.label);
      button.setAttribute("aria-pressed", String(!this.off.has(line.label)));
      this.plot.setSeries(this.specs.indexOf(line) + 1, { show: !this.off.has(line.label) });
    });
    this.legend.append(button);
    return value;
  }

  /** The figures beside the legend: under the crosshair, or the latest. */
  showValues(index) {
    if (!this.plot) return;
    this.specs.forEach((line, at) => {
      const column = this.plot.data[at + 1];
      let i = index ?? column.length - 1;
      while (i > 0 && !known(column[i])) i--;
      setText(this.values[at], number(column[i], 3)); // in the unit of its axis
    });
  }

  legendText() {
    return this.specs.map((line, at) => `${line.label} ${this.values[at].textContent}`).join(", ");
  }

  rescale() {
    const [min, max] = timeline.range();
    this.plot?.setScale("x", { min, max });
  }

  resize() {
    const [width, height] = [this.canvas.clientWidth, this.height()];
    if (this.plot && width > 0 && (width !== this.plot.width || height !== this.plot.height)) this.plot.setSize({ width, height });
  }

  height() {
    return Math.max(80, this.canvas.clientHeight);
  }

  recolour() {
    this.plot?.redraw(false);
  }
}

/**
 * An axis starts at zero (all our figures are amounts) and leaves room on top: more for the second axis, so that two
 * quantities that go in step are two lines.
 */
function fromZero(low, high, room) {
  if (!known(high)) return [0, 1];
  if (low < 0) return uPlot.rangeNum(low, high, 0.1, true);
  return [0, high > 0 ? high * room : 1];
}

/** A line without axes, for a card. `series` is [{t, v, colour}]; the x range is the whole run. */
export function sparkline(canvas, series, from, to) {
  const ratio = devicePixelRatio;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return;
  if (canvas.width !== Math.round(width * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  let high = 0;
  for (const { v } of series) for (const value of v) if (value > high) high = value;
  if (!high) high = 1;
  const x = (t) => ((t - from) / Math.max(1e-9, to - from)) * (width - 3) + 1;
  const y = (value) => height - 1.5 - (value / high) * (height - 5);
  for (const { t, v, colour: name, fill } of series) {
    // No more points than pixels: an hour has thousands.
    const step = Math.max(1, Math.ceil(t.length / width));
    let started = false;
    let lastX = 0;
    context.beginPath();
    for (let i = 0; i < t.length; i += i + step < t.length || i === t.length - 1 ? step : t.length - 1 - i) {
      if (v[i] === null) continue;
      lastX = x(t[i]);
      started ? context.lineTo(lastX, y(v[i])) : context.moveTo(lastX, y(v[i]));
      started = true;
    }
    context.strokeStyle = colour(name);
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke();
    if (fill && started) {
      context.lineTo(lastX, height);
      context.lineTo(x(t[0]), height);
      context.globalAlpha = 0.1;
      context.fillStyle = colour(name);
      context.fill();
      context.globalAlpha = 1;
    }
  }
}

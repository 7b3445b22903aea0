// SPDX-License-Identifier: Apache-2.0
// A panel is a uPlot chart with a legend of buttons. All panels share the crosshair, the zoom and the axis of time.
// uPlot is a global: vendor/uPlot.iife.min.js.

import { h, setAttribute, setChildren, setText } from "./dom.js";
import { clock, known, number, unitLabel } from "./format.js";
import { firstAfter, fitted } from "./series.js";

const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400];
const WHOLE_STEPS = [1, 2, 5]
  .flatMap((one) => Array.from({ length: 10 }, (_, at) => one * 10 ** at))
  .sort((a, b) => a - b);
const FONT_SIZE = 11;
const AXIS_LEFT = 48;
const AXIS_RIGHT = 40; // kept on every chart, so that those of a column align
const POINT_PX = 2; // no more points than one for so many pixels
const ZOOM_LEAST_SEC = 2;

const colours = new Map();

/** The value of a colour variable in the present theme. */
export function colour(name) {
  let value = colours.get(name);
  if (!value) {
    value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    colours.set(name, value);
  }
  return value;
}
addEventListener("themechange", () => colours.clear());

const font = () => `${FONT_SIZE}px ${colour("--sans")}`;

/** The axis that all panels share: seconds since the first phase began. */
export const timeline = {
  panels: new Set(),
  zero: 0, // its zero in seconds since the epoch of the bus
  end: 10,
  strip: 0, // the share of the axis that stands for what came before
  zoom: null, // [from, to], or null
  follow: null, // the last so many seconds, or null for the whole run
  phases: [], // [{name, start, end}]
  onZoom: () => {},

  range() {
    if (this.zoom) return this.zoom;
    return this.follow && this.follow < this.end
      ? [this.end - this.follow, this.end]
      : [-this.strip * this.end, this.end];
  },

  setFollow(seconds) {
    this.follow = seconds;
    this.setZoom(null);
  },

  setZoom(zoom) {
    this.zoom = zoom && this.clamped(zoom);
    for (const panel of this.panels) panel.redraw();
    this.onZoom(this.zoom);
  },

  /** A range within the run; all of it is no zoom. */
  clamped([from, to]) {
    const least = Math.min(ZOOM_LEAST_SEC, this.end);
    const width = Math.max(least, Math.min(to - from, this.end));
    const start = Math.max(0, Math.min(from, this.end - width));
    return width >= this.end * 0.999 ? null : [start, start + width];
  },

  /** Wider (factor above 1) or narrower around `at`. */
  scaleZoom(at, factor) {
    const [from, to] = this.range().map((edge) => Math.max(0, edge)); // the strip before zero is not of the run
    this.setZoom([at - (at - from) * factor, at + (to - at) * factor]);
  },

  shiftZoom(by) {
    if (this.zoom) this.setZoom([this.zoom[0] + by, this.zoom[1] + by]);
  },
};

function axisNumber(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}B`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size >= 1000 ? value.toLocaleString("en-US") : String(+value.toPrecision(4));
}

/** Runs `draw(context, ratio)` clipped to the plot and `above` pixels over it. */
function clipped(u, above, draw) {
  const { ctx, bbox } = u;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top - above * ratio, bbox.width, bbox.height + above * ratio);
  ctx.clip();
  draw(ctx, ratio);
  ctx.restore();
}

/** What came before the first phase as a strip; lines where the phases begin and end, and their names. */
function drawPhases(u) {
  const { bbox } = u;
  clipped(u, 16, (ctx, ratio) => {
    ctx.fillStyle = ctx.strokeStyle = colour("--line-strong");
    if (timeline.strip && !timeline.zoom) {
      ctx.globalAlpha = 0.35;
      ctx.fillRect(bbox.left, bbox.top, u.valToPos(0, "x", true) - bbox.left, bbox.height);
      ctx.globalAlpha = 1;
    }
    ctx.fillStyle = colour("--axis");
    ctx.font = `${10 * ratio}px ${colour("--sans")}`;
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.lineWidth = ratio;
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    for (const { name, start, end } of timeline.phases) {
      for (const [at, label] of [[start, name], [end, ""]]) {
        if (at === null) continue;
        const x = Math.round(u.valToPos(at, "x", true)) + 0.5;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        // A name stands inside its phase.
        const room = (end === null ? bbox.left + bbox.width : u.valToPos(end, "x", true)) - x;
        if (label && room > ctx.measureText(label).width + 8 * ratio)
          ctx.fillText(label, x + 4 * ratio, bbox.top - 3 * ratio);
      }
    }
  });
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
    if (!axis.unit) continue;
    const right = axis.side === 1;
    ctx.textAlign = right ? "right" : "left";
    ctx.fillText(axis.unit, right ? u.width * ratio - 2 * ratio : 2 * ratio, bbox.top - 7 * ratio);
  }
  ctx.restore();
}

/**
 * One chart. `show(chart)` gets what view() has of it: {title, picker, lines: [{label, unit, scale, colour, dash,
 * width, title, series, band, whole}], limits: [{value, label, scale}], empty}. Its DOM changes with the lines.
 */
class Panel {
  constructor(id, { onPick = () => {}, eager = false } = {}) {
    this.id = id;
    this.off = new Set(); // labels toggled off
    this.shape = "";
    this.plot = null;
    this.visible = eager;
    this.stale = true;
    this.heading = h("h3", { id: `chart-${id}` });
    this.time = h("span", { class: "time", "aria-hidden": "true" });
    this.picker = h("select");
    this.pick = h("span", { class: "pick", hidden: true }, this.picker);
    this.picker.addEventListener("change", () => onPick(this.id, this.picker.value));
    this.legend = h("div", { class: "legend" });
    this.canvas = h("div", {
      class: "plot", role: "slider", tabindex: "0", "aria-label": "Chart over time", "aria-valuemin": "0",
      "aria-valuenow": "0", "aria-orientation": "horizontal",
    });
    this.empty = h("p", { class: "plot-empty" });
    this.element = h(
      "section", { class: "panel", "aria-labelledby": `chart-${id}` },
      h("header", {}, this.heading, this.pick, this.time), this.legend,
      h("div", { class: "plot-box" }, this.canvas, this.empty),
    );
    timeline.panels.add(this);
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.leave());
    touchZoom(this);
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    new IntersectionObserver(
      (entries) => {
        this.visible = eager || entries[entries.length - 1].isIntersecting;
        if (this.visible && this.stale && this.chart) this.draw();
      },
      { rootMargin: "80px" },
    ).observe(this.element);
    addEventListener("themechange", () => this.plot?.redraw(false));
  }

  /** New data has come: draws when on screen, else remembers to. */
  show(chart) {
    this.chart = chart;
    setText(this.heading, chart.title);
    this.showPicker(chart.picker);
    this.element.hidden = chart.absent;
    this.element.classList.toggle("wide", chart.wide);
    this.redraw();
  }

  redraw() {
    this.stale = true;
    if (this.visible && this.chart) this.draw();
  }

  showPicker(picker) {
    this.pick.hidden = !picker || picker.options.length < 2;
    if (!picker) return;
    setAttribute(this.picker, "aria-label", picker.label);
    const wanted = picker.options.map(({ value, text }) => `${value}\n${text}`).join("\n\n");
    if (this.picker.wanted !== wanted) {
      this.picker.wanted = wanted;
      this.picker.replaceChildren(...picker.options.map(({ value, text }) => h("option", { value }, text)));
    }
    if (this.picker.value !== picker.value) this.picker.value = picker.value;
  }

  draw() {
    this.stale = false;
    const { lines, empty, limits } = this.chart;
    setText(this.empty, empty);
    this.legend.classList.toggle("idle", !lines.length);
    this.canvas.classList.toggle("idle", !lines.length);
    setAttribute(this.canvas, "tabindex", lines.length ? "0" : "-1");
    if (!lines.length) {
      setAttribute(this.canvas, "aria-label", `${this.chart.title}: ${empty}`);
      this.clear();
      return;
    }
    const shape = JSON.stringify([lines.map(({ series, ...line }) => line), limits]);
    const data = this.data();
    if (shape !== this.shape) this.build(data, shape);
    else this.plot.setData(data, false);
    const [min, max] = timeline.range();
    this.plot.setScale("x", { min, max });
    this.showValues(this.at ?? null);
    this.describe();
  }

  /** The columns of uPlot: fitted to the pixels there are, on the axis' clock. */
  data() {
    const [from, to] = timeline.range();
    const bins = Math.max(40, Math.floor((this.canvas.clientWidth - AXIS_LEFT - AXIS_RIGHT) / POINT_PX));
    const all = this.chart.lines.map(({ series }) => series);
    this.fit = fitted(all, from + timeline.zero, to + timeline.zero, bins);
    return [Array.from(this.fit.t, (at) => at - timeline.zero), ...this.fit.columns];
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
    this.shape = "";
    this.legend.replaceChildren();
  }

  build(data, shape) {
    this.clear();
    this.shape = shape;
    const { lines } = this.chart;
    const scales = [...new Set(lines.map(({ scale }) => scale))];
    const whole = (name) => lines.filter(({ scale }) => scale === name).every((line) => line.whole);
    this.values = lines.map((line) => this.legendEntry(line));
    this.plot = new uPlot(
      {
        width: Math.max(120, this.canvas.clientWidth), height: Math.max(80, this.canvas.clientHeight),
        padding: [20, scales.length > 1 ? 4 : AXIS_RIGHT, 0, 0], legend: { show: false },
        scales: Object.fromEntries([
          ["x", { time: false, range: () => timeline.range() }],
          ...scales.map((name, at) => [
            name,
            { range: (u, low, high) => fromZero(low, this.highest(name, high), at ? 1.45 : 1.12, whole(name)) },
          ]),
        ]),
        series: [
          {},
          ...lines.map((line) => ({
            label: line.label, scale: line.scale, stroke: () => colour(line.colour), width: line.width ?? 1.5,
            dash: line.dash, spanGaps: false, show: !this.off.has(line.label),
            points: { show: (u, index) => u.data[index].filter(known).length < 3, size: 5 },
          })),
        ],
        axes: [
          {
            scale: "x", incrs: TIME_STEPS, space: 56, size: 26, gap: 4, font: font(), stroke: () => colour("--axis"),
            values: (u, splits) => splits.map((at) => (at < 0 ? "" : clock(at))), grid: { show: false },
            ticks: { stroke: () => colour("--line"), width: 1, size: 4 },
          },
          ...scales.map((name, at) => ({
            scale: name, side: at ? 1 : 3, size: at ? AXIS_RIGHT - 4 : AXIS_LEFT, gap: 4, space: 26, font: font(),
            stroke: () => colour("--axis"), values: (u, splits) => splits.map(axisNumber), ticks: { show: false },
            unit: unitLabel(name), ...(whole(name) ? { incrs: WHOLE_STEPS } : {}),
            grid: { show: at === 0, stroke: () => colour("--grid"), width: 1 },
          })),
        ],
        cursor: {
          y: false, points: { size: 6 },
          sync: {
            key: "run", setSeries: false, filters: { sub: (type) => type === "mousemove" || type === "mouseleave" },
          },
          drag: { x: true, y: false, setScale: false },
          bind: {
            dblclick: () => () => {
              timeline.setFollow(null);
              return null;
            },
          },
        },
        hooks: {
          drawAxes: [drawPhases, drawUnits, (u) => this.drawBands(u)], draw: [(u) => this.drawLimits(u)],
          setCursor: [(u) => this.showValues(u.cursor.idx)], setSelect: [(u) => this.selected(u)],
        },
      },
      data, this.canvas,
    );
  }

  /** An axis reaches as far as its limits do, if they are near; a band's top is not cut off. */
  highest(name, high) {
    let top = high;
    for (const { value, scale } of this.chart.limits)
      if (scale === name && value < 2.5 * high) top = Math.max(top, value);
    this.fit.high?.forEach((column, at) => {
      const { band, scale, label } = this.chart.lines[at];
      if (!band || scale !== name || this.off.has(label)) return;
      for (const value of column) if (value > top) top = value;
    });
    return top;
  }

  /** Between the smallest and the largest of the points that one point of the line stands for. */
  drawBands(u) {
    if (!this.fit.low) return;
    clipped(u, 0, (ctx) => {
      this.chart.lines.forEach(({ band, scale, colour: name, label }, at) => {
        if (!band || this.off.has(label)) return;
        const [low, high] = [this.fit.low[at], this.fit.high[at]];
        const place = (i, value) => [u.valToPos(u.data[0][i], "x", true), u.valToPos(value, scale, true)];
        ctx.beginPath();
        let started = false;
        for (let i = 0; i < high.length; i++) {
          if (!known(high[i])) continue;
          started ? ctx.lineTo(...place(i, high[i])) : ctx.moveTo(...place(i, high[i]));
          started = true;
        }
        for (let i = low.length - 1; i >= 0; i--) if (known(low[i])) ctx.lineTo(...place(i, low[i]));
        ctx.fillStyle = colour(name);
        ctx.globalAlpha = 0.18;
        ctx.fill();
        ctx.globalAlpha = 1;
      });
    });
  }

  drawLimits(u) {
    const { bbox } = u;
    clipped(u, 0, (ctx, ratio) => {
      ctx.strokeStyle = ctx.fillStyle = colour("--bad");
      ctx.font = `${10 * ratio}px ${colour("--sans")}`;
      ctx.textAlign = "right";
      ctx.lineWidth = 1.5 * ratio;
      for (const { value, label, scale } of this.chart.limits) {
        const y = Math.round(u.valToPos(value, scale, true)) + 0.5;
        const inside = y >= bbox.top;
        if (inside) {
          ctx.beginPath();
          ctx.moveTo(bbox.left, y);
          ctx.lineTo(bbox.left + bbox.width, y);
          ctx.stroke();
        }
        const text = inside ? label : `${label} ↑`;
        ctx.fillText(
          text, bbox.left + bbox.width - 4 * ratio,
          Math.max(y, bbox.top) + (inside && y > bbox.top + 16 * ratio ? -4 : 12) * ratio,
        );
      }
    });
  }

  legendEntry(line) {
    const value = h("span", { class: "value" });
    const swatch = h("span", {
      class: `swatch${line.dash ? (line.dash[0] > 4 ? " dashed" : " dotted") : ""}`, "aria-hidden": "true",
    });
    swatch.style.color = `var(${line.colour})`;
    const button = h(
      "button",
      {
        type: "button", "aria-pressed": String(!this.off.has(line.label)),
        title: `${line.title ?? line.label}${line.unit ? `, ${unitLabel(line.unit)}` : ""}`,
      },
      swatch, h("span", { class: "name" }, line.label), value,
    );
    button.addEventListener("click", () => {
      if (!this.off.delete(line.label)) this.off.add(line.label);
      button.setAttribute("aria-pressed", String(!this.off.has(line.label)));
      const at = this.chart.lines.findIndex(({ label }) => label === line.label);
      this.plot.setSeries(at + 1, { show: !this.off.has(line.label) });
    });
    this.legend.append(button);
    return value;
  }

  /** The figures beside the legend and the time: under the crosshair, or the last in sight. */
  showValues(index) {
    if (!this.plot) return;
    const under = index ?? null;
    const until = timeline.range()[1] + timeline.zero + 1e-6;
    setText(this.time, under === null ? "" : clock(Math.max(0, this.plot.data[0][under])));
    this.chart.lines.forEach(({ series, whole }, at) => {
      // The last is the series' own, not the mean of the points that share its pixels.
      const column = under === null ? series.v : this.plot.data[at + 1];
      let i = under ?? firstAfter(series.t, until) - 1;
      while (i > 0 && !known(column[i])) i--;
      const exact = whole && (under === null || this.fit.low === null);
      setText(this.values[at], known(column[i]) ? number(column[i], exact ? 6 : 3) : "—");
    });
  }

  describe() {
    const words = this.chart.lines.map(({ label }, at) => `${label} ${this.values[at].textContent}`).join(", ");
    const times = this.plot.data[0];
    const at = this.at === undefined ? times.length - 1 : this.at;
    setAttribute(this.canvas, "aria-label", `${this.chart.title} over time`);
    setAttribute(this.canvas, "aria-valuemax", String(Math.round(timeline.end)));
    setAttribute(this.canvas, "aria-valuenow", String(Math.max(0, Math.round(times[at] ?? 0))));
    setAttribute(this.canvas, "aria-valuetext", `${clock(Math.max(0, times[at] ?? 0))}: ${words}`);
  }

  selected(u) {
    if (u.select.width < 4) return;
    timeline.setZoom([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  }

  /** Arrows move the crosshair, + and − zoom around it, Escape shows the whole run again. */
  key(event) {
    if (!this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const times = this.plot.data[0];
    const [from, to] = timeline.range();
    const inSight = times
      .map((at, i) => [at, i])
      .filter(([at]) => at >= from && at <= to)
      .map(([, i]) => i);
    if (!inSight.length) return;
    const now = Math.max(0, inSight.indexOf(this.at ?? inSight.at(-1)));
    const step = event.shiftKey ? Math.max(2, Math.round(inSight.length / 10)) : 1;
    const move = { ArrowRight: now + step, ArrowLeft: now - step, Home: 0, End: inSight.length - 1 }[event.key];
    const at = times[inSight[now]];
    const span = (to - from) / 2;
    const act = {
      "+": () => timeline.scaleZoom(at, 0.5), "=": () => timeline.scaleZoom(at, 0.5),
      "-": () => timeline.scaleZoom(at, 2), Escape: () => timeline.setFollow(null),
      0: () => timeline.setFollow(null), PageUp: () => timeline.shiftZoom(-span),
      PageDown: () => timeline.shiftZoom(span),
    }[event.key];
    if (move === undefined && !act) return;
    event.preventDefault();
    act?.();
    const shown = move === undefined ? this.nearest(at) : inSight[Math.max(0, Math.min(inSight.length - 1, move))];
    this.at = shown;
    this.plot.setCursor({ left: this.plot.valToPos(this.plot.data[0][shown], "x"), top: 10 }, true, true);
    this.showValues(shown);
    this.describe();
  }

  nearest(at) {
    return this.plot.data[0].reduce(
      (best, time, i, all) => (Math.abs(time - at) < Math.abs(all[best] - at) ? i : best), 0,
    );
  }

  leave() {
    this.at = undefined;
    this.plot?.setCursor({ left: -10, top: -10 });
  }

  /** For printing. */
  forPaper() {
    if (this.chart) this.draw();
    this.resize();
  }

  resize() {
    const [width, height] = [this.canvas.clientWidth, Math.max(80, this.canvas.clientHeight)];
    if (!this.plot || width <= 0 || (width === this.plot.width && height === this.plot.height)) return;
    this.plot.setSize({ width, height });
    this.redraw();
  }
}

/** Two fingers zoom, one moves along the axis when it is zoomed and shows the crosshair else; up and down scrolls. */
function touchZoom(panel) {
  const fingers = new Map();
  let before = null;
  const { canvas } = panel;
  const place = (event) => event.clientX - panel.plot.over.getBoundingClientRect().left;
  const value = (x) => panel.plot.posToVal(x, "x");
  canvas.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch" || !panel.plot) return;
    canvas.setPointerCapture(event.pointerId); // a plot that is drawn anew under the fingers does not lose them
    fingers.set(event.pointerId, place(event));
    const [a, b] = fingers.values();
    before = b === undefined ? null : { width: Math.abs(a - b) };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId) || !panel.plot) return;
    fingers.set(event.pointerId, place(event));
    const [a, b] = fingers.values();
    if (b === undefined) {
      panel.plot.setCursor({ left: a, top: 10 }, true, true);
      if (timeline.zoom && before?.one !== undefined) timeline.shiftZoom(value(before.one) - value(a));
      before = { one: a };
      return;
    }
    const [width, middle] = [Math.abs(a - b), (a + b) / 2];
    if (before?.width > 8 && width > 8) timeline.scaleZoom(value(middle), before.width / width);
    before = { width };
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => {
      fingers.delete(event.pointerId);
      before = null;
      if (!fingers.size && event.pointerType === "touch") panel.plot?.setCursor({ left: -10, top: -10 });
    });
  }
}

/**
 * An axis starts at zero (all our figures are amounts) and leaves room on top: more for the second axis, so that two
 * quantities that go in step are two lines. A count's axis has room for whole steps.
 */
function fromZero(low, high, room, whole) {
  if (!known(high)) return [0, 1];
  if (low < 0) return uPlot.rangeNum(low, high, 0.1, true);
  return [0, high > 0 ? Math.max(high * room, whole ? 4 : 0) : whole ? 4 : 1];
}

/** A line without axes, for a card. `series` is [{t, v, colour, fill}]; the range is the whole run. */
export function sparkline(canvas, series, from, to) {
  const ratio = devicePixelRatio;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const { t, columns, high } = fitted(series, from, to, Math.max(20, Math.floor(width / POINT_PX)));
  const top = Math.max(0, ...(high ?? columns).flat().filter(known)) || 1;
  const x = (at) => ((at - from) / Math.max(1e-9, to - from)) * (width - 3) + 1;
  const y = (value) => height - 1.5 - (value / top) * (height - 5);
  series.forEach(({ colour: name, fill }, at) => {
    let [first, last] = [null, null];
    context.beginPath();
    t.forEach((time, i) => {
      const value = columns[at][i];
      if (!known(value) || time < from) return;
      last = x(time);
      if (first === null) context.moveTo(last, y(value));
      else context.lineTo(last, y(value));
      first ??= last;
    });
    if (first === null) return;
    context.strokeStyle = colour(name);
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke();
    if (!fill) return;
    context.lineTo(last, height);
    context.lineTo(first, height);
    context.globalAlpha = 0.1;
    context.fillStyle = colour(name);
    context.fill();
    context.globalAlpha = 1;
  });
}

/** All charts of a page, drawn one at a time, with room for other things between: none is worth a dropped frame. */
export class Charts {
  constructor(box, note, options) {
    Object.assign(this, { box, note, options, panels: new Map(), queue: new Map() });
  }

  show(charts, axis) {
    Object.assign(timeline, axis);
    if (timeline.zoom && timeline.zoom[0] >= axis.end) timeline.zoom = null;
    if (!charts.length) return;
    for (const { id } of charts) if (!this.panels.has(id)) this.panels.set(id, new Panel(id, this.options));
    setChildren(this.box, charts.map(({ id }) => this.panels.get(id).element));
    setText(
      this.note,
      charts
        .filter(({ absent }) => absent)
        .map(({ empty }) => empty)
        .filter((text, at, all) => all.indexOf(text) === at)
        .join(" "),
    );
    const idle = !this.queue.size;
    for (const chart of charts) this.queue.set(chart.id, chart); // one that waits keeps its place
    if (idle) requestAnimationFrame(() => this.next());
  }

  next() {
    const [[id, chart]] = this.queue;
    this.queue.delete(id);
    this.panels.get(id).show(chart);
    if (this.queue.size) setTimeout(() => requestAnimationFrame(() => this.next()), 20);
  }
}

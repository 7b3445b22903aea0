// SPDX-License-Identifier: Apache-2.0
// Numbers, units and times as people read them. Pure functions.

const formats = new Map();

function fixed(value, digits) {
  let format = formats.get(digits);
  if (!format) {
    format = new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    formats.set(digits, format);
  }
  return format.format(value);
}

export const NONE = "—";

const BIDI = /[\u0590-\u08ff\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufeff]/;

/** Text of others within a sentence of ours: what is written from right to left turns nothing but itself around. */
export const isolated = (text) => (BIDI.test(text) ? `\u2068${text}\u2069` : text);

/** Orders names as people do: GPU 2 before GPU 10. */
export const natural = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/** True for a number that can be shown. */
export const known = (value) => typeof value === "number" && Number.isFinite(value);

/** `significant` digits, thousands separated, millions and more by suffix: 0.456, 81.94, 276.6, 12,345, 4.57 M. */
export function number(value, significant = 4) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e15) return value.toExponential(2);
  for (const [factor, suffix] of [[1e12, " T"], [1e9, " B"], [1e6, " M"]]) {
    if (size >= factor) return fixed(value / factor, 2) + suffix;
  }
  if (Number.isInteger(value)) return fixed(value, 0);
  if (size < 1e-4) return value.toExponential(2);
  const before = Math.floor(Math.log10(size)) + 1;
  return fixed(value, Math.max(0, Math.min(6, significant - before)));
}

/** A count: always whole, thousands separated up to ten millions. */
export function count(value) {
  if (!known(value)) return NONE;
  return Math.abs(value) >= 1e7 ? number(value) : fixed(Math.round(value), 0);
}

/** "42" for 42.7: the share already done is never rounded up, so 100 means all of it. */
export const percent = (value) => (known(value) ? `${Math.floor(value + 1e-9)} %` : NONE);

/** A share of errors: 0 only for none at all, 100 only for all. */
export function share(part, whole) {
  if (!known(part) || !known(whole) || whole <= 0) return NONE;
  const value = (100 * part) / whole;
  if (part > 0 && value < 0.01) return "< 0.01 %";
  if (part < whole && value > 99.9) return "> 99.9 %";
  return `${value === 0 || value === 100 ? value : fixed(value, value < 1 ? 2 : 1)} %`;
}

const UNITS = {
  "tokens/sec": "tok/s", "tokens/sec/user": "tok/s/user", "tokens/s": "tok/s", "requests/sec": "req/s",
  requests: "req", tokens: "tok", count: "",
};

/** A unit as it stands beside a figure. */
export const unitLabel = (unit) => (unit === undefined || unit === null ? "" : (UNITS[unit] ?? String(unit)));

/** [factor, unit] by which a value of this size reads well: for 12,345 ms [0.001, "s"]. */
export function scaleOf(value, unit) {
  const size = known(value) ? Math.abs(value) : 0;
  if (unit === "ms" && size >= 10_000) return [0.001, "s"];
  if (unit === "ms" && size > 0 && size < 0.1) return [1000, "µs"];
  if (unit === "MB" && size >= 10_000) return [0.001, "GB"];
  return [1, unitLabel(unit)];
}

/** A value and its unit in a readable size: 12,345 ms becomes 12.35 s, 0.04 ms becomes 40 µs. */
export function quantity(value, unit, significant = 4) {
  const [factor, label] = scaleOf(value, unit);
  return { text: number(factor === 1 ? value : value * factor, significant), unit: label };
}

/** A quantity in one string. */
export function phrase(value, unit, significant = 4) {
  const shown = quantity(value, unit, significant);
  return shown.unit && shown.text !== NONE ? `${shown.text} ${shown.unit}` : shown.text;
}

/** Bytes in binary units. */
export function bytes(value) {
  if (!known(value)) return NONE;
  for (const [factor, suffix] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= factor) return `${number(value / factor, 3)} ${suffix}`;
  }
  return `${count(value)} B`;
}

/** Seconds as 0:07, 12:34 or 1:02:03. */
export function clock(seconds) {
  if (!known(seconds)) return NONE;
  const sign = seconds < 0 ? "−" : "";
  const whole = Math.floor(Math.abs(seconds));
  const two = (n) => String(n).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return sign + (hours ? `${hours}:${two(minutes)}` : `${minutes}`) + `:${two(whole % 60)}`;
}

/** Seconds in words for a sentence: 7 s, 12 min 5 s, 2 h 3 min. */
export function spoken(seconds) {
  if (!known(seconds)) return NONE;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor(whole / 60) % 60} min`;
}

/** Milliseconds since the epoch as local 14:03:59. */
export const timeOfDay = (ms) => new Date(ms).toLocaleTimeString("en-GB", { hour12: false });

/** One line of CSV (RFC 4180). A cell that a spreadsheet would run as a formula gets a leading apostrophe. */
export function csvLine(cells) {
  return (
    cells
      .map((cell) => {
        if (cell === undefined || cell === null) return "";
        let text = String(cell);
        if (typeof cell === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
        return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
      })
      .join(",") + "\r\n"
  );
}

/** A file of CSV, from its rows. */
export const csvText = (rows) => rows.map(csvLine).join("");

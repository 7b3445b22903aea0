// SPDX-License-Identifier: Apache-2.0
// Small helpers over the DOM. Text goes in as text nodes only: nothing in these pages parses HTML at run time.

/** The element with this id; it must exist. */
export const byId = (id) => document.getElementById(id);

/** `h("a", {href: "…", class: "x", onclick: f}, "text", child)`: an element. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

/** The same for a drawing. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

/** Sets an element's text, and touches the document only when it changes. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sets (or, for null, removes) an attribute, and touches the document only when it changes. */
export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** Makes `parent`'s children exactly `wanted`, moving as little as possible. */
export function setChildren(parent, wanted) {
  let at = parent.firstChild;
  for (const child of wanted) {
    if (child === at) at = at.nextSibling;
    else parent.insertBefore(child, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

/** Copies text; the fallback serves pages that came over plain http, where there is no clipboard API. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "sr", readonly: true, "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** A button that copies what `text()` returns at the time of the click. */
export function copyButton(text, label = "Copy", name = label) {
  const button = h("button", { class: "button", type: "button", "aria-label": name === label ? null : name }, label);
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(text())) ? "Copied" : "Failed";
    setTimeout(() => {
      button.textContent = label;
    }, 1200);
  });
  return button;
}

/** A line (or more) of shell with a button to copy it. `what` tells screen readers which one. */
export function snippet(text, what = "command") {
  const pre = h("pre", { tabindex: "0", "aria-label": what }, h("code", {}, text));
  const box = h("div", { class: "snippet" }, pre, copyButton(() => pre.textContent, "Copy", `Copy ${what}`));
  box.setLine = (line) => setText(pre.firstChild, line);
  return box;
}

/** Offers `text` as a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

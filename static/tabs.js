// SPDX-License-Identifier: Apache-2.0
// Tabs by pointer and keyboard (WAI-ARIA: arrows, Home, End), one of them open.

import { byId, setAttribute, setText } from "./dom.js";

export class Tabs {
  constructor(list, onOpen) {
    this.buttons = [...list.querySelectorAll("[role=tab]")];
    this.onOpen = onOpen;
    this.buttons.forEach((button, at) => {
      button.addEventListener("click", () => this.open(nameOf(button)));
      button.addEventListener("keydown", (event) => {
        const last = this.buttons.length - 1;
        const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at ? at - 1 : last, Home: 0, End: last }[
          event.key
        ];
        if (to === undefined) return;
        event.preventDefault();
        this.open(nameOf(this.buttons[to]));
        this.buttons[to].focus();
      });
    });
  }

  open(name) {
    if (!this.buttons.some((button) => nameOf(button) === name)) return;
    this.name = name;
    for (const button of this.buttons) {
      const mine = nameOf(button) === name;
      setAttribute(button, "aria-selected", String(mine));
      setAttribute(button, "tabindex", mine ? null : "-1");
      byId(`pane-${nameOf(button)}`).hidden = !mine;
    }
    this.onOpen(name);
  }

  count(name, n) {
    setText(byId(`count-${name}`), n ? n.toLocaleString("en-US") : "");
  }
}

const nameOf = (button) => button.id.slice(4);

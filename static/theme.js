// SPDX-License-Identifier: Apache-2.0
// Sets the theme before the first paint, so that nobody sees a flash of the other one: a classic script.
(() => {
  const KEY = "aiperf.theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const apply = () => {
    const theme = stored() ?? (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    dispatchEvent(new Event("themechange"));
  };
  apply();
  dark.addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => {
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      const label = () => {
        const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
        button.setAttribute("aria-label", `Switch to the ${next} theme`);
        button.title = button.getAttribute("aria-label");
        button.textContent = next === "light" ? "Light" : "Dark";
      };
      button.addEventListener("click", () => {
        const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
        const system = dark.matches ? "dark" : "light";
        // Back at what the system says: follow the system again.
        try {
          next === system ? localStorage.removeItem(KEY) : localStorage.setItem(KEY, next);
        } catch { /* no storage */ }
        document.documentElement.dataset.theme = next;
        dispatchEvent(new Event("themechange"));
      });
      addEventListener("themechange", label);
      label();
      button.hidden = false;
    }
  });
})();

// SPDX-License-Identifier: Apache-2.0
// A browser for test_pages.py: one JSON command a line on stdin, one JSON answer a line on stdout.
//
// Whatever a page does that it must not do (console errors, CSP violations, requests to other hosts) is collected from
// its first moment and handed over with "close".

import { createInterface } from "node:readline";
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(process.env.PAGES_MODULES ? `${process.env.PAGES_MODULES}/` : import.meta.url);
const { chromium } = require("playwright-core");
const AXE = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--js-flags=--expose-gc", "--enable-precise-memory-info",
  ],
});
const pages = new Map();

/** Runs in the page before anything of ours: layout shifts and CSP violations. */
function watch() {
  const seen = (globalThis.watched = { shift: 0, shifts: [], csp: [], tasks: [] });
  addEventListener("securitypolicyviolation", (event) =>
    seen.csp.push(`${event.violatedDirective} ${event.blockedURI}`),
  );
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
      if (entry.hadRecentInput) continue;
      seen.shift += entry.value;
      seen.shifts.push(entry.sources.map(({ node }) => node?.id || node?.className || node?.nodeName));
    }
  }).observe({ type: "layout-shift", buffered: true });
  new PerformanceObserver((list) => {
    for (const { duration } of list.getEntries()) seen.tasks.push(duration);
  }).observe({ type: "longtask", buffered: true });
}

/**
 * What each frame costs the page's main thread in ms of CPU time (whatever else the machine is doing), from a trace:
 * the task that ends in the frame's commit, and what ran in the 16 ms before it and after the frame before.
 */
function frameCosts(trace) {
  const threads = new Map();
  for (const { name, ph, pid, tid, ts, dur = 0, tdur = 0, cat } of JSON.parse(trace.toString()).traceEvents) {
    if (ph !== "X") continue;
    const key = `${pid}.${tid}`;
    if (!threads.has(key)) threads.set(key, { tasks: [], commits: [] });
    if (name === "RunTask" && cat.includes("timeline"))
      threads.get(key).tasks.push({ ts, end: ts + dur, cost: tdur / 1000 });
    else if (name === "Commit") threads.get(key).commits.push(ts);
  }
  const [{ tasks, commits }] = [...threads.values()].sort((a, b) => b.commits.length - a.commits.length);
  let done = 0; // when the frame before was
  return commits
    .sort((a, b) => a - b)
    .map((commit) => {
      const own = tasks.find(({ ts, end }) => ts <= commit && commit <= end);
      const since = Math.max(done, (own?.ts ?? commit) - 16_000);
      done = own?.end ?? commit;
      return tasks.reduce((sum, { ts, cost }) => (ts >= since && ts <= commit ? sum + cost : sum), 0);
    });
}

async function open({
  name, url, width = 1440, height = 900, theme = "light", block = [], forced = false, touch = false,
  slow = 0,
}) {
  const context = await browser.newContext({
    viewport: { width, height }, colorScheme: theme, forcedColors: forced ? "active" : "none", acceptDownloads: true,
    hasTouch: touch, permissions: ["clipboard-read", "clipboard-write"],
  });
  await context.addInitScript(watch);
  const page = await context.newPage();
  const faults = [];
  const host = new URL(url).host;
  let wire = 0;
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) faults.push(`console: ${message.text()}`);
  });
  page.on("pageerror", (error) => faults.push(`exception: ${error.stack}`));
  page.on("request", (request) => {
    const asked = new URL(request.url());
    if (/^(https?|wss?):$/.test(asked.protocol) && asked.host !== host) faults.push(`foreign: ${request.url()}`);
  });
  page.on("websocket", (socket) => {
    if (new URL(socket.url()).host !== host) faults.push(`foreign: ${socket.url()}`);
  });
  for (const pattern of block) await page.route(pattern, (route) => route.abort());
  if (slow) {
    await page.routeWebSocket("**", async (socket) => {
      await page.waitForTimeout(slow);
      socket.connectToServer();
    });
  }
  const devtools = await context.newCDPSession(page);
  await devtools.send("Network.enable");
  devtools.on("Network.loadingFinished", ({ encodedDataLength }) => {
    wire += encodedDataLength;
  });
  pages.set(name, { context, page, faults, devtools, wire: () => wire });
  await page.goto(url);
}

const commands = {
  open,
  reload: async ({ name }) => {
    await pages.get(name).page.reload();
  },
  evaluate: ({ name, script }) => pages.get(name).page.evaluate(script),
  // page.waitForFunction would evaluate text inside the page, which its policy forbids; the debugger may.
  wait: async ({ name, script, seconds }) => {
    const { page } = pages.get(name);
    for (const deadline = Date.now() + seconds * 1000; ; ) {
      const value = await page.evaluate(script).catch((error) => {
        if (!/context was destroyed/.test(error)) throw error;
      });
      if (value) return value;
      if (Date.now() > deadline) throw new Error(`not within ${seconds} s`);
      await page.waitForTimeout(60);
    }
  },
  click: async ({ name, selector }) => {
    await pages.get(name).page.click(selector, { timeout: 10_000 });
  },
  fill: async ({ name, selector, text }) => {
    await pages.get(name).page.fill(selector, text);
  },
  press: async ({ name, key }) => {
    await pages.get(name).page.keyboard.press(key);
  },
  drag: async ({ name, selector, from, to }) => {
    const { page } = pages.get(name);
    const box = await page.locator(selector).first().boundingBox();
    await page.mouse.move(box.x + box.width * from, box.y + box.height / 2);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width * to, box.y + box.height / 2, { steps: 4 });
    await page.mouse.up();
  },
  /** Two fingers, from two places to two others; places are shares of the element's width. */
  pinch: async ({ name, selector, from, to }) => {
    const { page, devtools } = pages.get(name);
    const box = await page.locator(selector).first().boundingBox();
    const touch = (type, places) =>
      devtools.send("Input.dispatchTouchEvent", {
        type, touchPoints: places.map((at, id) => ({ id, x: box.x + box.width * at, y: box.y + box.height / 2 })),
      });
    await touch("touchStart", from);
    for (let step = 1; step <= 5; step++)
      await touch("touchMove", from.map((at, id) => at + ((to[id] - at) * step) / 5));
    await touch("touchEnd", []);
  },
  download: async ({ name, selector }) => {
    const { page } = pages.get(name);
    const [got] = await Promise.all([page.waitForEvent("download"), page.click(selector)]);
    return { file: got.suggestedFilename(), text: readFileSync(await got.path(), "utf8") };
  },
  files: async ({ name, selector, files }) => {
    await pages.get(name).page.setInputFiles(selector, files);
  },
  media: async ({ name, media }) => {
    await pages.get(name).page.emulateMedia({ media });
  },
  screenshot: async ({ name, path, full = false }) => {
    await pages.get(name).page.screenshot({ path, fullPage: full });
  },
  wire: ({ name }) => pages.get(name).wire(),
  trace: async ({ name }) => {
    await browser.startTracing(pages.get(name).page, {
      categories: ["devtools.timeline", "disabled-by-default-devtools.timeline", "toplevel"],
    });
  },
  frames: async () => frameCosts(await browser.stopTracing()),
  heap: async ({ name }) => {
    const { devtools } = pages.get(name);
    await devtools.send("HeapProfiler.collectGarbage");
    return (await devtools.send("Runtime.getHeapUsage")).usedSize;
  },
  axe: async ({ name }) => {
    const { page } = pages.get(name);
    // By the debugger, which the page's policy does not bind.
    await page.evaluate(AXE);
    const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
    return violations
      .filter(({ impact }) => impact === "serious" || impact === "critical")
      .map(
        ({ id, nodes }) =>
          `${id}: ${nodes
            .slice(0, 4)
            .map(({ html, failureSummary }) => `${html.slice(0, 160)} (${failureSummary})`)
            .join("; ")}`,
      );
  },
  close: async ({ name }) => {
    const { context, page, faults } = pages.get(name);
    const csp = await page.evaluate(() => globalThis.watched.csp).catch(() => []);
    await context.close();
    pages.delete(name);
    return [...faults, ...csp.map((text) => `policy: ${text}`)];
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...options } = JSON.parse(line);
  try {
    const result = await commands[command](options);
    console.log(JSON.stringify({ result: result ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error.stack ?? error) }));
  }
}
await browser.close();

import { renew } from "./change.js";
import { Chart } from "./chart.js";
import { follow, json, live, make, parse } from "./page.js";

const place = document.getElementById("run");
const name = encodeURIComponent(place.dataset.run);
const slider = document.getElementById("smoothing");
const charts = new Map();

function start(view) {
  const figure = document.querySelector(`figure[data-chart="${CSS.escape(view.key)}"]`);
  if (!figure) return false;
  const zoomed = async (range, show) => {
    const query = range ? `?from=${range[0]}&to=${range[1]}` : "";
    const found = (await json(`/api/runs/${name}/charts${query}`)).charts.find((one) => one.key === view.key);
    if (found) show(found.lines);
  };
  charts.set(view.key, { file: view.file, chart: new Chart(figure.querySelector(".canvas"), view, { smoothing: Number(slider?.value ?? 0.9), zoomed }) });
  return true;
}

slider?.addEventListener("input", () => {
  for (const { chart } of charts.values()) { chart.smoothing = Number(slider.value); chart.later(); }
});

// events: newest first, at most 500 on the page
const log = document.getElementById("log");
const filter = document.getElementById("event-filter");
const hide = (row) => { row.hidden = !row.textContent.toLowerCase().includes(filter.value.toLowerCase()); };
filter.addEventListener("input", () => { for (const row of log.rows) hide(row); });
const KNOWN = new Set(["ts", "name", "run", "span", "parent", "trace", "kind", "seq", "crc"]);

function addEvents(events) {
  for (const event of events) {
    const told = Object.entries(event).filter(([key, value]) => !KNOWN.has(key) && value !== "" && value !== null);
    const text = told.map(([key, value]) => `${key}=${typeof value === "string" ? value : JSON.stringify(value)}`).join("  ").slice(0, 400);
    const when = new Date(1000 * event.ts).toISOString().slice(11, 19);
    const row = make("tr", {}, make("td", { class: "time" }, when), make("td", { class: "event" }, String(event.name)), make("td", { class: "fields" }, text));
    hide(row);
    log.prepend(row);
  }
  while (log.rows.length > 500) log.lastElementChild.remove();
}

let again = 0;
function refresh() {
  clearTimeout(again);
  again = setTimeout(async () => {
    const answer = await fetch(location.href);
    if (!answer.ok) return;
    const fresh = parse(await answer.text());
    for (const part of fresh.querySelectorAll("[data-part]")) {
      const old = document.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
      if (old) old.replaceWith(document.importNode(part, true));
    }
    renew(fresh);
    const missing = [...fresh.querySelectorAll("figure[data-chart]")].filter((one) => !charts.has(one.dataset.chart));
    if (missing.length) location.reload();
  }, 300);
}

const first = await json(`/api/runs/${name}/charts`);
for (const view of first.charts) start(view);
// curves go on where they were fetched, events where the page was made
const [metrics, timings] = first.cursor.split(",");
const after = [metrics, timings, place.dataset.cursor.split(",")[2]].join(",");
follow(`/api/runs/${name}/live?after=${encodeURIComponent(after)}&parts=${place.dataset.parts}`, {
  hello: ({ status }) => live(status === "running" ? "live" : "up to date", status === "running" ? "on" : ""),
  rows: (rows) => {
    for (const { file, chart } of charts.values()) {
      const own = rows[file.replace(".jsonl", "")];
      if (own) chart.add(own);
    }
    if (rows.metrics && !charts.size) refresh();
    if (rows.events) addEvents(rows.events);
  },
  parts: ({ status }) => { live(status === "running" ? "live" : "up to date", status === "running" ? "on" : ""); refresh(); },
  again: () => location.reload(),
  gone: (_, stop) => { live("the run is gone", "off"); stop(); },
});

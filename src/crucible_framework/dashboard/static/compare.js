import { Chart } from "./chart.js";
import { follow, json, make } from "./page.js";

const place = document.getElementById("comparison");
const names = [...document.querySelectorAll(".chosen [data-run]")].map((chip) => chip.dataset.run);
const host = document.querySelector("#overlay .canvas");
const pick = document.getElementById("metric");
const slider = document.getElementById("smoothing");
const log = document.getElementById("log");
const query = (metric) => new URLSearchParams([...names.map((name) => ["run", name]), ["metric", metric]]);
let chart = null;

async function lines(metric, range) {
  const asked = query(metric);
  if (range) { asked.set("from", range[0]); asked.set("to", range[1]); }
  const found = await json(`/api/compare?${asked}`);
  return found.lines.map((line, index) => ({ ...line, field: metric, role: "raw", colour: index }));
}

async function show() {
  const metric = pick.value;
  const spec = { title: metric, unit: names.join(", "), log: log.checked, lines: await lines(metric) };
  const zoomed = async (range, put) => put(await lines(metric, range));
  chart = new Chart(host, spec, { smoothing: Number(slider.value), zoomed, height: 380 });
  document.getElementById("chart-title").textContent = metric;
  document.getElementById("csv").href = `/compare.csv?${query(metric)}`;
  history.replaceState(null, "", `/compare?${query(metric)}`);
}

pick.addEventListener("change", show);
slider.addEventListener("input", () => { if (chart) { chart.smoothing = Number(slider.value); chart.later(); } });
log.addEventListener("change", () => { if (chart) { chart.spec.log = log.checked; chart.later(); } });
document.getElementById("svg").addEventListener("click", (event) => {
  event.preventDefault();
  if (!chart) return;
  const address = URL.createObjectURL(chart.file());
  make("a", { href: address, download: `compare-${pick.value.replaceAll("/", "-")}.svg` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
});
await show();
place.dataset.ready = "yes";

// only runs that still go on are followed
for (const chip of document.querySelectorAll(".chosen [data-run]")) {
  if (!chip.querySelector(".state.running")) continue;
  follow(`/api/runs/${encodeURIComponent(chip.dataset.run)}/live?after=now`, {
    rows: ({ metrics }) => {
      const line = chart?.spec.lines.find((one) => one.name === chip.dataset.run);
      const own = (metrics ?? []).filter((row) => typeof row[pick.value] === "number");
      if (!line || chart.range) return;
      for (const row of own) if (!line.x.length || row.step > line.x[line.x.length - 1]) { line.x.push(row.step); line.y.push(row[pick.value]); }
      if (own.length) chart.later();
    },
  });
}

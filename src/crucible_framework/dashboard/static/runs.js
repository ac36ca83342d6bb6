import { follow, live, parse, typing } from "./page.js";

const rows = document.getElementById("rows");
const search = document.getElementById("q");
const compare = document.getElementById("compare");

const boxes = () => [...document.querySelectorAll("input[name=run]")];
function count() {
  const chosen = boxes().filter((box) => box.checked).length;
  compare.disabled = chosen < 2;
  compare.textContent = chosen < 2 ? "Compare chosen runs" : `Compare ${chosen} runs`;
}
document.addEventListener("change", count);
count();

// the filter asks the server, which alone knows the rules
let pending = 0;
search?.addEventListener("input", () => {
  clearTimeout(pending);
  pending = setTimeout(async () => {
    const address = new URL(location.href);
    address.searchParams.set("q", search.value);
    const answer = await fetch(address);
    if (!answer.ok || !rows) return;
    const chosen = new Set(boxes().filter((box) => box.checked).map((box) => box.value));
    rows.replaceChildren(...[...parse(await answer.text()).querySelectorAll("#rows > tr")].map((row) => document.importNode(row, true)));
    for (const box of boxes()) box.checked = chosen.has(box.value);
    history.replaceState(null, "", address);
    count();
  }, 150);
});

function place({ name, html, new: fresh }) {
  const row = document.importNode(parse(`<table><tbody>${html}</tbody></table>`).querySelector("tr"), true);
  const old = [...document.querySelectorAll("tr[data-run]")].find((one) => one.dataset.run === name);
  if (old) {
    row.querySelector("input").checked = old.querySelector("input").checked;
    const focused = old.contains(document.activeElement) ? document.activeElement.tagName : "";
    old.replaceWith(row);
    if (focused) row.querySelector(focused === "INPUT" ? "input" : "a").focus();
  } else if (fresh && rows && !search.value) rows.prepend(row);
  else if (fresh && !rows) location.reload();
}

follow(`/api/live?after=${rows?.dataset.now ?? "0"}`, {
  hello: () => live("live", "on"),
  row: place,
  gone: ({ names }) => { for (const row of document.querySelectorAll("tr[data-run]")) if (names.includes(row.dataset.run)) row.remove(); },
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && event.target === search) { search.blur(); return; }
  if (typing(event) && event.target.type !== "checkbox") return;
  const links = [...document.querySelectorAll("a.run")];
  const row = document.activeElement.closest?.("tr");
  const at = row ? links.findIndex((link) => row.contains(link)) : -1;
  if (event.key === "/") { event.preventDefault(); search?.focus(); }
  else if (event.key === "j") links[Math.min(links.length - 1, at + 1)]?.focus();
  else if (event.key === "k") links[Math.max(0, at - 1)]?.focus();
  else if (event.key === "x" && row) { const box = row.querySelector("input"); box.checked = !box.checked; count(); }
  else if (event.key === "c" && !compare.disabled) compare.click();
});

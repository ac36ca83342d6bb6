// A page made of parts: when its files change, it is fetched again, and only parts that differ are put in place.
import { follow, live, parse } from "./page.js";

const place = document.querySelector("[data-live]");

async function refresh() {
  const answer = await fetch(location.href);
  if (!answer.ok) return;
  const fresh = parse(await answer.text());
  const parts = [...fresh.querySelectorAll("[data-part]")];
  const here = [...document.querySelectorAll("[data-part]")].map((one) => one.dataset.part).join();
  if (parts.map((one) => one.dataset.part).join() !== here) { location.reload(); return; }
  for (const part of parts) {
    const old = document.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
    if (old && old.innerHTML !== part.innerHTML && !old.contains(document.activeElement)) old.replaceWith(document.importNode(part, true));
  }
}

if (place) {
  let again = 0;
  follow(`${place.dataset.live}?after=${encodeURIComponent(place.dataset.stamp ?? "")}`, {
    hello: () => live("live", "on"),
    parts: () => { clearTimeout(again); again = setTimeout(refresh, 200); },
    gone: (_, stop) => { live("it is gone", "off"); stop(); },
  });
}
document.addEventListener("keydown", (event) => {
  const search = document.getElementById("q");
  if (event.key === "Escape" && event.target === search) search.blur();
  else if (event.key === "/" && search && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) { event.preventDefault(); search.focus(); }
});

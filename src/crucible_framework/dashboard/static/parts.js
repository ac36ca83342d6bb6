// A page made of parts: when its files change, the server is told what is here and sends only the parts that differ.
import { follow, live, parse } from "./page.js";

const place = document.querySelector("[data-live]");

async function refresh() {
  const here = [...document.querySelectorAll("[data-part]")];
  const address = new URL(location.href);
  address.searchParams.set("known", here.map((one) => `${one.dataset.part}:${one.dataset.digest}`).join());
  const answer = await fetch(address);
  if (!answer.ok) return;
  const { order, parts } = await answer.json();
  if (order.join() !== here.map((one) => one.dataset.part).join()) { location.reload(); return; }
  for (const old of here) {
    const fresh = parts[old.dataset.part];
    if (fresh && !old.contains(document.activeElement)) old.replaceWith(document.importNode(parse(fresh).querySelector("[data-part]"), true));
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

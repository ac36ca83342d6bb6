// Small pieces that every page uses. Text becomes text nodes; HTML comes only from this server's own pages, where it is escaped.
const policy = window.trustedTypes ? trustedTypes.createPolicy("crucible", { createHTML: (html) => html }) : null;

export function parse(html) {
  return new DOMParser().parseFromString(policy ? policy.createHTML(html) : html, "text/html");
}

export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function live(text, state = "") {
  const place = document.getElementById("live");
  if (place && place.textContent !== text) place.textContent = text;
  if (place) place.className = `live ${state}`;
}

// Follows a stream; the browser reconnects by itself and says where it was.
export function follow(url, handlers) {
  const source = new EventSource(url);
  const stop = () => source.close();
  source.addEventListener("hello", () => live("live", "on"));
  source.addEventListener("error", () => live("reconnecting…", "off"));
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data), stop));
  }
  addEventListener("pagehide", stop, { once: true });
  return stop;
}

export async function json(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

export const typing = (event) => event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);

// Stage, tags and notes of a model version or a run; only a dashboard that may write serves these forms.
const said = document.getElementById("said");
const token = document.querySelector("meta[name=crucible-token]")?.content;
const notes = document.querySelector("form[data-change] textarea");
const draft = `draft ${location.pathname}`;

// Notes that are being written outlive the page: setting a tag makes it anew, as a run's first curve does.
function keep() {
  try {
    if (notes.value === notes.defaultValue) sessionStorage.removeItem(draft);
    else sessionStorage.setItem(draft, notes.value);
  } catch { /* storage may be switched off */ }
}

function kept() {
  try { return sessionStorage.getItem(draft); } catch { return null; }
}

// Notes that nobody is writing follow what others make of them.
export function renew(fresh) {
  const now = fresh.querySelector("form[data-change] textarea")?.defaultValue;
  if (notes && now !== undefined && notes.value === notes.defaultValue) notes.value = notes.defaultValue = now;
}

if (notes) {
  const text = kept();
  if (text !== null && text !== notes.value) {
    notes.value = text;
    said.textContent = "These notes are not saved yet.";
  }
  addEventListener("pagehide", keep);
}

for (const form of document.querySelectorAll("form[data-change]")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const data = new FormData(form);
    const kind = form.dataset.change;
    const body = kind === "tag" ? { tags: { [data.get("key")]: data.get("value") || null } } : { [kind]: data.get(kind) };
    try {
      const answer = await fetch(location.pathname, { method: "POST", headers: { "content-type": "application/json", "x-crucible-token": token }, body: JSON.stringify(body) });
      const text = await answer.text();
      if (answer.ok) {
        if (kind === "notes") notes.defaultValue = body.notes;
        location.reload();
      } else said.textContent = answer.headers.get("content-type")?.startsWith("application/json") ? JSON.parse(text).error : text;
    } catch (error) {
      said.textContent = String(error);
    }
  });
}

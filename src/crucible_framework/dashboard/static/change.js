// Stage, tags and notes of a model version or a run; only a dashboard that may write serves these forms.
const said = document.getElementById("said");
const token = document.querySelector("meta[name=crucible-token]")?.content;

for (const form of document.querySelectorAll("form[data-change]")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const data = new FormData(form);
    const kind = form.dataset.change;
    const body = kind === "tag" ? { tags: { [data.get("key")]: data.get("value") || null } } : { [kind]: data.get(kind) };
    try {
      const answer = await fetch(location.pathname, { method: "POST", headers: { "content-type": "application/json", "x-crucible-token": token }, body: JSON.stringify(body) });
      const text = await answer.text();
      if (answer.ok) location.reload();
      else said.textContent = answer.headers.get("content-type")?.startsWith("application/json") ? JSON.parse(text).error : text;
    } catch (error) {
      said.textContent = String(error);
    }
  });
}

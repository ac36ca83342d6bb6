import { live, make } from "./page.js";

const form = document.getElementById("ask");
const answers = document.getElementById("answers");
const send = document.getElementById("send");
const token = document.querySelector("meta[name=crucible-token]").content;
const probabilities = document.getElementById("probabilities");

function card(answer) {
  const facts = answer.error ? "" : `${answer.tokens} tokens, ${answer.duration_s.toFixed(2)} s, ended by ${answer.stop_reason}`;
  const text = make("div", { class: answer.error ? "text error" : "text" }, answer.error || answer.text || "(empty)");
  const mean = answer.logprobs.length ? answer.logprobs.reduce((a, b) => a + b, 0) / answer.logprobs.length : NaN;
  const strip = make("div", { class: "strip", role: "img", "aria-label": `mean token probability ${Math.exp(mean).toFixed(2)}` });
  for (const value of answer.logprobs) {
    const p = Math.exp(value);
    strip.append(make("span", { class: `p p${Math.min(9, Math.floor(p * 10))}`, title: `p = ${p.toFixed(3)}` }));
  }
  const made = make("article", { class: "answer" }, make("p", { class: "who" }, make("b", {}, answer.model), " ", make("span", {}, facts)), text);
  if (answer.logprobs.length && probabilities.checked) made.append(strip, make("p", { class: "soft small" }, `mean log p ${mean.toFixed(3)} nats per token`));
  return made;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const data = new FormData(form);
  const models = data.getAll("model");
  if (!models.length) { answers.replaceChildren(make("p", { class: "note" }, "Choose at least one model.")); return; }
  const body = { prompt: data.get("prompt"), system: data.get("system"), models, max_tokens: Number(data.get("max_tokens")), temperature: Number(data.get("temperature")) };
  if (data.get("seed") !== "") body.seed = Number(data.get("seed"));
  send.disabled = true;
  live("asking…", "on");
  try {
    const answer = await fetch("/playground/ask", { method: "POST", headers: { "content-type": "application/json", "x-crucible-token": token }, body: JSON.stringify(body) });
    const said = answer.headers.get("content-type")?.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
    if (said.error) answers.replaceChildren(make("p", { class: "note error" }, said.error));
    else answers.replaceChildren(...said.answers.map(card));
  } catch (error) {
    answers.replaceChildren(make("p", { class: "note error" }, String(error)));
  } finally {
    send.disabled = false;
    live("");
  }
});
form.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });

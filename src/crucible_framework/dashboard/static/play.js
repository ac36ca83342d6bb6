import { live, make } from "./page.js";

const form = document.getElementById("ask");
const answers = document.getElementById("answers");
const send = document.getElementById("send");
const token = document.querySelector("meta[name=crucible-token]").content;
const probabilities = document.getElementById("probabilities");

const level = (p) => Math.min(9, Math.max(0, Math.floor(p * 10)));

// the text token by token, shaded by how likely each was; without token texts, a strip of squares
function tokens(answer) {
  const known = answer.pieces.length === answer.logprobs.length;
  const place = make("div", { class: known ? "text tokens" : "strip" });
  for (const [i, logprob] of answer.logprobs.entries()) {
    const p = Math.exp(logprob);
    const told = `${known ? `${JSON.stringify(answer.pieces[i])}: ` : ""}p = ${p.toFixed(3)}, log p = ${logprob.toFixed(3)} nats`;
    place.append(make("span", { class: `p p${level(p)}`, title: told }, known ? answer.pieces[i] : ""));
  }
  return place;
}

function least(answer) {
  const order = [...answer.logprobs.keys()].sort((a, b) => answer.logprobs[a] - answer.logprobs[b]).slice(0, 5);
  const rows = order.map((i) => make("tr", {}, make("td", { class: "number" }, String(i + 1)), make("td", {}, JSON.stringify(answer.pieces[i] ?? "")),
    make("td", { class: "number" }, Math.exp(answer.logprobs[i]).toFixed(3)), make("td", { class: "number" }, answer.logprobs[i].toFixed(3))));
  const head = ["token", "text", "p", "log p, nats"].map((name, i) => make("th", { scope: "col", class: i === 1 ? "" : "number" }, name));
  return make("details", {}, make("summary", {}, "Least likely tokens"), make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

function ballots(list) {
  const rows = list.map((one) => make("tr", {}, make("td", {}, one.member), make("td", {}, one.error || (one.answer ?? "abstains")),
    make("td", { class: "number" }, one.confidence === null ? "–" : one.confidence.toFixed(2))));
  const head = ["member", "answer", "confidence"].map((name, i) => make("th", { scope: "col", class: i === 2 ? "number" : "" }, name));
  return make("table", { class: "ballots" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function card(answer) {
  const facts = answer.error ? "" : `${answer.tokens} tokens, ${answer.duration_s.toFixed(2)} s, ended by ${answer.stop_reason}`;
  const made = make("article", { class: "answer" }, make("p", { class: "who" }, make("b", {}, answer.model), " ", make("span", {}, facts)));
  const plain = make("div", { class: answer.error ? "text error" : "text plain" }, answer.error || answer.text || "(empty)");
  made.append(plain);
  if (answer.logprobs.length) {
    const mean = answer.logprobs.reduce((a, b) => a + b, 0) / answer.logprobs.length;
    const said = make("p", { class: "soft small" }, `mean log p ${mean.toFixed(3)} nats per token, perplexity ${Math.exp(-mean).toFixed(2)}`);
    made.append(make("div", { class: "likely" }, tokens(answer), said, least(answer)));
  }
  if (answer.ballots.length) made.append(ballots(answer.ballots));
  return made;
}

function together(verdict) {
  const tie = verdict.tied.length ? `, drawn from a tie of ${verdict.tied.length}` : "";
  const said = verdict.answer === null ? `No verdict: ${verdict.reason}` : verdict.text;
  return make("article", { class: "answer verdict-card" }, make("p", { class: "who" }, make("b", {}, `Together: ${verdict.strategy}`), " ",
    make("span", {}, `agreement ${(100 * verdict.agreement).toFixed(0)} %${tie}`)), make("div", { class: "text" }, said), ballots(verdict.ballots));
}

const shade = () => answers.classList.toggle("likely-on", probabilities.checked);
probabilities.addEventListener("change", shade);

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const data = new FormData(form);
  const models = data.getAll("model");
  if (!models.length) { answers.replaceChildren(make("p", { class: "note" }, "Choose at least one model.")); return; }
  const body = { prompt: data.get("prompt"), system: data.get("system"), models, vote: data.get("vote"), max_tokens: Number(data.get("max_tokens")), temperature: Number(data.get("temperature")) };
  if (data.get("seed") !== "") body.seed = Number(data.get("seed"));
  send.disabled = true;
  live("asking…", "on");
  try {
    const answer = await fetch("/playground/ask", { method: "POST", headers: { "content-type": "application/json", "x-crucible-token": token }, body: JSON.stringify(body) });
    const said = answer.headers.get("content-type")?.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
    if (said.error) answers.replaceChildren(make("p", { class: "note error" }, said.error));
    else answers.replaceChildren(...(said.verdict ? [together(said.verdict)] : []), ...said.answers.map(card));
    shade();
  } catch (error) {
    answers.replaceChildren(make("p", { class: "note error" }, String(error)));
  } finally {
    send.disabled = false;
    live("");
  }
});
form.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });

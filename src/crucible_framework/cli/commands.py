"""The commands: each reads its words, makes one call and says what came back."""

from __future__ import annotations

import contextlib
import signal
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Group

from ..backends import connect
from ..data import datasets as known_datasets
from ..demo import run_demo
from ..evaluation import BySentence, EmbeddingSimilarity, NliModel, attempt, compare, evaluate, persistence_scorers, usual_scorers, validation_scorers
from ..experiments import analyse
from ..inference import ChoiceSampler
from ..losses import losses as known_losses
from ..losses import resolve
from ..protocols import Sampler, Scorer
from ..records import Evaluation, SamplingParams
from ..reports import write_report
from ..reports.study import is_study, write_study_report
from ..training import Callback, Trainer, progress_bar, received_signal
from ..training import watch as watching
from . import show
from .checkup import examine
from .jobs import DataChoice, load_data, load_job, load_rows, numbers, resolve_model, runnable
from .reply import Reply, typed

__all__ = ["register"]

Settings = Annotated[list[str] | None, Parameter(name="--set", help="A key of the configuration, `lora.rank=8`; may be given again.")]


def demo(*, dataset: str = "minifact", base_model: str | None = None, folder: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> Reply:
    """Train on claims, compare with the base, write a report: the whole way.

    Args:
        dataset: `minifact` (shipped) or `scifact` (its files must be there).
        base_model: `smollm2-135m`, with --quick `tiny`.
        folder: the run folder; an interrupted demo there is continued.
        quick: few examples and a tiny model: under 90 seconds.
        seed: of adapter, dropout and batches.
    """
    with progress_bar() as bar:
        done = run_demo(dataset, base_model=base_model, folder=folder, quick=quick, seed=seed, callbacks=(bar,), progress=bar.stage, command=typed.get())
    asked = {"base": done.base, "base by likelihood": done.preferred, "adapter": done.adapter}
    scores = ", ".join(f"{who} {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for who, ran in asked.items() for one in [ran["label_accuracy"]])
    text = (
        f"Label accuracy on {len(done.base.items)} held-out claims: {scores}.\n"
        f"{show.finding_text(done.finding)}\n{show.finding_text(done.fair)}\n"
        f"Loss on training examples: {done.training.initial_loss:.3f} → {done.training.final_loss:.3f} nats per token in {done.training.steps} steps.\n"
        f"Registered as {done.model.name}:{done.model.version}. Ask it: crucible sample {folder} -i\nReport: {done.report}"
    )
    return Reply(done, text)


def train(
    config: Path | None = None, /, *, settings: Settings = None, base_model: str | None = None, dataset: str | None = None, split: str | None = None,
    dev: str | None = None, limit: int | None = None, folder: Path | None = None, backend: str | None = None, loss: str | None = None,
    max_steps: int | None = None, watch: int = 0, resume: bool = False,
) -> Reply:  # fmt: skip
    """Train an adapter from a TOML file, flags, or both.

    Args:
        config: keys of TrainConfig, and `[data]`, `backend`, `folder`.
        base_model: name, folder or Hugging Face id.
        dataset: name or path.
        split: what is learned from.
        dev: a split whose loss is taken every `eval_interval` steps.
        limit: the first examples only.
        folder: the run folder.
        backend: local or fake.
        loss: a registered loss.
        max_steps: optimizer steps.
        watch: that many examples (of `dev` where there is one) are answered at every checkpoint; `crucible ui` shows how.
        resume: go on from the folder's latest checkpoint.
    """
    chosen = {"name": dataset, "split": split, "dev": dev, "limit": limit}
    flags: dict[str, object] = {"base_model": base_model, "folder": str(folder) if folder else None, "backend": backend, "loss": loss, "max_steps": max_steps,
             "data": {key: value for key, value in chosen.items() if value is not None} or None}  # fmt: skip
    job = load_job(config, settings or [], flags)
    rows, held_out = load_data(job.data, job.data.split), load_data(job.data, job.data.dev) if job.data.dev else None
    with connect(job.backend) as engine, progress_bar() as bar, contextlib.ExitStack() as stack:
        callbacks: list[Callback] = [bar]
        if watch > 0:
            callbacks.append(watching((held_out or rows).examples[:watch], lambda: trainer.sampler(), job.folder))  # noqa: PLW0108 - the trainer is made after
        trainer = stack.enter_context(Trainer(engine, job.config(), folder=job.folder, callbacks=callbacks, resume=resume, command=typed.get()))
        result = trainer.train(rows, held_out)
    text = (
        f"{result.steps} steps, {result.tokens:,} tokens, {result.duration_s:.0f} s; ended by {result.stopped}.\n"
        f"Loss on training examples: {result.initial_loss:.4f} → {result.final_loss:.4f} nats per token.\n"
        f"Checkpoint: {result.checkpoint.local_path if result.checkpoint else 'none'}"
    )
    code = 128 + (received_signal() or signal.SIGINT) if result.stopped == "signal" else 0
    return Reply(result, text + (f"\nStopped by a signal; go on with --resume --folder {job.folder}." if code else ""), code)


def score(
    model: str, /, *, dataset: str = "minifact", split: str = "test", task: str | None = None, limit: int | None = None, against: str | None = None,
    scorers: list[str] | None = None, nli: str | None = None, similarity: str | None = None, choose: bool = False, perplexity: bool = False,
    max_tokens: int | None = None, shots: int = 0, attempts: int = 1, k: str = "1", temperature: float = 0.8, unsafe_local: bool = False,
    folder: Path | None = None, backend: str = "local",
) -> Reply:  # fmt: skip
    """Score a model on a data set, alone or paired with another.

    Args:
        model: a base model's name, a run or checkpoint folder, or a registered model.
        dataset: name or path.
        split: train, dev or test.
        task: where the data set has several.
        limit: the first examples only.
        against: a second model that answers the same examples; the difference is model − against.
        scorers: names; where none is given, `label_accuracy`, and those of claims for the task "extract".
        nli: a Hugging Face cross-encoder that judges whether documents bear claims out, in five more scores.
        similarity: a Hugging Face sentence encoder that judges how near claims are to the target's, in the same scores, and in those of persistence.
        choose: the answer is the label that the model finds likeliest, instead of what it writes.
        perplexity: also the targets' perplexity.
        max_tokens: tokens per answer at the most, 32 where nothing is said and 512 for the task "extract"; answers are greedy, but for attempts.
        shots: solved training (else dev) examples of other documents before each question.
        attempts: draw that many answers to each example and give pass@k without bias; the first scorer says what passes.
        k: of pass@k; several with commas between.
        temperature: of attempts.
        unsafe_local: run code that the model wrote without a sandbox, as you; without it `passes_tests` refuses (exit code 78) where there is none.
        folder: keeps each row, so that an interrupted evaluation goes on.
        backend: local or fake.
    """
    rows = load_rows(DataChoice(name=dataset, task=task, limit=limit), split, shots)
    names = runnable(scorers or list(usual_scorers(rows)), unsafe=unsafe_local)
    bears, alike = BySentence(NliModel(nli)) if nli else None, EmbeddingSimilarity(similarity) if similarity else None
    judged: dict[str, Scorer] = dict(zip(("longest_hole", "total_persistence"), persistence_scorers(alike), strict=True)) if alike else {}
    asked: tuple[str | Scorer, ...] = tuple(judged.get(name, name) for name in names)
    asked += validation_scorers(entailment=bears, similarity=alike) if bears or alike else ()
    most = max_tokens or (512 if rows.card.task == "extract" else 32)
    if attempts > 1:
        drawn = SamplingParams(max_tokens=most, temperature=temperature, top_p=0.95, seed=0)
        with connect(backend) as engine, progress_bar() as bar:
            told, ks = partial(bar.stage, model), numbers("k", k)
            tried = attempt(engine.sampler(resolve_model(model)), rows, asked[0], n=attempts, ks=ks, params=drawn, folder=folder, progress=told)
        return Reply({"attempts": tried}, show.estimates(tried.estimates))
    params = SamplingParams(max_tokens=most, temperature=0.0)
    found: dict[str, Evaluation] = {}
    with connect(backend) as engine, progress_bar() as bar:
        for label, name in (("model", model), ("against", against)):
            if name is not None:
                kept = folder / label if folder else None
                told = partial(bar.stage, name)
                asking: Sampler = engine.sampler(resolve_model(name))
                asking = ChoiceSampler(asking, rows.card.labels, by="mean") if choose else asking
                found[name] = evaluate(asking, rows, asked, params=params, label=name, perplexity=perplexity, in_flight=8, folder=kept, progress=told)
    parts = [part for name, one in found.items() for part in (name, show.estimates(one.estimates))]
    if against is None:
        return Reply({"evaluation": found[model]}, Group(*parts))
    findings = [compare(found[against], found[model], name if isinstance(name, str) else getattr(name, "__name__", "")) for name in asked]
    return Reply({"evaluation": found[model], "against": found[against], "findings": findings}, Group(*parts, *map(show.finding_text, findings)))


def report(folder: Path, /, *, format: str = "html,markdown") -> Reply:  # noqa: A002 - the flag's name
    """Write the report of a run or study: report.html, report.md and others.

    Args:
        folder: of the run or study.
        format: of html, markdown, latex, json, csv and jupyter, with commas between; a study is analysed anew.
    """
    asked = [name.strip() for name in format.split(",") if name.strip()]
    if is_study(folder):
        analyse(folder)
    paths = write_study_report(folder, asked) if is_study(folder) else write_report(folder, asked)
    return Reply({"paths": [str(path) for path in paths]}, "\n".join(map(str, paths)))


def datasets() -> Reply:
    """List the data sets that have a name."""
    found = known_datasets()
    rows = [(one.name, ", ".join(one.splits), ", ".join(one.tasks), one.licence, one.missing or one.where[0].parent) for one in found]
    shown = show.table(("data set", "splits", "tasks", "licence", "where"), rows, "")
    return Reply({"datasets": list(found)}, Group(shown, "Also: any .jsonl or .csv file with prompt and completion, or chat messages."))


def losses() -> Reply:
    """List the registered losses."""
    found = [resolve(name) for name in known_losses.names()]
    plain = [{"name": one.name, "source": one.source, "needs": one.needs, "extras": list(one.extras)} for one in found]
    return Reply({"losses": plain}, show.table(("loss", "needs", "extras", "source"), [(o.name, o.needs, ", ".join(o.extras), o.source) for o in found], ""))


def doctor() -> Reply:
    """Look at what a run needs: Python, packages, memory, disk, model files."""
    checks = examine()
    rows = [(("ok" if one.ok else "PROBLEM"), one.what, one.found, "" if one.ok else one.fix) for one in checks]
    return Reply({"checks": list(checks)}, show.table(("", "what", "found", "fix"), rows, ""), 0 if all(one.ok for one in checks) else 78)


def register(app: App) -> None:
    """Adds every command to the tree."""
    for command in (demo, train, report, datasets, losses, doctor):
        app.command(command)
    app.command(score, name="eval")

"""A run's files as a document: title, status, summary, notices, and the sections in the order in which they are read.

It decides what a report says and never how it looks. What is not on file is said to be missing and never filled in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from ..records import Json
from . import words
from .evidence import compared, evaluation_notices, facts
from .gradients import gradient_blocks, points, values
from .parts import Block, Document, Fact, LineChart, Listing, Note, Section, Series, Table
from .results import results, samples
from .sources import RunFiles, as_list, as_number, as_table, as_text

__all__ = ["build"]

_WORDS = {
    "done": "finished",
    "running": "still running",
    "stopped": "stopped before its end",
    "failed": "failed",
    "interrupted": "interrupted",
}
_LOSSES = {"train/loss": "training batch", "dev/loss": "held-out data", "probe/loss": "fixed training examples"}
_ROLES: Mapping[str, Literal["raw", "held_out", "points"]] = {"train/loss": "raw", "dev/loss": "held_out", "probe/loss": "points"}
_BROAD = 20.0
"""A logarithmic axis where the largest value is that many times the smallest."""


def build(run: RunFiles) -> Document:
    """The report of a run."""
    found, verdict = compared(run)
    sections = (_results(run), _training(run), _answers(run), _configuration(run), _data(run), _environment(run), _reproduce(run), _files(run))
    return Document(
        title=as_text(run.run.get("name")) or run.folder.resolve().name,
        subtitle=_subtitle(run),
        status=_WORDS.get(run.status, run.status or "status unknown"),
        finished=run.status == "done",
        summary=f"{_trained(run)}{f' {found[0].upper()}{found[1:]}.' if found else ''}",
        verdict=verdict,
        facts=(*facts(run), *_training_facts(run)),
        notices=tuple(_notices(run)),
        sections=sections,
    )


# ------------------------------------------------------------------------------------------------------------------ top
def _result(run: RunFiles) -> Mapping[str, Json]:
    return as_table(run.run.get("result"))


def _steps(run: RunFiles) -> int | None:
    """Finished steps: of the result, else the highest in the metrics."""
    steps = as_number(_result(run).get("steps"))
    seen = [step for row in run.metrics if (step := as_number(row.get("step"))) is not None]
    return int(steps) if steps is not None else int(max(seen)) if seen else None


def _card(run: RunFiles, split: str) -> Mapping[str, Json]:
    return as_table(run.data.get(split))


def _lora(run: RunFiles) -> Mapping[str, Json]:
    return as_table(run.config.get("lora"))


def _model(run: RunFiles) -> str:
    return as_text(run.config.get("base_model"))


def _count(value: Json, noun: str) -> str:
    number = as_number(value)
    return "" if number is None else words.counted(int(number), noun)


def _trained(run: RunFiles) -> str:
    """The first sentence: what was trained, on what, how far."""
    rank, steps, planned = as_number(_lora(run).get("rank")), _steps(run), as_number(run.config.get("max_steps"))
    what = f"A {f'rank-{rank:g} ' if rank is not None else ''}LoRA adapter of {_model(run) or 'an unrecorded base model'}"
    card = _card(run, "train")
    rows = _count(card.get("rows"), "example")
    data = f" on {as_text(card.get('name'))}{f' ({rows})' if rows else ''}" if as_text(card.get("name")) else ""
    if steps is None:
        return f"{what}: no training step is on file."
    partly = f" of {planned:,.0f} planned" if run.status != "done" and planned is not None and steps < planned else ""
    return f"{what} was trained for {words.counted(steps, 'step')}{partly}{data}."


def _subtitle(run: RunFiles) -> str:
    moments = (("started", run.run.get("created_at")), ("ended", run.run.get("finished_at")))
    parts = [f"{what} {words.when(value)}" for what, value in moments if as_number(value) is not None]
    return " · ".join([part for part in (_model(run), as_text(_card(run, "train").get("name")), *parts) if part])


def _probed(run: RunFiles) -> str:
    """What the losses of the result are measured on, where the metrics tell."""
    result, probes = _result(run), points(run, "probe/loss")[1]
    same = len(probes) > 1 and probes[0] == as_number(result.get("initial_loss")) and probes[-1] == as_number(result.get("final_loss"))
    return ", fixed training examples" if same else ""


def _training_facts(run: RunFiles) -> list[Fact]:
    result = _result(run)
    before, after = (as_number(result.get(name)) for name in ("initial_loss", "final_loss"))
    found = []
    if before is not None and after is not None:
        found.append(Fact(label="Loss", value=f"{words.number(before)} → {words.number(after)}", detail=f"nats per weight{_probed(run)}"))
    duration = as_number(result.get("duration_s"))
    if duration is not None:
        found.append(Fact(label="Training time", value=words.duration(duration), detail=_count(result.get("steps"), "step")))
    return found


def _notices(run: RunFiles) -> Iterator[str]:
    if run.status and run.status != "done":
        error = as_text(run.run.get("error"))
        yield f"The run is {_WORDS.get(run.status, run.status)}{f': {error}' if error else ''}. Its numbers are those so far."
    missing = [
        name for name, there in (("run.json", run.run), ("config.json", run.config), ("data.json", run.data), ("metrics.jsonl", run.metrics)) if not there
    ]
    named = " ".join(run.problems)
    missing = [name for name in missing if f"{name} was left out" not in named]
    if missing:
        yield f"Missing or empty: {', '.join(missing)}. What they would say is not in this report."
    yield from run.problems
    yield from evaluation_notices(run)
    ignored = [as_text(name) for name in as_list(as_table(run.run.get("environment")).get("not_honoured"))]
    if ignored:
        yield f"The backend ignored these settings, which were at their defaults: {', '.join(ignored)}."
    cut = as_number(as_table(run.data.get("truncated")).get("completions"))
    if cut:
        yield f"Training completions that were longer than max_length and lost their ends: {cut:,.0f}."


def _or_note(key: str, title: str, blocks: Sequence[Block | None], missing: str) -> Section:
    kept = tuple(block for block in blocks if block is not None)
    return Section(key=key, title=title, blocks=kept or (Note(text=missing),))


def _results(run: RunFiles) -> Section:
    return results(run) or _or_note(
        "results", "Before and after", (), "No evaluation is on file (eval/<label>/evaluation.json), so there is no before and after."
    )


def _answers(run: RunFiles) -> Section:
    return samples(run) or _or_note("samples", "Answers side by side", (), "No answers of base and adapter to the same items are on file.")


# ------------------------------------------------------------------------------------------------------------- training
def _smooth(y: Sequence[float | None], window: int) -> tuple[float | None, ...]:
    """The mean of the last `window` values at each place; None before there are as many, and across gaps."""
    means: list[float | None] = []
    for end in range(1, len(y) + 1):
        part = [value for value in y[max(0, end - window) : end] if value is not None]
        means.append(math.fsum(part) / window if len(part) == window else None)
    return tuple(means)


def _loss_chart(run: RunFiles) -> LineChart | None:
    names = {name: words_ for name, words_ in _LOSSES.items() if any(y is not None for y in points(run, name)[1])}
    if not names:
        return None
    series: list[Series] = []
    note = ""
    for name, label in names.items():
        x, y = points(run, name)
        series.append(Series(name=label, x=x, y=y, role=_ROLES[name]))
        window = min(50, len(y) // 10)
        if name == "train/loss" and window >= 3:
            series.append(Series(name=f"mean of the last {window} batches", x=x, y=_smooth(y, window), role="smooth"))
    if any(value is None for name in names for value in points(run, name)[1]):
        note = "Gaps are values that are not finite."
    shown = values("Loss at some steps (nats per weight)", names, run, "metrics.jsonl")
    return LineChart(
        title="Loss", x_label="optimizer step", y_label="loss, nats per weight", series=tuple(series), source="metrics.jsonl", values=shown, note=note
    )


def _gradient_chart(run: RunFiles) -> LineChart | None:
    x, y = points(run, "grad/global_norm")
    known = [value for value in y if value is not None]
    if not known:
        return None
    clip = as_number(as_table(run.config.get("adam")).get("max_grad_norm"))
    note = ""
    if clip is not None:
        over = sum(value > clip for value in known)
        note = f"Gradients above a norm of {words.setting(clip)} were clipped to it: {over:,} of {words.counted(len(known), 'step')}."
    return LineChart(
        title="Gradient norm",
        x_label="optimizer step",
        y_label="global L2 norm before clipping",
        series=(Series(name="gradient norm", x=x, y=y, role="raw"),),
        source="metrics.jsonl",
        values=values("Gradient norm at some steps", {"grad/global_norm": "Gradient norm", "train/lr": "Learning rate"}, run, "metrics.jsonl"),
        note=note,
        log=min(known) > 0 and max(known) / min(known) > _BROAD,
    )


def _progress(run: RunFiles) -> Table | None:
    result = _result(run)
    rows: list[tuple[str, str]] = []
    shown = (
        (f"Loss before{_probed(run)}", "initial_loss", " nats per weight"),
        (f"Loss after{_probed(run)}", "final_loss", " nats per weight"),
        ("Lowest loss on held-out data", "best_dev_loss", " nats per weight"),
        ("Steps", "steps", ""),
        ("Epochs", "epochs", ""),
        ("Tokens", "tokens", ""),
    )
    for label, name, unit in shown:
        value = as_number(result.get(name))
        if value is not None:
            rows.append((label, (f"{value:,.0f}" if value.is_integer() and not unit else words.number(value)) + unit))
    if as_number(result.get("duration_s")) is not None:
        rows.append(("Time", words.duration(as_number(result.get("duration_s")))))
    if as_text(result.get("stopped")):
        rows.append(("Ended by", as_text(result.get("stopped"))))
    sources = ["run.json"] if rows else []
    speeds = [v for row in run.timings if (v := as_number(row.get("tokens_per_s"))) is not None]
    memory = [v for row in run.timings if (v := as_number(row.get("memory_bytes"))) is not None]
    if speeds:
        rows.append(("Speed, median over steps", f"{words.number(statistics.median(speeds))} tokens/s"))
    if memory:
        rows.append(("Most memory held by the process", words.size(max(memory))))
    sources += ["timings.jsonl"] if speeds or memory else []
    return Table(title="Training in numbers", columns=("", "Value"), rows=tuple(rows), source=", ".join(sources), numeric=(1,)) if rows else None


def _checkpoints(run: RunFiles) -> Table | None:
    rows = []
    for folder in run.checkpoints:
        manifest = folder.manifest
        if manifest is None:
            rows.append((folder.name, words.NOTHING, words.NOTHING, words.NOTHING, f"cannot be used: {folder.problem}"))
            continue
        step = as_number(manifest.meta.get("step"))
        rows.append(
            (
                folder.name,
                f"{step:,.0f}" if step is not None else words.NOTHING,
                as_text(manifest.meta.get("kind")),
                words.size(manifest.size_bytes),
                manifest.sha256,
            )
        )
    if not rows:
        return None
    return Table(
        title="Checkpoints",
        columns=("Folder", "Step", "Kind", "Size", "sha256 of the manifest"),
        rows=tuple(rows),
        source="checkpoints/*/manifest.json",
        numeric=(1, 3),
    )


def _training(run: RunFiles) -> Section:
    blocks: list[Block | None] = [_loss_chart(run), _gradient_chart(run), *gradient_blocks(run)]
    if run.metrics and not any(blocks):
        blocks.append(Note(text="metrics.jsonl holds neither a loss nor a gradient norm."))
    elif (_steps(run) or 0) < 5 and any(blocks):
        blocks.insert(0, Note(text="So few steps show no trend."))
    blocks += [_progress(run), _checkpoints(run)]
    if not run.metrics:
        blocks.append(Note(text="No metrics are on file (metrics.jsonl), so there are no curves."))
    if not run.checkpoints:
        blocks.append(Note(text="No checkpoint is on file."))
    return _or_note("training", "Training", blocks, "No training is on file.")


# ----------------------------------------------------------------------------------------------------------- the record
def _flat(tree: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", words.setting(value)


def _configuration(run: RunFiles) -> Section:
    rows = tuple(_flat(run.config))
    table = Table(title="All settings", columns=("Setting", "Value"), rows=rows, source="config.json") if rows else None
    print_ = as_text(run.run.get("fingerprint"))
    note = Note(text=f"Fingerprint of the configuration (sha256 of its canonical JSON): {print_}.", source="run.json") if print_ else None
    return _or_note("configuration", "Configuration", (table, note), "No configuration is on file (config.json).")


def _data(run: RunFiles) -> Section:
    given = [("training", _card(run, "train"), "data.json"), ("held out", _card(run, "dev"), "data.json")]
    given += [(f"evaluation: {arm.label}", arm.card, f"{arm.source}/evaluation.json") for arm in run.arms]
    cards = [(who, card, source) for who, card, source in given if card]
    merged: list[tuple[str, Mapping[str, Json], str]] = []
    for who, card, source in cards:
        if merged and merged[-1][1] == card:
            merged[-1] = (f"{merged[-1][0]}, {who.removeprefix('evaluation: ')}", card, f"{merged[-1][2]}, {source}")
        else:
            merged.append((who, card, source))
    blocks: list[Block | None] = [_card_table(who, card, source) for who, card, source in merged]
    blocks += [_overlap(run), _truncation(run)]
    return _or_note("data", "Data", blocks, "No data card is on file (data.json).")


def _card_table(who: str, card: Mapping[str, Json], source: str) -> Table:
    names = (
        ("Name", "name"), ("Split", "split"), ("Task", "task"), ("Rows", "rows"), ("Labels", "labels"), ("Licence", "licence"),
        ("sha256 of the examples", "sha256"), ("Source", "source"), ("Citation", "citation"),
    )  # fmt: skip
    rows = [(label, words.setting(card[key])) for label, key in names if card.get(key) not in (None, "", [])]
    missing = [label for label, key in names[:2] + names[5:7] if not card.get(key)]
    files = [as_table(file) for file in as_list(card.get("files"))]
    rows += [(f"File {as_text(f.get('name'))}", f"{words.size(as_number(f.get('size_bytes')))}, sha256 {as_text(f.get('sha256')) or 'unknown'}") for f in files]
    note = f"Not on file: {', '.join(missing)}." if missing else ""
    return Table(title=f"Data card: {who}", columns=("", "Value"), rows=tuple(rows), source=source, note=note)


def _overlap(run: RunFiles) -> Note | None:
    """Scoring on the rows that were learned shows memory, so it is said where the hashes are equal."""
    learned = as_text(_card(run, "train").get("sha256"))
    same = [arm.label for arm in run.arms if learned and as_text(arm.card.get("sha256")) == learned]
    return Note(text=f"Evaluated on the training data itself (same sha256): {', '.join(same)}. This shows memory, not generalisation.") if same else None


def _truncation(run: RunFiles) -> Table | None:
    cut = as_table(run.data.get("truncated"))
    limit = as_number(run.config.get("max_length"))
    labels = (("Prompts cut at their start", "prompts"), ("Completions cut at their end", "completions"), ("Tokens of the training data", "tokens"))
    rows = tuple((label, f"{value:,.0f}") for label, key in labels if (value := as_number(cut.get(key))) is not None)
    note = f"At {words.counted(int(limit), 'token')} per example (max_length)." if limit is not None else ""
    return Table(title="Truncation", columns=("", "Count"), rows=rows, source="data.json", numeric=(1,), note=note) if rows else None


def _environment(run: RunFiles) -> Section:
    found = {key: value for key, value in as_table(run.run.get("environment")).items() if key not in ("command", "not_honoured")}
    rows = tuple((key.removeprefix("packages."), value) for key, value in _flat(found))
    table = Table(title="Machine and versions", columns=("", "Value"), rows=rows, source="run.json") if rows else None
    return _or_note("environment", "Environment", (table,), "No environment is on file (run.json).")


_PYTHON = """import json
import crucible_framework as cf
from crucible_framework.config import from_dict

config = from_dict(cf.TrainConfig, json.load(open("config.json")))"""


def _reproduce(run: RunFiles) -> Section:
    command = as_text(as_table(run.run.get("environment")).get("command"))
    blocks: list[Block | None] = []
    if command:
        blocks.append(Listing(title="The command that made this run", text=command, language="sh", source="run.json"))
    elif run.config:
        blocks.append(Note(text="The command was not recorded. The configuration is; read it with this and train on the data of the data card."))
        blocks.append(Listing(title="The configuration in Python", text=_PYTHON, language="python", source="config.json"))
    seed, sha = run.config.get("seed"), as_text(_card(run, "train").get("sha256"))
    if command or run.config:
        said = [f"seed {words.setting(seed)}"] if seed is not None else []
        said += [f"training data with sha256 {sha}"] if sha else []
        said += ["the package versions above"] if as_table(run.run.get("environment")) else []
        blocks.append(Note(text=f"Needed for the same numbers: {', '.join(said)}, and the same kind of processor.") if said else None)
    return _or_note("reproduce", "How to reproduce", blocks, "Neither the command nor the configuration is on file.")


def _files(run: RunFiles) -> Section:
    rows = tuple((file.name, words.size(file.size_bytes), file.sha256) for file in run.files)
    table = Table(title="Read for this report", columns=("File", "Size", "sha256"), rows=rows, source="the run folder", numeric=(1,)) if rows else None
    return _or_note("files", "Files", (table,), "The folder holds none of a run's files.")

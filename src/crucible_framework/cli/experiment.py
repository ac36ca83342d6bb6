"""Commands of experiments: run a study, and compare two runs. Each makes one call and says what came back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Group, RenderableType

from ..config import places
from ..data import leaks as find_leaks
from ..data import load_dataset
from ..errors import NotFoundError
from ..evaluation import compare as compare_evaluations
from ..evaluation import load_evaluation
from ..experiments import Analysis, Contrast, Experiment, Study, analyse, estimate, load_experiment
from ..experiments import run as run_study
from ..records import Evaluation
from ..reports.study import write_study_report
from ..training import progress_bar, received_signal
from . import show
from .reply import Reply

__all__ = ["register"]

Settings = Annotated[list[str] | None, Parameter(name="--set", help="A key of the experiment, `train.max_steps=50`; may be given again.")]


def run(
    experiment: Path, /, *, settings: Settings = None, folder: Path | None = None, resume: bool = False, retry_failed: bool = False, dry_run: bool = False,
    jobs: int = 1, together: int = 1, executor: Literal["local", "ray"] = "local",
) -> Reply:  # fmt: skip
    """Run an experiment: every arm with every seed on every data set, analysed and reported.

    Args:
        experiment: a TOML file.
        folder: of the study; `runs/<name of the file>` where none is given.
        resume: go on with the study that is there; nothing is run twice.
        retry_failed: run failed cells again.
        dry_run: only show the cells and what they will cost, from a few measured steps.
        jobs: cells side by side, each in its own process; 0 runs them in this one.
        together: cells that train side by side in one process and share a base model there.
        executor: local, or ray.
    """
    plan = load_experiment(experiment, settings or ())
    where = folder or places().runs / experiment.stem
    if dry_run:
        return _dry(plan, jobs)
    with progress_bar() as bar:
        study = run_study(
            plan,
            where,
            resume=resume,
            retry_failed=retry_failed,
            jobs=jobs,
            together=together,
            executor=executor,
            progress=lambda done, total, note: bar.stage("cells", done, total, note),
        )
    if study.stopped:
        number = received_signal() or signal.SIGINT
        finished = f"Stopped by a signal; {len(study.of('done'))} of {len(study.cells)} cells are finished."
        text = f"{finished} Go on with: crucible run {experiment} --folder {where} --resume"
        return Reply({"folder": str(where), "stopped": True}, text, 128 + number)
    analysis = analyse(study)
    paths = write_study_report(where)
    data = {"folder": str(where), "cells": _counts(study), "analysis": analysis, "reports": [str(path) for path in paths]}
    return Reply(data, Group(*_told(study, analysis), f"Report: {paths[0]}"), 0 if study.of("done") else 70)


def _counts(study: Study) -> dict[str, int]:
    return {status: len(study.of(status)) for status in ("done", "failed", "pending", "dropped")}


def _dry(plan: Experiment, jobs: int) -> Reply:
    with progress_bar():
        cost = estimate(plan, jobs=max(1, jobs))
    rows = []
    for cell in plan.cells():
        one = cost.of(cell.id)
        rows.append((cell.id, cell.arm, cell.seed, cell.data, "–" if one is None else f"{one.seconds:.0f} s", "–" if one is None else f"{one.tokens:,.0f}"))
    text = (
        f"{len(rows)} cells: about {cost.seconds / 60:.1f} minutes of work, {cost.wall_s / 60:.1f} minutes with {max(1, jobs)} jobs on {os.cpu_count()} cores, "
        f"{cost.tokens:,.0f} tokens" + (f", {cost.money:.4g} (money)" if cost.money else "") + f". Measured in {cost.measured_s:.0f} s; nothing was written."
    )
    return Reply({"cost": cost}, Group(show.table(("cell", "arm", "seed", "data", "time", "tokens"), rows, ""), text))


def _told(study: Study, analysis: Analysis) -> list[RenderableType]:
    counts = _counts(study)
    parts: list[RenderableType] = [
        f"{counts['done']} of {len(study.cells)} cells have a result"
        + (f", {counts['failed']} failed" if counts["failed"] else "")
        + (f", {counts['dropped']} were dropped." if counts["dropped"] else ".")
    ]
    for declared, title in ((True, "declared before"), (False, "exploratory")):
        chosen = [one for one in analysis.contrasts if one.declared is declared]
        if chosen:
            headings = (title, "data", "score", "difference", "interval", "p adjusted", "verdict")
            parts.append(show.table(headings, [_row(one) for one in chosen], ""))
    parts += [f"dropped: {arm}: {because}" for arm, because in analysis.dropped.items()]
    parts += [f"failed: {one.id}: {one.error}: {one.message}" for one in analysis.failed]
    return parts


def _row(one: Contrast) -> tuple[object, ...]:
    if one.finding is None:
        return one.name, one.data, one.metric, "–", one.note, "–", one.verdict
    low, high = one.finding.interval
    return one.name, one.data, one.metric, f"{one.finding.effect:+.4g}", f"[{low:+.4g}, {high:+.4g}]", show.figure(one.p_adjusted), one.verdict


# -------------------------------------------------------------------------------------------------------------- compare
def _evaluation(reference: Path) -> Evaluation:
    """The evaluation of a run's adapter, of a cell, or of an evaluation's own folder."""
    for root in (reference, places().runs / reference):
        for inner in ("eval/adapter", "eval/model", "eval", "model", "."):
            if (root / inner / "evaluation.json").is_file():
                return load_evaluation(root / inner)
    raise NotFoundError(
        f"{str(reference)!r} holds no finished evaluation (evaluation.json in it, in eval/ or in eval/adapter/). Make one: crucible eval MODEL --folder FOLDER"
    )


def compare(run_a: Path, run_b: Path, /, *, metric: str | None = None, level: float = 0.95) -> Reply:
    """Say whether run B is better than run A, paired by example.

    Args:
        run_a: a run, a cell of a study, or a folder of `crucible eval`.
        run_b: the same; both must have answered the same examples.
        metric: a score of both; the first of A where none is given.
        level: of the interval.
    """
    before, after = _evaluation(run_a), _evaluation(run_b)
    chosen = metric or next(iter(before.items[0].scores))
    found = compare_evaluations(before, after, chosen, level=level)
    less = chosen == "target_nll"
    gain = (-found.interval[1], -found.interval[0]) if less else found.interval
    verdict = "is better than" if gain[0] > 0 else "is worse than" if gain[1] < 0 else "is not shown to differ from"
    low, high = found.interval
    text = (
        f"{run_b} {verdict} {run_a} in {chosen}: difference {found.effect:+.4g}, {found.level:.0%} interval [{low:+.4g}, {high:+.4g}], "
        f"p = {found.p_value:.3g}, {found.n} examples{f' in {found.clusters} documents' if found.clusters else ''} ({found.test})."
    )
    return Reply({"finding": found, "verdict": verdict, "a": str(run_a), "b": str(run_b)}, text)


# ---------------------------------------------------------------------------------------------------------------- leaks
def leaks(dataset: str, /, *, train: str = "train", test: str = "test", task: str | None = None, n: int = 13, least: float = 0.5) -> Reply:
    """Show test examples whose document or text is also in the training data.

    Args:
        dataset: name or path.
        train: the split that is learned from.
        test: the split that is asked.
        task: where the data set has several.
        n: words in a row that count as shared.
        least: the share of a test example's n-grams that must be shared.
    """
    held = load_dataset(dataset, split=test, task=task)
    found = find_leaks(load_dataset(dataset, split=train, task=task), held, n=n, least=least)
    rows = [(one.test, one.train, f"{one.share:.0%}", one.why) for one in found[:50]]
    text = f"{len(found)} of {len(held)} {test} examples of {dataset} share a document or text with {train}."
    return Reply({"leaks": list(found), "of": len(held)}, Group(text, show.table(("test", "train", "shared", "why"), rows, "")) if rows else text)


def register(app: App) -> None:
    """Adds `run`, `compare` and `leaks`."""
    for command in (run, compare, leaks):
        app.command(command)

"""A study on disk: its plan, a file for each cell, and how they are read back.

    plan.json           what decides the results, and the data's sha256; a run with another plan is refused
    cells/<id>.json     one cell's result or failure; written whole or not at all, and without any time in it
    cells/<id>/         its run (checkpoints, metrics) and its evaluation, row by row
    bases/<id>.json     the same for an untrained base model, evaluated once for all cells that start from it
    leaks.json          test examples that share a document or text with training data
    findings.json       what `analyse` said
    timings.jsonl       seconds and tokens of every attempt; calibration.json what was measured before the start

This file does not know how a cell is run or what its numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from .. import files
from ..config import differing_keys, from_dict, to_dict
from ..data import leaks, load_dataset
from ..display import table_html
from ..errors import ConfigError, CorruptError, NotFoundError, PlanChangedError
from ..evaluation import load_evaluation
from ..records import Dataset, Evaluation, Json, record
from .arms import BASE, Cell
from .design import DataPlan, Experiment

__all__ = ["CellResult", "Failure", "Study", "load_data", "load_study"]

FORMAT = 1
PLAN, FINDINGS, TIMINGS, CALIBRATION, LOCK = "plan.json", "findings.json", "timings.jsonl", "calibration.json", ".lock"
LEAKS, CELLS, BASES = "leaks.json", "cells", "bases"
_SHOWN_LEAKS = 20
Kind = Literal["cell", "base"]


@record
class Failure:
    """Why a cell has no result: the error's class and its sentence."""

    error: str
    message: str


@record
class CellResult:
    """What is on file of one cell, or of an untrained model.

    Attributes:
        base: the id of the untrained model that it started from (its own, where it is one).
        training: losses, steps and tokens; like `evaluation` it is empty without a result.
        dropped: why its arm was dropped before it ran.
    """

    id: str
    arm: str
    seed: int
    data: str
    base: str
    status: Literal["done", "failed", "pending", "dropped"]
    training: Mapping[str, Json]
    evaluation: Evaluation | None = None
    failure: Failure | None = None
    dropped: str = ""


@record
class Study:
    """An experiment with what is known of its cells. `stopped` says that a signal ended it; resume goes on."""

    experiment: Experiment
    folder: Path
    cells: tuple[CellResult, ...]
    bases: Mapping[str, CellResult]
    stopped: bool = False

    def of(self, status: Literal["done", "failed", "pending", "dropped"]) -> tuple[CellResult, ...]:
        """The cells in that state."""
        return tuple(cell for cell in self.cells if cell.status == status)

    @property
    def finished(self) -> bool:
        """Whether every cell has a result, a recorded failure, or a reason for which it was dropped."""
        return not self.of("pending")

    def _repr_html_(self) -> str:
        primary = self.experiment.primary
        rows = []
        for cell in self.cells:
            found = next((e for e in cell.evaluation.estimates if e.name == primary), None) if cell.evaluation else None
            measured = (found.value, found.low, found.high) if found else (None, None, None)
            rows.append((cell.arm, cell.seed, cell.data, cell.status, *measured, cell.failure.message if cell.failure else ""))
        counts = ", ".join(f"{len(self.of(status))} {status}" for status in ("done", "failed", "pending"))
        return table_html(f"Study {self.experiment.name}: {counts}", ("arm", "seed", "data", "status", primary, "low", "high", "failure"), rows)

    def base_of(self, cell: CellResult) -> CellResult:
        """The evaluation of the untrained model that a cell started from."""
        return self.bases[cell.base]


def load_data(plan: DataPlan) -> tuple[Dataset, Dataset, Dataset | None]:
    """(train, test, dev) of a data set."""
    train = load_dataset(plan.name, split=plan.train, task=plan.task, limit=plan.train_limit)
    test = load_dataset(plan.name, split=plan.test, task=plan.task, limit=plan.test_limit)
    return train, test, None if plan.dev is None else load_dataset(plan.name, split=plan.dev, task=plan.task)


def result_path(folder: Path, kind: Kind, identity: str) -> Path:
    """The file that says how a cell or a base ended."""
    return folder / (CELLS if kind == "cell" else BASES) / f"{identity}.json"


def work_folder(folder: Path, kind: Kind, identity: str) -> Path:
    """Where a cell or a base keeps its run and its rows."""
    return folder / (CELLS if kind == "cell" else BASES) / identity


# ----------------------------------------------------------------------------------------------------------------- plan
def full_plan(experiment: Experiment) -> dict[str, Json]:
    """The plan with the data's checksums: what two runs must have in common to be one study.

    Raises:
        DataError, NotFoundError, UnknownNameError: a data set cannot be loaded.
    """
    data: dict[str, Json] = {}
    for plan in experiment.data:
        train, test, dev = load_data(plan)
        data[plan.key] = {"train": train.card.sha256, "test": test.card.sha256, "dev": dev.card.sha256 if dev else None}
    return {"format_version": FORMAT, "experiment": experiment.plan(), "data_sha256": data, "cells": [cell.id for cell in experiment.cells()]}


def note_leaks(experiment: Experiment, folder: Path) -> None:
    """Writes once which test examples share a document or text with training data; the report says so."""
    if (folder / LEAKS).exists():
        return
    shared: dict[str, Json] = {}
    for plan in experiment.data:
        train, test, _ = load_data(plan)
        found = leaks(train, test)
        shared[plan.key] = {"count": len(found), "of": len(test), "first": [to_dict(leak) for leak in found[:_SHOWN_LEAKS]]}
    files.write_json(folder / LEAKS, shared)


def claim(folder: Path, plan: dict[str, Json], *, resume: bool) -> None:
    """Makes the folder this plan's, or says why it is not.

    Raises:
        ConfigError: it holds a study and `resume` was not asked.
        PlanChangedError: it holds a study of another plan.
    """
    path = folder / PLAN
    if not path.exists():
        if (folder / CELLS).exists():
            raise ConfigError(f"{str(folder)!r} has cells but no {PLAN}. Choose another folder.")
        files.write_json(path, plan)
        return
    if not resume:
        raise ConfigError(f"{str(folder)!r} holds a study already. Go on with resume (--resume), or choose another folder.")
    old = files.read_json(path)
    # through JSON, so that tuples and lists, 1 and 1.0 are not taken for a change
    keys = differing_keys(cast("dict[str, Json]", old), plan)
    if keys:
        told = [key for key in keys if key != "cells"] or list(keys)
        raise PlanChangedError(
            f"{str(folder)!r} was begun with another plan: {', '.join(key.removeprefix('experiment.') for key in told)} differ. "
            "Results of two plans are not mixed: restore these keys, or choose another folder."
        )


# -------------------------------------------------------------------------------------------------------------- reading
def load_study(folder: str | Path) -> Study:
    """A study from its folder, also while it is running.

    Raises:
        NotFoundError: there is no study.
        CorruptError: a file of it is damaged; the message names it.
    """
    folder = Path(folder)
    if not (folder / PLAN).exists():
        raise NotFoundError(f"{str(folder)!r} holds no study ({PLAN} is missing). Start one: crucible run experiment.toml --folder {folder}")
    plan = files.read_json(folder / PLAN)
    if not isinstance(plan, dict) or plan.get("format_version") != FORMAT:
        raise CorruptError(f"{str(folder / PLAN)!r} has no format version {FORMAT}. Use the version of Crucible that wrote it.")
    experiment = from_dict(Experiment, cast("dict[str, object]", plan["experiment"]))
    cells = experiment.cells()
    if plan.get("cells") != [cell.id for cell in cells]:
        raise CorruptError(f"{str(folder / PLAN)!r} lists other cells than its experiment has. Use the version of Crucible that wrote it.")
    return Study(
        experiment=experiment,
        folder=folder,
        cells=tuple(_read(folder, "cell", cell.id, cell) for cell in cells),
        bases={cell.base: _read(folder, "base", cell.base, cell) for cell in cells},
    )


def read_result(path: Path) -> dict[str, Json] | None:
    """The result file of a cell or base, None before it has ended.

    Raises:
        CorruptError: it is no result.
    """
    if not path.exists():
        return None
    body = files.read_json(path)
    if not isinstance(body, dict) or body.get("status") not in ("done", "failed", "dropped"):
        raise CorruptError(f"{str(path)!r} is no result of a cell. Delete it and resume to run the cell again.")
    return body


def _read(folder: Path, kind: Kind, identity: str, cell: Cell) -> CellResult:
    path = result_path(folder, kind, identity)
    body = read_result(path)
    arm, seed = (cell.arm, cell.seed) if kind == "cell" else (BASE, 0)
    empty = CellResult(id=identity, arm=arm, seed=seed, data=cell.data, base=cell.base, status="pending", training={})
    if body is None:
        return empty
    if body["status"] == "failed":
        failure = from_dict(Failure, cast("dict[str, object]", body["failure"]))
        return replace(empty, status="failed", failure=failure)
    if body["status"] == "dropped":
        return replace(empty, status="dropped", dropped=str(body.get("because", "")))
    evaluation = load_evaluation(work_folder(folder, kind, identity) / "eval")
    if body.get("scores_sha256") != files.sha256_file(work_folder(folder, kind, identity) / "eval" / "scores.jsonl"):
        raise CorruptError(f"{str(path)!r} was written for other scores. Delete it and resume to run the cell again.")
    training = cast("dict[str, Json]", body.get("training") or {})
    return replace(empty, status="done", training=training, evaluation=evaluation)

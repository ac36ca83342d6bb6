"""What a study will cost, from a few measured steps and answers of each arm, and what it has cost so far.

Seconds and tokens are extrapolated in a straight line; they hold for the machine and the number of threads on which they were measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from .. import files
from ..config import fingerprint, to_dict
from ..errors import ExperimentError
from ..records import Json, record
from .arms import Cell
from .design import Budget, Experiment
from .study import CALIBRATION, TIMINGS, full_plan
from .work import Engines, Job, Watch, job_for, perform

__all__ = ["CellCost", "Cost", "Usage", "calibrated", "estimate", "usage"]


@record
class CellCost:
    """What one cell will take. `train_s` and `tokens` of a base are those of its evaluation alone; an ensemble takes next to nothing."""

    id: str
    train_s: float
    eval_s: float
    tokens: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.train_s + self.eval_s


@record
class Cost:
    """What a whole study will take. `seconds` are those of all workers together, `wall_s` with that many jobs side by side."""

    cells: tuple[CellCost, ...]
    bases: tuple[CellCost, ...]
    seconds: float
    wall_s: float
    tokens: float
    money: float
    measured_s: float

    def of(self, identity: str) -> CellCost | None:
        """The cost of one cell or base."""
        return next((one for one in (*self.cells, *self.bases) if one.id == identity), None)


@record
class Usage:
    """What a study has used so far."""

    seconds: float = 0.0
    tokens: int = 0

    def plus(self, seconds: float, tokens: float) -> Usage:
        """With that much more."""
        return Usage(seconds=self.seconds + seconds, tokens=self.tokens + round(tokens))

    def over(self, budget: Budget) -> str:
        """Which limit this passes, in words; "" where none."""
        money = budget.cost(self.seconds, self.tokens)
        if budget.hours is not None and self.seconds > budget.hours * 3600:
            return f"{self.seconds / 3600:.3g} of {budget.hours:g} hours"
        if budget.tokens is not None and self.tokens > budget.tokens:
            return f"{self.tokens:,} of {budget.tokens:,} tokens"
        if budget.money is not None and money > budget.money:
            return f"{money:.4g} of {budget.money:g} (money)"
        return ""


def usage(folder: Path) -> Usage:
    """What the attempts that ended in this folder have used; one whose runner was killed is not in it."""
    rows = files.read_lines(folder / TIMINGS)
    total = Usage()
    for row in rows:
        number = {key: float(cast("float", row.get(key) or 0)) for key in ("train_s", "eval_s", "train_tokens", "asked_tokens")}
        total = total.plus(number["train_s"] + number["eval_s"], number["train_tokens"] + number["asked_tokens"])
    return total


def _kind(cell: Cell) -> str:
    """What decides how long a step takes: cells that differ in nothing else are measured once."""
    config = cast("dict[str, Json]", to_dict(cell.config))
    lora = cast("dict[str, Json]", config["lora"])
    idle = ("adam", "schedule", "warmup_steps", "final_lr_ratio", "seed", "keep", "checkpoint_interval", "eval_interval", "patience", "lora")
    plain = {key: value for key, value in config.items() if key not in idle}
    return fingerprint({**plain, "rank": lora["rank"], "modules": lora["target_modules"], "data": cell.data, "backend": cell.backend})


def _measure(job: Job, engines: Engines) -> Json:
    try:
        return perform(job, engines, Watch(lambda _: None, lambda: False))
    except Exception as error:  # the study will record it as a failure; the estimate goes on without it
        return {"error": f"{type(error).__name__}: {error}"}


def _measured(experiment: Experiment) -> dict[str, Json]:
    """ "arm|data" → what a step and an answer take; an arm that fails says why."""
    engines = Engines()
    found: dict[str, Json] = {}
    alike: dict[str, Json] = {}
    try:
        for cell in experiment.cells():
            key = f"{cell.arm}|{cell.data}"
            if key not in found and not cell.members:
                kind = _kind(cell)
                if kind not in alike:
                    alike[kind] = _measure(job_for(experiment, cell, Path(), "calibrate"), engines)
                found[key] = alike[kind]
    finally:
        engines.close()
    return found


def _number(values: Mapping[str, Json], key: str) -> float:
    return float(cast("float", values.get(key, 0.0)))


def _cell_cost(cell: Cell, identity: str, measured: Mapping[str, Json], *, base: bool) -> CellCost:
    one = cast("dict[str, Json]", measured.get(f"{cell.arm}|{cell.data}") or {})
    asked = _number(one, "items") * _number(one, "tokens_per_item")
    trained = 0.0 if base else _number(one, "steps")
    eval_s = _number(one, "items") * _number(one, "item_s")
    return CellCost(id=identity, train_s=trained * _number(one, "step_s"), eval_s=eval_s, tokens=trained * _number(one, "tokens_per_step") + asked)


def _total(experiment: Experiment, body: Mapping[str, Json], jobs: int) -> Cost:
    measured = cast("dict[str, Json]", body["measured"])
    cells = experiment.cells()
    costs = tuple(_cell_cost(cell, cell.id, measured, base=False) for cell in cells)
    bases = tuple(_cell_cost(cell, name, measured, base=True) for name, cell in {cell.base: cell for cell in cells}.items())
    seconds, tokens = sum(one.seconds for one in (*costs, *bases)), sum(one.tokens for one in (*costs, *bases))
    if not seconds:
        errors = [str(cast("dict[str, Json]", one).get("error", "nothing was measured")) for one in measured.values()]
        raise ExperimentError(f"No arm could be measured; the first said: {errors[0]} Mend the experiment first.")
    longest = max(one.seconds for one in (*costs, *bases))
    return Cost(
        cells=costs, bases=bases, seconds=seconds, wall_s=max(longest, seconds / max(1, jobs)), tokens=tokens,
        money=experiment.budget.cost(seconds, tokens), measured_s=_number(body, "measured_s"),
    )  # fmt: skip


def estimate(experiment: Experiment, *, jobs: int = 1) -> Cost:
    """Measures every arm on every data set for a few steps in this process and extrapolates. Writes nothing.

    Raises:
        DataError, NotFoundError, UnknownNameError: a data set cannot be loaded.
        ExperimentError: no arm could be measured.
    """
    full_plan(experiment)
    started = time.monotonic()
    measured = _measured(experiment)
    return _total(experiment, {"measured": measured, "measured_s": time.monotonic() - started}, jobs)


def calibrated(experiment: Experiment, folder: Path, jobs: int) -> Cost:
    """`estimate`, kept in the study's calibration.json and taken from there where it is."""
    path = folder / CALIBRATION
    if not path.exists():
        started = time.monotonic()
        measured = _measured(experiment)
        files.write_json(path, {"measured": measured, "measured_s": time.monotonic() - started})
    return _total(experiment, cast("dict[str, Json]", files.read_json(path)), jobs)

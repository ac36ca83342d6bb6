"""Looking for good settings with Optuna's ask and tell: each trial is a small study of its own folder, judged by its loss on held-out data.

A search chooses and proves nothing: its best value is the best of many. Declare the winner as a condition of a new study, with other seeds and the
test split, and test it there. Optuna is imported when a search begins. Source: Akiba et al. 2019, arXiv 1907.10902; Bergstra et al. 2011 (TPE).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Protocol, cast

from .. import events, files
from ..config import to_dict
from ..errors import ConfigError, ExperimentError
from ..records import Json, record
from .design import Experiment
from .runner import run
from .study import PLAN, Study

__all__ = ["Found", "Range", "Trial", "search"]

RESULTS = "search.json"


@record
class Range:
    """Numbers from `low` to `high`; `log` draws evenly over their logarithms, `whole` draws whole numbers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high and (self.low > 0 or not self.log)):
            raise ConfigError(f"The range is {self.low!r} to {self.high!r}; expected rising finite numbers, above 0 where log is True.")


@record
class Trial:
    """One trial: its settings and its loss on held-out data; None where no cell of it ended well."""

    number: int
    settings: Mapping[str, Json]
    loss: float | None


@record
class Found:
    """What a search found. `best` is the trial with the lowest loss on held-out data; its loss is too good, being the best of many."""

    best: Trial
    trials: tuple[Trial, ...]
    folder: Path


class _Asked(Protocol):
    @property
    def params(self) -> Mapping[str, Json]: ...


class _Study(Protocol):
    """What is used of Optuna's study; the package need not be installed."""

    def ask(self, fixed_distributions: Mapping[str, object]) -> _Asked: ...
    def tell(self, trial: _Asked, values: float | None = None, *, state: object = None) -> object: ...


def _optuna(part: str = "") -> ModuleType:
    try:
        return importlib.import_module(f"optuna{part}")
    except ImportError as error:
        raise ConfigError("A search needs Optuna. Install it: pip install 'crucible-framework[search]'.") from error


def search(
    experiment: Experiment,
    space: Mapping[str, Range | tuple[Json, ...]],
    folder: str | Path,
    *,
    trials: int = 20,
    seed: int = 0,
    jobs: int = 1,
    sampler: object | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Found:
    """Asks for settings, trains them with the experiment's seeds, and tells the mean of their best losses on held-out data.

    The same arguments on the same folder go on where a search was killed: trials that have ended are not run again.

    Args:
        experiment: seeds, data (with `dev`) and everything that stays the same; it has no matrix, conditions or hypotheses.
        space: dotted keys of `TrainConfig` → a range, or values to choose from.
        trials: in all.
        seed: of Optuna's TPE sampler.
        jobs: worker processes of one trial; 0 runs it in this process.
        sampler: another Optuna sampler; a search is only repeatable where the sampler is seeded.
        progress: called with (trials ended, in all, what happened).

    Raises:
        ConfigError: Optuna is missing, an empty space, no held-out data, or a setting that does not exist.
        ExperimentError: no trial ended well.

    Emits:
        `experiment.searched` with trials, best and loss, and the events of every trial.
    """
    if not space or trials < 1:
        raise ConfigError(f"A search over {len(space)} settings in {trials} trials; expected at least one of each.")
    _check(experiment)
    optuna, folder = _optuna(), Path(folder)
    names = {key: _distribution(kind) for key, kind in space.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = cast("_Study", optuna.create_study(direction="minimize", sampler=sampler or optuna.samplers.TPESampler(seed=seed)))
    found: list[Trial] = []
    for number in range(trials):
        asked = study.ask(names)
        settings = dict(asked.params)
        one = dataclasses.replace(experiment, name=f"{experiment.name}, trial {number}", conditions={f"trial{number}": settings})
        where = folder / f"trial-{number:04d}"
        ended = run(one, where, jobs=jobs, resume=(where / PLAN).exists())
        if ended.stopped:
            said = f"A signal ended the search in trial {number} of {trials}; {number} are kept."
            raise ExperimentError(f"{said} Call it again with the same arguments to go on.")
        loss = _loss(ended)
        study.tell(asked, loss) if loss is not None else study.tell(asked, state=_optuna(".trial").TrialState.FAIL)
        found.append(Trial(number=number, settings=settings, loss=loss))
        files.write_json(folder / RESULTS, {"trials": [to_dict(trial) for trial in found]})
        if progress is not None:
            progress(number + 1, trials, f"trial {number}: {loss if loss is None else f'{loss:.4g}'} with {settings}")
    well = [trial for trial in found if trial.loss is not None]
    if not well:
        raise ExperimentError(f"None of {trials} trials ended well; see {str(folder / 'trial-0000')!r}. Mend the experiment first.")
    best = min(well, key=lambda trial: (cast("float", trial.loss), trial.number))
    events.emit("experiment.searched", experiment=experiment.name, trials=trials, best=best.number, loss=best.loss)
    return Found(best=best, trials=tuple(found), folder=folder)


def _check(experiment: Experiment) -> None:
    """Raises ConfigError where an experiment cannot be searched."""
    if experiment.matrix or experiment.conditions or experiment.hypotheses or experiment.stopping:
        raise ConfigError("A search takes an experiment without matrix, conditions, hypotheses and stopping.")
    if any(plan.dev is None for plan in experiment.data) or not experiment.train.eval_interval:
        raise ConfigError("A search chooses by the loss on held-out data; expected data.dev and train.eval_interval to be set.")


def _distribution(kind: Range | tuple[Json, ...]) -> object:
    made = _optuna(".distributions")
    if not isinstance(kind, Range):
        return made.CategoricalDistribution(tuple(kind))
    if kind.whole:
        return made.IntDistribution(round(kind.low), round(kind.high), log=kind.log)
    return made.FloatDistribution(kind.low, kind.high, log=kind.log)


def _loss(study: Study) -> float | None:
    losses = [cell.training.get("best_dev_loss") for cell in study.of("done")]
    known = [float(cast("float", loss)) for loss in losses if loss is not None]
    return fmean(known) if len(known) == len(study.cells) and all(map(math.isfinite, known)) else None

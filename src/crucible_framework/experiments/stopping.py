"""Dropping arms before all their seeds have run, so that what is said in the end still holds.

- "hopeless": after each seed from the third on, an arm that is shown to be worse than another one is dropped. Looks are planned (one a seed), so
  their levels come from an error-spending function and are divided by the number of pairs: the chance that any arm is dropped for a worse one is
  at most α. Few seeds tell little of how much seeds vary, so a drop is tested with the least degrees of freedom, seeds - 1, which hold the level
  however much they do; two seeds could then show nothing, and no α is spent on them. Comparisons in the analysis have the level of the look at
  which they ended (repeated intervals).
- "halving": after the first seeds the arms with the lowest loss on held-out data go on. These seeds choose and are in no test; the tests use the
  other seeds and the test split, which the choice has not seen.

An ensemble takes no part in the choice, and goes with the first of its members that is dropped.

Every decision follows from results on file alone, so that a study that was killed decides the same again. This file runs no cell.

Source: Lan & DeMets 1983; Jennison & Turnbull 2000 (repeated intervals); Mickey & Brown 1966 (least degrees of freedom);
Jamieson & Talwalkar 2016, arXiv 1502.07943 (successive halving).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Literal, cast

from .. import files
from ..errors import StatisticsError
from ..stats import group_sequential
from .arms import less_is_better
from .design import FIRST_LOOK as FIRST
from .design import Experiment
from .pairs import Scores, paired_up, tested
from .study import CellResult, Study, result_path

__all__ = ["alpha_at", "decide", "drop", "kept_seeds", "rungs"]


def rungs(experiment: Experiment) -> tuple[tuple[int, ...], ...]:
    """The seeds between which arms may be dropped: all at once where nothing stops early."""
    rule, seeds = experiment.stopping, experiment.seeds
    if rule is None:
        return (seeds,)
    if rule.rule == "halving":
        return seeds[: rule.selection], seeds[rule.selection :]
    return (seeds[:FIRST], *((seed,) for seed in seeds[FIRST:]))


def kept_seeds(experiment: Experiment) -> tuple[int, ...]:
    """The seeds that tests may use: not those that chose."""
    rule = experiment.stopping
    return experiment.seeds[rule.selection :] if rule is not None and rule.rule == "halving" else experiment.seeds


def alpha_at(experiment: Experiment, seeds: int) -> float:
    """The level of a comparison that ends with so many seeds; α itself where nothing is looked at early."""
    rule, planned = experiment.stopping, len(experiment.seeds)
    if rule is None or rule.rule != "hopeless" or planned <= FIRST:
        return experiment.alpha
    return _levels(planned, experiment.alpha, rule.spending)[max(0, min(seeds, planned) - FIRST)]


@functools.lru_cache(maxsize=64)
def _levels(planned: int, alpha: float, spending: Literal["obrien-fleming", "pocock", "linear"]) -> tuple[float, ...]:
    """The level of each look."""
    return tuple(group_sequential([look / planned for look in range(FIRST, planned + 1)], alpha=alpha, spending=spending).nominal)


def decide(study: Study, seeds_done: int) -> dict[str, str]:
    """Arm → why it is dropped after so many seeds."""
    rule = study.experiment.stopping
    if rule is None or seeds_done >= len(study.experiment.seeds):
        return {}
    active = [arm.name for arm in study.experiment.trained() if _complete(study, arm.name, seeds_done)]
    return _halved(study, active, seeds_done) if rule.rule == "halving" else _hopeless(study, active, seeds_done)


def _of(study: Study, arm: str, seeds_done: int) -> list[CellResult]:
    seeds = study.experiment.seeds[:seeds_done]
    return [cell for cell in study.cells if cell.arm == arm and cell.seed in seeds]


def _complete(study: Study, arm: str, seeds_done: int) -> bool:
    return all(cell.status == "done" for cell in _of(study, arm, seeds_done))


def _halved(study: Study, active: list[str], seeds_done: int) -> dict[str, str]:
    rule = study.experiment.stopping
    assert rule is not None
    losses: dict[str, float] = {}
    for arm in active:
        found = [cell.training.get("best_dev_loss") for cell in _of(study, arm, seeds_done)]
        losses[arm] = fmean(float(cast("float", loss)) for loss in found) if None not in found else math.inf
    order = sorted(active, key=lambda arm: (losses[arm], active.index(arm)))
    kept = max(1, math.ceil(rule.keep * len(order)))
    told = f"of {len(order)} arms the {kept} with the lowest loss on held-out data after {seeds_done} seed(s) went on"
    return {arm: f"{told}; this one had {losses[arm]:.4g}, the last of them {losses[order[kept - 1]]:.4g}" for arm in order[kept:]}


def _hopeless(study: Study, active: list[str], seeds_done: int) -> dict[str, str]:
    experiment, scores = study.experiment, Scores(study)
    metric, alpha = experiment.primary, alpha_at(experiment, seeds_done)
    pairs = math.comb(len(experiment.trained()), 2)
    sign, found = -1.0 if less_is_better(metric) else 1.0, dict[str, str]()
    for a, b in itertools.combinations(active, 2):
        effects, p_values = [], []
        for plan in experiment.data:
            paired = paired_up(scores, ((b, a),), plan.key, metric, experiment.seeds[:seeds_done])
            try:
                finding, _ = tested(f"{b} − {a}", paired, metric, 1 - alpha / pairs, freedom="least")
            except StatisticsError:
                break
            effects.append(sign * finding.effect)
            p_values.append(finding.p_value)
        if len(effects) < len(experiment.data) or max(p_values) >= alpha / pairs or min(map(abs, effects)) == 0:
            continue
        if max(effects) < 0 or min(effects) > 0:  # worse on every data set, each at the level: no correction over data sets is needed
            worse, better = (b, a) if max(effects) < 0 else (a, b)
            limit = f"{alpha / pairs:.3g} ({pairs} pairs, look at {seeds_done} of {len(experiment.seeds)} seeds)"
            found.setdefault(worse, f"shown to be worse than {better} in {metric}: p = {max(p_values):.3g}, below {limit}")
    return found


def drop(study: Study, decided: Mapping[str, str]) -> int:
    """Writes why each cell that will not run was dropped; gives their number."""
    because = dict(decided)
    for arm in study.experiment.arms():
        if gone := next((name for name in arm.members if name in decided), ""):
            because[arm.name] = f"its member {gone} was dropped: {decided[gone]}"
    dropped = [cell for cell in study.of("pending") if cell.arm in because]
    for cell in dropped:
        body = {
            "format_version": 1, "id": cell.id, "arm": cell.arm, "seed": cell.seed, "data": cell.data, "status": "dropped", "because": because[cell.arm],
        }  # fmt: skip
        files.write_json(result_path(study.folder, "cell", cell.id), body)
    return len(dropped)

"""Dropping hopeless arms: over all looks and all pairs, an arm is dropped for one that is no better in at most α of all studies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.experiments.test_analysis import evaluation, made, study_of

from crucible_framework.experiments import Experiment, Stopping, Study
from crucible_framework.experiments.stopping import decide

ALPHA, SEEDS, ITEMS = 0.1, 5, 36


def planned(spending: str) -> Experiment:
    return made(matrix={"lora.rank": (2, 4, 8)}, seeds=tuple(range(SEEDS)), hypotheses=(), alpha=ALPHA, stopping=Stopping(spending=spending))  # type: ignore[arg-type]


@pytest.fixture
def template(tmp_path: Path) -> Callable[[str], Study]:
    """A study of three arms with that spending of α, for scores to be filled in."""
    return lambda spending: study_of(planned(spending), tmp_path, lambda arm, seed, n: [0.0] * n, n=ITEMS, per_document=2)


def dropped(study: Study, random: np.random.Generator, shift: dict[str, float], *, binary: bool, seed_sd: float) -> dict[str, int]:
    """Arm → after how many seeds it was dropped, in one study whose arms differ by `shift`; a dropped arm is not looked at again."""
    common = random.normal(0.0, 0.2, ITEMS)
    cells = []
    for cell in study.cells:
        values = 0.5 + common + shift.get(cell.arm, 0.0) + random.normal(0, seed_sd) + random.normal(0, 0.1, ITEMS)
        values = (random.random(ITEMS) < np.clip(values, 0, 1)).astype(float) if binary else values
        cells.append(replace(cell, evaluation=evaluation(values.tolist(), 2, study.experiment.primary)))
    study, found = replace(study, cells=tuple(cells)), dict[str, int]()
    for seeds_done in range(3, SEEDS):
        for arm in decide(study, seeds_done):
            found[arm] = seeds_done
        study = _without(study, found)
    return found


def _without(study: Study, gone: dict[str, int]) -> Study:
    cells = (replace(one, status="dropped", evaluation=None) if one.arm in gone and one.seed >= gone[one.arm] else one for one in study.cells)
    return replace(study, cells=tuple(cells))


@pytest.mark.parametrize(
    ("spending", "binary", "seed_sd"), [("pocock", False, 0.0), ("pocock", False, 0.05), ("obrien-fleming", False, 0.2), ("linear", True, 0.0)]
)
def test_equal_arms_lose_one_in_no_more_than_alpha_of_studies(spending: str, binary: bool, seed_sd: float, template: Callable[[str], Study]) -> None:
    """The worst case: all arms are equally good, so each that is dropped is dropped in error. Of 200 studies at α = 0.1, more than 33 have a
    chance of 0.1 %."""
    random, study = np.random.default_rng(11), template(spending)
    wrong = sum(bool(dropped(study, random, {}, binary=binary, seed_sd=seed_sd)) for _ in range(200))
    assert wrong <= 33


def test_the_best_arm_stays_and_a_hopeless_one_goes(template: Callable[[str], Study]) -> None:
    """The best arm leads by little, the last one is far behind. The best is dropped in less than α; the last in most studies, and early."""
    random, study = np.random.default_rng(12), template("pocock")
    shift = {"lora.rank=8": 0.02, "lora.rank=2": -0.3}
    found = [dropped(study, random, shift, binary=False, seed_sd=0.02) for _ in range(100)]
    assert sum("lora.rank=8" in one for one in found) <= 19, "more than 19 of 100 at 10 % has a chance of 0.2 %"
    assert sum("lora.rank=2" in one for one in found) >= 80
    assert sum(one.get("lora.rank=2") == 3 for one in found) >= 20, "a rule that never acts would hold any level"

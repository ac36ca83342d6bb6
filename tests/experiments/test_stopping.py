"""Arms that are dropped early, cells that train together: what is decided follows from the files, and what is said still holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.experiments.conftest import TRAIN, result_bytes, small

from crucible_framework.errors import ConfigError
from crucible_framework.experiments import DataPlan, Experiment, Stopping, analyse, load_study, run
from crucible_framework.experiments.stopping import alpha_at, kept_seeds
from crucible_framework.stats import group_sequential

RATES = {"adam.lr": (1e-5, 5e-2)}


def hopeless(**changes: object) -> Experiment:
    return small(matrix=RATES, seeds=(0, 1, 2, 3), hypotheses=(), stopping=Stopping(), data=(DataPlan(train_limit=24, test_limit=72),), **changes)


def test_a_hopeless_arm_is_dropped_and_the_rest_runs_on(tmp_path: Path) -> None:
    told: list[str] = []
    study = run(hopeless(), tmp_path / "a", jobs=0, progress=lambda done, total, note: told.append(f"{done}/{total} {note}"))
    assert study.finished
    assert {(cell.arm, cell.seed) for cell in study.of("dropped")} == {("adam.lr=1e-05", 3)}
    assert any("dropped adam.lr=1e-05: shown to be worse than adam.lr=0.05" in line for line in told)
    assert told[-1].startswith("9/9")
    found = analyse(study)
    assert set(found.dropped) == {"adam.lr=1e-05"}
    contrast = found["adam.lr=0.05 − adam.lr=1e-05"]
    assert contrast.seeds == (0, 1, 2)
    assert contrast.verdict == "better"
    bounds = group_sequential([0.75, 1.0], spending="pocock")
    assert contrast.finding is not None
    assert contrast.finding.level == pytest.approx(1 - bounds.nominal[0])
    assert alpha_at(hopeless(), 4) == pytest.approx(bounds.nominal[1])
    assert "group-sequential looks" in found.methods
    # from the files alone: a study that lost what it had decided decides the same again
    before = result_bytes(tmp_path / "a")
    for cell in study.of("dropped"):
        (tmp_path / "a" / "cells" / f"{cell.id}.json").unlink()
    assert not load_study(tmp_path / "a").finished
    analyse(run(hopeless(), tmp_path / "a", jobs=0, resume=True))
    assert result_bytes(tmp_path / "a") == before


def test_halving_chooses_on_held_out_data_by_seeds_that_test_nothing(tmp_path: Path) -> None:
    plan = small(
        matrix=RATES, seeds=(0, 1, 2), hypotheses=(), stopping=Stopping(rule="halving"), train=dataclasses.replace(TRAIN, eval_interval=3),
        data=(DataPlan(train_limit=24, test_limit=18, dev="dev"),),
    )  # fmt: skip
    assert kept_seeds(plan) == (1, 2)
    study = run(plan, tmp_path, jobs=0)
    assert {cell.arm for cell in study.of("dropped")} == {"adam.lr=1e-05"}
    found = analyse(study)
    assert found["adam.lr=0.05 − base"].seeds == (1, 2)
    lost = found["adam.lr=1e-05 − base"]
    assert (lost.finding, lost.verdict) == (None, "no result")
    assert "dropped before" in lost.note


def test_a_rule_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4 seeds and 2 arms"):
        small(matrix=RATES, seeds=(0, 1, 2), hypotheses=(), stopping=Stopping())
    with pytest.raises(ConfigError, match=r"data\.dev"):
        small(matrix=RATES, seeds=(0, 1), hypotheses=(), stopping=Stopping(rule="halving"))
    with pytest.raises(ConfigError, match="keep"):
        Stopping(keep=1.0)
    with pytest.raises(ConfigError, match="together"):
        run(small(), "nowhere", jobs=0, together=2)


def test_cells_that_train_together_give_the_same_study(experiment: Experiment, tmp_path: Path) -> None:
    analyse(run(experiment, tmp_path / "together", jobs=1, together=3))
    analyse(run(experiment, tmp_path / "alone", jobs=0))
    assert result_bytes(tmp_path / "together") == result_bytes(tmp_path / "alone")

"""Searching settings: the best by held-out loss, the same again, going on after an end, and what it needs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from tests.experiments.conftest import TRAIN, small

from crucible_framework import events
from crucible_framework.errors import ConfigError
from crucible_framework.experiments import DataPlan, Experiment, Range, search

SPACE: dict[str, Range | tuple[object, ...]] = {"adam.lr": Range(low=1e-5, high=1e-1, log=True), "lora.rank": (2, 8)}


def plain(**changes: object) -> Experiment:
    kept: dict[str, object] = {
        "matrix": {}, "hypotheses": (), "seeds": (0,), "perplexity": False, "primary": "label_accuracy",
        "train": dataclasses.replace(TRAIN, eval_interval=3), "data": (DataPlan(train_limit=24, test_limit=4, dev="dev"),),
    }  # fmt: skip
    return small(**{**kept, **changes})


def test_a_search_finds_the_lowest_held_out_loss_and_goes_on_after_an_end(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    told: list[tuple[int, int]] = []
    with events.collect() as seen:
        half = search(plain(), SPACE, tmp_path, trials=3, jobs=0, progress=lambda done, total, _: told.append((done, total)))  # type: ignore[arg-type]
    assert [event["trials"] for event in seen if event["name"] == "experiment.searched"] == [3]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trial-*/cells/*.json")}
    whole = search(plain(), SPACE, tmp_path, trials=5, jobs=0)  # type: ignore[arg-type]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert whole.trials[:3] == half.trials
    assert {path: path.stat().st_mtime_ns for path in times} == times, "trials that have ended are not run again"
    losses = [trial.loss for trial in whole.trials]
    assert None not in losses
    assert whole.best.loss == min(loss for loss in losses if loss is not None)
    assert set(whole.best.settings) == set(SPACE)
    assert (tmp_path / "search.json").is_file()


def test_what_a_search_needs_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dev"):
        search(plain(data=(DataPlan(),)), SPACE, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="without matrix"):
        search(small(), SPACE, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="above 0 where log"):
        Range(low=0.0, high=1.0, log=True)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"crucible-framework\[search\]"):
        search(plain(), SPACE, tmp_path)  # type: ignore[arg-type]

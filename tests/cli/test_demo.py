"""The demo, quickly: everything that it promises is there, and a second call repeats nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from crucible_framework.demo import run_demo
from crucible_framework.errors import ConfigError
from crucible_framework.files import read_json, read_lines
from crucible_framework.store import Models


def test_the_quick_demo_does_the_whole_way_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    stages: list[str] = []
    done = run_demo(quick=True, folder=folder, progress=lambda stage, done, total: stages.append(stage))
    assert done.training.final_loss < done.training.initial_loss
    assert [item.id for item in done.base.items] == [item.id for item in done.adapter.items]
    assert done.finding.clusters == 6
    assert done.better == (min(done.finding.interval[0], done.fair.interval[0]) > 0)
    assert {path.name for path in folder.iterdir()} >= {
        "run.json",
        "config.json",
        "metrics.jsonl",
        "eval",
        "findings.json",
        "samples.json",
        "report.html",
        "report.md",
    }
    samples = read_json(folder / "samples.json")
    assert isinstance(samples, dict)
    assert isinstance(samples["samples"], list)
    assert len({sample["document"] for sample in samples["samples"] if isinstance(sample, dict)}) == 6
    assert [version.name for version in Models(tmp_path / "runs/models").list()] == ["demo"]
    assert set(stages) == {"base", "base by likelihood", "adapter"}
    assert {item.completion for item in done.preferred.items} <= {"SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO"}
    rows = {
        name: (folder / name).read_bytes()
        for name in ("metrics.jsonl", "eval/base/scores.jsonl", "eval/base by likelihood/scores.jsonl", "eval/adapter/scores.jsonl")
    }
    again = run_demo(quick=True, folder=folder)
    assert dataclasses.replace(again.finding) == done.finding
    assert {name: (folder / name).read_bytes() for name in rows} == rows
    assert len(Models(tmp_path / "runs/models").list()) == 1
    assert len(read_lines(folder / "eval/base/scores.jsonl")) == 54


def test_a_folder_of_another_run_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"base_model": "other"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="another run"):
        run_demo(quick=True, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

"""Running: every cell once, failures as values, refusals, budgets and signals; all of it leaves a study to resume."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.experiments.conftest import TRAIN, result_bytes, small

from crucible_framework import files
from crucible_framework.backends import Connection, backends, connect
from crucible_framework.errors import BudgetExceeded, ConfigError, CorruptError, LockedError, NotFoundError, PlanChangedError, ServiceError
from crucible_framework.events import collect
from crucible_framework.experiments import Budget, DataPlan, Experiment, Hypothesis, analyse, estimate, load_study, run, worker

Make = Callable[..., Experiment]


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]


def test_every_cell_is_run_once_and_a_second_call_runs_nothing(experiment: Experiment, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with collect() as events:
        study = run(experiment, tmp_path, jobs=0, progress=lambda done, total, _: told.append((done, total)))
    assert study.finished
    assert not study.stopped
    assert told[-1] == (5, 5), "four cells and one base for all of them"
    names = [one["name"] for one in events if str(one["name"]).startswith("experiment.")]
    assert names == ["experiment.started", *["experiment.cell"] * 5, "experiment.done", "experiment.run"]
    for cell in study.cells:
        assert cell.status == "done"
        assert cell.evaluation is not None
        assert {"label_accuracy", "target_nll"} <= set(cell.evaluation.items[0].scores)
        assert cell.training["steps"] == 6
        final, initial = cell.training["final_loss"], cell.training["initial_loss"]
        assert isinstance(final, float)
        assert isinstance(initial, float)
        assert final < initial
    assert len({cell.training["final_loss"] for cell in study.cells}) == 4, "ranks and seeds differ"
    before, times = result_bytes(tmp_path), rows(tmp_path)
    assert run(experiment, tmp_path, jobs=0, resume=True).finished
    assert (result_bytes(tmp_path), rows(tmp_path)) == (before, times)
    assert load_study(tmp_path).cells == study.cells


def test_results_hold_no_time_and_two_runs_are_the_same_bytes(experiment: Experiment, tmp_path: Path) -> None:
    for name in ("a", "b"):
        analyse(run(experiment, tmp_path / name, jobs=0))
    assert result_bytes(tmp_path / "a") == result_bytes(tmp_path / "b")
    assert len(result_bytes(tmp_path / "a")) > 30


def test_a_changed_plan_is_refused_and_names_the_keys(made: Make, tmp_path: Path) -> None:
    run(made(), tmp_path, jobs=0)
    with pytest.raises(ConfigError, match="holds a study already"):
        run(made(), tmp_path, jobs=0)
    with pytest.raises(PlanChangedError, match=r"train\.max_steps differ"):
        run(made(train=dataclasses.replace(TRAIN, max_steps=7)), tmp_path, jobs=0, resume=True)
    with pytest.raises(PlanChangedError, match="hypotheses"):
        run(made(hypotheses=(Hypothesis(better="lora.rank=2", than="lora.rank=8"),)), tmp_path, jobs=0, resume=True)
    before = result_bytes(tmp_path)
    assert run(made(budget=Budget(hours=9), retries=4), tmp_path, jobs=0, resume=True).finished, "limits may change"
    assert result_bytes(tmp_path) == before


def test_changed_data_are_a_changed_plan(tmp_path: Path) -> None:
    table = tmp_path / "own.jsonl"
    lines = [{"prompt": f"Question {i}?", "completion": "yes" if i % 2 else "no", "split": "train" if i < 12 else "test"} for i in range(24)]
    table.write_text("\n".join(map(json.dumps, lines)))
    own = small(data=(DataPlan(name=str(table), label="own"),), scorers=("exact_match",), primary="exact_match", perplexity=False, hypotheses=(), seeds=(0,))
    assert run(own, tmp_path / "study", jobs=0).finished
    table.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "More?", "completion": "no", "split": "test"}])))
    with pytest.raises(PlanChangedError, match=r"data_sha256\.own\.test"):
        run(own, tmp_path / "study", jobs=0, resume=True)


def test_a_failed_cell_is_a_value_and_is_tried_again_when_asked(made: Make, tmp_path: Path) -> None:
    wrong = made(matrix={"lora.target_modules": (("q_proj",), ("no_proj",))}, hypotheses=())
    study = run(wrong, tmp_path, jobs=0)
    assert [cell.status for cell in study.cells] == ["done", "failed", "done", "failed"]
    failure = study.of("failed")[0].failure
    assert failure is not None
    assert "no_proj" in failure.message
    assert str(tmp_path) not in failure.message
    assert len(rows(tmp_path)) == 5, "what the settings cause is not tried twice"
    assert run(wrong, tmp_path, jobs=0, resume=True).of("failed")
    assert len(rows(tmp_path)) == 5
    assert len(run(wrong, tmp_path, jobs=0, resume=True, retry_failed=True).of("failed")) == 2
    assert len(rows(tmp_path)) == 7
    analysis = analyse(study)
    assert {one.id for one in analysis.failed} == {cell.id for cell in study.of("failed")}


@pytest.mark.parametrize(("retries", "ended"), [(0, "failed"), (2, "done")])
def test_failures_that_can_pass_are_retried(retries: int, ended: str, made: Make, tmp_path: Path) -> None:
    broken: list[int] = []

    def flaky() -> Connection:
        engine = connect("fake")
        real = engine.train

        def train(*args: object) -> object:
            if len(broken) < 2:
                broken.append(1)
                raise ServiceError("the service is away", status=503, retryable=True)
            return real(*args)  # type: ignore[arg-type]

        engine.train = train  # type: ignore[method-assign, assignment]
        return engine

    name = f"flaky-{retries}-{tmp_path.name}"
    backends.add(name, flaky)
    study = run(made(backend=name, retries=retries, seeds=(0,), matrix={}, hypotheses=()), tmp_path, jobs=0)
    assert [cell.status for cell in study.cells] == [ended]


def test_a_budget_of_tokens_keeps_finished_cells_and_more_goes_on(made: Make, tmp_path: Path) -> None:
    whole = estimate(made())
    assert whole.tokens > 0
    assert whole.of(made().cells()[0].id) is not None
    assert whole.wall_s <= whole.seconds
    with collect() as events:
        estimate(made(matrix={"adam.lr": (1e-3, 1e-4)}, hypotheses=()))
    assert sum(one["name"] == "training.run" for one in events) == 1, "arms that take the same time are measured once"
    told: list[str] = []
    with pytest.raises(BudgetExceeded, match=r"\d of 4 cells are finished and kept"):
        run(made(budget=Budget(tokens=int(whole.tokens * 0.6))), tmp_path, jobs=0, progress=lambda done, total, note: told.append(note))
    assert told[0].startswith("estimated: "), "the estimate is shown before anything starts"
    study = load_study(tmp_path)
    assert 0 < len(study.of("done")) < 4
    assert (tmp_path / "calibration.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*.json")}
    assert run(made(), tmp_path, jobs=0, resume=True).finished
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished cells are not run again"
    run(made(), tmp_path / "free", jobs=0)
    assert result_bytes(tmp_path) == result_bytes(tmp_path / "free")


def test_a_budget_is_enforced_inside_a_cell(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Money is used up by the first steps where the estimate said that it would suffice."""
    monkeypatch.setattr(worker, "EVERY_S", 0.0)
    cheap = made(budget=Budget(money=1e-9, price_per_million_tokens=1.0))
    run_without = made(seeds=(0,), matrix={}, hypotheses=())
    assert run_without.budget.cost(3600, 1e6) == 0
    with pytest.raises(BudgetExceeded, match="money"):
        run(cheap, tmp_path, jobs=0)
    assert load_study(tmp_path).of("pending")
    body = json.loads((tmp_path / "calibration.json").read_text())
    for one in body["measured"].values():
        one |= {"step_s": 0, "tokens_per_step": 0, "tokens_per_item": 0}
    (tmp_path / "calibration.json").write_text(json.dumps(body))
    with pytest.raises(BudgetExceeded, match="it has used"):
        run(cheap, tmp_path, jobs=0, resume=True)
    assert rows(tmp_path)[-1]["ended"] == "stopped"


@pytest.mark.parametrize("moment", [r"step [1-9]\d*$", "answers"])
def test_sigterm_leaves_a_state_to_resume(moment: str, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "EVERY_S", 0.0)  # every step and every answer is told
    sent: list[str] = []

    def tell(done: int, total: int, note: str) -> None:
        if not sent and done >= 1 and re.search(moment, note):
            sent.append(note)
            signal.raise_signal(signal.SIGTERM)

    study = run(experiment, tmp_path / "cut", jobs=0, progress=tell)
    assert sent
    assert study.stopped
    assert not study.finished
    assert rows(tmp_path / "cut")[-1]["ended"] == "stopped"
    assert run(experiment, tmp_path / "cut", jobs=0, resume=True).finished
    run(experiment, tmp_path / "whole", jobs=0)
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "whole")


def test_a_study_has_one_runner(experiment: Experiment, tmp_path: Path) -> None:
    with files.lock(tmp_path / ".lock"), pytest.raises(LockedError):
        run(experiment, tmp_path, jobs=0)


def test_damage_is_named(experiment: Experiment, tmp_path: Path) -> None:
    study = run(small(seeds=(0,), matrix={}, hypotheses=()), tmp_path, jobs=0)
    with pytest.raises(NotFoundError, match=r"plan\.json is missing"):
        load_study(tmp_path / "nothing")
    cell = tmp_path / "cells" / f"{study.cells[0].id}.json"
    body = json.loads(cell.read_text())
    cell.write_text(json.dumps({**body, "scores_sha256": "0"}))
    with pytest.raises(CorruptError, match="other scores"):
        load_study(tmp_path)
    cell.write_text("[]")
    with pytest.raises(CorruptError, match="no result of a cell"):
        load_study(tmp_path)
    cell.unlink()
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "cells": ["x"]}))
    with pytest.raises(CorruptError, match="other cells"):
        load_study(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(CorruptError, match="format version"):
        load_study(tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ConfigError, match="has cells but no"):
        run(experiment, tmp_path, jobs=0, resume=True)


def test_settings_of_the_run_are_checked(experiment: Experiment, tmp_path: Path) -> None:
    for wrong in ({"jobs": -1}, {"executor": "cluster"}):
        with pytest.raises(ConfigError, match="jobs is"):
            run(experiment, tmp_path, **wrong)


def test_models_can_be_asked_for_the_likeliest_label(made: Make, tmp_path: Path) -> None:
    plan = made(choose=True, perplexity=False, primary="label_accuracy", matrix={}, seeds=(0,), hypotheses=())
    assert plan.cells()[0].id != made(perplexity=False, primary="label_accuracy", matrix={}, seeds=(0,), hypotheses=()).cells()[0].id
    study = run(plan, tmp_path, jobs=0)
    for one in (*study.cells, *study.bases.values()):
        assert one.evaluation is not None
        assert {item.completion for item in one.evaluation.items} <= {"SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO"}
    assert "by choosing the likeliest label" in analyse(study).methods

"""Ensembles as arms of a study: the vote is that of the members' answers on file, and nothing of it depends on how the study was run."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from tests.experiments.conftest import TRAIN, result_bytes, small

from crucible_framework.data import load_dataset
from crucible_framework.errors import BudgetExceeded, CapabilityError, ConfigError, CorruptError, UnknownNameError
from crucible_framework.evaluation import stated_label
from crucible_framework.experiments import (
    Budget,
    DataPlan,
    EnsemblePlan,
    Experiment,
    Hypothesis,
    Stopping,
    analyse,
    estimate,
    experiment_from,
    load_study,
    run,
    study_overview,
)  # fmt: skip
from crucible_framework.experiments.ensembles import Recorded, verdicts
from crucible_framework.files import read_lines
from crucible_framework.records import SamplingParams, Verdict
from crucible_framework.reports.study import write_study_report

ALL = EnsemblePlan(name="three ranks", members=("lora.rank=2", "lora.rank=4", "lora.rank=8"))


def voting(**changes: object) -> Experiment:
    """Three ranks × two seeds and the majority of the three; answers are labels."""
    plain: dict[str, object] = {
        "matrix": {"lora.rank": (2, 4, 8)}, "ensembles": (ALL,), "perplexity": False, "primary": "label_accuracy", "choose": True,
        "hypotheses": (Hypothesis(better="three ranks", than="lora.rank=2"),),
    }  # fmt: skip
    return small(**{**plain, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's folder, run in this process and analysed."""
    folder = tmp_path_factory.mktemp("voting") / "study"
    analyse(run(voting(), folder, jobs=0))
    return folder


# ---------------------------------------------------------------------------------------------------------------- plan
def test_toml_names_members_and_every_seed_has_its_ensemble() -> None:
    experiment = experiment_from({
        "name": "x", "seeds": [3, 5], "matrix": {"lora.rank": [2, 4], "loss": ["cross_entropy", "mse"]},
        "ensembles": [{"name": "losses", "members": ["lora.rank=4"], "vote": "plurality"},
                      {"name": "two", "members": ["lora.rank=2, loss=mse", "lora.rank=4, loss=mse"]}],
    })  # fmt: skip
    arms = {arm.name: arm for arm in experiment.arms()}
    assert arms["losses"].members == ("lora.rank=4, loss=cross_entropy", "lora.rank=4, loss=mse"), "a setting stands for all arms that have it"
    assert (arms["losses"].vote, arms["two"].vote) == ("plurality", "majority")
    assert [arm.name for arm in experiment.trained()] == [name for name in arms if name not in ("losses", "two")]
    cells = experiment.cells()
    assert [cell.arm for cell in cells[:6]] == list(arms), "after their members, seed by seed"
    here = {(cell.arm, cell.seed): cell for cell in cells}
    for seed in (3, 5):
        one = here["two", seed]
        assert dict(one.members) == {name: here[name, seed].id for name in arms["two"].members}
        assert one.base == here["lora.rank=2, loss=mse", seed].base
    assert len({cell.id for cell in cells}) == len(cells) == 12


@pytest.mark.parametrize(
    ("change", "told", "error"),
    [
        ({"ensembles": (EnsemblePlan(name="e", members=("lora.rank=2",)),)}, "at least two arms", ConfigError),
        ({"ensembles": (EnsemblePlan(name="e", members=("lora.rank=2", "lora.rank=3")),)}, "lora.rank=4", UnknownNameError),
        ({"ensembles": (EnsemblePlan(name="lora.rank=2", members=("lora.rank=2", "lora.rank=4")),)}, "another arm", ConfigError),
        ({"ensembles": (ALL, ALL)}, "another arm", ConfigError),
        ({"ensembles": (EnsemblePlan(name="e", members=("lora.rank=2", "lora.rank=4"), vote="majorty"),)}, "majority", UnknownNameError),
        ({"perplexity": True, "primary": "target_nll"}, "votes on answers", ConfigError),
        ({"perplexity": True, "hypotheses": (Hypothesis(better="three ranks", metric="target_nll"),)}, "votes on answers", ConfigError),
    ],
)
def test_a_mistake_is_an_error_before_anything_runs(change: dict[str, object], told: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=told.replace(".", r"\.")):
        voting(**change)


@pytest.mark.parametrize("wrong", [{"name": "base"}, {"name": "a, b"}, {"name": " "}, {"vote": "best_confidence"}, {"vote": "weighted"}])
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="EnsemblePlan"):
        EnsemblePlan(**{"name": "e", "members": ("a", "b"), **wrong})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- run
def test_the_vote_is_that_of_the_answers_on_file(study: Path) -> None:
    cells = {(cell.arm, cell.seed): cell for cell in load_study(study).cells}
    split = 0
    for seed in (0, 1):
        ensemble = cells["three ranks", seed].evaluation
        members = [cells[f"lora.rank={rank}", seed].evaluation for rank in (2, 4, 8)]
        assert ensemble is not None
        answers = [{item.id: stated_label(item.completion)[0] for item in one.items} for one in members if one is not None]
        notes = {row["id"]: row for row in read_lines(study / "cells" / cells["three ranks", seed].id / "votes.jsonl")}
        assert len(ensemble.items) == len(notes) == 18
        for item in ensemble.items:
            counts = Counter(one[item.id] for one in answers)
            winner, most = counts.most_common(1)[0]
            split += len(counts) > 1
            if list(counts.values()).count(most) == 1:
                assert item.completion == winner == notes[item.id]["answer"]
                assert item.scores["label_accuracy"] == float(winner == item.target)
                assert notes[item.id]["agreement"] == pytest.approx(most / 3)
            else:
                assert len(notes[item.id]["tied"]) == 3  # type: ignore[arg-type]
            assert list(notes[item.id]["answers"].values()) == [one[item.id] for one in answers]  # type: ignore[union-attr]
        body = json.loads((study / "cells" / f"{cells['three ranks', seed].id}.json").read_text())
        assert body["ensemble"]["agreement"] == pytest.approx(sum(row["agreement"] for row in notes.values()) / 18)  # type: ignore[misc]
        assert (body["training"], body["ensemble"]["abstained"]) == ({}, 0)
    assert split, "members that never differ would show nothing"


def test_it_is_one_more_arm_of_the_analysis_and_the_report(study: Path) -> None:
    analysis = analyse(study)
    declared = [one for one in analysis.contrasts if one.declared]
    assert [(one.name, one.seeds) for one in declared] == [("three ranks − lora.rank=2", (0, 1))]
    cells = {(cell.arm, cell.seed): cell.evaluation for cell in load_study(study).cells}

    def mean(arm: str) -> float:
        values = [item.scores["label_accuracy"] for seed in (0, 1) if (found := cells[arm, seed]) for item in found.items]
        return sum(v for v in values if v is not None) / len(values)

    assert declared[0].finding is not None
    assert declared[0].finding.effect == pytest.approx(mean("three ranks") - mean("lora.rank=2"))
    assert {"three ranks − base", "three ranks − lora.rank=4", "three ranks − lora.rank=8"} <= {one.name for one in analysis.contrasts}
    assert {one.arm for one in analysis.arms} == {"base", "lora.rank=2", "lora.rank=4", "lora.rank=8", "three ranks"}
    assert set(analysis.rankings[0].mean_ranks) == {one.arm for one in analysis.arms}
    assert "1 ensemble, three ranks (majority vote of lora.rank=2, lora.rank=4 and lora.rank=8)" in analysis.methods
    assert "3 arms of LoRA fine-tuning" in analysis.methods
    formats = ("html", "markdown", "latex", "json", "csv", "jupyter")
    texts = {path.suffix: path.read_text() for path in write_study_report(study, formats)}
    assert len(texts) == 6
    for suffix, text in texts.items():
        assert "three ranks" in text, suffix
        assert "Best member" in text, suffix
    overview = study_overview(study)
    assert overview.arms[-1] == "three ranks"
    assert overview.cells["three ranks", "minifact", 1].score == pytest.approx(
        next(e.value for e in cells["three ranks", 1].estimates if e.name == "label_accuracy") if cells["three ranks", 1] else None
    )


def test_with_many_arms_an_ensemble_is_still_held_against_its_members(tmp_path: Path) -> None:
    ranks = (1, 2, 3, 4, 5, 6, 7)
    some = EnsemblePlan(name="e", members=("lora.rank=1", "lora.rank=2", "lora.rank=3"))
    analysis = analyse(run(voting(matrix={"lora.rank": ranks}, ensembles=(some,), seeds=(0,), hypotheses=()), tmp_path, jobs=0))
    names = {one.name for one in analysis.contrasts}
    assert {"e − lora.rank=1", "e − lora.rank=2", "e − lora.rank=3", "e − base"} <= names
    assert "e − lora.rank=7" not in names


def test_target_nll_is_measured_of_what_has_one(tmp_path: Path) -> None:
    analysis = analyse(run(voting(perplexity=True, seeds=(0,)), tmp_path, jobs=0))
    assert {one.arm for one in analysis.arms if one.metric == "target_nll"} == {"base", "lora.rank=2", "lora.rank=4", "lora.rank=8"}
    assert not [one.name for one in analysis.contrasts if one.metric == "target_nll" and "three" in one.name]
    test = load_dataset("minifact", split="test", limit=1)
    sampler = Recorded("three ranks", test, {test.examples[0].id: Verdict(answer=None, text="", agreement=0.0, strategy="unanimous", ballots=())})
    assert sampler.sample(test.examples[0].prompt, SamplingParams()).result()[0].text == ""
    with pytest.raises(CapabilityError, match="three ranks"):
        sampler.compute_logprobs(test.examples[0].prompt, "SUPPORT")


def test_workers_and_a_resumed_study_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    analyse(run(voting(), tmp_path / "workers", jobs=2, together=2))
    assert result_bytes(tmp_path / "workers") == result_bytes(study)
    cut = tmp_path / "workers"
    for cell in load_study(cut).cells:
        if cell.arm == "three ranks":
            (cut / "cells" / f"{cell.id}.json").unlink()
    first = next(cell for cell in load_study(cut).cells if cell.arm == "three ranks")
    scores = cut / "cells" / first.id / "eval" / "scores.jsonl"
    scores.write_bytes(b"".join(scores.read_bytes().splitlines(keepends=True)[:7]))  # killed between two rows
    (scores.parent / "evaluation.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in cut.glob("cells/*.json")}
    assert len(load_study(cut).of("pending")) == 2
    analyse(run(voting(), cut, jobs=0, resume=True))
    assert result_bytes(cut) == result_bytes(study)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "no member is run again"


def test_a_member_without_a_result_is_the_ensembles_failure_and_both_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flaky.py").write_text(
        "import os\nfrom crucible_framework.losses import losses\n"
        "def loss(data, logprobs):\n    if 'FLAKY_MENDED' not in os.environ:\n        raise ValueError('not yet')\n"
        "    return losses.get('cross_entropy').fn(data, logprobs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = voting(matrix={"loss": ("cross_entropy", "flaky:loss")}, ensembles=(EnsemblePlan(name="both", members=("loss=cross_entropy", "loss=flaky:loss")),),
                  hypotheses=(Hypothesis(better="both", than="loss=cross_entropy"),), seeds=(0,))  # fmt: skip
    study = run(plan, tmp_path / "study", jobs=0)
    assert study.finished
    assert {cell.arm: cell.status for cell in study.cells} == {"loss=cross_entropy": "done", "loss=flaky:loss": "failed", "both": "failed"}
    failure = study.cells[-1].failure
    assert failure is not None
    assert failure.error == "MemberFailed"
    assert "'loss=flaky:loss'" in failure.message
    assert "ValueError: not yet" in failure.message
    analysis = analyse(study)
    assert analysis["both − loss=cross_entropy"].verdict == "no result"
    assert {one.error for one in analysis.failed} == {"ValueError", "MemberFailed"}
    assert "MemberFailed" in write_study_report(tmp_path / "study", ("markdown",))[0].read_text()
    assert run(plan, tmp_path / "study", jobs=0, resume=True).cells[-1].status == "failed", "a failure is not tried again unasked"
    monkeypatch.setenv("FLAKY_MENDED", "1")
    again = run(plan, tmp_path / "study", jobs=0, resume=True, retry_failed=True)
    assert {cell.status for cell in again.cells} == {"done"}


def test_a_dry_run_counts_ensembles_as_cells_that_cost_nothing_and_a_budget_keeps_what_is_done(tmp_path: Path) -> None:
    cost = estimate(voting())
    cells = {cell.id: cell for cell in voting().cells()}
    assert {cells[one.id].arm for one in cost.cells if one.seconds == 0} == {"three ranks"}
    assert all(one.tokens == 0 for one in cost.cells if one.seconds == 0)
    plan = voting(budget=Budget(tokens=int(cost.tokens / 2)))
    with pytest.raises(BudgetExceeded):
        run(plan, tmp_path, jobs=0)
    study = load_study(tmp_path)
    assert study.of("done")
    done = {(cell.arm, cell.seed) for cell in study.of("done")}
    assert (("three ranks", 0) in done) == all((f"lora.rank={rank}", 0) in done for rank in (2, 4, 8)), "a seed whose members are done has its ensemble"
    assert run(voting(), tmp_path, jobs=0, resume=True).finished


def test_an_ensemble_goes_with_a_member_that_is_dropped(tmp_path: Path) -> None:
    rates = {"adam.lr": (1e-5, 5e-2)}
    pair = EnsemblePlan(name="both rates", members=("adam.lr=1e-05", "adam.lr=0.05"))
    plan = voting(matrix=rates, ensembles=(pair,), seeds=(0, 1, 2), hypotheses=(), stopping=Stopping(rule="halving"),
                  train=dataclasses.replace(TRAIN, eval_interval=3), data=(DataPlan(train_limit=24, test_limit=18, dev="dev"),))  # fmt: skip
    study = run(plan, tmp_path, jobs=0)
    assert {(cell.arm, cell.seed) for cell in study.of("dropped")} == {(arm, seed) for arm in ("adam.lr=1e-05", "both rates") for seed in (1, 2)}
    told = analyse(study).dropped["both rates"]
    assert told.startswith("its member adam.lr=1e-05 was dropped: of 2 arms the 1")


def test_losses_and_backends_are_axes_and_an_ensemble_may_cross_them(tmp_path: Path) -> None:
    plan = voting(
        matrix={"backend": ("fake", "local"), "loss": ("cross_entropy", {"cross_entropy": 0.7, "mse": 0.3})}, seeds=(0,), hypotheses=(),
        ensembles=(EnsemblePlan(name="all", members=("backend=fake", "backend=local")),), data=(DataPlan(train_limit=12, test_limit=6),),
    )  # fmt: skip
    study = run(plan, tmp_path, jobs=0)
    assert [cell.status for cell in study.cells] == ["done"] * 5
    assert len(study.bases) == 2, "each backend has its own base"
    names = [arm.name for arm in plan.trained()]
    assert plan.arms()[-1].members == tuple(names)
    losses = {cell.arm: cell.training["final_loss"] for cell in study.cells if cell.training}
    assert len(set(losses.values())) == 4, "every loss and backend trains in its own way"
    analysis = analyse(study)
    assert {"backend=local − backend=fake", "loss=0.7*cross_entropy+0.3*mse − loss=cross_entropy"} <= {one.name for one in analysis.contrasts}


def test_answers_to_other_examples_are_refused(study: Path) -> None:
    cell = next(cell for cell in voting().cells() if cell.members)
    with pytest.raises(CorruptError, match="other examples"):
        verdicts(study, cell.members, "majority", load_dataset("minifact", split="test", limit=5))

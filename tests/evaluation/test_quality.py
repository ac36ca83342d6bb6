"""Gates: directions, missing metrics, intervals; and the monitor in a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.backends import connect
from crucible_framework.data import load_dataset
from crucible_framework.errors import ConfigError
from crucible_framework.evaluation import CLAIM_TARGETS, Gate, Target, check_quality, evaluate, monitor, parse_target, scorers, validation_scorers
from crucible_framework.records import AdamConfig, Evaluation, TrainConfig, less_is_better
from crucible_framework.training import Trainer

from .samplers_for_tests import Scripted, labelled, right


@pytest.mark.parametrize(
    ("text", "metric", "limit", "direction"),
    [
        ("citation_accuracy>=0.95", "citation_accuracy", 0.95, "at_least"),
        (" dev/loss <= 1.2e0 ", "dev/loss", 1.2, "at_most"),
        ("x>=-.5", "x", -0.5, "at_least"),
        ("target_nll<=3", "target_nll", 3.0, "at_most"),
    ],
)
def test_targets_are_read_from_text_and_written_back(text: str, metric: str, limit: float, direction: str) -> None:
    target = parse_target(text)
    assert (target.metric, target.limit, target.direction) == (metric, limit, direction)
    assert parse_target(str(target)) == target


@pytest.mark.parametrize("text", ["", "x", "x>0.5", "x=0.5", ">=0.5", "x>=", "x>=high", "x>=nan", "x>=1 y<=2", "x>=1e"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no quality target"):
        parse_target(text)


@pytest.mark.parametrize("metric", ["target_nll", "dev/loss", "perplexity", "cyclic", "invented_documents"])
def test_more_of_what_is_bad_cannot_be_asked(metric: str) -> None:
    with pytest.raises(ConfigError, match="less is better"):
        parse_target(f"{metric}>=0.5")
    assert check_quality({metric: 0.4}, [f"{metric}<=0.5"]).passed


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_exactly_one_direction_falls_short_and_equality_passes(value: float, limit: float) -> None:
    least = check_quality({"m": value}, [Target(metric="m", limit=limit)])
    most = check_quality({"m": value}, [Target(metric="m", limit=limit, direction="at_most")])
    assert least.passed == (value >= limit)
    assert most.passed == (value <= limit)
    for gate in (least, most):
        for short in gate.shortfalls:
            assert short.gap == pytest.approx(abs(value - limit))
            assert short.value == value


@pytest.mark.parametrize("metrics", [{}, {"m": None}, {"m": math.nan}, {"m": math.inf}, {"other": 1.0}])
def test_what_was_not_measured_falls_short_in_both_directions(metrics: dict[str, float | None]) -> None:
    for target in ("m>=0", "m<=100"):
        gate = check_quality(metrics, [target])
        assert not gate.passed
        assert (gate.shortfalls[0].value, gate.shortfalls[0].gap) == (None, None)


def test_a_gate_needs_targets_and_targets_need_sense() -> None:
    with pytest.raises(ConfigError, match="no targets"):
        check_quality({"m": 1.0}, [])
    with pytest.raises(ConfigError, match="direction is 'above'"):
        Target(metric="m", limit=1, direction="above")  # type: ignore[arg-type]
    for metric, limit in (("m", math.nan), ("", 1.0)):
        with pytest.raises(ConfigError, match="finite number"):
            Target(metric=metric, limit=limit)
    with pytest.raises(ConfigError, match="no intervals"):
        check_quality({"m": 1.0}, ["m>=0"], bound=True)


def test_an_evaluation_is_held_against_targets_by_value_or_by_the_bad_end() -> None:
    rows = labelled(40)
    found = evaluate(Scripted(right(rows, wrong=[1, 2])), rows)
    assert check_quality(found, ["label_accuracy>=0.9"]).passed
    cautious = check_quality(found, ["label_accuracy>=0.9", "label_accuracy<=0.99"], bound=True)
    assert [str(short.target) for short in cautious.shortfalls] == ["label_accuracy>=0.9"]
    assert cautious.shortfalls[0].value == found["label_accuracy"].low
    assert check_quality(found, ["label_accuracy<=0.95"]).passed
    assert not check_quality(found, ["label_accuracy<=0.95"], bound=True).passed, "the upper end is above"


def test_the_usual_targets_name_scorers_that_exist() -> None:
    known = {*scorers.names(), *(scorer.__name__ for scorer in validation_scorers())}
    assert {target.metric for target in CLAIM_TARGETS} <= known
    assert {"circuit_rank", "cyclic", "chirality", "invented_documents", "polarity_conflict"} <= {name for name in known if less_is_better(name)}
    perfect = {target.metric: 1.0 if target.direction == "at_least" else 0.0 for target in CLAIM_TARGETS}
    assert check_quality(perfect, CLAIM_TARGETS) == Gate(passed=True, shortfalls=())
    assert not check_quality({**perfect, "invented_documents": 0.02}, CLAIM_TARGETS).passed, "one invented id in fifty is too many"


# -------------------------------------------------------------------------------------------------------------- monitor
CONFIG = TrainConfig(base_model="fake", max_steps=6, checkpoint_interval=3, eval_interval=2, adam=AdamConfig(lr=0.01), max_length=2048)


@pytest.mark.parametrize(("action", "steps"), [("warn", 6), ("stop", 2)])
def test_a_monitor_warns_or_stops_a_run(tmp_path: Path, action: str, steps: int) -> None:
    train, dev = (load_dataset("minifact", split=split, limit=8) for split in ("train", "dev"))
    watch = monitor(["dev/loss<=0.001"], action=action)  # type: ignore[arg-type]
    with events.collect() as seen, connect("fake") as backend, Trainer(backend, CONFIG, folder=tmp_path / "run", callbacks=[watch]) as trainer:
        result = trainer.train(train, dev)
    assert result.steps == steps
    assert (result.stopped == "callback") == (action == "stop")
    shorts = [event for event in seen if event["name"] == "quality.shortfall"]
    assert [event["step"] for event in shorts] == list(range(2, steps + 1, 2))
    assert {event["metric"] for event in shorts} == {"dev/loss"}


def test_a_monitor_can_measure_by_asking_the_model_as_it_is() -> None:
    train = load_dataset("minifact", split="train", limit=4)
    measured: list[Evaluation] = []
    with connect("fake") as backend, Trainer(backend, CONFIG) as trainer:

        def measure() -> Evaluation:
            measured.append(evaluate(trainer.sampler(), train, ["schema_compliance", "invented_documents"]))
            return measured[-1]

        trainer.callbacks = (monitor(["schema_compliance>=0.9"], action="stop", kinds=["step"], measure=measure),)
        result = trainer.train(train, train)
    assert result.stopped == "callback"
    assert (result.steps, len(measured)) == (len(measured), len(measured))
    assert result.steps < CONFIG.max_steps


def test_a_monitor_is_checked_before_training() -> None:
    with pytest.raises(ConfigError, match="no targets"):
        monitor([])
    with pytest.raises(ConfigError, match="action 'shout'"):
        monitor(["x>=1"], action="shout")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'never'"):
        monitor(["x>=1"], kinds=["never"])
    with pytest.raises(ConfigError, match="less is better"):
        monitor(["loss>=1"])

"""Loading, baselines and comparisons: paired by id whatever the order, and never over different examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.data import load_dataset
from crucible_framework.errors import CorruptError, DataError, NotFoundError, StatisticsError, TooFewError, UnknownNameError
from crucible_framework.evaluation import baselines, compare, evaluate, load_evaluation
from crucible_framework.records import Dataset, Evaluation, Example
from crucible_framework.stats import paired_difference, wilson

from .samplers_for_tests import Scripted, dataset, key, labelled, right


def answered(data: Dataset, wrong: list[int], model: str = "m") -> Evaluation:
    return evaluate(Scripted(right(data, wrong), model=model), data, ["label_accuracy", "f1"], perplexity=True)


# ----------------------------------------------------------------------------------------------------------- comparison
def test_a_comparison_is_paired_and_clustered() -> None:
    data = labelled(12, documents=4)
    before, after = answered(data, [0, 1, 2, 3, 4]), answered(data, [4])
    with events.collect() as seen:
        found = compare(before, after)
    ids = sorted(item.id for item in before.items)
    values = [[{item.id: item.scores["label_accuracy"] for item in side.items}[i] for i in ids] for side in (before, after)]
    documents = [{item.id: item.document for item in before.items}[i] for i in ids]
    assert found == paired_difference("label_accuracy", *values, clusters=documents)
    assert found.effect == pytest.approx(4 / 12)
    assert (found.n, found.clusters) == (12, 4)
    assert [(event["name"], event["metric"], event["n"]) for event in seen] == [("evaluation.compared", "label_accuracy", 12)]
    plain = labelled(12)
    assert "McNemar" in compare(answered(plain, [0, 1, 2]), answered(plain, [])).test
    assert compare(before, after, name="base to adapter").name == "base to adapter"


@given(st.integers(2, 12), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_either_side_does_not_matter(n: int, random: Random, documents: bool) -> None:
    data = labelled(n, documents=2 if documents else None)
    before, after = (answered(data, [i for i in range(n) if random.random() < 0.5]) for _ in range(2))
    before, after = (
        replace(side, items=tuple(replace(item, scores={**item.scores, "target_nll": random.random()}) for item in side.items)) for side in (before, after)
    )
    left, right_side = (replace(side, items=tuple(random.sample(side.items, n))) for side in (before, after))
    assert compare(left, right_side) == compare(before, after)
    assert compare(left, right_side, "target_nll") == compare(before, after, "target_nll")  # to the last bit
    back = compare(after, before)
    assert back.effect == -compare(before, after).effect
    assert back.p_value == pytest.approx(compare(before, after).p_value)


def test_nll_is_compared_as_a_measure_without_bounds() -> None:
    data = labelled(2)
    plain = answered(data, [])
    low = [
        replace(plain, items=tuple(replace(item, scores={"target_nll": value}) for item, value in zip(plain.items, values, strict=True)))
        for values in ((0.9, 0.1), (0.0, 0.1))
    ]
    assert compare(low[0], low[1], "target_nll").interval[0] < -1  # it lies in [0, 1] and is not clipped to it
    data = labelled(6)
    before, after = answered(data, []), answered(data, [])
    better = replace(after, items=tuple(replace(item, scores={**item.scores, "target_nll": 0.1 * k}) for k, item in enumerate(after.items)))
    found = compare(before, better, "target_nll")
    assert found.effect < -1
    assert found.interval[0] < -1
    with pytest.raises(UnknownNameError, match="logarithm of the ratio of perplexities"):
        compare(before, after, "perplexity")


def test_what_cannot_be_compared_says_why() -> None:
    data = labelled(6)
    before, after = answered(data, [0]), answered(data, [])
    with pytest.raises(UnknownNameError, match="Did you mean 'label_accuracy'"):
        compare(before, after, "label_acuracy")
    with pytest.raises(StatisticsError, match=r"4 examples were answered on one side only \('e2', 'e3', 'e4', …\)"):
        compare(answered(labelled(2), []), after)
    with pytest.raises(StatisticsError, match="'e0' has another target or document"):
        compare(answered(labelled(6, target=lambda i: "SUPPORT" if i else "CONTRADICT"), []), after)
    with pytest.raises(StatisticsError, match="'e0' has another target or document"):
        compare(answered(labelled(6, documents=2), []), after)
    with pytest.raises(TooFewError, match="single pair"):
        compare(answered(labelled(1), []), answered(labelled(1), []))


# -------------------------------------------------------------------------------------------------------------- loading
def finished(folder: Path) -> Path:
    data = labelled(4)
    evaluate(Scripted(right(data)), data, folder=folder)
    return folder


def test_only_a_finished_evaluation_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="holds no evaluation"):
        load_evaluation(tmp_path / "nowhere")
    (finished(tmp_path) / "evaluation.json").unlink()
    with pytest.raises(NotFoundError, match="4 rows of an evaluation that is not finished"):
        load_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99; expected 1"),
        ({"model": 3}, "lacks model, card or estimates"),
        ({"estimates": ["x"]}, "lacks model, card or estimates"),
        ({"card": {"name": "x"}}, "does not parse"),
        ({"estimates": [{"name": "f1", "worth": 1}]}, "does not parse.*worth"),
        ({"scores_sha256": "0" * 64}, "is not the file that evaluation.json sums up"),
    ],
)
def test_a_file_that_was_changed_is_not_loaded(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = finished(tmp_path) / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptError, match=message):
        load_evaluation(tmp_path)


def test_no_table_and_changed_rows_are_not_loaded(tmp_path: Path) -> None:
    rows = finished(tmp_path) / "scores.jsonl"
    rows.write_text(rows.read_text().replace("1.0", "0.0"))
    with pytest.raises(CorruptError, match="is not the file"):
        load_evaluation(tmp_path)
    rows.unlink()
    with pytest.raises(CorruptError, match="is not the file"):
        load_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(CorruptError, match=r"format version \[\]"):
        load_evaluation(tmp_path)


# ------------------------------------------------------------------------------------------------------------ baselines
def test_baselines_by_hand() -> None:
    data = labelled(10, target=lambda i: "CONTRADICT" if i < 6 else "supports")
    majority, uniform = baselines(data)
    assert (majority.name, majority.value, (majority.low, majority.high)) == ("majority_label", 0.6, wilson(6, 10))
    assert majority.method.startswith("always 'CONTRADICT', the commonest label of these data; Wilson")
    assert (uniform.name, uniform.low, uniform.high) == ("uniform_label", uniform.value, uniform.value)
    assert uniform.value == pytest.approx(1 / 3)


def test_the_label_can_come_from_the_training_data() -> None:
    train = labelled(5, target=lambda _: "SUPPORT")
    majority, _ = baselines(labelled(10, target=lambda i: "CONTRADICT" if i < 6 else "SUPPORT", documents=5), train=train, level=0.9)
    assert (majority.value, majority.clusters, majority.level) == (0.4, 5, 0.9)
    assert "'SUPPORT', the commonest label of small, split test" in majority.method


def test_guessing_among_labels_of_each_example() -> None:
    two = Example(id="a", prompt="p", target="A", meta={"labels": ["A", "B"]})
    mixed = [two, Example(id="b", prompt="p", target="C", meta={"labels": ["A", "B", "C", "D"]})]
    assert baselines(dataset(mixed))[1].value == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_baselines_need_labels() -> None:
    with pytest.raises(DataError, match="target of example 'a' is 'Berlin'"):
        baselines(dataset([Example(id="a", prompt="p", target="Berlin")]))
    with pytest.raises(DataError, match="no examples"):
        baselines(Dataset(examples=(), card=labelled(1).card))


def test_an_extraction_has_no_majority() -> None:
    data = dataset([Example(id=str(i), prompt="p", target="CLAIM[c1]: x\nRELATION: c2 supports c1") for i in range(3)])
    assert [e.name for e in evaluate(Scripted({"p": "x"}), data, ["f1"]).estimates] == ["f1"]


# ------------------------------------------------------------------------------------------------------------ real data
def test_scifact_is_clustered_by_abstract(real_data: Path) -> None:
    data = load_dataset("scifact", split="test", data=real_data)
    truth = {key(example.prompt): example.target for example in data}
    found = evaluate(Scripted({prompt: f"The answer is {label.lower()}." for prompt, label in truth.items()}), data)
    constant = evaluate(Scripted(dict.fromkeys(truth, "SUPPORT")), data)
    estimate = found["label_accuracy"]
    assert estimate.value == 1
    assert estimate.clusters == len({example.meta["document"] for example in data}) < estimate.n == len(data)
    assert "Wilson score interval with the" in estimate.method
    share = sum(example.target == "SUPPORT" for example in data) / len(data)
    assert constant["label_accuracy"].value == pytest.approx(share)
    difference = compare(constant, found)
    assert difference.effect == pytest.approx(1 - share)
    assert difference.clusters == estimate.clusters
    majority = found["majority_label"]
    assert majority.value >= share
    assert majority.low < majority.value < majority.high


def test_answers_by_letter_are_labels() -> None:
    letters = ["A", "B", "C", "D"]
    rows = [Example(id=str(i), prompt=f"q{i}", target=letters[i % 4], meta={"labels": [*letters]}) for i in range(8)]
    found = evaluate(Scripted({f"q{i}": f"The answer is ({letters[i % 4]})." for i in range(8)}), dataset(rows))
    assert found["label_accuracy"].value == 1
    assert found["majority_label"].value == 0.25

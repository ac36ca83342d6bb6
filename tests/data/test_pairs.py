"""Preference rows as examples, and batches that hold them together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.data import Batches, load_preferences, preference_examples
from crucible_framework.data.batches import BatchMode
from crucible_framework.errors import ConfigError, DataError, FormatError
from crucible_framework.records import Datum, Json, Message, split_answer_id
from crucible_framework.testing import make_datum

ROWS: list[dict[str, Json]] = [
    {"id": "a", "prompt": "p", "chosen": "good", "rejected": "bad", "document": "d1"},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "fine"}], "rejected": "poor"},
]


def data(groups: int, roles: tuple[str, ...] = ("chosen", "rejected")) -> list[Datum]:
    return [make_datum(3 + group % 4, seed=group, name=f"q{group}#{role}") for group in range(groups) for role in roles]


def test_rows_become_neighbouring_examples() -> None:
    examples = preference_examples(ROWS)
    assert [(example.id, example.target) for example in examples] == [("a#chosen", "good"), ("a#rejected", "bad"), ("2#chosen", "fine"), ("2#rejected", "poor")]
    assert examples[0].meta == {"pair": "a", "document": "d1", "choice": "chosen"}
    assert examples[2].prompt == (Message(role="user", content="q"),)


def test_baseline_is_the_next_rows_answer() -> None:
    found = {example.id: example.target for example in preference_examples(ROWS, baseline=True)}
    assert (found["a#baseline"], found["2#baseline"]) == ("fine", "good")


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    dataset = load_preferences(path, licence="CC0-1.0")
    assert (len(dataset), dataset.card.name, dataset.card.rows, dataset.card.licence) == (4, "prefs", 4, "CC0-1.0")
    assert dataset.card.files[0].size_bytes == path.stat().st_size


@pytest.mark.parametrize(
    "change", [{"chosen": ""}, {"rejected": 3}, {"prompt": []}, {"prompt": [{"role": "king", "content": "x"}]}, {"id": "x#chosen"}, {"id": True}]
)
def test_rows_that_do_not_fit(change: dict[str, Json]) -> None:
    with pytest.raises(FormatError, match="row 1"):
        preference_examples([{**ROWS[0], **change}])


def test_too_few_or_twice() -> None:
    with pytest.raises(DataError, match="0 preferences"):
        preference_examples([])
    with pytest.raises(DataError, match="at least 2"):
        preference_examples(ROWS[:1], baseline=True)
    with pytest.raises(DataError, match="'a' is there twice"):
        preference_examples([ROWS[0], ROWS[0]])


@given(groups=st.integers(1, 12), size=st.sampled_from([2, 4, 6]), seed=st.integers(0, 50), epoch=st.integers(0, 3))
def test_batches_hold_pairs_whole(groups: int, size: int, seed: int, epoch: int) -> None:
    batches = Batches(data(groups), size, seed=seed)
    seen: list[str] = []
    for place in range(batches.per_epoch):
        names = [split_answer_id(identity) for identity in batches.at(epoch * batches.per_epoch + place).ids]
        assert len(names) <= size
        assert {name for name, role in names if role == "chosen"} == {name for name, role in names if role == "rejected"}
        seen += [f"{name}#{role}" for name, role in names]
    assert sorted(seen) == sorted(datum.id for datum in data(groups))


def test_epochs_differ_and_threes_work() -> None:
    batches = Batches(data(9, ("chosen", "rejected", "baseline")), 6, seed=0)
    assert batches.at(0).ids != batches.at(batches.per_epoch).ids
    assert all(len({identity.split("#")[0] for identity in batches.at(i).ids}) <= 2 for i in range(batches.per_epoch))


def test_what_would_tear_pairs_apart() -> None:
    with pytest.raises(ConfigError, match=r"Batches of 3 examples.*Set batch_size to 2"):
        Batches(data(4), 3, seed=0)
    modes: tuple[BatchMode, ...] = ("length", "pack", "prefix")
    for mode in modes:
        with pytest.raises(ConfigError, match="'shuffle'"):
            Batches(data(4), 4, seed=0, mode=mode)
    with pytest.raises(DataError, match="'q3#chosen' does not"):
        Batches(data(4)[:-1], 4, seed=0)
    assert len(Batches(data(1), 3, seed=0).at(0).data) == 2  # one batch holds all


def test_single_answers_are_shuffled_as_ever() -> None:
    alone = data(8, ("chosen",))
    plain = [make_datum(3 + i % 4, seed=i, name=f"r{i}") for i in range(8)]
    order = [tuple(int(identity[1]) for identity in Batches(rows, 3, seed=5).at(0).ids) for rows in (alone, plain)]
    assert order[0] == order[1]

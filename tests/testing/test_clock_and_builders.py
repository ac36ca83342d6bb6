"""The virtual clock and the small data."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.data import ByteTokenizer
from crucible_framework.errors import ConfigError
from crucible_framework.protocols import Clock
from crucible_framework.testing import VirtualClock, make_batch, make_data, make_dataset, make_datum, text_datum


def test_importing_the_suites_loads_no_torch() -> None:
    code = "import sys, crucible_framework.testing\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout.strip() == "False"


# ----------------------------------------------------------------------------------------------------------------- clock
def test_time_stands_still() -> None:
    clock: Clock = VirtualClock(5.0)
    assert clock.now() == clock.now() == 5.0


@given(delays=st.lists(st.floats(0, 10), max_size=8), moves=st.lists(st.floats(0, 6), min_size=1, max_size=4))
def test_calls_come_when_they_are_due(delays: list[float], moves: list[float]) -> None:
    clock, seen = VirtualClock(), list[tuple[float, int]]()
    for number, delay_s in enumerate(delays):
        clock.call_later(delay_s, lambda number=number: seen.append((clock.now(), number)))  # type: ignore[misc]
    made = sum(clock.advance(move_s) for move_s in moves)
    due = sorted((delay_s, number) for number, delay_s in enumerate(delays) if delay_s <= clock.now())
    assert seen == due
    assert made == len(due)
    assert clock.pending == len(delays) - len(due)
    assert clock.now() == pytest.approx(sum(moves))


def test_calls_may_make_calls() -> None:
    clock, seen = VirtualClock(), list[float]()

    def tick() -> None:
        seen.append(clock.now())
        clock.call_later(2.0, tick)

    clock.call_later(2.0, tick)
    assert clock.advance(7.0) == 3
    assert seen == [2.0, 4.0, 6.0]
    assert (clock.now(), clock.pending) == (7.0, 1)


def test_cancelled_calls_are_not_made() -> None:
    clock, seen = VirtualClock(), list[str]()
    cancel = clock.call_later(1.0, lambda: seen.append("cancelled"))
    late = clock.call_later(1.0, lambda: seen.append("made"))
    clock.call_later(0.5, cancel)
    assert clock.advance(1.0) == 2
    assert seen == ["made"]
    late()
    cancel()
    assert clock.pending == 0
    clock.call_later(0.0, lambda: seen.append("at once"))
    assert clock.advance(0.0) == 1
    assert seen == ["made", "at once"]


def test_negative_delay_is_now_and_errors_come_out() -> None:
    clock = VirtualClock(3.0)

    def fail() -> None:
        raise KeyError("from the call")

    clock.call_later(-1.0, fail)
    with pytest.raises(KeyError):
        clock.advance(5.0)
    assert clock.now() == 3.0
    assert clock.advance(5.0) == 0
    assert clock.now() == 8.0


@pytest.mark.parametrize("move_s", [-0.1, float("nan"), float("inf")])
def test_time_does_not_go_back(move_s: float) -> None:
    with pytest.raises(ConfigError, match="finite number of at least 0"):
        VirtualClock().advance(move_s)


# -------------------------------------------------------------------------------------------------------------- builders
@given(length=st.integers(1, 20), seed=st.integers(0, 9), vocab_size=st.integers(2, 300), candidates=st.none() | st.integers(1, 4))
def test_datum_is_what_was_asked(length: int, seed: int, vocab_size: int, candidates: int | None) -> None:
    datum = make_datum(length, seed=seed, vocab_size=vocab_size, candidates=candidates)
    again = make_datum(length, seed=seed, vocab_size=vocab_size, candidates=candidates)
    assert len(datum) == length
    assert datum.targets.shape == ((length,) if candidates is None else (length, candidates))
    assert max(int(datum.tokens.max()), int(datum.targets.max())) < vocab_size
    assert (datum.targets == again.targets).all()
    assert datum.weights.reshape(length, -1).sum(1)[length // 2 :] == pytest.approx(np.ones(length - length // 2), abs=1e-6)
    assert not datum.weights[: length // 2].any()
    if candidates is None:
        assert (datum.tokens[1:] == datum.targets[:-1]).all()
    assert [array.dtype.name for array in (datum.tokens, datum.targets, datum.weights)] == ["int32", "int64", "float32"]


def test_data_differ_by_id_and_tokens() -> None:
    data = make_data((8, 8, 3), seed=1)
    assert len({datum.id for datum in data}) == 3
    assert not (data[0].tokens == data[1].tokens).all()
    assert make_batch((8, 8, 3), seed=1).ids == tuple(datum.id for datum in data)
    assert make_datum(2, name="mine", extras={"advantages": np.ones(2, np.float32)}).extras["advantages"].tolist() == [1, 1]


def test_text_datum_is_what_training_makes() -> None:
    datum, tokenizer = text_datum("Two?", "Yes"), ByteTokenizer()
    answer = datum.targets[datum.weights != 0].tolist()
    assert answer == [*tokenizer.encode("Yes"), tokenizer.eos_ids[0]]
    assert "Two?" in tokenizer.decode(datum.tokens.tolist())


def test_dataset_has_right_answers_and_documents() -> None:
    dataset = make_dataset(40, seed=2, documents=5)
    assert len(dataset) == dataset.card.rows == 40
    assert len({str(example.meta["document"]) for example in dataset}) == 5
    assert {example.target for example in dataset} == set(dataset.card.labels) == {"yes", "no"}
    for example in dataset:
        left, _, right, _, total = str(example.prompt).removeprefix("Is ").removesuffix("?").split()
        assert (int(left) + int(right) == int(total)) == (example.target == "yes")
    assert dataset.card.sha256 == make_dataset(40, seed=2, documents=5).card.sha256 != make_dataset(40, seed=3, documents=5).card.sha256

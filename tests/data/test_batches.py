"""Batches: every example once an epoch, the same at any position however it is reached, and weights that sum to one."""

import itertools
import math
import random
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.data import Batches, normalise
from crucible_framework.errors import ConfigError, DataError
from crucible_framework.records import Batch, Datum

Mode = Literal["shuffle", "length", "prefix", "pack"]
MODES: list[Mode] = ["shuffle", "length", "prefix", "pack"]
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def datum(name: object, length: int, weights: list[float] | None = None) -> Datum:
    values = np.ones(length) if weights is None else np.array(weights)
    return Datum(id=str(name), tokens=np.zeros(length, np.int32), targets=np.zeros(length, np.int64), weights=values.astype(np.float32))


def data(lengths: list[int]) -> list[Datum]:
    return [datum(number, length) for number, length in enumerate(lengths)]


def epoch_ids(batches: Batches, epoch: int) -> list[str]:
    return [batches.data[i].id for members in batches.epoch_batches(epoch) for i in members]


@given(lengths=LENGTHS, size=st.integers(1, 10), seed=st.integers(0, 2**64), mode=st.sampled_from(MODES), epoch=st.integers(0, 5))
def test_each_epoch_holds_every_example_once(lengths: list[int], size: int, seed: int, mode: Mode, epoch: int) -> None:
    batches = Batches(data(lengths), size, seed=seed, mode=mode)
    assert sorted(epoch_ids(batches, epoch), key=int) == [str(i) for i in range(len(lengths))]
    parts = batches.epoch_batches(epoch)
    assert all(parts)
    if mode == "pack":
        assert all(sum(lengths[i] for i in part) <= batches.max_tokens for part in parts)
    else:
        assert len(parts) == batches.per_epoch == math.ceil(len(lengths) / size)
        assert sorted(map(len, parts))[1:] == [size] * (len(parts) - 1), "only one batch may be partial"


@given(lengths=LENGTHS, size=st.integers(1, 10), seed=st.integers(0, 99), mode=st.sampled_from(MODES), order=st.randoms(use_true_random=False))
def test_at_gives_what_iteration_gives_in_any_order(lengths: list[int], size: int, seed: int, mode: Mode, order: random.Random) -> None:
    first = Batches(data(lengths), size, seed=seed, mode=mode)
    epochs = [first.epoch_batches(epoch) for epoch in range(4)]
    flat = [(epoch, tuple(str(i) for i in part)) for epoch, parts in enumerate(epochs) for part in parts]
    positions = list(range(len(flat)))
    order.shuffle(positions)
    second = Batches(data(lengths), size, seed=seed, mode=mode)
    for position in positions:
        batch = second.at(position)
        assert (batch.epoch, batch.ids) == flat[position]
        assert batch.index == position


@given(lengths=LENGTHS, seed=st.integers(0, 99), mode=st.sampled_from(MODES), start=st.integers(0, 200))
def test_a_fresh_start_at_any_position_continues_alike(lengths: list[int], seed: int, mode: Mode, start: int) -> None:
    one, other = (Batches(data(lengths), 3, seed=seed, mode=mode) for _ in range(2))
    through = [one.at(position).ids for position in range(start + 5)]
    assert [other.at(position).ids for position in range(start, start + 5)] == through[start:]


@pytest.mark.parametrize("mode", MODES)
def test_seeds_and_epochs_differ(mode: Mode) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 64).tolist()
    orders = [epoch_ids(Batches(data(lengths), 4, seed=seed, mode=mode), epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_the_permutation_is_pinned() -> None:
    """A change of it would make resumed runs differ from the ones that they continue."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 3])))
    assert epoch_ids(Batches(data([1] * 9), 2, seed=7), 3) == [str(i) for i in generator.permutation(9)]
    assert epoch_ids(Batches(data([1] * 5), 2, seed=0), 0) == ["2", "4", "3", "0", "1"]


def test_length_batches_hold_less_padding() -> None:
    lengths = np.random.default_rng(1).integers(1, 200, 256).tolist()

    def padding(mode: Mode) -> int:
        parts = Batches(data(lengths), 8, seed=0, mode=mode).epoch_batches(0)
        return sum(max(lengths[i] for i in part) * len(part) - sum(lengths[i] for i in part) for part in parts)

    assert padding("length") < padding("shuffle") / 5


def test_packing_fills_batches_well() -> None:
    lengths = np.random.default_rng(2).integers(1, 100, 300).tolist()
    packed = Batches(data(lengths), 4, seed=0, mode="pack", max_tokens=400)
    assert packed.per_epoch <= 1.1 * sum(lengths) / 400 + 1


def test_a_pack_is_filled_up_to_its_limit_and_not_beyond() -> None:
    assert all(len(part) == 1 for part in Batches(data([5, 6] * 9), 1, seed=0, mode="pack", max_tokens=9).epoch_batches(0))
    assert all(len(part) == 2 for part in Batches(data([5] * 18), 1, seed=0, mode="pack", max_tokens=10).epoch_batches(0))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"size": 0}, "size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"mode": "sorted"}, "mode is 'sorted'"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], match: str) -> None:
    settings: dict[str, object] = {"size": 2, "seed": 0, **changes}
    with pytest.raises(ConfigError, match=match):
        Batches(data([1, 2]), **settings)  # type: ignore[arg-type]


def test_negative_positions_and_epochs() -> None:
    batches = Batches(data([1, 2]), 1, seed=0)
    with pytest.raises(ConfigError, match="position is -1"):
        batches.at(-1)
    with pytest.raises(ConfigError, match="epoch is -1"):
        batches.epoch_batches(-1)


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="0 examples"):
        Batches([], 2, seed=0)


def test_an_example_that_no_pack_holds_is_named() -> None:
    with pytest.raises(DataError, match=r"Example '1' has 9 tokens; expected at most max_tokens 8"):
        Batches(data([3, 9]), 2, seed=0, mode="pack", max_tokens=8)


# ----------------------------------------------------------------------------------------------------------- normalise
WEIGHTS = st.lists(st.lists(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=6), min_size=1, max_size=4), min_size=1, max_size=4)


@given(weights=WEIGHTS)
def test_weights_of_a_step_sum_to_one(weights: list[list[list[float]]]) -> None:
    step = [Batch(data=tuple(datum(n, len(w), w) for n, w in enumerate(part)), epoch=1, index=i) for i, part in enumerate(weights)]
    total = sum(float(d.weights.sum(dtype=np.float64)) for batch in step for d in batch.data)
    scaled = normalise(step)
    after = sum(float(d.weights.sum(dtype=np.float64)) for batch in scaled for d in batch.data)
    assert [(batch.ids, batch.epoch, batch.index) for batch in scaled] == [(batch.ids, batch.epoch, batch.index) for batch in step]
    if total > 0:
        assert after == pytest.approx(1.0, rel=1e-5)
        for before, now in zip(step, scaled, strict=True):
            for old, new in zip(before.data, now.data, strict=True):
                np.testing.assert_allclose(new.weights.astype(np.float64) * total, old.weights, rtol=1e-5, atol=total * 1e-40)
                assert new.weights.dtype == np.float32
    else:
        assert after == 0


def test_slices_share_one_scale() -> None:
    """Two slices of 1 and 3 weighted tokens: each token counts a quarter, as in one batch of 4."""
    one, three = normalise([Batch(data=(datum("a", 1),)), Batch(data=(datum("b", 3),))])
    assert one.data[0].weights.tolist() == [0.25]
    assert three.data[0].weights.tolist() == [0.25] * 3


def test_weights_that_have_no_mean_stay() -> None:
    for weights in ([0.0, 0.0], [1.0, -1.0], [-2.0, 1.0]):
        (batch,) = normalise([Batch(data=(datum("a", 2, weights),))])
        assert batch.data[0].weights.tolist() == weights


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    with pytest.raises(DataError, match=r"Example 'b' has weights"):
        normalise([Batch(data=(datum("a", 1), datum("b", 2, [1.0, bad])))])


@given(
    families=st.lists(st.integers(1, 5), min_size=1, max_size=8), seed=st.integers(0, 99), epoch=st.integers(0, 3), shuffle=st.randoms(use_true_random=False)
)
def test_prefix_keeps_examples_that_begin_alike_together(families: list[int], seed: int, epoch: int, shuffle: random.Random) -> None:
    examples = [
        Datum(
            id=f"{family}-{member}", tokens=np.array([family] * 10 + [100 + member] * (1 + member), np.int32), targets=np.zeros(11 + member, np.int64),
            weights=np.ones(11 + member, np.float32),
        )
        for family, count in enumerate(families) for member in range(count)
    ]  # fmt: skip
    shuffle.shuffle(examples)
    batches = Batches(examples, 3, seed=seed, mode="prefix")
    order = [name.partition("-")[0] for name in epoch_ids(batches, epoch)]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == len(families) - 1


def test_prefix_takes_the_families_in_another_order_each_epoch() -> None:
    examples = [
        Datum(id=f"{family}-{member}", tokens=np.array([family] * 9 + [member], np.int32), targets=np.zeros(10, np.int64), weights=np.ones(10, np.float32))
        for family in range(9)
        for member in range(3)
    ]
    batches = Batches(examples, 3, seed=1, mode="prefix")
    assert len({tuple(epoch_ids(batches, epoch)) for epoch in range(4)}) == 4

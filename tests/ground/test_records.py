"""Records: ranges are checked at the door, arrays have the right shapes, nothing can be changed afterwards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import records
from crucible_framework.errors import ConfigError, DataError, UnknownNameError
from crucible_framework.records import (
    AdamConfig,
    Batch,
    Dataset,
    DatasetCard,
    Datum,
    Estimate,
    Evaluation,
    Example,
    LoraConfig,
    SamplingParams,
    TrainConfig,
    record,
)

NAN, INF = math.nan, math.inf
BAD: dict[Callable[..., object], dict[str, tuple[object, ...]]] = {
    LoraConfig: {
        "rank": (0, -1, 1.5, True, "8"),
        "alpha": (0, -1.0, NAN, INF, True, "32"),
        "dropout": (-0.1, 1.0, NAN),
        "target_modules": ((), ("",), ["q_proj"], "q_proj"),
        "seed": (-1, 0.5),
    },
    AdamConfig: {
        "lr": (-1e-9, NAN, INF, "1e-4"),
        "beta1": (1.0, -0.1, NAN),
        "beta2": (1.0, -0.1, NAN),
        "eps": (0.0, NAN),
        "weight_decay": (-0.1, INF),
        "max_grad_norm": (0.0, -1.0, NAN, INF, "1"),
    },
    TrainConfig: {
        "base_model": ("",),
        "loss": ("", {}, {"kl": NAN}, {"kl": "1"}),
        "batch_size": (0, 2.0, True),
        "accumulate": (0,),
        "max_steps": (0,),
        "max_length": (0,),
        "keep": (0,),
        "epochs": (0, 1.5),
        "warmup_steps": (-1,),
        "checkpoint_interval": (-1,),
        "eval_interval": (-1,),
        "patience": (-1,),
        "final_lr_ratio": (-0.1, 1.1, NAN),
        "batching": ("random",),
        "seed": (-1,),
    },
    SamplingParams: {
        "max_tokens": (0, 1.5),
        "temperature": (-0.1, NAN, INF),
        "top_k": (-1, 0.5),
        "top_p": (0.0, 1.1, NAN),
        "stop": (("",), ["x"], "x"),
        "seed": (-1, 1.5),
    },
}
CASES = [(make, name, value) for make, fields in BAD.items() for name, values in fields.items() for value in values]


@pytest.mark.parametrize(("make", "name", "value"), CASES)
def test_value_out_of_range_is_named(make: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    text = str(caught.value)
    assert f".{name} is {value!r}" in text
    assert "expected" in text


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (LoraConfig, "rank", 1),
        (LoraConfig, "dropout", 0.0),
        (LoraConfig, "target_modules", ("all-linear",)),
        (AdamConfig, "lr", 0.0),
        (AdamConfig, "max_grad_norm", None),
        (TrainConfig, "epochs", 1),
        (TrainConfig, "checkpoint_interval", 0),
        (TrainConfig, "final_lr_ratio", 1.0),
        (TrainConfig, "loss", {"cross_entropy": 0.8, "kl": -0.2}),
        (SamplingParams, "temperature", 0.0),
        (SamplingParams, "top_p", 1.0),
        (SamplingParams, "stop", ("\n", 7)),
    ],
)
def test_value_at_the_edge_is_taken(make: Callable[..., object], name: str, value: object) -> None:
    assert getattr(make(**{name: value}), name) == value


def test_the_defaults_are_those_of_the_design() -> None:
    config = TrainConfig()
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.target_modules) == (16, 32, 0.05, ("q_proj", "v_proj"))
    assert (config.adam.lr, config.batch_size, config.max_steps, config.checkpoint_interval) == (1e-4, 4, 1000, 100)


RECORDS = [cls for name in records.__all__ if dataclasses.is_dataclass(cls := getattr(records, name))]


@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
def test_every_record_is_frozen_slotted_and_keyword_only(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]  # typeshed keeps it private
    assert "__slots__" in vars(cls)
    assert all(field.kw_only for field in dataclasses.fields(cls))


def test_a_record_cannot_be_changed() -> None:
    config = LoraConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8  # type: ignore[misc]  # what is tested
    assert dataclasses.replace(config, rank=8).rank == 8
    with pytest.raises(ConfigError, match="rank is 0"):
        dataclasses.replace(config, rank=0)


def test_record_makes_keyword_only_classes_of_ones_own() -> None:
    @record
    class Point:
        x: int
        y: int = 0

    assert Point(x=1) == Point(x=1, y=0)
    with pytest.raises(TypeError):
        Point(1)  # type: ignore[call-arg]  # what is tested


def datum(tokens: int = 3, targets: tuple[int, ...] = (3,), weights: tuple[int, ...] = (3,), name: str = "a") -> Datum:
    return Datum(id=name, tokens=np.zeros(tokens, np.int32), targets=np.zeros(targets, np.int64), weights=np.zeros(weights, np.float32))


@given(length=st.integers(1, 20), candidates=st.integers(1, 5))
def test_datum_takes_one_target_or_candidates_per_position(length: int, candidates: int) -> None:
    assert len(datum(length, (length,), (length,))) == length
    assert len(datum(length, (length, candidates), (length, candidates))) == length


@pytest.mark.parametrize(
    ("tokens", "targets", "weights", "words"),
    [
        (0, (0,), (0,), "tokens of shape (0,)"),
        (3, (2,), (2,), "targets of shape (2,) for 3 tokens"),
        (3, (), (), "targets of shape ()"),
        (3, (3, 2, 2), (3, 2, 2), "targets of shape (3, 2, 2)"),
        (3, (3,), (2,), "weights of shape (2,)"),
        (3, (3, 2), (3,), "weights of shape (3,)"),
    ],
)
def test_datum_refuses_other_shapes(tokens: int, targets: tuple[int, ...], weights: tuple[int, ...], words: str) -> None:
    with pytest.raises(DataError) as caught:
        datum(tokens, targets, weights, name="claim-7")
    assert "'claim-7'" in str(caught.value)
    assert words in str(caught.value)


def test_datum_refuses_tokens_of_two_dimensions() -> None:
    with pytest.raises(DataError, match="one dimension"):
        Datum(id="a", tokens=np.zeros((2, 2), np.int32), targets=np.zeros(2, np.int64), weights=np.zeros(2, np.float32))


def test_batch_counts_tokens_and_lists_ids_in_order() -> None:
    batch = Batch(data=(datum(3, name="b"), datum(2, (2,), (2,), name="a")))
    assert (batch.tokens, batch.ids, batch.epoch, batch.index) == (5, ("b", "a"), 0, 0)
    assert (Batch(data=()).tokens, Batch(data=()).ids) == (0, ())


CARD = DatasetCard(name="d", split="train", task="t", rows=3, sha256="0", licence="CC0-1.0", source="here")


def test_dataset_is_a_sequence() -> None:
    examples = tuple(Example(id=str(i), prompt="p", target="t") for i in range(3))
    dataset = Dataset(examples=examples, card=CARD)
    assert len(dataset) == 3
    assert tuple(dataset) == examples
    assert dataset[-1] is examples[2]
    assert dataset[1:] == examples[1:]


def test_mappings_of_two_records_are_not_shared() -> None:
    assert Example(id="a", prompt="p", target="t").meta is not Example(id="b", prompt="p", target="t").meta


def test_evaluation_finds_estimates_by_name() -> None:
    estimate = Estimate(name="accuracy", value=0.5, low=0.4, high=0.6, n=100)
    evaluation = Evaluation(model="m", card=CARD, items=(), estimates=(estimate,))
    assert evaluation["accuracy"] is estimate
    with pytest.raises(UnknownNameError, match=r"No estimate is called 'acuracy'\. Did you mean 'accuracy'"):
        evaluation["acuracy"]

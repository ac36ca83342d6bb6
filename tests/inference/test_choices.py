"""Choices by log-likelihood: the likeliest one is the answer, with its share of the probability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.backends import connect
from crucible_framework.data import load_dataset
from crucible_framework.errors import ConfigError, ServiceError
from crucible_framework.evaluation import evaluate
from crucible_framework.inference import ChoiceSampler
from crucible_framework.protocols import Backend
from crucible_framework.records import Completion, Prompt, SamplingParams

PARAMS = SamplingParams()


class Table:
    """A model whose log-probs are written down."""

    model = "table"

    def __init__(self, logprobs: dict[str, tuple[float, ...]]) -> None:
        self.logprobs = logprobs

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        raise AssertionError("choices are never drawn")

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        future: Future[tuple[float, ...]] = Future()
        if completion == "broken":
            future.set_exception(ServiceError("gone", retryable=False))
        else:
            future.set_result(self.logprobs[str(completion)])
        return future


@given(st.lists(st.floats(-50, -0.01), min_size=2, max_size=6))
def test_the_likeliest_choice_wins_with_its_share(scores: list[float]) -> None:
    names = [f"c{k}" for k in range(len(scores))]
    (answer,) = ChoiceSampler(Table({name: (score,) for name, score in zip(names, scores, strict=True)}), names).sample("?", PARAMS).result()
    assert answer.text == names[scores.index(max(scores))]
    share = math.exp(max(scores)) / math.fsum(map(math.exp, scores))
    assert math.exp(answer.logprobs[0]) == pytest.approx(share)
    assert share >= 1 / len(scores) - 1e-12


def test_sum_and_mean_may_differ() -> None:
    table = Table({"long": (-0.5, -0.5, -0.5), "short": (-1.0,)})
    assert ChoiceSampler(table, ("long", "short")).sample("?", PARAMS).result()[0].text == "short"
    assert ChoiceSampler(table, ("long", "short"), by="mean").sample("?", PARAMS).result()[0].text == "long"


def test_failures_reach_the_caller() -> None:
    with pytest.raises(ServiceError, match="gone"):
        ChoiceSampler(Table({"a": (-1.0,)}), ("a", "broken")).sample("?", PARAMS).result()
    with pytest.raises(ConfigError, match="no token"):
        ChoiceSampler(Table({"a": (-1.0,), "b": ()}), ("a", "b")).sample("?", PARAMS).result()


@pytest.mark.parametrize("choices", [(), ("a",), ("a", "a"), ("a", ""), "ab"])
def test_bad_choices(choices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="at least two"):
        ChoiceSampler(Table({}), choices)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="'sum' or 'mean'"):
        ChoiceSampler(Table({}), ("a", "b"), by="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        ChoiceSampler(Table({}), ("a", "b")).sample("?", PARAMS, 0)


@pytest.fixture
def backend() -> Iterator[Backend]:
    """The local engine."""
    with connect("local") as engine:
        yield engine


def test_a_model_that_never_writes_a_label_is_scored_all_the_same(backend: Backend) -> None:
    claims = load_dataset("minifact", split="test", limit=9)
    sampler = ChoiceSampler(backend.sampler("tiny"), claims.card.labels, by="mean")
    found = evaluate(sampler, claims, ["label_accuracy", "exact_match"])
    assert {item.completion for item in found.items} <= set(claims.card.labels)
    assert found["label_accuracy"].value == found["exact_match"].value
    assert "choices=SUPPORT" in found.model

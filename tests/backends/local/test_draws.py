"""Drawing a token: the distribution, top-k and top-p, log-probs, and independence of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from crucible_framework.backends.local.draws import draw, generator, kept
from crucible_framework.records import SamplingParams

probabilities = st.lists(st.integers(1, 1000), min_size=2, max_size=12, unique=True).map(lambda values: [v / sum(values) for v in values])


def plain_kept(p: list[float], top_k: int, top_p: float) -> set[int]:
    """Which tokens stay, written as the definition says it."""
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    mass = sum(p[i] for i in order)
    chosen: list[int] = []
    for token in order:
        chosen.append(token)
        if sum(p[i] for i in chosen) / mass >= top_p:
            break
    return set(chosen)


@given(probabilities, st.integers(0, 14), st.floats(0.01, 1.0))
def test_kept_is_the_definition(p: list[float], top_k: int, top_p: float) -> None:
    cumulative = np.cumsum(sorted(p, reverse=True)[: top_k or None])
    assume(top_p == 1 or np.min(np.abs(cumulative / cumulative[-1] - top_p)) > 1e-6)  # else rounding decides
    found = kept(torch.tensor(p).log(), top_k, top_p)
    assert {i for i, mass in enumerate(found.tolist()) if mass > 0} == plain_kept(p, top_k, top_p)
    stay = found > 0
    expected = torch.tensor(p, dtype=torch.float64) * stay
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(), {0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}),
        (SamplingParams(top_k=2), {0: 2 / 3, 1: 1 / 3}),
        (SamplingParams(top_p=0.8), {0: 0.5 / 0.9, 1: 0.25 / 0.9, 2: 0.15 / 0.9}),
        (SamplingParams(top_k=3, top_p=0.8), {0: 2 / 3, 1: 1 / 3}),
        (SamplingParams(temperature=0.5), {0: 0.25 / 0.345, 1: 0.0625 / 0.345, 2: 0.0225 / 0.345, 3: 0.01 / 0.345}),
    ],
)
def test_frequencies(params: SamplingParams, allowed: dict[int, float]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log() + 3
    n = 4000
    tokens, logprobs = draw(logits.expand(n, -1), [params] * n, [generator(1, i, (5,)) for i in range(n)])
    counts = np.bincount(tokens, minlength=4)
    assert {i for i in range(4) if counts[i]} == allowed.keys()
    chi2 = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in allowed.items())
    assert chi2 < 21.1  # the 0.9999 quantile for 3 degrees of freedom
    scaled = (logits / params.temperature).log_softmax(-1)
    assert logprobs == pytest.approx([float(scaled[t]) for t in tokens], abs=1e-6)  # before top-k and top-p


def test_greedy_draws_nothing_and_reports_temperature_one() -> None:
    source = generator(0, 0, (5,))
    before = source.bit_generator.state
    tokens, logprobs = draw(torch.tensor([[1.0, 3.0, 2.0]]), [SamplingParams(temperature=0)], [source])
    assert tokens == [1]
    assert logprobs[0] == pytest.approx(3 - math.log(math.e + math.e**3 + math.e**2), abs=1e-6)
    assert source.bit_generator.state == before


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in ((1, 0, 1), (0.7, 5, 1), (0, 0, 1), (2, 0, 0.5), (1, 3, 0.9), (1, 0, 1))]
    together = draw(logits, params, [generator(3, i, (5,)) for i in range(6)])
    for i in range(6):
        alone = draw(logits[i : i + 1], [params[i]], [generator(3, i, (5,))])
        assert alone[0] == together[0][i : i + 1]
        assert alone[1] == pytest.approx(together[1][i : i + 1], abs=1e-6)


@given(st.integers(0, 2**40), st.integers(0, 100), st.lists(st.integers(0, 50000), min_size=1))
def test_seeds(seed: int, index: int, prompt: list[int]) -> None:
    first = generator(seed, index, prompt).random()
    assert first == generator(seed, index, tuple(prompt)).random()
    others = generator(seed, index + 1, prompt), generator(seed + 1, index, prompt), generator(seed, index, [*prompt, 1])
    assert first not in [other.random() for other in others]


def test_without_a_seed_draws_are_fresh() -> None:
    assert generator(None, 0, (5,)).random() != generator(None, 0, (5,)).random()


def test_the_last_token_with_mass_is_the_end() -> None:
    class Highest:
        def random(self) -> float:
            return 1 - 2**-53

    logits = torch.tensor([[0.0, 0.0, -1000.0]])
    assert draw(logits, [SamplingParams()], [Highest()])[0] == [1]  # type: ignore[list-item]

"""Bayesian, stochastic-order and anytime-valid comparisons: held to closed forms, to enumeration and to their own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.stats import almost_stochastic_order, anytime_difference, rope_signed_rank, rope_t

from .agreement import SCIPY

RANDOM = np.random.default_rng(21)
A, B = RANDOM.normal(0, 1, 20).tolist(), RANDOM.normal(0.4, 1, 20).tolist()


# ------------------------------------------------------------------------------------------------------------ Bayesian
def test_rope_t_is_the_posterior_of_the_mean() -> None:
    d = np.subtract(B, A)
    posterior = SCIPY.t(19, d.mean(), d.std(ddof=1) / math.sqrt(20))
    found = rope_t("x", A, B, rope=0.2)
    assert (found.below, found.above) == pytest.approx((posterior.cdf(-0.2), posterior.sf(0.2)))
    assert found.below + found.inside + found.above == pytest.approx(1)
    assert found.interval == pytest.approx(posterior.interval(0.95))
    correlated = rope_t("x", A, B, rope=0.2, correlation=0.1)
    wider = SCIPY.t(19, d.mean(), d.std(ddof=1) * math.sqrt(1 / 20 + 1 / 9))
    assert correlated.above == pytest.approx(wider.sf(0.2))
    assert "correlated" in correlated.method


def test_signed_rank_posterior_goes_where_the_data_are() -> None:
    up, mirrored = rope_signed_rank("x", A, [a + 1 for a in A], rope=0.5), rope_signed_rank("x", [a + 1 for a in A], A, rope=0.5)
    assert up.above > 0.99
    assert mirrored.below > 0.99
    none = rope_signed_rank("x", A, A, rope=0.1)
    assert (none.below, none.inside, none.above) == (0, 1, 0)
    assert rope_signed_rank("x", A, B, rope=0.1) == rope_signed_rank("x", A, B, rope=0.1)


def test_signed_rank_without_rope_is_near_wilcoxons_one_sided_p() -> None:
    """With a weak prior the posterior chance of "below" is close to the one-sided p-value of the signed-rank test."""
    found = rope_signed_rank("x", A, B, rope=0.0, draws=20_000)
    assert found.below == pytest.approx(SCIPY.wilcoxon(np.subtract(B, A), alternative="greater").pvalue, abs=0.04)


def test_bayesian_refusals() -> None:
    with pytest.raises(TooFewError, match="no spread"):
        rope_t("x", [1.0, 2.0], [2.0, 3.0], rope=0.1)
    with pytest.raises(StatisticsError, match="rope is -1"):
        rope_t("x", A, B, rope=-1)
    with pytest.raises(StatisticsError, match="correlation is 1"):
        rope_t("x", A, B, rope=0.1, correlation=1)
    with pytest.raises(StatisticsError, match="at least 1000 draws"):
        rope_signed_rank("x", A, B, rope=0.1, draws=10)


# --------------------------------------------------------------------------------------------------- stochastic order
def test_dominance_is_zero_one_or_half() -> None:
    assert almost_stochastic_order("x", [1.0, 2.0, 3.0], [2.0, 3.0, 4.0]).value == 0
    assert almost_stochastic_order("x", [2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).value == 1
    assert almost_stochastic_order("x", [1.0, 1.0], [1.0, 1.0, 1.0]).value == 0.5
    assert almost_stochastic_order("x", [0.0, 10.0], [4.0, 6.0]).value == pytest.approx(0.5)
    with pytest.raises(StatisticsError, match="at least 100"):
        almost_stochastic_order("x", A, B, resamples=5)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6), (7, 3)])
def test_violation_ratio_is_the_integral_over_quantiles(n: int, m: int) -> None:
    a, b = np.sort(RANDOM.normal(0, 1, n)), np.sort(RANDOM.normal(0.3, 2, m))
    grid = (np.arange(84_000) + 0.5) / 84_000
    gap = b[(grid * m).astype(int)] - a[(grid * n).astype(int)]
    expected = (np.minimum(gap, 0) ** 2).sum() / (gap**2).sum()
    assert almost_stochastic_order("x", a.tolist(), b.tolist()).value == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.integers(0, 9).map(float), min_size=2, max_size=9), st.lists(st.integers(0, 9).map(float), min_size=2, max_size=9))
def test_violations_of_both_directions_add_up_to_one(a: list[float], b: list[float]) -> None:
    forth, back = almost_stochastic_order("x", a, b, resamples=100), almost_stochastic_order("x", b, a, resamples=100)
    assert forth.value + back.value == pytest.approx(1)
    assert 0 <= forth.value <= forth.high <= 1


# ------------------------------------------------------------------------------------------------------------- anytime
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=120))
def test_anytime_interval_and_p_agree(rows: list[tuple[bool, bool]]) -> None:
    found = anytime_difference("x", [float(b) for b, _ in rows], [float(a) for _, a in rows])
    low, high = found.interval
    assert -1 <= low <= high <= 1
    if abs(found.p_value - 0.05) > 1e-9:
        assert (found.p_value < 0.05) == (low > 1e-12 or high < -1e-12)


def test_anytime_capital_is_that_of_the_definition() -> None:
    before, after = (RANDOM.random(40).tolist() for _ in range(2))
    found = anytime_difference("x", before, after)
    y, best, capital, squares, total = (np.subtract(after, before) + 1) / 2, 0.0, {1: 0.5, -1: 0.5}, 0.25, 0.5
    for t, value in enumerate(y, start=1):
        variance = squares / t
        bet = min(math.sqrt(2 * math.log(2 / 0.05) / (variance * t * math.log(t + 1))), 1.0)
        for sign in capital:
            capital[sign] *= 1 + sign * bet * (value - 0.5)
        best = max(best, *capital.values(), 0.5)
        total += value
        squares += (value - total / (t + 1)) ** 2
    assert found.p_value == pytest.approx(min(1.0, 1 / best))


def test_anytime_interval_narrows_and_scales() -> None:
    before, after = RANDOM.random(3000) * 0.5, RANDOM.random(3000) * 0.5 + 0.3
    short, long = (anytime_difference("x", before[:n].tolist(), after[:n].tolist()) for n in (100, 3000))
    assert short.interval[0] <= long.interval[0] < 0.3 < long.interval[1] <= short.interval[1]
    assert long.interval[1] - long.interval[0] < 0.06
    scaled = anytime_difference("x", (before * 100).tolist(), (after * 100).tolist(), bounds=(0, 100))
    assert scaled.interval == pytest.approx([100 * end for end in long.interval])


def test_anytime_refusals() -> None:
    with pytest.raises(StatisticsError, match="within bounds"):
        anytime_difference("x", [0.0, 2.0], [1.0, 1.0])
    with pytest.raises(StatisticsError, match="two rising numbers"):
        anytime_difference("x", [0.0, 1.0], [1.0, 1.0], bounds=(1, 1))


def test_peeking_after_every_pair_keeps_the_promise() -> None:
    """Under the null, looking after each of 200 pairs: rejections stay below 5 %, those of a t test at every look do not."""
    random, refused, naive = np.random.default_rng(4), 0, 0
    for _ in range(200):
        before, after = random.random(200), random.random(200)
        refused += anytime_difference("x", before.tolist(), after.tolist()).p_value < 0.05  # the largest capital of all looks
        d, n = np.cumsum(after - before), np.arange(1, 201)
        squares = np.cumsum((after - before) ** 2)
        t = (d / n)[9:] / np.sqrt((squares / n - (d / n) ** 2)[9:] / (n[9:] - 1))
        naive += bool((np.abs(t) > 2).any())
    assert refused <= 15
    assert naive > 40

"""Sizes of effects: held to closed forms, scipy and statsmodels; each interval agrees with the test it belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import Table2x2

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.records import Estimate, Finding
from crucible_framework.stats import (
    a12,
    cliffs_delta,
    cohen_d,
    eta_squared,
    glass_delta,
    hedges_g,
    noncentral,
    odds_ratio,
    omega_squared,
    paired_t,
    proportion_difference,
    rank_biserial,
    risk_difference,
    student_t,
)

from .agreement import SCIPY

RANDOM = np.random.default_rng(3)
A, B = RANDOM.normal(0, 1, 12).tolist(), RANDOM.normal(1, 1.5, 17).tolist()
NUMBERS = st.lists(st.integers(-5, 5).map(float), min_size=4, max_size=12)


def test_d_g_and_delta_are_their_formulas() -> None:
    va, vb, gap = np.var(A, ddof=1), np.var(B, ddof=1), np.mean(B) - np.mean(A)
    d = gap / math.sqrt((11 * va + 16 * vb) / 27)
    assert cohen_d("x", A, B).value == pytest.approx(d)
    j = math.gamma(27 / 2) / (math.sqrt(27 / 2) * math.gamma(26 / 2))
    assert hedges_g("x", A, B).value == pytest.approx(d * j)
    assert glass_delta("x", A, B).value == pytest.approx(gap / math.sqrt(va))
    assert cohen_d("x", A, B[:12], paired=True).value == pytest.approx(np.mean(np.subtract(B[:12], A)) / np.std(np.subtract(B[:12], A), ddof=1))


def test_interval_of_d_is_that_of_cumming_and_finch() -> None:
    """The ends are the effects under which the observed t is in the upper or lower 2.5 %."""
    found, t = cohen_d("x", A, B), student_t("x", A, B).statistic
    root = math.sqrt(12 * 17 / 29)
    assert SCIPY.nct.sf(t, 27, found.low * root) == pytest.approx(0.025, abs=1e-8)
    assert SCIPY.nct.cdf(t, 27, found.high * root) == pytest.approx(0.025, abs=1e-8)


@given(NUMBERS, NUMBERS)
def test_d_agrees_with_t(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    cases: list[tuple[Callable[[], Estimate], Callable[[], Finding]]] = [
        (lambda: cohen_d("x", a, b), lambda: student_t("x", a, b)),
        (lambda: cohen_d("x", a[:n], b[:n], paired=True), lambda: paired_t("x", a[:n], b[:n])),
    ]
    for effect, test in cases:
        try:
            found, p = effect(), test().p_value
        except TooFewError:
            with pytest.raises(TooFewError):
                test()
            continue
        assert found.low <= found.value <= found.high
        if abs(p - 0.05) > 1e-7 and found.low != found.high:
            assert (p < 0.05) == (found.low > 0 or found.high < 0)


def test_large_effects_have_intervals_too() -> None:
    found = cohen_d("x", [0.0, 0.001, 0.002, 0.001], [10.0, 10.001, 10.002, 10.0])
    assert 0 < found.low < found.value < found.high < math.inf


def test_enormous_effects_of_few_values_have_intervals_at_once() -> None:
    found = cohen_d("x", [1.0, 0.0, 0.0], [1e8, 1e8 + 1, 1e8 + 2])
    assert 0 < found.low < found.value < found.high < math.inf
    mirrored = cohen_d("x", [1e8, 1e8 + 1, 1e8 + 2], [1.0, 0.0, 0.0])
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), rel=1e-6)
    with pytest.raises(StatisticsError, match="another unit"):
        cohen_d("x", [1e99, 0.0], [1.0, 2.0])


@pytest.mark.parametrize("df", [3, 30, 300, 3000])
def test_far_noncentral_t_joins_the_exact_one(df: float) -> None:
    for t in (150.0, 190.0, 230.0):
        assert noncentral.t_cdf(t, df, 200.0) == pytest.approx(SCIPY.nct.cdf(t, df, 200.0), abs=0.01)
        assert noncentral.t_cdf(-t, df, -200.0) == pytest.approx(1 - noncentral.t_cdf(t, df, 200.0))
    assert (noncentral.t_cdf(-1.0, df, 300.0), noncentral.t_cdf(1.0, df, -300.0)) == pytest.approx((0, 1))


def test_flat_groups() -> None:
    assert cohen_d("x", [1.0, 1.0], [1.0, 1.0]).value == 0
    assert glass_delta("x", [1.0, 1.0], [1.0, 1.0]).high == 0
    assert rank_biserial("x", [1.0, 2.0], [1.0, 2.0]).value == 0
    assert eta_squared("x", {"a": [1.0, 1.0], "b": [1.0]}).value == 0
    for effect in (cohen_d, hedges_g, glass_delta):
        with pytest.raises(TooFewError, match="no spread"):
            effect("x", [1.0, 1.0], [2.0, 2.0])
    with pytest.raises(TooFewError, match="no spread"):
        omega_squared("x", {"a": [1.0, 1.0], "b": [2.0, 2.0]})
    with pytest.raises(TooFewError, match="more values than groups"):
        omega_squared("x", {"a": [1.0], "b": [2.0]})
    with pytest.raises(TooFewError, match="at least 3"):
        hedges_g("x", [1.0, 2.0], [2.0, 5.0], paired=True)


def test_cliff_and_a12_are_counts_of_wins() -> None:
    wins = np.mean([(y > x) - (y < x) for x in A for y in B])
    delta, superiority = cliffs_delta("x", A, B), a12("x", A, B)
    assert delta.value == pytest.approx(wins)
    assert superiority.value == pytest.approx(SCIPY.mannwhitneyu(B, A).statistic / len(A) / len(B))
    assert (superiority.low, superiority.high) == pytest.approx(((delta.low + 1) / 2, (delta.high + 1) / 2))
    assert superiority.method.startswith("A12")


def test_rank_biserial_is_kerbys_simple_difference() -> None:
    d = np.array([1.0, -2.0, 3.0, 4.0, 0.0, 5.0])
    found = rank_biserial("x", [0.0] * 6, d.tolist())
    assert found.value == pytest.approx((1 + 3 + 4 + 5 - 2) / 15)
    assert -1 <= found.low <= found.value <= found.high <= 1


def test_shares_of_variance_of_the_published_example() -> None:
    """[.89..]/[.87..]/[.84..]-like data: F = 12.667, η² = 0.6786, ω² = 0.6087."""
    groups = {"a": [0.89, 0.90, 0.88, 0.91, 0.89], "b": [0.87, 0.88, 0.86, 0.89, 0.87], "c": [0.84, 0.86, 0.85, 0.87, 0.85]}
    eta, omega = eta_squared("x", groups), omega_squared("x", groups)
    f = SCIPY.f_oneway(*groups.values()).statistic
    assert eta.value == pytest.approx(2 * f / (2 * f + 12))
    assert omega.value == pytest.approx(2 * (f - 1) / (2 * (f - 1) + 15))
    assert omega.value < eta.value
    assert 0 < eta.low < eta.value < eta.high < 1


def test_odds_ratio_is_that_of_statsmodels() -> None:
    a, b = [1.0] * 7 + [0.0] * 13, [1.0] * 12 + [0.0] * 6
    found, oracle = odds_ratio("x", a, b), Table2x2(np.array([[12, 6], [7, 13]]))
    assert found.value == pytest.approx(oracle.oddsratio)
    assert (found.low, found.high) == pytest.approx(oracle.oddsratio_confint())
    empty = odds_ratio("x", [0.0] * 5, [1.0] * 5)
    assert empty.value == pytest.approx(5.5 * 5.5 / 0.25)
    assert "half an observation" in empty.method
    with pytest.raises(StatisticsError, match="neither 0 nor 1"):
        odds_ratio("x", [0.5, 1.0], [1.0])


def test_risk_difference_is_that_of_the_test() -> None:
    a, b = [1.0] * 7 + [0.0] * 13, [1.0] * 12 + [0.0] * 6
    found, test = risk_difference("x", a, b), proportion_difference("x", a, b)
    assert (found.value, found.low, found.high) == (test.effect, *test.interval)


def test_noncentral_distributions_are_those_of_scipy_and_finite_far_out() -> None:
    assert noncentral.t_cdf(2.0, 9, 1.0) == pytest.approx(SCIPY.nct.cdf(2.0, 9, 1.0))
    assert noncentral.f_cdf(2.0, 3, 9, 1.0) == pytest.approx(SCIPY.ncf.cdf(2.0, 3, 9, 1.0))
    assert noncentral.chi2_cdf(2.0, 3, 1.0) == pytest.approx(SCIPY.ncx2.cdf(2.0, 3, 1.0))
    for p in (noncentral.t_cdf(-2.0, 150, 12.0), noncentral.f_cdf(2.0, 3, 600, 2000.0), noncentral.chi2_cdf(20.0, 3, 2e5)):
        assert 0 <= p < 1e-6
    assert noncentral.chi2_cdf(2e5 + 3, 3, 2e5) == pytest.approx(0.5, abs=0.01)
    assert noncentral.f_cdf(2e6, 1, 1000, 2e6) == pytest.approx(SCIPY.ncf.cdf(1e5, 1, 1000, 1e5), abs=0.01)
    for f in (1e2, 1e4, 1e6):
        low, high = noncentral.f_interval(f, 2, 60, 0.9)
        assert 0 < low < 2 * f < high < math.inf
        low, high = noncentral.chi2_interval(f, 2, 0.9)
        assert 0 < low < f < high < math.inf

"""Shares and counts: two proportions, McNemar, Fisher, Clopper–Pearson."""

from __future__ import annotations

import math
import warnings

import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats import proportion

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.stats import (
    clopper_pearson,
    fisher_exact,
    mcnemar_exact,
    proportion_difference,
)

from .agreement import SCIPY, check

BITS = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=25)


@given(BITS, BITS)
def test_two_shares_are_those_of_statsmodels(a: list[float], b: list[float]) -> None:
    found = proportion_difference("x", a, b)
    check(found)
    k1, n1, k2, n2 = int(sum(a)), len(a), int(sum(b)), len(b)
    if not 0 < k1 + k2 < n1 + n2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the oracle, which divides by zero on its way
        oracle = proportion.test_proportions_2indep(k2, n2, k1, n1, method="score", compare="diff", correction=True)
        assert found.p_value == pytest.approx(oracle.pvalue, abs=1e-9)


@pytest.mark.parametrize(("k1", "n1", "k2", "n2"), [(7, 20, 12, 25), (1, 30, 5, 25), (40, 90, 41, 60), (1, 2, 2, 3)])
def test_ends_of_the_interval_are_where_the_constrained_likelihood_puts_the_score(k1: int, n1: int, k2: int, n2: int) -> None:
    """With a numerical maximum of the likelihood (the ends of statsmodels 0.15 differ in the third digit)."""
    found = proportion_difference("x", [1.0] * k1 + [0.0] * (n1 - k1), [1.0] * k2 + [0.0] * (n2 - k2))
    for delta, expected in zip(found.interval, (1.959964, -1.959964), strict=True):

        def minus_log(p: float, delta: float = delta) -> float:
            cells = ((k1, p), (n1 - k1, 1 - p), (k2, p + delta), (n2 - k2, 1 - p - delta))
            return -sum(count * math.log(max(chance, 1e-300)) for count, chance in cells)

        bounds = (max(0.0, -delta), min(1.0, 1 - delta))
        p1 = float(scipy.optimize.minimize_scalar(minus_log, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)
        p2, n = p1 + delta, n1 + n2
        z = (found.effect - delta) / math.sqrt((p1 * (1 - p1) / n1 + p2 * (1 - p2) / n2) * n / (n - 1))
        assert z == pytest.approx(expected, abs=1e-4)


def test_miettinen_nurminen_interval_of_the_published_example() -> None:
    """Newcombe 1998, Statistics in Medicine 17:873-890, table II: 56/70 against 48/80, method of Miettinen and Nurminen: 0.0528 to 0.3382."""
    found = proportion_difference("x", [1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14)
    assert found.interval == pytest.approx((0.0528, 0.3382), abs=6e-5)


@given(st.integers(0, 30), st.integers(0, 30))
def test_exact_mcnemar_agrees_with_its_interval(gained: int, lost: int) -> None:
    found = mcnemar_exact("x", gained, lost, n=80)
    assert found.p_value == pytest.approx(SCIPY.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)
    check(found)


def test_clopper_pearson_is_that_of_scipy() -> None:
    for k, n in ((0, 7), (3, 10), (10, 10)):
        oracle = SCIPY.binomtest(k, n).proportion_ci(0.95, "exact")
        assert clopper_pearson(k, n) == pytest.approx((oracle.low, oracle.high))
    with pytest.raises(TooFewError):
        clopper_pearson(0, 0)
    with pytest.raises(StatisticsError, match="k is 4 of n = 3"):
        clopper_pearson(4, 3)


@given(st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(lambda cells: sum(cells) > 1))
def test_fisher_agrees_with_its_interval_and_scipys_odds_ratio(cells: list[int]) -> None:
    table = [cells[:2], cells[2:]]
    found = fisher_exact("x", table)
    check(found)
    one_sided = [SCIPY.fisher_exact(table, alternative=side).pvalue for side in ("greater", "less")]
    assert found.p_value == pytest.approx(min(1.0, 2 * min(one_sided)), abs=1e-9)
    if min(cells) > 0:
        oracle = SCIPY.contingency.odds_ratio(table, kind="conditional")
        ends = oracle.confidence_interval(0.95)
        q = [(odds - 1) / (odds + 1) for odds in (oracle.statistic, ends.low, ends.high)]
        assert (found.effect, *found.interval) == pytest.approx(q, abs=1e-5)


def test_counts_must_be_counts() -> None:
    with pytest.raises(StatisticsError, match="expected a count"):
        mcnemar_exact("x", -1, 2)
    with pytest.raises(StatisticsError, match="at least the 4 pairs"):
        mcnemar_exact("x", 2, 2, n=3)
    with pytest.raises(StatisticsError, match="2 × 2"):
        fisher_exact("x", [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(TooFewError, match="empty table"):
        fisher_exact("x", [[0, 0], [0, 0]])
    with pytest.raises(StatisticsError, match="expected 0 or 1"):
        proportion_difference("x", [0.0, 0.5], [1.0])
    with pytest.raises(TooFewError, match="single value"):
        proportion_difference("x", [0.0], [1.0])

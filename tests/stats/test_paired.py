"""Paired differences: held to scipy, statsmodels and published tables; interval and p-value never disagree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import statsmodels.api as sm
from hypothesis import assume, given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.records import Finding
from crucible_framework.stats import paired_difference

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def binary(gained: int, lost: int, n: int, level: float = 0.95) -> Finding:
    both = n - gained - lost
    before = [0.0] * gained + [1.0] * lost + [1.0] * (both // 2) + [0.0] * (both - both // 2)
    after = [1.0] * gained + [0.0] * lost + [1.0] * (both // 2) + [0.0] * (both - both // 2)
    return paired_difference("accuracy", before, after, level=level)


def agrees(found: Finding) -> bool:
    low, high = found.interval
    if min(abs(low), abs(high)) < 1e-7 or abs(found.p_value - (1 - found.level)) < 1e-7:
        return True  # on the edge, where the last digit decides
    return (found.p_value < 1 - found.level) == (low > 0 or high < 0)


# -------------------------------------------------------------------------------------------------------- 0/1 outcomes
def test_tango_interval_of_the_published_example() -> None:
    """Bentur et al. 2009 in Fagerland, Lydersen & Laake 2014: 1 and 7 discordant of 21; Tango −0.517 to −0.026."""
    found = binary(1, 7, 21)
    assert found.effect == pytest.approx(-6 / 21)
    assert found.interval == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert found.test == "McNemar score test with Tango interval"


@given(BITS)
def test_the_score_test_is_mcnemars(rows: list[tuple[bool, bool]]) -> None:
    gained, lost = sum(a and not b for b, a in rows), sum(b and not a for b, a in rows)
    found = paired_difference("accuracy", [float(b) for b, _ in rows], [float(a) for _, a in rows])
    if gained + lost == 0:
        assert (found.statistic, found.p_value, found.effect) == (0.0, 1.0, 0.0)
        assert found.interval[0] < 0 < found.interval[1]
        return
    oracle = mcnemar([[0, gained], [lost, 0]], exact=False, correction=False)
    assert found.statistic**2 == pytest.approx(oracle.statistic)
    assert found.p_value == pytest.approx(oracle.pvalue)
    assert f"{gained} gained, {lost} lost of {len(rows)}" in found.why


@pytest.mark.parametrize(("gained", "lost", "n"), [(5, 2, 40), (0, 3, 25), (9, 0, 30), (4, 4, 12), (1, 7, 21)])
def test_tango_ends_are_where_the_constrained_likelihood_puts_the_score(gained: int, lost: int, n: int) -> None:
    """An independent way: the nuisance parameter from a numerical maximum of the likelihood, not from Tango's closed form."""

    def z(delta: float) -> float:
        def minus_log(q: float) -> float:
            p = q + delta
            return -(gained * math.log(max(p, 1e-300)) + lost * math.log(max(q, 1e-300)) + (n - gained - lost) * math.log(max(1 - p - q, 1e-300)))

        floor, ceiling = max(0.0, -delta), (1 - delta) / 2
        q = float(scipy.optimize.minimize_scalar(minus_log, bounds=(floor, ceiling), method="bounded", options={"xatol": 1e-12}).x)
        return float((gained - lost - n * delta) / math.sqrt(n * (2 * q + delta - delta**2)))

    low, high = binary(gained, lost, n).interval
    assert z(low) == pytest.approx(1.959964, abs=2e-3)
    assert z(high) == pytest.approx(-1.959964, abs=2e-3)


def test_all_gained_and_all_lost_reach_the_edge() -> None:
    up, down = binary(10, 0, 10), binary(0, 10, 10)
    assert (up.effect, up.interval[1], down.effect, down.interval[0]) == (1.0, 1.0, -1.0, -1.0)
    z2 = scipy.stats.norm.ppf(0.975) ** 2  # here the score is √(n (1 − Δ) / (1 + Δ)), so the end has a closed form
    assert up.interval[0] == pytest.approx(-down.interval[1])
    assert up.interval[0] == pytest.approx((10 - z2) / (10 + z2))
    assert up.p_value == down.p_value < 0.01


# --------------------------------------------------------------------------------------------------------------- numbers
def test_numbers_get_the_paired_t_test_of_scipy() -> None:
    random = np.random.default_rng(5)
    before = list(random.normal(size=25))
    after = list(np.array(before) + random.normal(0.3, 0.5, size=25))
    found = paired_difference("seconds", before, after, level=0.9)
    oracle = scipy.stats.ttest_rel(after, before)
    assert (found.statistic, found.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))
    assert found.interval == pytest.approx(tuple(oracle.confidence_interval(0.9)))
    assert (found.test, found.clusters, found.n) == ("paired t test", None, 25)


@given(st.data())
def test_clustered_differences_are_those_of_a_cluster_robust_regression(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=5, max_size=40))
    pair = st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0]))
    rows = data.draw(st.lists(pair, min_size=len(names), max_size=len(names)))
    assume(2 <= len(set(names)) < len(names))
    differences = np.array([a - b for b, a in rows])
    codes = np.unique(names, return_inverse=True)[1]
    fit = sm.OLS(differences, np.ones(len(rows))).fit()
    se = fit.get_robustcov_results("cluster", groups=codes, use_correction=True).bse[0]
    assume(se > 1e-6)
    found = paired_difference("accuracy", [b for b, _ in rows], [a for _, a in rows], clusters=names)
    df = len(set(names)) - 1
    assert found.statistic == pytest.approx(differences.mean() / se, abs=1e-9)
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(differences.mean() / se), df), abs=1e-9)
    half = scipy.stats.t.ppf(0.975, df) * se
    assert found.interval == pytest.approx((max(-1, differences.mean() - half), min(1, differences.mean() + half)), abs=1e-9)
    assert (found.test, found.clusters) == ("cluster-robust paired t test (CR1)", df + 1)


# ------------------------------------------------------------------------------------------------------------ properties
@given(st.data())
def test_interval_and_p_value_agree_and_hold_under_swap_and_order(data: st.DataObject) -> None:
    value = data.draw(st.sampled_from([st.sampled_from([0.0, 1.0]), st.floats(0, 1).map(lambda x: round(x, 2))]))
    rows = data.draw(st.lists(st.tuples(value, value, st.sampled_from("abcde")), min_size=2, max_size=30))
    level = data.draw(st.sampled_from([0.8, 0.95, 0.99]))
    clusters = data.draw(st.booleans())
    assume(not clusters or len({c for *_, c in rows}) > 1)

    def run(order: list[tuple[float, float, str]], level: float = level) -> Finding:
        before, after, names = [b for b, _, _ in order], [a for _, a, _ in order], [c for *_, c in order]
        return paired_difference("score", before, after, clusters=names if clusters else None, level=level)

    found, swapped, turned = run(rows), run([(a, b, c) for b, a, c in rows]), run(rows[::-1])
    assert agrees(found)
    assert -1 <= found.interval[0] <= found.effect + 1e-12
    assert found.effect <= found.interval[1] + 1e-12 <= 1 + 2e-12
    assert 0 <= found.p_value <= 1
    assert swapped.effect == pytest.approx(-found.effect, abs=1e-12)
    assert swapped.p_value == pytest.approx(found.p_value, abs=1e-9)
    assert (-swapped.interval[1], -swapped.interval[0]) == pytest.approx(found.interval, abs=1e-7)
    assert (turned.effect, turned.p_value, *turned.interval) == pytest.approx((found.effect, found.p_value, *found.interval), abs=1e-9)
    wider = run(rows, 0.999)
    assert wider.interval[0] <= found.interval[0] + 1e-9
    assert found.interval[1] <= wider.interval[1] + 1e-9


def test_pairs_with_a_side_missing_are_left_out() -> None:
    found = paired_difference("score", [0.0, None, 1.0, 0.0], [1.0, 1.0, None, 1.0])
    assert (found.n, found.effect) == (2, 1.0)
    assert found.why.endswith("; 2 of 4 did not apply and are left out")


def test_no_spread_is_handled_without_inventing_certainty() -> None:
    clusters = [str(i // 3) for i in range(18)]
    every = paired_difference("score", [0.0] * 18, [1.0] * 18, clusters=clusters)
    assert every.interval == pytest.approx(binary(6, 0, 6).interval)
    assert "6 clusters" in every.test
    half = paired_difference("f1", [0.25] * 12, [0.75] * 12)
    assert half.interval[0] < 0.5 < half.interval[1]
    assert "12 pairs" in half.test
    same = paired_difference("nll", [2.0, 3.0], [2.0, 3.0])
    assert (same.effect, same.p_value, same.interval, same.test) == (0.0, 1.0, (0.0, 0.0), "none needed")
    with pytest.raises(StatisticsError, match=r"differ by exactly 0\.5"):
        paired_difference("nll", [2.0, 3.0, 4.0], [2.5, 3.5, 4.5])


def test_a_true_null_is_rejected_as_often_as_promised() -> None:
    random = np.random.default_rng(6)
    names = [str(i // 5) for i in range(150)]
    rejected = {"clustered": 0, "ignored": 0, "score": 0}
    for _ in range(300):
        shared = np.repeat(random.integers(0, 2, size=(30, 2)), 5, axis=0)  # answers of one document agree, on either side alone
        before, after = [float(x) for x in shared[:, 0]], [float(x) for x in shared[:, 1]]
        rejected["clustered"] += paired_difference("x", before, after, clusters=names).p_value < 0.05
        rejected["ignored"] += paired_difference("x", before, after).p_value < 0.05
        bits = random.integers(0, 2, size=(2, 60)).astype(float)
        rejected["score"] += paired_difference("x", list(bits[0]), list(bits[1])).p_value < 0.05
    assert 0.01 <= rejected["clustered"] / 300 <= 0.09
    assert 0.01 <= rejected["score"] / 300 <= 0.09
    assert rejected["ignored"] / 300 > 0.25  # what ignoring the documents costs


@pytest.mark.parametrize(
    ("before", "after", "options", "error", "message"),
    [
        ([1.0], [1.0, 0.0], {}, StatisticsError, "1 values before and 2 after"),
        ([1.0], [0.0], {}, TooFewError, "single pair"),
        ([1.0, 0.0], [0.0, 1.0], {"clusters": ["a", "a"]}, TooFewError, "single cluster"),
        ([None, None], [1.0, 0.0], {}, TooFewError, "no value that applies"),
        ([1.0, 0.0], [math.nan, 0.0], {}, StatisticsError, "nan at position 0"),
        ([1.0, 0.0], [1.0, 0.0], {"level": 1}, StatisticsError, "level is 1"),
        ([1.0, 0.0], [3.0, 0.0], {"bounded": True}, StatisticsError, "bounded is True"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_why(
    before: list[float | None], after: list[float | None], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        paired_difference("score", before, after, **options)  # type: ignore[arg-type]

"""Tests of two groups: held to scipy, statsmodels and enumeration; interval and p-value never disagree; degenerate data have answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.stats import (
    brunner_munzel,
    clustered_t,
    mann_whitney,
    paired_difference,
    paired_t,
    permutation_test,
    student_t,
    tost,
    welch_t,
    wilcoxon,
)

from .agreement import SCIPY, check

SIDES = ("two-sided", "greater", "less")
NUMBERS = st.lists(st.integers(-6, 6).map(float), min_size=8, max_size=14)
BITS = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=25)
RANDOM = np.random.default_rng(11)
CASES = [
    ([1.2, 3.4, 2.2, 5.1, 4.4, 3.9], [2.2, 4.4, 6.1, 5.0, 7.7, 6.8, 5.5]),
    (RANDOM.normal(0, 1, 30).tolist(), RANDOM.normal(0.4, 3, 12).tolist()),
    (RANDOM.exponential(1, 60).tolist(), RANDOM.exponential(1.6, 70).tolist()),
    (RANDOM.integers(0, 5, 40).tolist(), RANDOM.integers(1, 6, 40).tolist()),
]


# ------------------------------------------------------------------------------------------------------------------- t
@pytest.mark.parametrize("alternative", SIDES)
@pytest.mark.parametrize(("a", "b"), CASES)
def test_t_tests_are_those_of_scipy(a: list[float], b: list[float], alternative: str) -> None:
    for ours, equal in ((student_t, True), (welch_t, False)):
        found = ours("x", a, b, alternative=alternative)  # type: ignore[arg-type]
        oracle = SCIPY.ttest_ind(b, a, equal_var=equal, alternative=alternative)
        assert found.statistic == pytest.approx(oracle.statistic)
        assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-9)
        ends = oracle.confidence_interval(0.95)
        if alternative == "two-sided":
            assert found.interval == pytest.approx((ends.low, ends.high))
            check(found)
        else:
            assert found.level == 0.9
            assert found.interval[0 if alternative == "greater" else 1] == pytest.approx(ends.low if alternative == "greater" else ends.high)
    n = min(len(a), len(b))
    paired, oracle = paired_t("x", a[:n], b[:n], alternative=alternative), SCIPY.ttest_rel(b[:n], a[:n], alternative=alternative)  # type: ignore[arg-type]
    assert (paired.statistic, paired.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))


def test_paired_t_is_the_paired_difference_of_numbers() -> None:
    a, b = CASES[0][0], CASES[0][1][:6]
    assert paired_t("x", a, b).interval == pytest.approx(paired_difference("x", a, b).interval)


def test_unsigned_integers_do_not_wrap() -> None:
    a, b = np.array([3, 5, 7, 9], dtype=np.uint8), np.array([1, 2, 4, 3], dtype=np.uint8)
    for test in (student_t, welch_t, paired_t, mann_whitney, brunner_munzel):
        assert test("x", a, b).effect < 0  # type: ignore[arg-type]
    assert permutation_test("x", a.tolist() * 2, b.tolist() * 2, paired=True).effect == pytest.approx(-3.5)


@pytest.mark.parametrize("test", [student_t, welch_t, paired_t, mann_whitney, wilcoxon, brunner_munzel])
def test_equal_constants_are_no_difference(test: object) -> None:
    found = test("x", [2.0] * 8, [2.0] * 8)  # type: ignore[operator]
    assert (found.effect, found.p_value, found.interval) == (0.0, 1.0, (0.0, 0.0))


@pytest.mark.parametrize("test", [student_t, welch_t, paired_t])
def test_different_constants_have_no_t_test(test: object) -> None:
    with pytest.raises(TooFewError, match="no spread"):
        test("x", [1.0] * 5, [2.0] * 5)  # type: ignore[operator]
    with pytest.raises(TooFewError):
        test("x", [1.0], [2.0])  # type: ignore[operator]


def test_none_is_left_out_and_counted() -> None:
    found = welch_t("x", [1.0, None, 3.0], [2.0, 4.0, 7.0])
    assert found.n == 5
    assert "1 of 3 did not apply and is left out" in found.why


def test_one_sided_needs_a_level_above_one_half() -> None:
    with pytest.raises(StatisticsError, match=r"more than 0\.5"):
        welch_t("x", *CASES[0], alternative="less", level=0.4)
    with pytest.raises(StatisticsError, match="expected 'two-sided'"):
        welch_t("x", *CASES[0], alternative="both")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- ranks
@pytest.mark.parametrize("alternative", SIDES)
@pytest.mark.parametrize(("a", "b"), CASES)
def test_rank_tests_are_those_of_scipy(a: list[float], b: list[float], alternative: str) -> None:
    found = mann_whitney("x", a, b, alternative=alternative)  # type: ignore[arg-type]
    tied, n = len({*a, *b}) < len(a) + len(b), min(len(a), len(b))
    if not (tied and len(a) + len(b) <= 100):
        method = "exact" if len(a) + len(b) <= 100 else "asymptotic"
        oracle = SCIPY.mannwhitneyu(b, a, alternative=alternative, method=method)
        assert (found.statistic, found.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))
    signed = wilcoxon("x", a[:n], b[:n], alternative=alternative)  # type: ignore[arg-type]
    if not tied:
        oracle = SCIPY.wilcoxon(np.subtract(b[:n], a[:n]), alternative=alternative, method="exact")
        assert signed.p_value == pytest.approx(oracle.pvalue)
    if n >= 10:
        munzel, oracle = brunner_munzel("x", a, b, alternative=alternative), SCIPY.brunnermunzel(b, a, alternative=alternative)  # type: ignore[arg-type]
        assert (-munzel.statistic, munzel.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))
    for one in (found, signed):
        if alternative == "two-sided":
            check(one)


def test_ties_and_many_values_keep_the_corrections_of_scipy() -> None:
    a, b = RANDOM.integers(0, 6, 80), RANDOM.integers(0, 7, 90)
    oracle = SCIPY.mannwhitneyu(b, a, method="asymptotic")
    assert mann_whitney("x", a.tolist(), b.tolist()).p_value == pytest.approx(oracle.pvalue)
    x, y = RANDOM.integers(0, 9, 260), RANDOM.integers(0, 10, 260)
    oracle = SCIPY.wilcoxon(y - x, zero_method="zsplit", correction=True, method="asymptotic")
    ours = wilcoxon("x", x.tolist(), y.tolist())
    assert ours.statistic == pytest.approx(max(oracle.statistic, 260 * 261 / 2 - oracle.statistic), rel=1e-12)
    moved = SCIPY.rankdata(np.abs(y - x))[x != y]
    z = (abs(ours.statistic - 260 * 261 / 4) - 0.5) / math.sqrt((moved**2).sum() / 4)
    assert ours.p_value == pytest.approx(2 * SCIPY.norm.sf(z))


def test_exact_p_with_ties_is_that_of_all_arrangements() -> None:
    a, b = [1.0, 1.0, 2.0, 3.0, 3.0], [2.0, 3.0, 3.0, 4.0, 5.0, 5.0]
    ranks = SCIPY.rankdata([*a, *b])
    sums = np.array([sum(picked) for picked in itertools.combinations(ranks, len(b))])
    observed = ranks[5:].sum()
    expected = 2 * min(np.mean(sums >= observed - 1e-9), np.mean(sums <= observed + 1e-9))
    assert mann_whitney("x", a, b).p_value == pytest.approx(expected)
    d = np.array([1.0, 1.0, -1.0, 2.0, 2.0, 3.0, 0.0, 4.0])
    r = SCIPY.rankdata(np.abs(d))
    flips = np.array([sum(rank for rank, sign in zip(r[d != 0], signs, strict=True) if sign) for signs in itertools.product((0, 1), repeat=7)])
    seen = r[d > 0].sum()
    expected = 2 * min(np.mean(flips >= seen - 1e-9), np.mean(flips <= seen + 1e-9))
    assert wilcoxon("x", [0.0] * 8, d.tolist()).p_value == pytest.approx(expected)


def test_hodges_lehmann_interval_of_the_textbook() -> None:
    """Hollander & Wolfe 1973: depression scale (wilcox.test of R: V = 40, p = 0.03906, interval 0.010 to 0.786, pseudo-median 0.46)."""
    before = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
    after = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
    found = wilcoxon("depression", after, before)
    assert (found.statistic, found.p_value, found.effect) == pytest.approx((40, 0.0390625, 0.46))
    assert found.interval == pytest.approx((0.010, 0.786))


def test_too_few_for_a_level_says_the_smallest_p() -> None:
    with pytest.raises(TooFewError, match=r"p = 0\.0625"):
        wilcoxon("x", [0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert wilcoxon("x", [0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], level=0.9).p_value == 0.0625
    with pytest.raises(TooFewError, match=r"p = 0\.1"):
        mann_whitney("x", [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])


@given(NUMBERS, NUMBERS)
def test_interval_and_p_agree_on_any_data(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    for test, x, y in ((mann_whitney, a, b), (wilcoxon, a[:n], b[:n]), (brunner_munzel, a, b), (welch_t, a, b), (student_t, a, b)):
        try:
            check(test("x", x, y))
        except TooFewError as error:
            assert "spread" in str(error) or "too few" in str(error)  # noqa: PT017


@given(NUMBERS, NUMBERS)
def test_effects_are_antisymmetric(a: list[float], b: list[float]) -> None:
    forth, back = brunner_munzel("x", a, b), brunner_munzel("x", b, a)
    assert forth.effect == pytest.approx(-back.effect)
    there, again = mann_whitney("x", a, b), mann_whitney("x", b, a)
    assert there.p_value == pytest.approx(again.p_value)
    assert there.interval == pytest.approx((-again.interval[1], -again.interval[0]), abs=1e-12)


@pytest.mark.parametrize("sizes", [(5, 5), (12, 12), (3, 40)])
def test_separated_groups_get_the_exact_rank_test(sizes: tuple[int, int]) -> None:
    a, b = list(range(sizes[0])), list(range(100, 100 + sizes[1]))
    found = brunner_munzel("x", a, b)
    assert found.p_value == pytest.approx(2 / math.comb(sum(sizes), sizes[0]))
    assert found.effect == 1.0
    check(found)
    mirrored = brunner_munzel("x", b, a)
    assert (mirrored.effect, mirrored.p_value) == pytest.approx((-1.0, found.p_value))
    assert mirrored.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    check(mirrored)


def test_too_large_for_ranks_names_another_way() -> None:
    with pytest.raises(StatisticsError, match="brunner_munzel"):
        mann_whitney("x", np.zeros(6000).tolist(), np.ones(6000).tolist())
    with pytest.raises(StatisticsError, match="paired_difference"):
        wilcoxon("x", np.zeros(7100).tolist(), np.ones(7100).tolist())


# --------------------------------------------------------------------------------------------------------- permutation
def test_permutation_p_is_that_of_scipy() -> None:
    a, b = CASES[0][0], CASES[0][1]
    oracle = SCIPY.permutation_test((b, a), lambda x, y: np.mean(x) - np.mean(y), permutation_type="independent", n_resamples=np.inf)
    two_sided = np.mean(np.abs(oracle.null_distribution) >= abs(oracle.statistic) - 1e-12)
    found = permutation_test("x", a, b)
    assert found.p_value == pytest.approx(two_sided)
    check(found)
    d = np.subtract(b[:6], a)
    signs = np.array(list(itertools.product((1, -1), repeat=6)))
    assert permutation_test("x", a, b[:6], paired=True, level=0.9).p_value == pytest.approx(np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9))


@pytest.mark.parametrize("paired", [True, False])
def test_permutation_interval_inverts_the_test(paired: bool) -> None:
    a, b = RANDOM.normal(0, 1, 9), RANDOM.normal(1, 1, 9)
    low, high = permutation_test("x", a.tolist(), b.tolist(), paired=paired).interval
    for end, outwards in ((low, -1), (high, 1)):
        inside = permutation_test("x", a.tolist(), (b - end + outwards * 1e-6).tolist(), paired=paired)
        outside = permutation_test("x", a.tolist(), (b - end - outwards * 1e-6).tolist(), paired=paired)
        assert outside.p_value < 0.05 <= inside.p_value


@given(NUMBERS, NUMBERS, st.booleans())
def test_permutation_interval_and_p_agree(a: list[float], b: list[float], paired: bool) -> None:
    n = min(len(a), len(b), 9)
    try:
        check(permutation_test("x", a[:n], b[:n], paired=paired, resamples=999))
    except TooFewError as error:
        assert "arrangement" in str(error)  # noqa: PT017


def test_clusters_are_exchanged_whole() -> None:
    d = np.repeat([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -1.0], 3)
    names = [str(i // 3) for i in range(21)]
    clustered = permutation_test("x", [0.0] * 21, d.tolist(), paired=True, clusters=names)
    alone = permutation_test("x", [0.0] * 7, d[::3].tolist(), paired=True)
    assert clustered.p_value == pytest.approx(alone.p_value)
    assert clustered.interval == pytest.approx(alone.interval)
    assert clustered.clusters == 7
    sides = {"before": [f"a{i // 3}" for i in range(15)], "after": [f"b{i // 3}" for i in range(15)]}
    x, y = np.repeat(RANDOM.normal(0, 1, 5), 3), np.repeat(RANDOM.normal(2, 1, 5), 3)
    whole, single = permutation_test("x", x.tolist(), y.tolist(), clusters=sides), permutation_test("x", x[::3].tolist(), y[::3].tolist())
    assert whole.p_value == pytest.approx(single.p_value)
    assert whole.interval == pytest.approx(single.interval)


def test_random_arrangements_say_their_error_and_never_give_zero() -> None:
    a, b = RANDOM.normal(0, 1, 40).tolist(), RANDOM.normal(5, 1, 40).tolist()
    found = permutation_test("x", a, b)
    assert found.p_value == 1 / 10_000
    assert "Monte Carlo error" in found.why
    assert permutation_test("x", a, b) == found
    check(found)
    check(permutation_test("x", a, b, paired=True))


def test_permutation_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TooFewError, match="no arrangement is rarer"):
        permutation_test("x", [0.0] * 4, [1.0, 2.0, 3.0, 4.0], paired=True)
    assert permutation_test("x", [1.0] * 3, [1.0] * 3).p_value == 1.0
    with pytest.raises(StatisticsError, match="both sides"):
        permutation_test("x", [1.0, 2.0], [1.0, 2.0], clusters={"before": ["a", "b"], "after": ["b", "c"]})
    with pytest.raises(StatisticsError, match="one cluster for each pair"):
        permutation_test("x", [1.0], [2.0], paired=True, clusters={})
    with pytest.raises(StatisticsError, match="not paired"):
        permutation_test("x", [1.0], [2.0], clusters=["a"])
    with pytest.raises(StatisticsError, match="999"):
        permutation_test("x", [1.0], [2.0], resamples=10)


# ------------------------------------------------------------------------------------------------------------- clusters
def test_clustered_t_with_clusters_of_one_is_welch() -> None:
    a, b = CASES[0]
    found = clustered_t("x", a, b, before_clusters=[f"a{i}" for i in range(len(a))], after_clusters=[f"b{i}" for i in range(len(b))])
    assert (found.p_value, *found.interval) == pytest.approx((welch_t("x", a, b).p_value, *welch_t("x", a, b).interval))


def test_shared_clusters_are_credited_as_pairs_are() -> None:
    """With one value per cluster and side, summing residuals by cluster is the paired t test."""
    a, b = RANDOM.normal(0, 3, 15), RANDOM.normal(0, 0.3, 15)
    b = a + b + 0.2
    names = [str(i) for i in range(15)]
    found = clustered_t("x", a.tolist(), b.tolist(), before_clusters=names, after_clusters=names)
    assert found.p_value == pytest.approx(paired_t("x", a.tolist(), b.tolist()).p_value)
    assert found.clusters == 15
    check(found)


def test_clustered_t_needs_clusters_and_spread() -> None:
    with pytest.raises(TooFewError, match="single cluster after"):
        clustered_t("x", [1.0, 2.0], [1.0, 2.0], before_clusters=["a", "b"], after_clusters=["c", "c"])
    with pytest.raises(TooFewError, match="no spread"):
        clustered_t("x", [1.0, 1.0], [2.0, 2.0], before_clusters=["a", "b"], after_clusters=["c", "d"])


# --------------------------------------------------------------------------------------------------------- equivalence
def test_tost_is_that_of_statsmodels() -> None:
    a, b = CASES[1]
    oracle = ttost_ind(np.array(b), np.array(a), -2.0, 2.0, usevar="unequal")
    found = tost("x", a, b, margin=2.0)
    assert found.p_value == pytest.approx(oracle[0])
    assert (found.p_value < 0.05) == (found.interval[0] > -2 and found.interval[1] < 2)
    oracle = ttost_paired(np.array(b), np.array(a[:12]), -2.5, 2.5)
    assert tost("x", a[:12], b, margin=2.5, paired=True).p_value == pytest.approx(oracle[0])


@given(BITS, st.floats(0.02, 0.9))
def test_tost_of_shares_agrees_with_its_interval(b: list[float], margin: float) -> None:
    a = [1.0 - value if index % 5 == 0 else value for index, value in enumerate(b)]
    for paired in (True, False):
        found = tost("x", a, b, margin=margin, paired=paired)
        if abs(found.p_value - 0.05) > 1e-6:
            assert (found.p_value < 0.05) == (found.interval[0] > -margin and found.interval[1] < margin), found


def test_identical_answers_are_shown_equal_only_if_there_are_many() -> None:
    few, many = ([float(i % 2) for i in range(n)] for n in (10, 400))
    assert tost("x", few, few, margin=0.05, paired=True).p_value > 0.05
    assert tost("x", many, many, margin=0.05, paired=True).p_value < 0.05
    with pytest.raises(TooFewError, match="no spread"):
        tost("x", [3.0] * 5, [3.0] * 5, margin=1.0)


def test_tost_wants_a_margin_and_pairs_for_clusters() -> None:
    with pytest.raises(StatisticsError, match="margin is 0"):
        tost("x", [1.0, 2.0], [1.0, 2.0], margin=0)
    with pytest.raises(StatisticsError, match="paired=True"):
        tost("x", [1.0, 2.0], [1.0, 2.0], margin=1, clusters=["a", "b"])
    assert tost("x", [1.0, 2.0, 3.0, 5.0], [1.5, 2.0, 3.5, 5.0], margin=2, paired=True, clusters=["a", "a", "b", "c"]).clusters == 3

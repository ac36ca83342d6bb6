"""Means and proportions: held to statsmodels and scipy, to properties, and to the coverage that they promise."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from hypothesis import assume, given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.stats import bootstrap, majority_rate, mean_estimate, wilson

UNIT = st.floats(0, 1, allow_nan=False)
LEVELS = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


def test_importing_it_loads_no_scipy() -> None:
    code = "import sys, crucible_framework.stats; print([m for m in ('scipy', 'torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------------------- Wilson
@given(n=st.integers(1, 3000), share=UNIT, level=LEVELS)
def test_wilson_is_that_of_statsmodels(n: int, share: float, level: float) -> None:
    successes = round(share * n)
    assert wilson(successes, n, level) == pytest.approx(proportion_confint(successes, n, 1 - level, method="wilson"), abs=1e-12)


@given(n=st.integers(1, 500), share=UNIT)
def test_wilson_holds_the_proportion_grows_with_the_level_and_is_symmetric(n: int, share: float) -> None:
    successes = share * n
    assume(successes <= n)
    ends = [wilson(successes, n, level) for level in (0.5, 0.9, 0.95, 0.999999999999)]
    for low, high in ends:
        assert 0 <= low <= successes / n <= high <= 1
    assert all(wide[0] <= narrow[0] + 1e-12 and narrow[1] <= wide[1] + 1e-12 for narrow, wide in itertools.pairwise(ends))
    mirrored = wilson(n - successes, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx(wilson(successes, n), abs=1e-9)


def test_wilson_covers_on_average_at_least_what_it_promises() -> None:
    for n in (5, 10, 30, 100):
        ends = [wilson(k, n) for k in range(n + 1)]
        grid = np.linspace(0.005, 0.995, 199)
        covered = [sum(scipy.stats.binom.pmf(k, n, p) for k, (low, high) in enumerate(ends) if low <= p <= high) for p in grid]
        assert np.mean(covered) > 0.945
        assert min(covered) > 0.83  # the known dip near 0 and 1; Wald's falls to 0


@pytest.mark.parametrize(
    ("successes", "n", "level", "message"),
    [(1, 0, 0.95, "n = 0"), (3, 2, 0.95, "from 0 to n"), (-1, 2, 0.95, "successes is -1"), (1, 2, 1.0, "level is 1.0"), (1, 2, math.nan, "level is nan")],
)
def test_wilson_refuses(successes: float, n: int, level: float, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        wilson(successes, n, level)


# --------------------------------------------------------------------------------------------------------------- means
def test_independent_zeros_and_ones_get_wilson() -> None:
    found = mean_estimate("accuracy", [1.0] * 7 + [0.0] * 3)
    assert (found.low, found.high) == wilson(7, 10)
    assert (found.value, found.n, found.clusters, found.method) == (0.7, 10, None, "Wilson score interval")


def test_few_numbers_get_the_t_interval() -> None:
    values = [2.0, 3.5, 1.0, 4.25, 2.75]
    found = mean_estimate("seconds", values, level=0.9)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.method == "t interval (4 degrees of freedom)"


def test_many_numbers_get_the_bca_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(0).lognormal(size=60)
    found = mean_estimate("seconds", list(values))
    oracle = scipy.stats.bootstrap((values,), np.mean, n_resamples=40000, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    width = oracle.high - oracle.low
    assert abs(found.low - oracle.low) < 0.03 * width
    assert abs(found.high - oracle.high) < 0.05 * width
    assert found == mean_estimate("seconds", list(values))
    assert found != mean_estimate("seconds", list(values), seed=1)


def test_the_mean_lies_in_a_narrow_bca_interval_too() -> None:
    """BCa moves both ends towards the longer tail; near level 0 they would both pass the mean."""
    values = [float(x) for x in np.random.default_rng(0).lognormal(sigma=2, size=60)]
    for level in (0.001, 0.01, 0.05):
        found = mean_estimate("seconds", values, level=level)
        assert found.low <= found.value <= found.high
        assert found.low == found.value  # the skewed sample pushes the lower end past it


@given(st.data())
def test_clustered_means_are_those_of_a_cluster_robust_regression(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=5, max_size=40))
    values = data.draw(st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=len(names), max_size=len(names)))
    assume(2 <= len(set(names)) < len(names))
    found = mean_estimate("difference", values, clusters=names, bounded=False)
    codes = np.unique(names, return_inverse=True)[1]
    fit = sm.OLS(np.array(values), np.ones(len(values))).fit()
    se = fit.get_robustcov_results("cluster", groups=codes, use_correction=True).bse[0]
    assume(se > 1e-6)
    half = scipy.stats.t.ppf(0.975, len(set(names)) - 1) * se
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-6, abs=1e-9)
    assert found.clusters == len(set(names))
    assert "cluster-robust t interval" in found.method


@given(st.data())
def test_a_mean_lies_in_its_interval_which_grows_with_the_level(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.one_of(st.sampled_from([0.0, 1.0]), UNIT.map(lambda x: round(x, 3))), min_size=2, max_size=30)) * data.draw(
        st.sampled_from([1, 2, 25])
    )
    clusters = data.draw(st.none() | st.lists(st.sampled_from("abcd"), min_size=len(values), max_size=len(values)))
    assume(clusters is None or len(set(clusters)) > 1)
    ends = [mean_estimate("score", values, clusters=clusters, level=level) for level in (0.05, 0.5, 0.8, 0.95, 0.99)]
    for found in ends:
        assert 0 <= found.low <= found.value + 1e-12
        assert found.value <= found.high + 1e-12 <= 1 + 2e-12
    assert all(wide.low <= narrow.low + 1e-12 and narrow.high <= wide.high + 1e-12 for narrow, wide in itertools.pairwise(ends))


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from("abc")), min_size=3, max_size=19), st.randoms(use_true_random=False))
def test_the_order_of_observations_does_not_matter(rows: list[tuple[float, str]], random: Random) -> None:
    assume(len({name for _, name in rows}) > 1)
    turned = random.sample(rows, len(rows))
    left, right = (mean_estimate("score", [x for x, _ in order], clusters=[c for _, c in order]) for order in (rows, turned))
    assert (left.value, left.low, left.high) == pytest.approx((right.value, right.low, right.high), abs=1e-12)
    assert left.method == right.method


def test_clusters_of_one_observation_each_are_no_clusters() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    found, plain = mean_estimate("score", values, clusters=list("abcde")), mean_estimate("score", values)
    assert (found.low, found.high, found.method) == (plain.low, plain.high, plain.method)
    assert (found.clusters, plain.clusters) == (5, None)


def test_copies_of_the_same_answer_add_nothing_to_what_is_known() -> None:
    one = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    tenfold = mean_estimate("score", one * 10, clusters=[str(i) for i in range(8)] * 10)
    assert tenfold.high - tenfold.low > 0.9 * (mean_estimate("x", one, bounded=False).high - mean_estimate("x", one, bounded=False).low)
    assert mean_estimate("score", one * 10).high - mean_estimate("score", one * 10).low < 0.4 * (tenfold.high - tenfold.low)


def test_no_spread_gives_the_conservative_interval_not_a_width_of_zero() -> None:
    perfect = mean_estimate("score", [1.0] * 40, clusters=[str(i // 4) for i in range(40)])
    assert (perfect.low, perfect.high) == wilson(10, 10)
    assert "10 clusters as observations" in perfect.method
    half = mean_estimate("f1", [0.5] * 30)
    assert (half.low, half.high) == wilson(15, 30)
    assert "30 values as observations" in half.method
    alone = mean_estimate("score", [1.0, 0.0, 1.0, 1.0], clusters=["one"] * 4)
    assert (alone.low, alone.high) == wilson(0.75, 1)
    assert "one cluster shows no spread" in alone.method
    constant = mean_estimate("nll", [0.3] * 30, bounded=False)
    assert constant.low == constant.high == constant.value
    assert "no width" in constant.method


def test_what_does_not_apply_is_left_out_and_said() -> None:
    found = mean_estimate("score", [1.0, None, 0.0, 1.0], clusters=["a", "b", "c", "d"])
    assert (found.n, found.clusters) == (3, 3)
    assert found.value == pytest.approx(2 / 3)
    assert found.method.endswith("; 1 of 4 did not apply and is left out")
    assert mean_estimate("score", [1.0, None, None]).method.endswith("2 of 3 did not apply and are left out")


def test_a_measure_that_may_leave_the_unit_interval_is_not_clipped() -> None:
    values = [0.01, 0.02, 0.9]
    assert mean_estimate("nll", values, bounded=False).low < 0
    clipped = mean_estimate("f1", values)
    assert clipped.low == 0
    assert clipped.method.endswith("clipped to [0, 1]")


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        ([], {}, TooFewError, "no value that applies, of 0"),
        ([None, None], {}, TooFewError, "of 2"),
        ([0.5], {}, TooFewError, "single observation"),
        ([0.5, 0.7], {"clusters": ["a", "a"]}, TooFewError, "single cluster"),
        ([1.0, math.nan], {}, StatisticsError, "nan at position 1"),
        ([None, math.inf], {}, StatisticsError, "inf at position 1"),
        ([1.0, 2.0], {"clusters": ["a"]}, StatisticsError, "2 values and 1 clusters"),
        ([1.0, 2.0], {"level": 0}, StatisticsError, "level is 0"),
        ([1.0, 2.0], {"bounded": True}, StatisticsError, r"from 1 to 2; expected \[0, 1\]"),
    ],
)
def test_a_mean_that_cannot_be_estimated_says_why(values: list[float | None], options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_estimate("score", values, **options)  # type: ignore[arg-type]


def test_intervals_cover_in_simulation() -> None:
    """95 % intervals, 400 draws each: within what chance allows of 95 % (three standard errors are 3.3 points)."""
    random = np.random.default_rng(20)
    hits = {"clustered": 0, "ignored": 0, "t": 0, "bca": 0}
    names = [str(i // 8) for i in range(320)]
    for _ in range(400):
        chance = random.beta(1.4, 0.6, size=40)
        x = [float(v) for v in random.random(320) < np.repeat(chance, 8)]
        for key, clusters in (("clustered", names), ("ignored", None)):
            found = mean_estimate("score", x, clusters=clusters)
            hits[key] += found.low <= 0.7 <= found.high
        found = mean_estimate("t", list(random.normal(3, 2, size=8)))
        hits["t"] += found.low <= 3 <= found.high
    for _ in range(150):
        found = mean_estimate("bca", list(random.gamma(2, size=60)))
        hits["bca"] += found.low <= 2 <= found.high
    assert 0.917 <= hits["clustered"] / 400 <= 0.983
    assert hits["ignored"] / 400 < 0.85  # what happens when the documents are ignored
    assert 0.917 <= hits["t"] / 400 <= 0.983
    assert 0.88 <= hits["bca"] / 150 <= 0.99


# ----------------------------------------------------------------------------------------------------------- bootstrap
def test_bootstrap_of_another_statistic_is_that_of_scipy() -> None:
    values = np.random.default_rng(3).gamma(2, size=50)
    for method, theirs in (("bca", "BCa"), ("percentile", "percentile")):
        found = bootstrap(list(values), lambda x: float(np.std(x, ddof=1)), method=method, resamples=3000)  # type: ignore[arg-type]
        oracle = scipy.stats.bootstrap(  # type: ignore[call-overload]
            (values,), lambda x, axis: np.std(x, ddof=1, axis=axis), n_resamples=20000, method=theirs, rng=np.random.default_rng(1)
        ).confidence_interval
        width = oracle.high - oracle.low
        assert abs(found.low - oracle.low) < 0.08 * width
        assert abs(found.high - oracle.high) < 0.08 * width
        assert found.method.startswith(f"{theirs} bootstrap (3000 resamples of 50 observations)")


def test_bootstrap_draws_whole_clusters() -> None:
    random = np.random.default_rng(4)
    values = list(np.repeat(random.normal(size=12), 10) + random.normal(scale=0.1, size=120))
    clusters = [str(i // 10) for i in range(120)]
    mean = lambda x: float(x.mean())  # noqa: E731
    whole = bootstrap(values, mean, clusters=clusters, resamples=1000)
    single = bootstrap(values, mean, resamples=1000)
    assert whole.high - whole.low > 2 * (single.high - single.low)
    assert "12 clusters drawn whole" in whole.method
    assert (whole.clusters, single.clusters) == (12, None)
    robust = mean_estimate("mean", values, clusters=clusters)
    assert whole.high - whole.low == pytest.approx(robust.high - robust.low, rel=0.3)


def test_bootstrap_of_a_constant_has_no_width() -> None:
    found = bootstrap([2.0, 2.0, 2.0], lambda x: float(x.mean()), resamples=100)
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)


def test_bootstrap_with_one_far_value_stays_inside_the_resamples() -> None:
    found = bootstrap([0.0] * 9 + [1000.0], lambda x: float(x.mean()), level=0.999, resamples=200)
    assert 0 <= found.low <= found.high <= 1000


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0], {}, "single observation"),
        ([1.0, 2.0], {"clusters": ["a", "a"]}, "single cluster"),
        ([1.0, 2.0], {"resamples": 10}, "resamples is 10"),
        ([1.0, 2.0], {"method": "basic"}, "method is 'basic'"),
        ([1.0, 2.0], {"statistic": lambda x: math.nan}, "not finite on every resample"),
    ],
)
def test_bootstrap_refuses(values: list[float], options: dict[str, object], message: str) -> None:
    settings = {"statistic": lambda x: float(x.mean()), **options}
    with pytest.raises(StatisticsError, match=message):
        bootstrap(values, **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ majority
@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1))
def test_majority_is_the_commonest_and_ties_go_to_the_alphabet(labels: list[str]) -> None:
    label, share = majority_rate(labels)
    assert share == labels.count(label) / len(labels) == max(labels.count(other) for other in labels) / len(labels)
    assert label == min(other for other in labels if labels.count(other) == labels.count(label))
    assert (label, share) == majority_rate(labels[::-1])


def test_majority_of_nothing_is_refused() -> None:
    with pytest.raises(TooFewError, match="no labels"):
        majority_rate([])

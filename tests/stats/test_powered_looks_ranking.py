"""Prediction-powered means, planned looks, ranks with their ranges, and profiles of performance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stats.agreement import check

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.stats import (
    compare_groups,
    group_sequential,
    judged_difference,
    judged_mean,
    mean_estimate,
    nemenyi,
    performance_profile,
    rank_sets,
    tied_sets,
)


# ------------------------------------------------------------------------------------------------------------- PPI++
def judged(seed: int, n: int, more: int, right: float = 0.85) -> tuple[list[float], list[float], list[float], list[float]]:
    """(truth, judge) of n items and of `more` items; the judge errs towards 1."""
    r = np.random.default_rng(seed)
    truth = (r.random(n + more) < 0.6).astype(float)
    judge = np.where(r.random(n + more) < right, truth, 1.0)
    return truth[:n].tolist(), judge[:n].tolist(), truth[n:].tolist(), judge[n:].tolist()


def test_a_biased_judge_makes_the_interval_narrower_and_not_wrong() -> None:
    held, naive, width, plain = 0, 0, [], []
    for seed in range(200):
        y, f, _, others = judged(seed, 150, 1500)
        found = judged_mean("accuracy", y, f, others)
        held += found.low <= 0.6 <= found.high
        naive += abs(float(np.mean(others)) - 0.6) < 1.96 * float(np.std(others)) / math.sqrt(1500)
        width.append(found.high - found.low)
        alone = mean_estimate("accuracy", y)
        plain.append(alone.high - alone.low)
    assert held >= 180, "95 % of 200, less three standard errors"
    assert naive < 20, "the judge alone is sure and wrong"
    assert np.mean(width) < 0.8 * np.mean(plain)


def test_a_judge_that_says_nothing_leaves_the_plain_mean() -> None:
    y = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    found = judged_mean("accuracy", y, [0.5] * 6, [0.5] * 50)
    assert found.value == pytest.approx(4 / 6)
    assert "weight 0," in found.method


def test_the_difference_by_hand() -> None:
    """The formula of the paper on a few numbers: λ from the covariance, then the rectified mean."""
    y, f, others = [0.2, 0.8, 0.5, 0.9], [0.1, 0.9, 0.4, 1.0], [0.3, 0.7, 0.6, 0.2, 0.9, 0.8]
    spread = float(np.var([*f, *others], ddof=1))
    weight = float(np.cov(y, f, ddof=1)[0, 1]) / ((1 + 4 / 6) * spread)
    value = float(np.mean(y)) - weight * (float(np.mean(f)) - float(np.mean(others)))
    zeros = [0.0] * 4
    found = judged_difference("d", (zeros, y), (zeros, f), ([0.0] * 6, others))
    assert found.effect == pytest.approx(value, abs=1e-12)
    check(found)


def test_clusters_must_be_on_one_side() -> None:
    y, f, _, others = judged(1, 8, 8)
    names, rest = [str(i // 2) for i in range(8)], [f"r{i // 2}" for i in range(8)]
    assert judged_mean("x", y, f, others, clusters=names, other_clusters=rest).clusters == 8
    with pytest.raises(StatisticsError, match="both sides"):
        judged_mean("x", y, f, others, clusters=names, other_clusters=names)
    with pytest.raises(StatisticsError, match="one side only"):
        judged_mean("x", y, f, others, clusters=names)
    with pytest.raises(TooFewError):
        judged_mean("x", y[:1], f[:1], others)
    with pytest.raises(StatisticsError, match="of the same items"):
        judged_mean("x", y, f[:3], others)
    with pytest.raises(TooFewError, match="every item"):
        judged_difference("x", ([0.0] * 3, [1.0] * 3), ([0.0] * 3, [1.0] * 3), ([0.0] * 3, [1.0] * 3))


# -------------------------------------------------------------------------------------------------------------- looks
# Two-sided boundaries for five looks at α = 0.05 as published (Jennison & Turnbull 2000; the R package ldbounds).
PUBLISHED = {"obrien-fleming": (4.877, 3.357, 2.680, 2.290, 2.031), "pocock": (2.438, 2.427, 2.410, 2.397, 2.386)}


@pytest.mark.parametrize("spending", PUBLISHED)
def test_boundaries_are_those_of_the_literature(spending: str) -> None:
    found = group_sequential(5, spending=spending)  # type: ignore[arg-type]
    assert found.z == pytest.approx(PUBLISHED[spending], abs=6e-4)
    assert found.spent[-1] == pytest.approx(0.05)


@settings(max_examples=20)
@given(looks=st.integers(1, 6), alpha=st.floats(0.005, 0.2), spending=st.sampled_from(["obrien-fleming", "pocock", "linear"]))
def test_looks_spend_alpha_and_no_more(looks: int, alpha: float, spending: str) -> None:
    found = group_sequential(looks, alpha=alpha, spending=spending)  # type: ignore[arg-type]
    assert all(p <= alpha + 1e-9 for p in found.nominal)
    assert sum(found.nominal) >= alpha - 1e-6, "a union bound: less would waste α"
    if looks == 1:
        assert found.nominal[0] == pytest.approx(alpha, abs=1e-9)


def test_peeking_at_planned_looks_keeps_alpha() -> None:
    r, bounds = np.random.default_rng(3), group_sequential([0.25, 0.5, 0.75, 1.0], spending="pocock")
    paths = np.cumsum(r.normal(0, 1, (20_000, 4)), axis=1) / np.sqrt(np.arange(1, 5))
    assert float((np.abs(paths) >= np.array(bounds.z)).any(axis=1).mean()) == pytest.approx(0.05, abs=0.005)
    assert float((np.abs(paths) >= 1.96).any(axis=1).mean()) > 0.11, "the same looks without boundaries"


def test_looks_must_rise_to_one() -> None:
    for looks in (0, [], [0.5, 0.4, 1.0], [0.5, 0.9], [-0.1, 1.0]):
        with pytest.raises(StatisticsError, match="looks"):
            group_sequential(looks)
    with pytest.raises(StatisticsError, match="spending"):
        group_sequential(2, spending="all")  # type: ignore[arg-type]
    with pytest.raises(StatisticsError, match="alpha"):
        group_sequential(2, alpha=1.0)


# -------------------------------------------------------------------------------------------------------------- ranks
def test_ranks_and_ties_of_clear_and_unclear_groups() -> None:
    r = np.random.default_rng(0)
    groups = {name: r.normal(mean, 1, 80).tolist() for name, mean in (("a", 0.0), ("b", 0.1), ("c", 1.5), ("d", 1.6))}
    found = compare_groups("score", groups)
    ranks = {one.name: one for one in rank_sets(list(groups), found.pairs, found.adjusted)}
    assert (ranks["a"].best, ranks["a"].worst, ranks["d"].best, ranks["d"].worst) == (3, 4, 1, 2)
    assert tied_sets(tuple(ranks.values())) == (("a", "b"), ("c", "d"))
    turned = {one.name: one for one in rank_sets(list(groups), found.pairs, found.adjusted, less_is_better=True)}
    assert (turned["a"].best, turned["a"].worst) == (1, 2)


def test_ranges_hold_all_true_ranks_together() -> None:
    held = 0
    for seed in range(60):
        r = np.random.default_rng(seed)
        rows = r.normal(0, 1, (25, 1)) + r.normal([0.0, 0.3, 0.6, 0.9], 1, (25, 4))
        groups = {name: rows[:, i].tolist() for i, name in enumerate("abcd")}
        pairs = nemenyi("x", groups)
        ranks = rank_sets(list(groups), pairs, [pair.p_value for pair in pairs])
        held += all(one.best <= true <= one.worst for one, true in zip(ranks, (4, 3, 2, 1), strict=True))
    assert held >= 52


def test_a_missing_pair_is_refused() -> None:
    groups = {name: [float(i), float(i + 1), float(i) + 0.5] for i, name in enumerate("abc")}
    found = compare_groups("score", groups, control="a")
    with pytest.raises(StatisticsError, match="every pair"):
        rank_sets(list(groups), found.pairs, found.adjusted)
    with pytest.raises(StatisticsError, match="is of none"):
        rank_sets(["x", "y"], found.pairs, found.adjusted)
    with pytest.raises(StatisticsError, match="a p-value for each pair"):
        rank_sets(list(groups), found.pairs, found.adjusted[:1])


# ------------------------------------------------------------------------------------------------------------ profiles
def test_a_profile_falls_from_one_to_zero() -> None:
    found = performance_profile("m", [[0.1, 0.4, 0.9], [0.2, 0.3]], [-1.0, 0.25, 0.5, 2.0])
    assert [one.value for one in found] == pytest.approx([1.0, (2 / 3 + 1 / 2) / 2, 1 / 6, 0.0])
    assert all(one.low <= one.value <= one.high for one in found)
    assert found[0].low == found[0].high == 1.0
    with pytest.raises(TooFewError):
        performance_profile("m", [[0.1]], [0.5])
    with pytest.raises(StatisticsError, match="thresholds"):
        performance_profile("m", [[0.1, 0.2]], [math.nan])

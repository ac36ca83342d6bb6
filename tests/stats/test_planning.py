"""Power, sample sizes and detectable effects: held to statsmodels, to published numbers and to simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.power import FTestAnovaPower, NormalIndPower, TTestIndPower, TTestPower

from crucible_framework.errors import StatisticsError
from crucible_framework.stats import plan, seeds_and_items

from .agreement import SCIPY

ALTERNATIVES = st.sampled_from(["two-sided", "one-sided"])


def test_the_textbook_sample_sizes() -> None:
    """Cohen 1988: d = 0.5, power 0.8 needs 64 per group (34 pairs, 26 for one group); η² = .06 in three groups needs 52 each."""
    assert plan("independent", effect=0.5, power=0.8).n == 64
    assert plan("paired", effect=0.5, power=0.8).n == 34
    assert plan("independent", effect=0.5, n=30).power == pytest.approx(0.4779, abs=1e-4)
    assert plan("anova", effect=math.sqrt(0.06 / 0.94), groups=3, power=0.8).n == 52


def test_questions_for_three_points() -> None:
    """Miller 2024: 969 questions for three points with a variance of 1/9 of the differences (by z; t asks two more)."""
    assert plan("paired", effect=0.03, sd=1 / 3, power=0.8).n in range(969, 973)


@given(effect=st.floats(0.1, 2), n=st.integers(3, 200), alternative=ALTERNATIVES)
def test_powers_are_those_of_statsmodels(effect: float, n: int, alternative: str) -> None:
    theirs = "two-sided" if alternative == "two-sided" else "larger"
    for design, sign, oracle in (("independent", 1, TTestIndPower()), ("paired", -1, TTestPower())):
        ours, expected = plan(design, effect=sign * effect, n=n, alternative=alternative).power, oracle.power(effect, n, 0.05, alternative=theirs)  # type: ignore[arg-type]
        assert ours == pytest.approx(expected, abs=1e-7) or (math.isnan(expected) and ours > 0.999)  # the oracle is NaN where scipy is
    oracle = FTestAnovaPower().power(effect, n * 4, 0.05, k_groups=4)
    ours = plan("anova", effect=effect, n=n, groups=4).power
    assert ours == pytest.approx(oracle, abs=1e-7) or (math.isnan(oracle) and ours > 0.999)


def test_shares_are_near_statsmodels_and_pairs_near_connor() -> None:
    found = plan("proportions", effect=0.1, base=0.5, power=0.8)
    h = 2 * math.asin(math.sqrt(0.6)) - 2 * math.asin(math.sqrt(0.5))
    assert found.n == pytest.approx(NormalIndPower().solve_power(h, None, 0.05, 0.8), rel=0.01)
    z_a, z_b = SCIPY.norm.ppf([0.975, 0.8])
    connor = (z_a * math.sqrt(0.2) + z_b * math.sqrt(0.2 - 0.05**2)) ** 2 / 0.05**2
    assert plan("paired proportions", effect=0.05, discordant=0.2, power=0.8).n == math.ceil(connor)


@given(
    design=st.sampled_from(["independent", "paired", "anova", "proportions", "paired proportions"]),
    n=st.integers(20, 400),
    power=st.floats(0.3, 0.95),
    size=st.sampled_from([1, 5]),
)
def test_the_three_parts_fit_each_other(design: str, n: int, power: float, size: int) -> None:
    extra: dict[str, float] = {"proportions": {"base": 0.4}, "paired proportions": {"discordant": 0.6}}.get(design, {})
    effect = plan(design, n=n, power=power, cluster_size=size, icc=0.2, **extra).effect  # type: ignore[arg-type]
    assert plan(design, effect=effect, n=n, cluster_size=size, icc=0.2, **extra).power == pytest.approx(power, abs=1e-6)  # type: ignore[arg-type]
    back = plan(design, effect=effect * (1 + 1e-9), power=power, cluster_size=size, icc=0.2, **extra)  # type: ignore[arg-type]
    assert back.n <= n
    assert back.power >= power
    assert (back.clusters is None) == (size == 1)


def test_clusters_cost_and_correlation_pays() -> None:
    alone, clustered = plan("paired", effect=0.1, power=0.8), plan("paired", effect=0.1, power=0.8, cluster_size=10, icc=0.3)
    assert clustered.n == pytest.approx(alone.n * 3.7, rel=0.02)
    assert clustered.clusters == math.ceil(clustered.n / 10)
    assert "3.7 times" in clustered.why
    assert plan("paired", effect=0.1, power=0.8, correlation=0.9).n < plan("paired", effect=0.1, power=0.8, correlation=0.1).n / 5


def test_seeds_help_until_the_items_are_the_limit() -> None:
    found = plan("seeds", effect=0.05, power=0.8, items=1000, sd=0.4, sd_seeds=0.03)
    assert found.unit == "seeds per side"
    assert found.power >= 0.8 > plan("seeds", effect=0.05, n=found.n - 1, items=1000, sd=0.4, sd_seeds=0.03).power
    with pytest.raises(StatisticsError, match="give more items"):
        plan("seeds", effect=0.01, power=0.8, items=1000, sd=0.4, sd_seeds=0.03)


def test_power_of_seeds_is_what_the_test_has() -> None:
    random, hits = np.random.default_rng(8), 0
    expected = plan("seeds", effect=0.4, n=6, items=80, sd=1.0, sd_seeds=0.2).power
    for _ in range(300):
        gain = random.normal(0, 1.0, 80)
        before = [(random.normal(0, 0.2) + np.zeros(80)).tolist() for _ in range(6)]
        after = [(0.4 + random.normal(0, 0.2) + gain).tolist() for _ in range(6)]
        hits += seeds_and_items("x", before, after).p_value < 0.05
    assert hits / 300 == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "paired"}, "exactly one"),
        ({"design": "paired", "effect": 1, "n": 10, "power": 0.8}, "exactly one"),
        ({"design": "nested", "effect": 1, "n": 10}, "design is 'nested'"),
        ({"design": "paired", "effect": 0.0, "n": 10}, "effect is 0.0"),
        ({"design": "paired", "effect": 1, "n": 1}, "n is 1"),
        ({"design": "paired", "effect": 1, "n": 9, "cluster_size": 5}, "at least 10"),
        ({"design": "paired", "effect": 1, "power": 0.01}, "power is 0.01"),
        ({"design": "paired", "effect": 1, "n": 5, "alpha": 0}, "alpha is 0"),
        ({"design": "paired", "effect": 1, "n": 5, "sd": 0}, "sd is 0"),
        ({"design": "paired", "effect": 1, "n": 5, "correlation": 1.0}, "correlation is 1.0"),
        ({"design": "paired", "effect": 1, "n": 5, "icc": 2}, "icc is 2"),
        ({"design": "paired", "effect": 1, "n": 5, "alternative": "less"}, "alternative is 'less'"),
        ({"design": "proportions", "effect": 0.1, "n": 5}, "base is None"),
        ({"design": "proportions", "effect": 0.6, "n": 5, "base": 0.5}, "expected a share between"),
        ({"design": "paired proportions", "effect": 0.1, "n": 5}, "discordant is None"),
        ({"design": "seeds", "effect": 0.1, "n": 5}, "items is None"),
        ({"design": "seeds", "effect": 0.1, "n": 5, "items": 9}, "sd_seeds is None"),
        ({"design": "paired", "effect": 1e-9, "power": 0.9}, "billion"),
        ({"design": "proportions", "n": 3, "power": 0.9, "base": 0.9}, "larger n"),
    ],
)
def test_a_plan_says_what_it_needs(options: dict[str, object], message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        plan(**options)  # type: ignore[arg-type]

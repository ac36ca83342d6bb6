"""Promises kept by simulation: 95 % intervals cover, p-values are uniform (or larger) where there is no effect. Small here, large when slow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from crucible_framework.records import Estimate, Finding
from crucible_framework.stats import (
    anova,
    brunner_munzel,
    clustered_anova,
    clustered_t,
    cohen_d,
    friedman,
    glass_delta,
    kruskal_wallis,
    mann_whitney,
    mcnemar_exact,
    paired_t,
    permutation_test,
    proportion_difference,
    repeated_anova,
    seeds_and_items,
    student_t,
    tost,
    welch_anova,
    welch_t,
    wilcoxon,
)

Draw = np.random.Generator


def normal(r: Draw, n: int, mean: float = 0.0, sd: float = 1.0) -> list[float]:
    return [float(x) for x in r.normal(mean, sd, n)]


def grouped(r: Draw, clusters: int, size: int) -> list[float]:
    return [float(x) for x in np.repeat(r.normal(0, 1, clusters), size) + r.normal(0, 1, clusters * size)]


def names(clusters: int, size: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{i // size}" for i in range(clusters * size)]


def crossed(r: Draw, method: str) -> Finding:
    item = r.normal(0, 1, 30)
    gain = r.normal(0, 0.5, 30)
    sides = [[(item + side * gain + r.normal(0, 0.3) + r.normal(0, 0.4, 30)).tolist() for _ in range(12 if method == "bootstrap" else 4)] for side in (0, 1)]
    return seeds_and_items("x", *sides, method=method, resamples=1000, seed=int(r.integers(1 << 30)))  # type: ignore[arg-type]


def shares(r: Draw) -> Finding:
    return proportion_difference("x", (r.random(40) < 0.3).astype(float).tolist(), (r.random(60) < 0.3).astype(float).tolist())


def rows(r: Draw) -> dict[str, list[float]]:
    return {name: (np.linspace(0, 2, 15) + r.normal(0, 1, 15)).tolist() for name in "abc"}


def clustered_rows(r: Draw) -> Finding:
    groups = {name: (np.repeat(r.normal(0, 1, 25), 3) + r.normal(0, 1, 75)).tolist() for name in "abc"}
    return clustered_anova("x", groups, names(25, 3))


# Each draws data without an effect; `exact` ones must be uniform, the others may reject less than they promise, never clearly more.
NULLS: dict[str, tuple[Callable[[Draw], Finding], bool]] = {
    "student": (lambda r: student_t("x", normal(r, 8), normal(r, 12)), True),
    "welch, unequal variances": (lambda r: welch_t("x", normal(r, 10), normal(r, 25, sd=3)), True),
    "paired t": (lambda r: paired_t("x", normal(r, 9), normal(r, 9)), True),
    "Mann-Whitney": (lambda r: mann_whitney("x", normal(r, 15), normal(r, 20)), True),
    "Mann-Whitney, ties": (lambda r: mann_whitney("x", r.integers(0, 4, 15).tolist(), r.integers(0, 4, 20).tolist()), False),
    "Wilcoxon": (lambda r: wilcoxon("x", normal(r, 18), normal(r, 18)), True),
    "Wilcoxon, ties and zeros": (lambda r: wilcoxon("x", r.integers(0, 4, 18).tolist(), r.integers(0, 4, 18).tolist()), False),
    "Brunner-Munzel, unequal spreads": (lambda r: brunner_munzel("x", normal(r, 15), normal(r, 30, sd=3)), True),
    "Brunner-Munzel, small": (lambda r: brunner_munzel("x", normal(r, 7), normal(r, 7)), False),
    "permutation": (lambda r: permutation_test("x", normal(r, 7), normal(r, 7)), True),
    "permutation, paired clusters": (
        lambda r: permutation_test("x", [0.0] * 30, grouped(r, 10, 3), paired=True, clusters=names(10, 3)),
        True,
    ),
    "clusters": (lambda r: clustered_t("x", grouped(r, 25, 4), grouped(r, 25, 4), before_clusters=names(25, 4, "a"), after_clusters=names(25, 4, "b")), True),
    "seeds × items": (lambda r: crossed(r, "t"), False),
    "seeds × items, bootstrap": (lambda r: crossed(r, "bootstrap"), False),
    "two shares": (shares, False),
    "exact McNemar": (lambda r: mcnemar_exact("x", int(k := r.binomial(20, 0.5)), 20 - int(k)), False),
    "ANOVA": (lambda r: anova("x", {name: normal(r, 8) for name in "abc"}), True),
    "Welch ANOVA": (lambda r: welch_anova("x", {"a": normal(r, 10), "b": normal(r, 15, sd=2), "c": normal(r, 20, sd=3)}), True),
    "Kruskal-Wallis": (lambda r: kruskal_wallis("x", {name: normal(r, 10) for name in "abc"}), False),
    "repeated ANOVA": (lambda r: repeated_anova("x", rows(r)), False),
    "Friedman": (lambda r: friedman("x", rows(r)), False),
    "clustered Hotelling": (clustered_rows, True),
}


def rejected(draw: Callable[[Draw], Finding], samples: int, seed: int) -> tuple[float, float]:
    """(share of p-values below 0.05, largest distance of their distribution function above the diagonal where p <= 0.1)."""
    r = np.random.default_rng(seed)
    p = np.sort([draw(r).p_value for _ in range(samples)])
    above = (np.arange(1, samples + 1) / samples - p)[p <= 0.1]  # further up nobody rejects, and discrete statistics jump
    return float(np.mean(p < 0.05)), float(above.max(initial=0.0))


@pytest.mark.parametrize("name", NULLS)
def test_p_values_do_not_promise_too_much(name: str) -> None:
    rate, above = rejected(NULLS[name][0], 60, 1)
    assert rate <= 0.15  # 3.5 standard errors above 0.05
    assert above <= 0.16


@pytest.mark.slow
@pytest.mark.parametrize("name", NULLS)
def test_p_values_are_uniform_where_there_is_no_effect(name: str) -> None:
    draw, exact = NULLS[name]
    rate, above = rejected(draw, 1500, 2)
    assert rate <= 0.067
    assert above <= 0.03
    if exact:
        assert rate >= 0.035


COVERS: dict[str, tuple[Callable[[Draw], Finding | Estimate], float]] = {
    "Welch": (lambda r: welch_t("x", normal(r, 12), normal(r, 20, 1, 2)), 1.0),
    "Mann-Whitney shift": (lambda r: mann_whitney("x", normal(r, 12), normal(r, 15, 1)), 1.0),
    "Wilcoxon pseudo-median": (lambda r: wilcoxon("x", [0.0] * 16, normal(r, 16, 1)), 1.0),
    "Brunner-Munzel delta": (lambda r: brunner_munzel("x", normal(r, 25), normal(r, 25, 1)), math.erf(0.5)),
    "permutation shift": (lambda r: permutation_test("x", normal(r, 8), normal(r, 8, 1)), 1.0),
    "Cohen's d": (lambda r: cohen_d("x", normal(r, 12), normal(r, 12, 0.8)), 0.8),
    "Cohen's d, pairs": (lambda r: cohen_d("x", [0.0] * 15, normal(r, 15, 0.8), paired=True), 0.8),
    "Glass's delta": (lambda r: glass_delta("x", normal(r, 25), normal(r, 15, 0.8, 2)), 0.8),
    "two shares": (
        lambda r: proportion_difference("x", (r.random(50) < 0.3).astype(float).tolist(), (r.random(50) < 0.5).astype(float).tolist()),
        0.2,
    ),
    "clusters": (
        lambda r: clustered_t("x", grouped(r, 20, 4), grouped(r, 20, 4), before_clusters=names(20, 4, "a"), after_clusters=names(20, 4, "b")),
        0.0,
    ),
    "seeds × items": (lambda r: crossed(r, "t"), 0.0),
}


def covered(draw: Callable[[Draw], Finding | Estimate], truth: float, samples: int, seed: int) -> float:
    r, held = np.random.default_rng(seed), 0
    for _ in range(samples):
        found = draw(r)
        low, high = found.interval if isinstance(found, Finding) else (found.low, found.high)
        held += low <= truth <= high
    return held / samples


@pytest.mark.parametrize("name", COVERS)
def test_intervals_cover(name: str) -> None:
    assert covered(*COVERS[name], 60, 3) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERS)
def test_intervals_cover_what_they_promise(name: str) -> None:
    assert 0.93 <= covered(*COVERS[name], 1500, 4) <= (0.99 if name == "seeds × items" else 0.975)


@pytest.mark.slow
def test_equivalence_is_shown_by_mistake_in_one_case_of_twenty() -> None:
    r, shown = np.random.default_rng(5), 0
    for _ in range(2000):
        shown += tost("x", normal(r, 30), normal(r, 30, 0.8), margin=0.8).p_value < 0.05
    assert shown / 2000 == pytest.approx(0.05, abs=0.015)

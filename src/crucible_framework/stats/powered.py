"""Few labels that are right and many that a judge gave: means and differences that use both and stay unbiased (PPI++). Knows no judge.

A judge (a model that scores answers) is cheap and wrong in its own way. On the items that a person has scored too, its mistake is measured; the
mean of its scores on all other items is corrected by that mistake. Source: Angelopoulos, Duchi & Zrnic 2023, PPI++, arXiv 2311.01453.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import Estimate, Finding
from .samples import Sample, Values, check_level, sample, t_critical, t_finding

__all__ = ["judged_difference", "judged_mean"]

_SOURCE = "Angelopoulos, Duchi & Zrnic 2023, PPI++: Efficient Prediction-Powered Inference, arXiv 2311.01453"


def _power(y: Sample, f: Sample, unlabelled: Sample) -> float:
    """The weight of the judge that makes the variance smallest, kept in [0, 1]; 0 where the judge says always the same."""
    spread = float(np.concatenate([f.x, unlabelled.x]).var(ddof=1))
    if spread == 0:
        return 0.0
    shared = float(np.cov(y.x, f.x, ddof=1)[0, 1])
    return min(1.0, max(0.0, shared / ((1 + len(y.x) / len(unlabelled.x)) * spread)))


def _joined(
    name: str, sides: tuple[Values, Values, Values], clusters: Sequence[str] | None, other_clusters: Sequence[str] | None
) -> tuple[Sample, Sample, Sample]:  # fmt: skip
    right, judged, others = sides
    if len(right) != len(judged):
        raise StatisticsError(f"{name!r} has {len(right)} right scores and {len(judged)} judged ones; expected both of the same items.")
    if (clusters is None) != (other_clusters is None):
        raise StatisticsError(f"{name!r} has clusters on one side only; expected clusters and other_clusters, or neither.")
    whole = [y is not None and f is not None for y, f in zip(right, judged, strict=True)]
    y = sample(name, [value if ok else None for value, ok in zip(right, whole, strict=True)], clusters)
    f = sample(f"{name} judged", [value if ok else None for value, ok in zip(judged, whole, strict=True)], clusters)
    rest = sample(f"{name} judged only", others, other_clusters)
    for data, what in ((y, "that have both scores"), (rest, "that are judged only")):
        if data.units < 2:
            raise TooFewError(f"{name!r} has {data.units} item(s) or cluster(s) {what}; expected at least two of each kind.")
    if clusters is not None and other_clusters is not None and set(clusters) & set(other_clusters):
        both = min(set(clusters) & set(other_clusters))
        raise StatisticsError(
            f"Cluster {both!r} of {name!r} is on both sides; expected items with right scores from clusters of their own. Draw clusters whole."
        )
    return y, f, rest


def _solved(y: Sample, f: Sample, rest: Sample) -> tuple[float, float, float, float]:
    """(value, standard error, degrees of freedom, weight of the judge)."""
    weight = _power(y, f, rest)
    rectified = replace(y, x=y.x - weight * f.x)
    value = rectified.mean + weight * rest.mean
    va, vb = rectified.se() ** 2, (weight * rest.se()) ** 2
    if va + vb == 0:
        return value, 0.0, float(y.units - 1), weight
    share = va / (va + vb)
    return value, math.sqrt(va + vb), 1 / (share**2 / (y.units - 1) + (1 - share) ** 2 / (rest.units - 1)), weight


def _how(y: Sample, rest: Sample, weight: float) -> str:
    units = f" ({y.units} and {rest.units} clusters)" if y.clustered or rest.clustered else ""
    return f"{len(y.x)} items with right scores, {len(rest.x)} judged only{units}; the judge counts with weight {weight:.3g}, measured on the former"


def judged_mean(
    name: str,
    right: Values,
    judged: Values,
    others: Values,
    *,
    clusters: Sequence[str] | None = None,
    other_clusters: Sequence[str] | None = None,
    level: float = 0.95,
    bounded: bool = False,
) -> Estimate:
    """Mean of the right scores, helped by a judge's scores on further items; with a useless judge it is the plain mean.

    With fewer than about 100 right scores, or a judge that is hardly ever wrong on them, the interval is somewhat too narrow (93 % for 95 %).

    Args:
        right, judged: scores of the same items, by a person and by the judge; a pair with a None is left out.
        others: the judge's scores of items that nobody else has scored, drawn from the same source.
        clusters, other_clusters: the documents of both; no document may be on both sides.
        bounded: clip the interval to [0, 1].

    Raises:
        TooFewError: fewer than two items or clusters of a kind.
        StatisticsError: lengths differ, a value is not finite, or a document is on both sides.

    Source: Angelopoulos, Duchi & Zrnic 2023, arXiv 2311.01453; degrees of freedom by Satterthwaite, which the paper leaves at infinity.
    """
    check_level(level)
    y, f, rest = _joined(name, (right, judged, others), clusters, other_clusters)
    value, se, df, weight = _solved(y, f, rest)
    half = t_critical(df, level) * se
    low, high = (max(0.0, value - half), min(1.0, value + half)) if bounded else (value - half, value + half)
    return Estimate(
        name=name,
        value=value,
        low=min(low, value),
        high=max(high, value),
        n=len(y.x) + len(rest.x),
        level=level,
        method=f"prediction-powered t interval (PPI++): {_how(y, rest, weight)}{y.note()}",
        clusters=None if y.clusters is None else y.units + rest.units,
    )


def _minus(name: str, before: Values, after: Values) -> list[float | None]:
    if len(before) != len(after):
        raise StatisticsError(f"{name!r} has {len(before)} values before and {len(after)} after; expected pairs by position.")
    return [None if b is None or a is None else a - b for b, a in zip(before, after, strict=True)]


def judged_difference(
    name: str,
    right: tuple[Values, Values],
    judged: tuple[Values, Values],
    others: tuple[Values, Values],
    *,
    clusters: Sequence[str] | None = None,
    other_clusters: Sequence[str] | None = None,
    level: float = 0.95,
) -> Finding:
    """Mean difference after - before of two models on the same items, where a person scored a few items and a judge all. Raises as `judged_mean`.

    Each argument is (before, after). What the judge gets wrong in the same way for both models cancels; what it gets wrong in favour of one of
    them is measured on the items with right scores and taken out.
    """
    y, f, rest = _joined(name, (_minus(name, *right), _minus(name, *judged), _minus(name, *others)), clusters, other_clusters)
    value, se, df, weight = _solved(y, f, rest)
    if se == 0 and value != 0:
        raise TooFewError(f"{name!r} differs by {value:g} on every item: no spread, so no test is defined. Report the difference.")
    n, units = len(y.x) + len(rest.x), None if y.clusters is None else y.units + rest.units
    test, why = "prediction-powered paired t test (PPI++)", _how(y, rest, weight) + y.note()
    return t_finding(name, test, effect=value, se=se, df=df, n=n, why=why, source=_SOURCE, level=level, clusters=units)

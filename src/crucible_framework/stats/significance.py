"""Tests of two means: Student, Welch, paired t, cluster-robust Welch, and equivalence (TOST). Knows no ranks and chooses no test.

The effect is after - before. A one-sided test at α stands beside the interval of level 1 - 2α, so that both always agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import Finding
from .intervals import score_z
from .proportions import difference_z
from .samples import Alternative, Sample, Values, differences, inside_unit, is_binary, one_sided, pair_up, sample, t_critical, t_finding, two_groups

__all__ = ["clustered_t", "paired_t", "student_t", "tost", "welch_t"]

Side: TypeAlias = Literal["both", "lower", "upper"]
"""Which margin a difference is held against: "lower" asks only whether it is above -margin (not worse, where more is better)."""
_STUDENT = "Student 1908, The Probable Error of a Mean; Fisher 1925"
_WELCH = "Welch 1947, Biometrika 34:28-35; Satterthwaite 1946"
_CR1 = "Cameron & Miller 2015, J. Human Resources 50(2); Donner & Klar 2000, Design and Analysis of Cluster Randomization Trials"
_TOST = "Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15:657-680; Lakens 2017"
_ONE_MARGIN = "Piaggio et al. 2012, JAMA 308:2594-2604 (CONSORT for non-inferiority trials)"
_TESTS = {"both": "TOST (two one-sided {kind} tests)", "lower": "one-sided {kind} test of non-inferiority", "upper": "one-sided {kind} test of non-superiority"}


def _no_spread(name: str, a: Sample, b: Sample) -> TooFewError:
    return TooFewError(
        f"{name!r} has only the value {a.x[0]:g} before and {b.x[0]:g} after: no spread, so a t test is not defined; expected values that differ "
        "within a group. Report the two values, or use permutation_test."
    )


def student_t(name: str, before: Values, after: Values, *, alternative: Alternative = "two-sided", level: float = 0.95) -> Finding:
    """Student's t test of two independent groups with one common variance. Prefer `welch_t` where variances may differ.

    Raises:
        TooFewError: a group has fewer than two values, or no group has any spread and the means differ.
    """
    a, b = two_groups(name, before, after)
    df = len(a.x) + len(b.x) - 2
    variance = ((len(a.x) - 1) * a.sd() ** 2 + (len(b.x) - 1) * b.sd() ** 2) / df
    effect, se = b.mean - a.mean, math.sqrt(variance * (1 / len(a.x) + 1 / len(b.x)))
    if se == 0 and effect != 0:
        raise _no_spread(name, a, b)
    why = f"{len(a.x)} and {len(b.x)} independent values with one common variance, as asked{a.note()}{b.note()}"
    n = len(a.x) + len(b.x)
    return t_finding(
        name, "Student's t test", effect=effect, se=se, df=df, n=n, why=why, source=_STUDENT, level=level, alternative=alternative
    )  # fmt: skip


def welch_terms(a: Sample, b: Sample) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the difference of two independent means, which may be clustered each."""
    va, vb = a.se() ** 2, b.se() ** 2
    if va + vb == 0:
        return 0.0, float(a.units + b.units - 2)
    share = va / (va + vb)  # shares, so that tiny variances do not underflow when squared
    return math.sqrt(va + vb), 1 / (share**2 / (a.units - 1) + (1 - share) ** 2 / (b.units - 1))


def welch_t(name: str, before: Values, after: Values, *, alternative: Alternative = "two-sided", level: float = 0.95) -> Finding:
    """Welch's t test of two independent groups, whose variances may differ.

    Raises:
        TooFewError: a group has fewer than two values, or no group has any spread and the means differ.
    """
    a, b = two_groups(name, before, after)
    effect, (se, df) = b.mean - a.mean, welch_terms(a, b)
    if se == 0 and effect != 0:
        raise _no_spread(name, a, b)
    why = f"{len(a.x)} and {len(b.x)} independent values, whose variances may differ{a.note()}{b.note()}"
    n = len(a.x) + len(b.x)
    return t_finding(
        name, "Welch's t test", effect=effect, se=se, df=df, n=n, why=why, source=_WELCH, level=level, alternative=alternative
    )  # fmt: skip


def paired_t(name: str, before: Values, after: Values, *, alternative: Alternative = "two-sided", level: float = 0.95) -> Finding:
    """Paired t test; a pair with a None on either side is left out. `paired_difference` also knows clusters and 0/1 outcomes.

    Raises:
        TooFewError: fewer than two complete pairs, or all pairs differ by the same amount, which is not 0.
    """
    pairs, ends = pair_up(name, before, after)
    d = differences(pairs, ends)
    se = d.se()
    if se == 0 and d.mean != 0:
        raise TooFewError(f"All {len(d.x)} pairs of {name!r} differ by {d.mean:g}: no spread, so a t test is not defined. Use permutation_test.")
    why = f"{len(d.x)} independent pairs; the test is on their differences{d.note()}"
    return t_finding(
        name, "paired t test", effect=d.mean, se=se, df=len(d.x) - 1, n=len(d.x), why=why, source=_STUDENT, level=level, alternative=alternative
    )  # fmt: skip


def clustered_t(
    name: str,
    before: Values,
    after: Values,
    *,
    before_clusters: Sequence[str],
    after_clusters: Sequence[str],
    alternative: Alternative = "two-sided",
    level: float = 0.95,
) -> Finding:
    """Difference of two means whose observations come in clusters (documents) and are not paired.

    Clusters that occur on one side only make it Welch's test with cluster-robust standard errors; where names occur on both sides, the
    clusters' sums of residuals of both sides are taken together, which credits the design for what the sides share.

    Raises:
        TooFewError: fewer than two clusters on a side, or no spread between clusters while the means differ.
    """
    a, b = sample(f"{name} before", before, before_clusters), sample(f"{name} after", after, after_clusters)
    for side, group in (("before", a), ("after", b)):
        if group.units < 2:
            raise TooFewError(f"{name!r} has a single cluster {side}; expected at least two clusters on each side.")
    shared = len(_names(before, before_clusters) & _names(after, after_clusters))
    effect, clusters = b.mean - a.mean, a.units + b.units - shared
    if shared:
        se, df = _joint_se(before, before_clusters, after, after_clusters), float(clusters - 1)
        how = f"{shared} of {clusters} clusters are on both sides, so residuals are summed by cluster over both"
    else:
        se, df = welch_terms(a, b)
        how = f"{a.units} and {b.units} clusters, none on both sides"
    if se <= 1e-12 * max(abs(a.mean), abs(b.mean)):
        se = 0.0
    if se == 0 and effect != 0:
        raise TooFewError(f"{name!r} has no spread between clusters, and means that differ; expected clusters that differ. Report the two means.")
    n = len(a.x) + len(b.x)
    why = f"{n} values; {how}; values of one cluster may depend on each other{a.note()}{b.note()}"
    return t_finding(
        name,
        "cluster-robust Welch's t test (CR1)",
        effect=effect,
        se=se,
        df=df,
        n=n,
        why=why,
        source=_CR1,
        level=level,
        alternative=alternative,
        clusters=clusters,
    )


def _names(values: Values, clusters: Sequence[str]) -> set[str]:
    return {cluster for value, cluster in zip(values, clusters, strict=True) if value is not None}


def _joint_se(before: Values, before_clusters: Sequence[str], after: Values, after_clusters: Sequence[str]) -> float:
    sums: dict[str, float] = {}
    for values, clusters, sign in ((before, before_clusters, -1.0), (after, after_clusters, 1.0)):
        kept = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if value is not None]
        mean = float(np.mean([value for value, _ in kept]))
        for value, cluster in kept:
            sums[cluster] = sums.get(cluster, 0.0) + sign * (value - mean) / len(kept)
    total = math.fsum(value * value for value in sums.values())
    return math.sqrt(len(sums) / (len(sums) - 1) * total)


# --------------------------------------------------------------------------------------------------------- equivalence
def tost(
    name: str,
    before: Values,
    after: Values,
    *,
    margin: float,
    paired: bool = False,
    clusters: Sequence[str] | None = None,
    level: float = 0.95,
    bounded: bool | None = None,
    side: Side = "both",
) -> Finding:
    """Two one-sided tests of equivalence: is the difference of means inside (-margin, margin)? With `side`, one of the two alone.

    A small p-value shows equivalence, that is: p < 1 - level exactly where the interval, of level 1 - 2α, lies inside the margins. This is
    the one finding whose p-value does not ask whether the interval leaves 0 out.

    Args:
        margin: the largest difference that does not matter; declare it before looking.
        side: "lower" asks only whether the difference is above -margin (non-inferiority where more is better), "upper" only whether it is
            below margin (where less is better).
        paired: pairs by position.
        clusters: the source of each pair (only with `paired`).
        bounded: whether the measure cannot leave [0, 1]; None takes it from the values.

    Raises:
        TooFewError: too few values or pairs, or no spread in an unbounded measure.
        StatisticsError: margin is not positive, or clusters without paired.
    """
    check_margin(margin)
    if clusters is not None and not paired:
        raise StatisticsError("clusters were given for groups that are not paired; expected paired=True. Use clustered_t and read its interval.")
    a, b = pair_up(name, before, after, clusters) if paired else two_groups(name, before, after)
    both = np.concatenate([a.x, b.x])
    inside = inside_unit(both, bounded)
    d = differences(a, b) if paired else None
    se, df = (d.se(), float(d.units - 1)) if d is not None else welch_terms(a, b)
    flat = d is not None and (se == 0 or (is_binary(both) and not d.clustered))
    if inside and margin < 1 and (flat or (d is None and is_binary(both))):
        return _score_tost(name, a, b, d, margin=margin, level=level, side=side)
    if se == 0:
        raise TooFewError(f"{name!r} shows no spread, so equivalence cannot be tested; expected values that differ. Report the difference itself.")
    what = "independent values" if d is None else "pairs" if not d.clustered else f"pairs from {d.units} clusters"
    why = f"{what}, {df:.4g} degrees of freedom{a.note()}{b.note() if d is None else ''}"
    n, units = len(a.x) + len(b.x) if d is None else len(d.x), None if d is None else d.clusters
    return margin_finding(name, "t", effect=b.mean - a.mean, se=se, df=df, margin=margin, side=side, n=n, why=why, level=level, clusters=units)


def check_margin(margin: float) -> None:
    """StatisticsError where a margin is not positive."""
    if not (margin > 0 and math.isfinite(margin)):
        raise StatisticsError(f"margin is {margin!r}; expected a positive number: the largest difference that does not matter.")


def margin_finding(
    name: str, kind: str, *, effect: float, se: float, df: float, margin: float, side: Side, n: int, why: str, level: float, clusters: int | None,
    source: str = "",
) -> Finding:  # fmt: skip
    """A finding that holds effect / se, with Student's t, against one margin or both; `se` > 0."""
    from scipy.special import stdtr

    wide = one_sided(level)
    above, below = (effect + margin) / se, (effect - margin) / se
    half = t_critical(df, wide) * se
    statistic, p = _against(above, below, float(stdtr(df, -above)), float(stdtr(df, below)), side)
    return Finding(
        name=name,
        test=_TESTS[side].format(kind=kind),
        statistic=statistic,
        p_value=p,
        effect=effect,
        interval=(effect - half, effect + half),
        n=n,
        why=f"{_margins(margin, wide, side)}; {why}",
        source="; ".join(filter(None, (_TOST if side == "both" else _ONE_MARGIN, source))),
        level=wide,
        clusters=clusters,
    )


def _against(above: float, below: float, p_lower: float, p_upper: float, side: Side) -> tuple[float, float]:
    """(the statistic that decides, its p-value): of both margins the nearer one."""
    if side == "both":
        return above if abs(above) < abs(below) else below, max(p_lower, p_upper)
    return (above, p_lower) if side == "lower" else (below, p_upper)


def _score_tost(name: str, a: Sample, b: Sample, d: Sample | None, *, margin: float, level: float, side: Side) -> Finding:
    from scipy.special import ndtr

    from .intervals import invert_score

    def z_at(delta: float) -> float:
        if d is None:
            return difference_z(float(a.x.sum()), len(a.x), float(b.x.sum()), len(b.x), delta)
        gains, losses = float(np.maximum(d.x, 0).mean()), float(np.maximum(-d.x, 0).mean())
        return score_z(gains * d.units, losses * d.units, d.units, delta)

    effect, wide = b.mean - a.mean, one_sided(level)
    above, below = z_at(-margin), z_at(margin)
    _, _, low, high = invert_score(z_at, effect, wide)
    statistic, p = _against(above, below, float(ndtr(-above)), float(ndtr(below)), side)
    return Finding(
        name=name,
        test=_TESTS[side].format(kind="score"),
        statistic=statistic,
        p_value=p,
        effect=effect,
        interval=(low, high),
        n=len(a.x) + len(b.x) if d is None else len(d.x),
        why=_margins(margin, wide, side) + "; shares of successes, or differences without spread, whose interval inverts the score test" + a.note(),
        source=(_TOST if side == "both" else _ONE_MARGIN) + "; Tango 1998; Miettinen & Nurminen 1985",
        level=wide,
        clusters=None if d is None else d.clusters,
    )


def _margins(margin: float, wide: float, side: Side) -> str:
    where = {"both": f"inside ±{margin:g}", "lower": f"above -{margin:g}", "upper": f"below {margin:g}"}[side]
    return f"asks whether the difference lies {where}: exactly where the {wide:g} interval does, p < {(1 - wide) / 2:.3g}"

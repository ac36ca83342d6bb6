"""Means, proportions and paired differences with intervals that respect clusters.

Every result says in words what was done (`Estimate.method`, `Finding.why`), and one method gives both the interval and the p-value, so
that the two never disagree. docs/statistics.md has the maths. This file knows neither models nor files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import Estimate, Finding
from .samples import Floats, Sample, check_level, inside_unit, pair_up, sample, t_critical

__all__ = ["bootstrap", "majority_rate", "mean_estimate", "paired_difference", "wilson"]

SMALL = 50
"""Below this many observations the bootstrap covers less than the t interval, which is then taken (measured: docs/statistics.md)."""
_CR1 = "Cameron & Miller 2015, A Practitioner's Guide to Cluster-Robust Inference, J. Human Resources 50(2); Miller 2024, arXiv 2411.00640"
_T = "Student 1908, The Probable Error of a Mean; Miller 2024, arXiv 2411.00640 (paired differences)"
_SCORE = "McNemar 1947; Tango 1998, Statistics in Medicine 17:891-908; Fagerland, Lydersen & Laake 2013, BMC Medical Research Methodology 13:91"


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion. Source: Wilson 1927, JASA 22:209-212.

    Args:
        successes: how many of `n`; need not be whole, so that a mean of clusters can be given.
        n: independent observations.
        level: confidence.

    Raises:
        TooFewError: n < 1.
        StatisticsError: successes outside [0, n], or level outside (0, 1).
    """
    from scipy.special import ndtri

    check_level(level)
    if n < 1:
        raise TooFewError(f"A proportion of n = {n!r} observations has no interval; expected at least 1.")
    if not 0 <= successes <= n:
        raise StatisticsError(f"successes is {successes!r} of n = {n}; expected a number from 0 to n.")
    z2 = float(ndtri((1 - level) / 2)) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return min(p, max(0.0, centre - half)) if p > 0 else 0.0, max(p, min(1.0, centre + half)) if p < 1 else 1.0


def mean_estimate(
    name: str,
    values: Sequence[float | None],
    *,
    clusters: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
    bounded: bool | None = None,
) -> Estimate:
    """A mean with the interval that its design asks for; `method` says which.

    | design | interval |
    |---|---|
    | 0/1, every observation its own cluster | Wilson |
    | fewer clusters than observations | cluster-robust t (CR1), clusters - 1 degrees of freedom |
    | the same in [0, 1] with no spread between clusters, or 0/1 in one cluster | Wilson with the clusters as observations (conservative) |
    | other numbers, n < 50 | t |
    | other numbers, n >= 50 | BCa bootstrap |

    Args:
        values: one per observation; None where the measure does not apply: left out, and `method` says how many.
        clusters: the source of each observation (a document); observations of one cluster may depend on each other.
        seed: of the bootstrap.
        bounded: whether the measure cannot leave [0, 1]; None takes it from the values. Say False for a measure such as nats per token
            that merely happens to lie there.

    Raises:
        TooFewError: no value, or a single observation or cluster of values that are not 0/1.
        StatisticsError: a value that is not finite, or lengths that differ.

    Source: Wilson 1927; Cameron & Miller 2015; Miller 2024, arXiv 2411.00640; Efron 1987.
    """
    check_level(level)
    data = sample(name, values, clusters)
    inside = inside_unit(data.x, bounded)
    binary = inside and bool(np.isin(data.x, (0.0, 1.0)).all())
    if data.units < 2 and not binary:
        what = "observation" if len(data.x) == 1 else "cluster"
        raise TooFewError(f"{name!r} has a single {what}, and its values are not 0/1; expected at least two {what}s for an interval.")
    low, high, method = _mean_interval(data, level, seed, inside, binary)
    return Estimate(name=name, value=data.mean, low=low, high=high, n=len(data.x), level=level, method=method + data.note(), clusters=data.clusters)


def _mean_interval(data: Sample, level: float, seed: int, inside: bool, binary: bool) -> tuple[float, float, str]:
    n, mean, se = len(data.x), data.mean, data.se()
    if binary and not data.clustered:
        return *wilson(float(data.x.sum()), n, level), "Wilson score interval"
    if se == 0 and inside:
        what = f"the {data.units} cluster{'s' if data.units > 1 else ''}" if data.clustered else f"the {n} values"
        why = "one cluster shows no spread between clusters" if data.units < 2 else "the sample shows no spread"
        return *wilson(min(mean, 1.0) * data.units, data.units, level), f"Wilson score interval with {what} as observations ({why}; conservative)"
    if se == 0:
        return mean, mean, "all equal: the sample shows no spread, so the interval has no width and says nothing of other samples"
    if not data.clustered and n >= SMALL:
        low, high = _bca(_mean_replicates(data.x, 4000, seed), mean, (data.x.sum() - data.x) / (n - 1), level)
        return min(low, mean), max(high, mean), "BCa bootstrap (4000 resamples)"  # at low levels BCa may miss the mean itself
    half = t_critical(data.units - 1, level) * se
    low, high = (max(0.0, mean - half), min(1.0, mean + half)) if inside else (mean - half, mean + half)
    clipped = ", clipped to [0, 1]" if inside and (mean - half < 0 or mean + half > 1) else ""
    if data.clustered:
        return low, high, f"cluster-robust t interval (CR1, {data.units} clusters, {data.units - 1} degrees of freedom){clipped}"
    return low, high, f"t interval ({n - 1} degrees of freedom){clipped}"


# ----------------------------------------------------------------------------------------------------------- bootstrap
def _mean_replicates(x: Floats, resamples: int, seed: int) -> Floats:
    """Means of resamples, in blocks of indices instead of a loop over resamples."""
    random = np.random.default_rng(seed)
    block = max(1, 2_000_000 // len(x))
    sizes = (min(block, resamples - start) for start in range(0, resamples, block))
    return np.concatenate([x[random.integers(len(x), size=(size, len(x)))].mean(axis=1) for size in sizes])


def _replicates(data: Sample, statistic: Callable[[Floats], float], resamples: int, seed: int) -> Floats:
    """The statistic on resamples of whole units."""
    random = np.random.default_rng(seed)
    codes = np.arange(len(data.x)) if data.codes is None else data.codes
    members = [data.x[codes == unit] for unit in range(data.units)]
    return np.array([statistic(np.concatenate([members[u] for u in random.integers(data.units, size=data.units)])) for _ in range(resamples)])


def _jackknife(data: Sample, statistic: Callable[[Floats], float]) -> Floats:
    codes = np.arange(len(data.x)) if data.codes is None else data.codes
    return np.array([statistic(data.x[codes != unit]) for unit in range(data.units)])


def _bca(replicates: Floats, value: float, jackknife: Floats, level: float) -> tuple[float, float]:
    """Bias-corrected and accelerated end points. Source: Efron 1987, JASA 82:171-185."""
    from scipy.special import ndtr, ndtri

    below = (np.sum(replicates < value) + 0.5 * np.sum(replicates == value)) / len(replicates)
    edge = 0.5 / len(replicates)
    z0 = float(ndtri(min(max(float(below), edge), 1 - edge)))
    d = jackknife.mean() - jackknife
    spread = float(d @ d)
    acceleration = float((d**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    ends: list[float] = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + float(ndtri(tail))
        scale = 1 - acceleration * z
        ends.append(float(ndtr(z0 + z / scale)) if scale > 0 else float(z > 0))
    low, high = np.quantile(replicates, ends)
    return float(min(low, high)), float(max(low, high))


def bootstrap(
    values: Sequence[float | None],
    statistic: Callable[[Floats], float],
    *,
    name: str = "bootstrap",
    clusters: Sequence[str] | None = None,
    method: Literal["bca", "percentile"] = "bca",
    resamples: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Any statistic of one sample with a bootstrap interval; with clusters, whole clusters are drawn.

    Args:
        values: one per observation; None is left out.
        statistic: float64[n] → number; n differs between resamples where clusters differ in size.
        method: "bca" corrects bias and skewness, "percentile" takes the quantiles of the resamples as they are.

    Raises:
        TooFewError: fewer than two observations or clusters.
        StatisticsError: the statistic is not finite on the sample, on a resample or with one cluster left out; or a setting is out of range.

    Source: Efron 1987, JASA 82:171-185; Davison & Hinkley 1997, ch. 3.8 (clusters).
    """
    check_level(level)
    if method not in ("bca", "percentile"):
        raise StatisticsError(f"method is {method!r}; expected 'bca' or 'percentile'.")
    if resamples < 100:
        raise StatisticsError(f"resamples is {resamples!r}; expected at least 100. Usual: 4000.")
    data = sample(name, values, clusters)
    if data.units < 2:
        raise TooFewError(f"{name!r} has a single {'observation' if len(data.x) == 1 else 'cluster'} to draw from; expected at least two.")
    value = float(statistic(data.x))
    replicates = _replicates(data, statistic, resamples, seed)
    jackknife = _jackknife(data, statistic) if method == "bca" else np.zeros(1)
    if not (math.isfinite(value) and np.isfinite(replicates).all() and np.isfinite(jackknife).all()):
        raise StatisticsError(f"The statistic of {name!r} is not finite on every resample; expected a number. Use one defined on any resample.")
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = _bca(replicates, value, jackknife, level) if method == "bca" else (float(end) for end in np.quantile(replicates, tails))
    drawn = f"{data.units} clusters drawn whole" if data.clustered else f"{len(data.x)} observations"
    text = f"{'BCa' if method == 'bca' else 'percentile'} bootstrap ({resamples} resamples of {drawn}){data.note()}"
    return Estimate(name=name, value=value, low=low, high=high, n=len(data.x), level=level, method=text, clusters=data.clusters)


# -------------------------------------------------------------------------------------------------------------- paired
def score_z(gains: float, losses: float, n: float, delta: float) -> float:
    """Score statistic of the difference of paired proportions being `delta`; falls as `delta` grows. Source: Tango 1998."""
    b = -gains - losses + (2 * n - gains + losses) * delta
    root = math.sqrt(max(0.0, b * b + 8 * n * losses * delta * (1 - delta)))
    variance = n * (2 * (root - b) / (4 * n) + delta * (1 - delta))
    gap = gains - losses - n * delta
    if variance <= 0:
        return math.copysign(math.inf, gap) if abs(gap) > 1e-9 else 0.0
    return gap / math.sqrt(variance)


def invert_score(z_at: Callable[[float], float], effect: float, level: float) -> tuple[float, float, float, float]:
    """(z, p, low, high) of a score statistic that falls as the difference grows from -1 to 1."""
    from scipy.optimize import brentq
    from scipy.special import ndtr, ndtri

    edge, critical = 1 - 1e-12, -float(ndtri((1 - level) / 2))
    low = float(brentq(lambda d: min(z_at(d), 1e9) - critical, -edge, effect)) if effect > -edge else -1.0
    high = float(brentq(lambda d: max(z_at(d), -1e9) + critical, effect, edge)) if effect < edge else 1.0
    z = z_at(0.0)
    return z, float(2 * ndtr(-abs(z))), low, high


def _tango(gains: float, losses: float, n: int, level: float) -> tuple[float, float, float, float]:
    """(z, p, low, high) of the difference of paired proportions: the score test and its inversion. Source: Tango 1998."""
    return invert_score(lambda delta: score_z(gains, losses, n, delta), (gains - losses) / n, level)


def paired_difference(
    name: str,
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    clusters: Sequence[str] | None = None,
    level: float = 0.95,
    bounded: bool | None = None,
) -> Finding:
    """Mean of after - before over the same observations, paired by position. Interval and p-value come from one method.

    | design | method |
    |---|---|
    | fewer clusters than pairs | cluster-robust t (CR1) on the differences, clusters - 1 degrees of freedom |
    | 0/1 on both sides | score test of McNemar and the interval that inverts it (Tango) |
    | other numbers | t on the differences |
    | measures in [0, 1] whose differences have no spread | the score method, with clusters as observations (conservative) |

    Args:
        before, after: one value per observation each; a pair with a None on either side is left out.
        clusters: the source of each observation (a document).
        bounded: whether the measure cannot leave [0, 1]; None takes it from the values.

    Raises:
        TooFewError: fewer than two complete pairs or clusters.
        StatisticsError: lengths differ, a value is not finite, or all pairs of an unbounded measure differ by the same non-zero amount.

    Source: in the finding.
    """
    check_level(level)
    pairs, ends = pair_up(name, before, after, clusters)
    both = np.concatenate([pairs.x, ends.x])
    inside = inside_unit(both, bounded)
    binary = inside and bool(np.isin(both, (0.0, 1.0)).all())
    data = Sample(x=ends.x - pairs.x, codes=pairs.codes, units=pairs.units, dropped=pairs.dropped)
    scale = float(np.abs(both).max())
    se = 0.0 if data.se() <= 1e-12 * scale else data.se()
    return _finding(name, data, se, level, inside=inside, score=binary and not data.clustered)


def _finding(name: str, data: Sample, se: float, level: float, *, inside: bool, score: bool) -> Finding:
    n, effect, units = len(data.x), data.mean, data.units
    gains, losses = float(np.maximum(data.x, 0).mean()), float(np.maximum(-data.x, 0).mean())
    if score or (se == 0 and inside):
        z, p, low, high = _tango(gains * units, losses * units, units, level)
        statistic, source = z, _SCORE
        if score:
            test = "McNemar score test with Tango interval"
            why = (
                f"paired 0/1 outcomes ({round(gains * n)} gained, {round(losses * n)} lost of {n}); the interval inverts the test, so they agree, "
                "which an exact McNemar p-value beside another interval does not"
            )
        else:
            test = f"score test with Tango interval on {units} {'clusters' if data.clustered else 'pairs'}"
            why = f"the differences show no spread, so a t test is not defined; the score method with {units} observations is conservative"
    elif se == 0:
        if effect != 0:
            raise StatisticsError(f"All {n} pairs of {name!r} differ by exactly {effect:g}: no spread, so no test is defined. Report the shift itself.")
        statistic, p, low, high, source = 0.0, 1.0, 0.0, 0.0, _T
        test, why = "none needed", "every pair is equal; the interval has no width and says nothing of other samples"
    else:
        from scipy.special import stdtr

        statistic, half = effect / se, t_critical(units - 1, level) * se
        p = float(2 * stdtr(units - 1, -abs(statistic)))
        low, high = (max(-1.0, effect - half), min(1.0, effect + half)) if inside else (effect - half, effect + half)
        if data.clustered:
            test, source = "cluster-robust paired t test (CR1)", _CR1
            why = f"{n} pairs from {units} clusters; pairs of one cluster may depend on each other, so {units - 1} degrees of freedom"
        else:
            test, source, why = "paired t test", _T, f"{n} independent pairs of numbers; the interval is on the differences"
    return Finding(
        name=name,
        test=test,
        statistic=statistic,
        p_value=p,
        effect=effect,
        interval=(low, high),
        n=n,
        why=why + data.note(),
        source=source,
        level=level,
        clusters=data.clusters,
    )


def majority_rate(labels: Sequence[str]) -> tuple[str, float]:
    """The commonest label and its share: what always saying it would score. Ties go to the first in the alphabet.

    Raises:
        TooFewError: no labels.
    """
    if not labels:
        raise TooFewError("There are no labels; expected at least one.")
    counts = Counter(labels)
    label = min(counts, key=lambda item: (-counts[item], item))
    return label, counts[label] / len(labels)

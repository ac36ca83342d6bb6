"""Sizes of effects with their intervals: standardised differences, superiority by rank, shares of variance, odds and risks. Knows no tests.

Signs follow after - before. Noncentral distributions give the intervals of d, g, Δ, η² and ω²; nothing here is a rule of thumb.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import Estimate
from .groups import independent
from .intervals import bootstrap
from .noncentral import f_interval, t_interval
from .proportions import proportion_difference
from .ranks import brunner_munzel
from .samples import Floats, Sample, Values, check_level, differences, pair_up, two_groups

__all__ = [
    "a12",
    "cliffs_delta",
    "cohen_d",
    "eta_squared",
    "glass_delta",
    "hedges_g",
    "odds_ratio",
    "omega_squared",
    "rank_biserial",
    "risk_difference",
]


def _standardised(name: str, t: float, df: float, scale: float, *, n: int, level: float, method: str) -> Estimate:
    """The effect t · scale, with the interval of its noncentrality."""
    check_level(level)
    low, high = t_interval(t, df, level)
    return Estimate(name=name, value=t * scale, low=low * scale, high=high * scale, n=n, level=level, method=method)


def _flat(name: str, effect: float, n: int, level: float) -> Estimate:
    if effect != 0:
        raise TooFewError(f"{name!r} shows no spread, so a difference in standard deviations is not defined; expected values that differ.")
    text = "all equal: no spread, so the interval has no width and says nothing of other samples"
    return Estimate(name=name, value=0.0, low=0.0, high=0.0, n=n, level=level, method=text)


def _small_sample_factor(df: float) -> float:
    """Hedges' exact J."""
    return math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) * math.sqrt(2 / df) if df > 1 else 0.0


def cohen_d(name: str, before: Values, after: Values, *, paired: bool = False, level: float = 0.95) -> Estimate:
    """Cohen's d: the difference of means in pooled standard deviations; paired: in standard deviations of the differences (d_z).

    The interval agrees with Student's (or the paired) t test.

    Raises:
        TooFewError: fewer than two values in a group (pairs), or no spread while means differ.

    Source: Cohen 1988; Cumming & Finch 2001 (noncentral interval).
    """
    return _cohen(name, before, after, paired=paired, level=level, corrected=False)


def hedges_g(name: str, before: Values, after: Values, *, paired: bool = False, level: float = 0.95) -> Estimate:
    """Hedges' g: Cohen's d times the exact factor that takes its small-sample bias away. Raises as `cohen_d`.

    Source: Hedges 1981, J. Educational Statistics 6:107-128.
    """
    return _cohen(name, before, after, paired=paired, level=level, corrected=True)


def _cohen(name: str, before: Values, after: Values, *, paired: bool, level: float, corrected: bool) -> Estimate:
    check_level(level)
    what = "Hedges' g" if corrected else "Cohen's d"
    if paired:
        d = differences(*pair_up(name, before, after))
        effect, sd, n, df = d.mean, d.sd(), len(d.x), len(d.x) - 1
        root, of = math.sqrt(n), "the differences of pairs (d_z)"
    else:
        a, b = two_groups(name, before, after)
        n, df = len(a.x) + len(b.x), len(a.x) + len(b.x) - 2
        effect, root = b.mean - a.mean, math.sqrt(len(a.x) * len(b.x) / n)
        sd, of = math.sqrt(((len(a.x) - 1) * a.sd() ** 2 + (len(b.x) - 1) * b.sd() ** 2) / df), "both groups, pooled"
    if sd == 0:
        return _flat(name, effect, n, level)
    if corrected and df < 2:
        raise TooFewError(f"{name!r} has {n} pairs; expected at least 3 for Hedges' g. Use cohen_d.")
    scale = (_small_sample_factor(df) if corrected else 1.0) / root
    return _standardised(name, effect / sd * root, df, scale, n=n, level=level, method=f"{what}, standard deviation of {of}; noncentral t interval")


def glass_delta(name: str, before: Values, after: Values, *, level: float = 0.95) -> Estimate:
    """Glass's Δ: the difference of means in standard deviations of `before` (the control).

    Raises:
        TooFewError: fewer than two values in a group, or a control without spread while means differ.

    Source: Glass 1976; Algina, Keselman & Penfield 2006 (noncentral interval where variances differ).
    """
    check_level(level)
    a, b = two_groups(name, before, after)
    effect, sd = b.mean - a.mean, a.sd()
    if sd == 0:
        return _flat(name, effect, len(a.x) + len(b.x), level)
    scale = math.sqrt(1 / len(a.x) + (b.sd() / sd) ** 2 / len(b.x))
    text = "Glass's Δ, standard deviation of the control; noncentral t interval"
    return _standardised(name, effect / sd / scale, len(a.x) - 1, scale, n=len(a.x) + len(b.x), level=level, method=text)


# --------------------------------------------------------------------------------------------------------------- ranks
def cliffs_delta(name: str, before: Values, after: Values, *, level: float = 0.95) -> Estimate:
    """Cliff's delta: P(after > before) - P(after < before). The interval is that of `brunner_munzel`, which raises the same errors.

    Source: Cliff 1993, Psychological Bulletin 114:494-509; Brunner & Munzel 2000.
    """
    found = brunner_munzel(name, before, after, level=level)
    text = f"Cliff's delta; {found.why}"
    return Estimate(name=name, value=found.effect, low=found.interval[0], high=found.interval[1], n=found.n, level=level, method=text)


def a12(name: str, before: Values, after: Values, *, level: float = 0.95) -> Estimate:
    """Vargha and Delaney's A12: P(after > before) + half P(equal); 0.5 is no effect. Interval and errors as `brunner_munzel`.

    Source: Vargha & Delaney 2000, J. Educational and Behavioral Statistics 25:101-132.
    """
    d = cliffs_delta(name, before, after, level=level)
    text = d.method.replace("Cliff's delta; ", "A12 (Vargha-Delaney); ", 1)
    return Estimate(name=name, value=(d.value + 1) / 2, low=(d.low + 1) / 2, high=(d.high + 1) / 2, n=d.n, level=level, method=text)


def rank_biserial(name: str, before: Values, after: Values, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Matched-pairs rank-biserial correlation: (ranks for - ranks against) / all ranks of the differences, from -1 to 1; zeros are dropped.

    Raises:
        TooFewError: fewer than two pairs.

    Source: Kerby 2014; interval: percentile bootstrap of pairs.
    """
    d = differences(*pair_up(name, before, after))
    if not d.x.any():
        return _flat(name, 0.0, len(d.x), level)

    def correlation(x: Floats) -> float:
        from scipy.stats import rankdata

        x = x[x != 0]
        if not len(x):
            return 0.0
        ranks = rankdata(np.abs(x))
        return float((ranks * np.sign(x)).sum() / ranks.sum())

    found = bootstrap(d.x.tolist(), correlation, name=name, method="percentile", resamples=resamples, level=level, seed=seed)
    low, high = min(found.low, found.value), max(found.high, found.value)
    return Estimate(name=name, value=found.value, low=low, high=high, n=found.n, level=level, method=f"matched-pairs rank-biserial; {found.method}")


# ------------------------------------------------------------------------------------------------- shares of variance
def eta_squared(name: str, groups: Mapping[str, Values], *, level: float = 0.95) -> Estimate:
    """η²: the share of the sample's variance that lies between groups; too large for the population, see `omega_squared`.

    Raises:
        TooFewError: fewer than two groups, no more values than groups, or no spread within groups while means differ.

    Source: Fisher 1925; Steiger 2004 (noncentral F interval).
    """
    return _share(name, groups, level, omega=False)


def omega_squared(name: str, groups: Mapping[str, Values], *, level: float = 0.95) -> Estimate:
    """ω²: the share of the population's variance between groups, less what chance gives; 0 at least. Raises as `eta_squared`.

    Source: Hays 1963; Steiger 2004 (noncentral F interval).
    """
    return _share(name, groups, level, omega=True)


def _share(name: str, groups: Mapping[str, Values], level: float, *, omega: bool) -> Estimate:
    check_level(level)
    samples = independent(name, groups, 1)
    n, k = sum(len(data.x) for data in samples.values()), len(samples)
    if n <= k:
        raise TooFewError(f"{name!r} has {n} values in {k} groups; expected more values than groups.")
    grand = sum(float(data.x.sum()) for data in samples.values()) / n
    between = sum(len(data.x) * (data.mean - grand) ** 2 for data in samples.values())
    within = sum((len(data.x) - 1) * data.sd() ** 2 for data in samples.values())
    if within == 0:
        return _flat(name, 0.0 if len({data.mean for data in samples.values()}) == 1 else 1.0, n, level)
    f = between / (k - 1) / (within / (n - k))
    low, high = (nc / (nc + n) for nc in f_interval(f, k - 1, n - k, level))
    gain = max(0.0, f - 1) * (k - 1)
    value, text = (gain / (gain + n), "ω²") if omega else (between / (between + within), "η²")
    return Estimate(name=name, value=value, low=min(low, value), high=max(high, value), n=n, level=level, method=f"{text}; noncentral F interval")


# ------------------------------------------------------------------------------------------------------ odds and risks
def _binary(name: str, before: Values, after: Values) -> tuple[Sample, Sample]:
    a, b = two_groups(name, before, after, least=1)
    for data in (a, b):
        if not np.isin(data.x, (0.0, 1.0)).all():
            raise StatisticsError(f"{name!r} has values that are neither 0 nor 1; expected 0/1 outcomes.")
    return a, b


def odds_ratio(name: str, before: Sequence[float | None], after: Sequence[float | None], *, level: float = 0.95) -> Estimate:
    """Odds of 1 after over odds of 1 before; 1 is no effect. Where a cell is empty, half an observation is added to each.

    Raises:
        TooFewError: an empty group.
        StatisticsError: a value is neither 0 nor 1.

    Source: Woolf 1955; Haldane 1956, Anscombe 1956 (empty cells).
    """
    from scipy.special import ndtri

    check_level(level)
    a, b = _binary(name, before, after)
    cells = np.array([b.x.sum(), len(b.x) - b.x.sum(), len(a.x) - a.x.sum(), a.x.sum()])
    empty = bool((cells == 0).any())
    cells = cells + 0.5 * empty
    log, half = float(np.log(cells) @ (1, -1, 1, -1)), -float(ndtri((1 - level) / 2)) * math.sqrt(float((1 / cells).sum()))
    text = "odds ratio, Woolf's logit interval" + (" with half an observation added to each cell, as one is empty" if empty else "")
    return Estimate(name=name, value=math.exp(log), low=math.exp(log - half), high=math.exp(log + half), n=len(a.x) + len(b.x), level=level, method=text)


def risk_difference(name: str, before: Sequence[float | None], after: Sequence[float | None], *, level: float = 0.95) -> Estimate:
    """Share of 1 after less share of 1 before, of independent groups, with Miettinen and Nurminen's interval. Raises as `proportion_difference`."""
    found = proportion_difference(name, before, after, level=level)
    return Estimate(name=name, value=found.effect, low=found.interval[0], high=found.interval[1], n=found.n, level=level, method="Miettinen-Nurminen interval")

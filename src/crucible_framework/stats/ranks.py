"""Rank tests of two groups: Mann-Whitney, Wilcoxon signed-rank and Brunner-Munzel, each with the interval that inverts it.

Ties never need another test: exact distributions are counted over the ranks as they are, ties included. Chooses no test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import StatisticsError, TooFewError
from ..records import Finding, record
from .permutation import arrangements
from .samples import Alternative, Floats, Sample, Values, differences, p_of, pair_up, paired_level, side_note, t_critical, two_groups

__all__ = ["brunner_munzel", "mann_whitney", "wilcoxon"]

_MW = "Mann & Whitney 1947; Hodges & Lehmann 1963 (shift); Streitberg & Röhmel 1986 (exact with ties)"
_WILCOXON = "Wilcoxon 1945; Pratt 1959, JASA 54:655-667 (zeros); Hodges & Lehmann 1963 (shift); Streitberg & Röhmel 1986 (exact with ties)"
_BM = "Brunner & Munzel 2000, Biometrical Journal 42:17-25; Neubert & Brunner 2007, CSDA 51:5192-5204 (permutation); Lehmann 1953 (separation)"
_EXACT_GROUPS, _EXACT_PAIRS, _MAX_SHIFTS = 100, 200, 25_000_000
_SMALL_GROUP = 10
"""Below this Brunner & Munzel's t is too liberal (Neubert & Brunner 2007), and its permutation distribution is taken."""


@record
class _Null:
    """How a rank statistic is spread where there is no effect: P(U <= u), P(U >= u), and the last values that the test accepts."""

    below: Callable[[float], float]
    above: Callable[[float], float]
    lowest: float
    highest: float


def _exact(support: Floats, chances: Floats, alpha: float) -> _Null:
    down, up = np.cumsum(chances), np.cumsum(chances[::-1])[::-1]

    def below(u: float) -> float:
        index = int(np.searchsorted(support, u + 1e-9)) - 1
        return float(down[index]) if index >= 0 else 0.0

    def above(u: float) -> float:
        index = int(np.searchsorted(support, u - 1e-9))
        return float(up[index]) if index < len(support) else 0.0

    accepted_up, accepted_down = np.flatnonzero(2 * up >= alpha), np.flatnonzero(2 * down >= alpha)
    return _Null(below=below, above=above, lowest=float(support[accepted_down[0]]), highest=float(support[accepted_up[-1]]))


def _normal(mean: float, sd: float, alpha: float) -> _Null:
    """With continuity correction of a half."""
    from scipy.special import ndtr, ndtri

    reach = 0.5 - float(ndtri(alpha / 2)) * sd
    return _Null(
        below=lambda u: float(ndtr((u - mean + 0.5) / sd)),
        above=lambda u: float(ndtr(-(u - mean - 0.5) / sd)),
        lowest=mean - reach,
        highest=mean + reach,
    )


def _invert(shifts: Floats, null: _Null) -> tuple[float, float] | None:
    """The shifts that the test accepts; None where the sample is too small to refuse any.

    The statistic at a shift is the number of `shifts` above it, those equal counting half. An end at which the test itself rejects (ties)
    is moved by one unit in the last place, so that "0 is inside" and "not rejected" remain the same.
    """
    n = len(shifts)
    if null.highest >= n or null.lowest <= 0:
        return None
    shifts = np.sort(shifts)

    def statistic(at: float) -> float:
        left, right = np.searchsorted(shifts, at, "left"), np.searchsorted(shifts, at, "right")
        return float(n - right + (right - left) / 2)

    low = float(shifts[math.ceil(n - null.highest - 1e-9) - 1])
    high = float(shifts[math.floor(n + 1 - null.lowest + 1e-9) - 1])
    if statistic(low) > null.highest + 1e-9:
        low = math.nextafter(low, math.inf)
    if statistic(high) < null.lowest - 1e-9:
        high = math.nextafter(high, -math.inf)
    return (low, high) if low <= high else (low, low)


def _shift_finding(
    name: str, test: str, *, shifts: Floats, null: _Null, observed: float, n: int, why: str, source: str, level: float, alternative: Alternative
) -> Finding:
    wide = paired_level(level, alternative)
    ends = _invert(shifts, null)
    p = p_of(null.below(observed), null.above(observed), alternative)
    if ends is None:
        raise TooFewError(
            f"{name!r} has too few values for a {wide:g} interval by ranks (p = {p:.4g}, and no values as few as these give p < {1 - level:.3g}); "
            "expected more. Ask for a lower level, or use a t test."
        )
    return Finding(
        name=name,
        test=test,
        statistic=observed,
        p_value=p,
        effect=min(max(float(np.median(shifts)), ends[0]), ends[1]),
        interval=ends,
        n=n,
        why=why + side_note(level, alternative),
        source=source,
        level=wide,
    )


def _all_equal(name: str, test: str, *, n: int, source: str, level: float, alternative: Alternative) -> Finding:
    wide = paired_level(level, alternative)
    why = "every value is equal, so there is nothing to rank; the interval has no width and says nothing of other samples"
    return Finding(name=name, test=test, statistic=0.0, p_value=1.0, effect=0.0, interval=(0.0, 0.0), n=n, why=why, source=source, level=wide)


def _midranks(x: Floats) -> Floats:
    from scipy.stats import rankdata

    return np.asarray(rankdata(x), dtype=np.float64)


def _subset_sums(doubled: NDArray[np.int64], size: int) -> tuple[Floats, Floats]:
    """Chances of each sum of `size` of the doubled ranks, all choices being equally likely."""
    total = int(np.sort(doubled)[::-1][:size].sum())
    ways = np.zeros((size + 1, total + 1))
    ways[0, 0] = 1.0
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, : total + 1 - rank].copy()
    chances = ways[size] / ways[size].sum()
    support = np.flatnonzero(chances)
    return support / 2.0, chances[support]


def _sign_sums(doubled: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Chances of each sum of doubled ranks with positive sign, each sign being equally likely."""
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        moved = np.zeros_like(chances)
        moved[rank:] = chances[: len(chances) - rank]
        chances = 0.5 * (chances + moved)
    support = np.flatnonzero(chances)
    return support / 2.0, chances[support]


def mann_whitney(name: str, before: Values, after: Values, *, alternative: Alternative = "two-sided", level: float = 0.95) -> Finding:
    """Mann-Whitney U test of two independent groups; the effect is the Hodges-Lehmann shift after - before.

    Exact up to 100 values in all, ties included; beyond, normal with the correction for ties and continuity. It asks whether one group is
    the other one shifted; where spreads differ too, use `brunner_munzel`.

    Raises:
        TooFewError: too few values for the level (4 and 4 reach 0.95).
        StatisticsError: more than 25 million differences.
    """
    wide = paired_level(level, alternative)
    a, b = two_groups(name, before, after, least=1)
    n1, n2 = len(a.x), len(b.x)
    n = n1 + n2
    if n1 * n2 > _MAX_SHIFTS:
        raise StatisticsError(f"{name!r} has {n1} × {n2} differences; expected at most {_MAX_SHIFTS}. Use brunner_munzel.")
    ranks = _midranks(np.concatenate([a.x, b.x]))
    if ranks.min() == ranks.max():
        return _all_equal(name, "Mann-Whitney U test", n=n, source=_MW, level=level, alternative=alternative)
    base = n2 * (n2 + 1) / 2
    observed = float(ranks[n1:].sum()) - base
    tied = len(np.unique(ranks)) < n
    if n <= _EXACT_GROUPS:
        support, chances = _subset_sums(np.rint(2 * ranks).astype(np.int64), n2)
        null, how = _exact(support - base, chances, 1 - wide), "exact" + (" over the ranks as they are, ties included" if tied else "")
    else:
        counts = np.unique(ranks, return_counts=True)[1].astype(np.float64)
        spread = math.sqrt(n1 * n2 / 12 * (n + 1 - float((counts**3 - counts).sum()) / (n * (n - 1))))
        null, how = _normal(n1 * n2 / 2, spread, 1 - wide), "normal with continuity correction" + (" and correction for ties" if tied else "")
    return _shift_finding(
        name,
        "Mann-Whitney U test",
        shifts=np.subtract.outer(b.x, a.x).ravel(),
        null=null,
        observed=observed,
        n=n,
        why=f"{n1} and {n2} independent values compared by rank, {how}; the effect is the Hodges-Lehmann shift{a.note()}{b.note()}",
        source=_MW,
        level=level,
        alternative=alternative,
    )


def wilcoxon(name: str, before: Values, after: Values, *, alternative: Alternative = "two-sided", level: float = 0.95) -> Finding:
    """Wilcoxon signed-rank test of pairs; the effect is the Hodges-Lehmann pseudo-median of after - before.

    Pairs without a difference keep their ranks and no sign (Pratt). Exact up to 200 pairs, ties included; beyond, normal with continuity
    correction. It takes the differences to be symmetric about their centre.

    Raises:
        TooFewError: too few pairs for the level (6 that differ reach 0.95), or fewer than two.
        StatisticsError: more than 7,000 pairs.
    """
    wide = paired_level(level, alternative)
    d = differences(*pair_up(name, before, after))
    n = len(d.x)
    if n * (n + 1) // 2 > _MAX_SHIFTS:
        raise StatisticsError(f"{name!r} has {n} pairs; expected at most 7,000 for signed ranks. Use paired_difference.")
    if not d.x.any():
        return _all_equal(name, "Wilcoxon signed-rank test", n=n, source=_WILCOXON, level=level, alternative=alternative)
    ranks, moved = _midranks(np.abs(d.x)), d.x != 0
    zeros = float(ranks[~moved].sum()) / 2
    observed = float(ranks[d.x > 0].sum()) + zeros
    if n <= _EXACT_PAIRS:
        support, chances = _sign_sums(np.rint(2 * ranks[moved]).astype(np.int64))
        null, how = _exact(support + zeros, chances, 1 - wide), "exact, ties included"
    else:
        null = _normal(n * (n + 1) / 4, math.sqrt(float((ranks[moved] ** 2).sum()) / 4), 1 - wide)
        how = "normal with continuity correction"
    equal = f"; {n - int(moved.sum())} pairs are equal and keep their ranks (Pratt)" if not moved.all() else ""
    rows, columns = np.triu_indices(n)
    return _shift_finding(
        name,
        "Wilcoxon signed-rank test",
        shifts=(d.x[rows] + d.x[columns]) / 2,
        null=null,
        observed=observed,
        n=n,
        why=f"{n} pairs compared by the ranks of their differences, {how}; the effect is the Hodges-Lehmann pseudo-median{equal}{d.note()}",
        source=_WILCOXON,
        level=level,
        alternative=alternative,
    )


# ------------------------------------------------------------------------------------------------------ Brunner-Munzel
def _wins(a: Floats, b: Floats) -> Floats:
    """P(other group is smaller) + half P(equal), of each value of `b` against all of `a`."""
    ordered = np.sort(a)
    return np.asarray((np.searchsorted(ordered, b, "left") + np.searchsorted(ordered, b, "right")) / (2 * len(a)), dtype=np.float64)


def superiority(a: Floats, b: Floats) -> tuple[float, float, float]:
    """(theta, standard error, degrees of freedom) of theta = P(after > before) + half P(equal)."""
    up, down = _wins(a, b), 1 - _wins(b, a)
    vb, va = float(up.var(ddof=1)) / len(b), float(down.var(ddof=1)) / len(a)
    theta, variance = float(up.mean()), va + vb
    if variance <= 1e-30:
        return theta, 0.0, float(len(a) + len(b) - 2)
    return theta, math.sqrt(variance), variance**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))


def _separated(n1: int, n2: int, alpha: float) -> tuple[float, float]:
    """(one-sided p, lower end of theta) where every value of one group is above all of the other.

    The chance of that is ∏ kΔ/(n1 + kΔ), k = 1..n2, under Lehmann's alternatives G = F^Δ, where theta = Δ/(1 + Δ).
    """
    from scipy.optimize import brentq

    k = np.arange(1, n2 + 1)

    def log_chance(log_odds: float) -> float:
        # In the log domain throughout: kΔ/(n1 + kΔ) = 1/(1 + n1/(kΔ)).
        return -float(np.logaddexp(0.0, math.log(n1) - np.log(k) - log_odds).sum())

    target = math.log(alpha / 2)
    end = float(brentq(lambda t: log_chance(t) - target, -50.0 + target, 60.0 + math.log(n1 * n2), xtol=1e-12))
    return math.exp(log_chance(0.0)), 1 / (1 + math.exp(-end))


def _studentised(z: Floats, n1: int, resamples: int, seed: int) -> tuple[Floats, bool]:
    """Brunner and Munzel's statistic over permutations of the labels; and whether they are all of them."""
    n = len(z)
    wins = (z[:, None] > z[None, :]) + 0.5 * (z[:, None] == z[None, :])
    blocks, exact = arrangements(n, n - n1, resamples, seed)
    statistics: list[Floats] = []
    for g in blocks:
        up, down = (1 - g) @ wins.T / n1, g @ wins / (n - n1)  # of each value as one of `after` against `before`, and the reverse
        theta = (g * up).sum(axis=1) / (n - n1)
        vb = (g * (up - theta[:, None]) ** 2).sum(axis=1) / (n - n1 - 1) / (n - n1)
        va = ((1 - g) * (down - theta[:, None]) ** 2).sum(axis=1) / (n1 - 1) / n1
        se = np.sqrt(va + vb)
        gap = np.where(np.abs(theta - 0.5) < 1e-12, 0.0, theta - 0.5)
        with np.errstate(divide="ignore", invalid="ignore"):
            statistics.append(np.where(se > 1e-12, gap / se, np.where(gap == 0, 0.0, np.copysign(np.inf, gap))))
    return np.sort(np.concatenate(statistics)), exact


def brunner_munzel(
    name: str,
    before: Values,
    after: Values,
    *,
    alternative: Alternative = "two-sided",
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Finding:
    """Brunner-Munzel test of two independent groups whose spreads may differ; the effect is Cliff's delta, after against before.

    delta = P(after > before) - P(after < before), from -1 to 1. With fewer than 10 values in a group the permutation distribution of the
    same statistic is taken. Where the groups are completely apart, the exact rank test and its inversion under Lehmann's alternatives.

    Raises:
        TooFewError: a group has fewer than two values.
    """
    wide = paired_level(level, alternative)
    a, b = two_groups(name, before, after)
    theta, se, df = superiority(a.x, b.x)
    if se == 0 and abs(theta - 0.5) < 1e-12:
        return _all_equal(name, "Brunner-Munzel test", n=len(a.x) + len(b.x), source=_BM, level=level, alternative=alternative)
    if se == 0:
        statistic, lower, upper, low, high, how = _apart(a, b, theta, wide)
    elif min(len(a.x), len(b.x)) < _SMALL_GROUP:
        statistic, lower, upper, low, high, how = _permuted(a, b, (theta, se), wide, resamples=resamples, seed=seed)
    else:
        from scipy.special import stdtr

        statistic, half = (theta - 0.5) / se, t_critical(df, wide) * se
        lower, upper = float(stdtr(df, statistic)), float(stdtr(df, -statistic))
        low, high, how = theta - half, theta + half, f"Student's t with {df:.4g} degrees of freedom"
    return Finding(
        name=name,
        test="Brunner-Munzel test",
        statistic=statistic,
        p_value=p_of(lower, upper, alternative),
        effect=2 * theta - 1,
        interval=(max(-1.0, 2 * low - 1), min(1.0, 2 * high - 1)),
        n=len(a.x) + len(b.x),
        why=f"{len(a.x)} and {len(b.x)} independent values compared by rank, whose spreads may differ; {how}; the effect is Cliff's delta"
        + a.note()
        + b.note()
        + side_note(level, alternative),
        source=_BM,
        level=wide,
    )


def _apart(a: Sample, b: Sample, theta: float, wide: float) -> tuple[float, float, float, float, float, str]:
    p, end = _separated(len(a.x), len(b.x), 1 - wide) if theta > 0.5 else _separated(len(b.x), len(a.x), 1 - wide)
    how = "no value of one group reaches the other, so the exact rank test, inverted under Lehmann's alternatives"
    if theta > 0.5:
        return float(len(a.x) * len(b.x)), 1.0, p, end, 1.0, how
    return 0.0, p, 1.0, 0.0, 1 - end, how


def _permuted(a: Sample, b: Sample, estimate: tuple[float, float], wide: float, *, resamples: int, seed: int) -> tuple[float, float, float, float, float, str]:
    theta, se = estimate
    spread, exact = _studentised(np.concatenate([a.x, b.x]), len(a.x), resamples, seed)
    statistic, extra, total = (theta - 0.5) / se, 0 if exact else 1, len(spread) + (0 if exact else 1)
    dust = 1e-9 * max(1.0, abs(statistic))
    upper = (float(np.sum(spread >= statistic - dust)) + extra) / total
    lower = (float(np.sum(spread <= statistic + dust)) + extra) / total
    # The furthest values that the test still accepts: 2 (count + extra)/total >= alpha.
    needed = max(1, math.ceil((1 - wide) * total / 2 - extra - 1e-9))
    highest, lowest = float(spread[len(spread) - needed]), float(spread[needed - 1])
    low = theta - highest * se if math.isfinite(highest) else 0.0
    high = theta - lowest * se if math.isfinite(lowest) else 1.0
    how = f"its {'exact' if exact else f'Monte Carlo ({resamples} permutations)'} permutation distribution, as a group has fewer than {_SMALL_GROUP} values"
    return statistic, lower, upper, _settle(low, upper, 1 - wide, above=True), _settle(high, lower, 1 - wide, above=False), how


def _settle(end: float, tail: float, alpha: float, *, above: bool) -> float:
    """Puts an end that rounding left on the wrong side of one half on the side that its tail probability says."""
    rejected = 2 * tail < alpha - 1e-12
    if above:
        return max(end, math.nextafter(0.5, 1.0)) if rejected else min(end, 0.5)
    return min(end, math.nextafter(0.5, 0.0)) if rejected else max(end, 0.5)

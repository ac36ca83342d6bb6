"""Counts and shares: difference of proportions, exact McNemar, exact Fisher, χ² of a table. Knows no pairing by position and no clusters.

Each effect is 0 where there is none; odds ratios stand as Yule's Q = (OR - 1)/(OR + 1), which is finite where a cell is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import Finding
from .intervals import invert_score
from .noncentral import chi2_interval
from .samples import Floats, check_level, one_sided, two_groups

__all__ = ["chi_square", "clopper_pearson", "fisher_exact", "mcnemar_exact", "proportion_difference"]

_MN = "Miettinen & Nurminen 1985, Statistics in Medicine 4:213-226"
_FISHER = "Fisher 1935; central (twice the smaller tail) form, so that it agrees with the exact interval: Fay 2010, Biostatistics 11:373-374"
_MCNEMAR = "McNemar 1947; Clopper & Pearson 1934; Fagerland, Lydersen & Laake 2013"
_CHI = "Pearson 1900; Cramér 1946; Steiger 2004, Psychological Methods 9:164-182 (noncentral interval)"


def difference_z(k1: float, n1: int, k2: float, n2: int, delta: float) -> float:
    """Score statistic of p2 - p1 being `delta`, with the restricted likelihood's closed form and the factor N/(N - 1)."""
    n, x = n1 + n2, k1 + k2
    gap = k2 / n2 - k1 / n1 - delta
    l3, l2 = float(n), (n2 + 2 * n1) * delta - n - x
    l1, l0 = (n1 * delta - n - 2 * k1) * delta + x, k1 * delta * (1 - delta)
    q = l2**3 / (3 * l3) ** 3 - l1 * l2 / (6 * l3**2) + l0 / (2 * l3)
    p = math.copysign(math.sqrt(max(0.0, l2**2 / (3 * l3) ** 2 - l1 / (3 * l3))), q)
    a = (math.pi + math.acos(max(-1.0, min(1.0, q / p**3)))) / 3 if p else 0.0
    p1 = min(1.0, max(0.0, 2 * p * math.cos(a) - l2 / (3 * l3)))
    p2 = min(1.0, max(0.0, p1 + delta))
    variance = (p1 * (1 - p1) / n1 + p2 * (1 - p2) / n2) * n / (n - 1)
    if variance <= 1e-15:
        return math.copysign(math.inf, gap) if abs(gap) > 1e-9 else 0.0
    return gap / math.sqrt(variance)


def proportion_difference(name: str, before: Sequence[float | None], after: Sequence[float | None], *, level: float = 0.95) -> Finding:
    """Difference of two independent shares of 0/1 outcomes: the score test and the interval that inverts it.

    Raises:
        TooFewError: a group is empty, or both hold a single value.
        StatisticsError: a value is neither 0 nor 1.
    """
    check_level(level)
    a, b = two_groups(name, before, after, least=1)
    for group in (a, b):
        if not np.isin(group.x, (0.0, 1.0)).all():
            raise StatisticsError(f"{name!r} has the value {group.x[~np.isin(group.x, (0.0, 1.0))][0]:g}; expected 0 or 1. Use welch_t for numbers.")
    (k1, n1), (k2, n2) = ((float(group.x.sum()), len(group.x)) for group in (a, b))
    if n1 + n2 < 3:
        raise TooFewError(f"{name!r} has a single value on each side; expected at least three in all for a comparison.")
    effect = k2 / n2 - k1 / n1
    z, p, low, high = invert_score(lambda delta: difference_z(k1, n1, k2, n2, delta), effect, level)
    why = f"two independent groups of 0/1 outcomes ({k1:g} of {n1}, {k2:g} of {n2}); the interval inverts the score test, so they agree"
    return Finding(
        name=name,
        test="score test of two proportions with Miettinen-Nurminen interval",
        statistic=z,
        p_value=p,
        effect=effect,
        interval=(low, high),
        n=n1 + n2,
        why=why + a.note() + b.note(),
        source=_MN,
        level=level,
    )


def _count(what: str, value: float) -> int:
    if value < 0 or value != int(value):
        raise StatisticsError(f"{what} is {value!r}; expected a count: a whole number from 0 on.")
    return int(value)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a proportion. Source: Clopper & Pearson 1934, Biometrika 26:404-413."""
    from scipy.special import betaincinv

    check_level(level)
    if n < 1:
        raise TooFewError(f"A proportion of n = {n!r} observations has no interval; expected at least 1.")
    if not 0 <= k <= n:
        raise StatisticsError(f"k is {k!r} of n = {n}; expected a number from 0 to n.")
    tail = (1 - level) / 2
    return (float(betaincinv(k, n - k + 1, tail)) if k else 0.0), (float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0)


def mcnemar_exact(name: str, gained: int, lost: int, *, n: int | None = None, level: float = 0.95) -> Finding:
    """Exact McNemar test of pairs of 0/1 outcomes, from how many changed to 1 and how many to 0.

    The effect is (gained - lost)/(gained + lost), the net share of the pairs that changed; its Clopper-Pearson interval agrees with the
    exact p-value. For the difference of the shares themselves use `paired_difference`.

    Args:
        n: all pairs, for the record; None counts the changed ones only.
    """
    from scipy.special import bdtr

    check_level(level)
    gained, lost = _count("gained", gained), _count("lost", lost)
    changed = gained + lost
    if n is not None and n < changed:
        raise StatisticsError(f"n is {n}; expected at least the {changed} pairs that changed.")
    low, high = clopper_pearson(gained, changed, level) if changed else (0.0, 1.0)
    p = min(1.0, 2 * float(bdtr(min(gained, lost), changed, 0.5))) if changed else 1.0
    return Finding(
        name=name,
        test="exact McNemar test",
        statistic=float(gained),
        p_value=p,
        effect=(gained - lost) / changed if changed else 0.0,
        interval=(2 * low - 1, 2 * high - 1),
        n=changed if n is None else n,
        why=f"paired 0/1 outcomes: {gained} gained, {lost} lost; the effect is the net share of the pairs that changed, exact whatever their number",
        source=_MCNEMAR,
        level=level,
    )


def fisher_exact(name: str, table: Sequence[Sequence[int]], *, level: float = 0.95) -> Finding:
    """Fisher's exact test of a 2 × 2 table [[a, b], [c, d]]; the effect is Yule's Q of the conditional odds ratio ad/bc.

    Raises:
        StatisticsError: the table is not 2 × 2 of counts.
        TooFewError: the table is empty.
    """
    check_level(level)
    if len(table) != 2 or any(len(row) != 2 for row in table):
        raise StatisticsError("The table is not 2 × 2; expected [[a, b], [c, d]]. Use chi_square for larger ones.")
    (a, b), (c, d) = ((_count("a cell", cell) for cell in row) for row in table)
    n = a + b + c + d
    if n == 0:
        raise TooFewError(f"{name!r} has an empty table; expected at least one observation.")
    p, odds, low, high = _conditional_odds(a, b, c, d, 1 - level)
    return Finding(
        name=name,
        test="Fisher's exact test",
        statistic=float(a),
        p_value=p,
        effect=_yule(odds),
        interval=(_yule(low), _yule(high)),
        n=n,
        why=f"exact given the margins; the odds ratio is {odds:.4g} ({low:.4g} to {high:.4g}), shown as Yule's Q so that it stays finite",
        source=_FISHER,
        level=level,
    )


def _yule(odds: float) -> float:
    return 1.0 if math.isinf(odds) else (odds - 1) / (odds + 1)


def _conditional_odds(a: int, b: int, c: int, d: int, alpha: float) -> tuple[float, float, float, float]:
    """(p, conditional maximum-likelihood odds ratio, low, high) from the noncentral hypergeometric distribution, on a log scale."""
    from scipy.optimize import brentq
    from scipy.special import gammaln

    row, column, n = a + b, a + c, a + b + c + d
    support = np.arange(max(0, row + column - n), min(row, column) + 1)
    weight = -gammaln(support + 1) - gammaln(row - support + 1) - gammaln(column - support + 1) - gammaln(n - row - column + support + 1)

    def pmf(log_odds: float) -> Floats:
        logs = weight + log_odds * support
        p = np.exp(logs - logs.max())
        return np.asarray(p / p.sum(), dtype=np.float64)

    null = pmf(0.0)
    p_value = min(1.0, 2 * min(float(null[support <= a].sum()), float(null[support >= a].sum())))
    if len(support) == 1:
        return 1.0, 1.0, 0.0, math.inf
    first, last = a == support[0], a == support[-1]

    def solve(rising: Callable[[float], float]) -> float:
        edge = 10.0
        while rising(-edge) > 0 or rising(edge) < 0:
            edge *= 2
        return math.exp(min(700.0, float(brentq(rising, -edge, edge, xtol=1e-13))))

    low = 0.0 if first else solve(lambda t: float(pmf(t)[support >= a].sum()) - alpha / 2)
    high = math.inf if last else solve(lambda t: alpha / 2 - float(pmf(t)[support <= a].sum()))
    odds = 0.0 if first else math.inf if last else solve(lambda t: float(pmf(t) @ support) - a)
    return p_value, odds, low, high


def chi_square(name: str, table: Sequence[Sequence[int]], *, level: float = 0.95) -> Finding:
    """Pearson's χ² test of an r × c table of counts; the effect is Cramér's V less what chance alone gives.

    Raises:
        StatisticsError: the table is ragged or holds something else than counts.
        TooFewError: fewer than two rows or columns that are not empty.
    """
    from scipy.special import chdtrc

    counts = np.array([[_count("a cell", cell) for cell in row] for row in table] if len({len(row) for row in table}) == 1 else [], dtype=np.float64)
    if counts.ndim != 2:
        raise StatisticsError("The table is empty or its rows differ in length; expected rows of counts of one length.")
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(counts.shape) < 2:
        raise TooFewError(f"{name!r} has counts in {counts.shape[0]} rows and {counts.shape[1]} columns; expected at least two of each.")
    n, df = float(counts.sum()), (counts.shape[0] - 1) * (counts.shape[1] - 1)
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / n
    statistic = float(((counts - expected) ** 2 / expected).sum())
    wide = one_sided(level)
    low, high = chi2_interval(statistic, df, wide)
    scale = n * (min(counts.shape) - 1)
    small = f"; {int((expected < 5).sum())} expected counts are below 5, so p is rough" if (expected < 5).any() else ""
    return Finding(
        name=name,
        test="Pearson's χ² test",
        statistic=statistic,
        p_value=float(chdtrc(df, statistic)),
        effect=min(1.0, math.sqrt(max(0.0, statistic - df) / scale)),
        interval=(min(1.0, math.sqrt(low / scale)), min(1.0, math.sqrt(high / scale))),
        n=int(n),
        why=f"{counts.shape[0]} × {counts.shape[1]} counts; the effect is Cramér's V corrected for chance, its interval is of {wide:g}{small}",
        source=_CHI,
        level=wide,
    )

"""Noncentral t, F and χ²: distribution functions that stay finite far out, and intervals of the noncentrality. Knows no tests.

scipy's functions give NaN where a tail underflows; there the approximations by a normal or central distribution (Patnaik 1949) are as good
as exact. Source of the intervals: Steiger & Fouladi 1997; Steiger 2004, Psychological Methods 9:164-182.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_FAR = 200.0


def t_cdf(t: float, df: float, shift: float) -> float:
    """P(T <= t) of the noncentral t distribution."""
    from scipy.special import chdtr, chdtrc, nctdtr, ndtr

    p = float(nctdtr(df, shift, t)) if abs(shift) < _FAR else math.nan
    if not math.isnan(p):
        return p
    if abs(shift) >= _FAR and df < 500:  # only the standard deviation varies still: T is near shift / √(χ²/df), and scipy's series is endless
        if t * shift <= 0:
            return float(shift < 0)
        ratio = df * (shift / t) ** 2
        return float(chdtrc(df, ratio) if shift > 0 else chdtr(df, ratio))
    return float(ndtr((t * (1 - 1 / (4 * df)) - shift) / math.sqrt(1 + t * t / (2 * df))))


def f_cdf(f: float, df1: float, df2: float, noncentrality: float) -> float:
    """P(F <= f) of the noncentral F distribution."""
    from scipy.special import fdtr, ncfdtr

    p = float(ncfdtr(df1, df2, noncentrality, f)) if noncentrality < 1e6 else math.nan
    if not math.isnan(p):
        return p
    return float(fdtr((df1 + noncentrality) * ((df1 + noncentrality) / (df1 + 2 * noncentrality)), df2, f * (df1 / (df1 + noncentrality))))


def chi2_cdf(x: float, df: float, noncentrality: float) -> float:
    """P(X <= x) of the noncentral χ² distribution."""
    from scipy.special import chdtr, chndtr

    p = float(chndtr(x, df, noncentrality)) if noncentrality < 1e5 else math.nan
    if not math.isnan(p):
        return p
    scale = 1 + noncentrality / (df + noncentrality)
    return float(chdtr((df + noncentrality) / scale, x / scale))


def t_interval(t: float, df: float, level: float) -> tuple[float, float]:
    """Interval of the noncentrality of a t statistic; it leaves 0 out exactly where the two-sided test rejects."""
    from scipy.optimize import brentq

    def solve(target: float) -> float:
        reach = 10.0 + abs(t)
        while t_cdf(t, df, t - reach) < target or t_cdf(t, df, t + reach) > target:
            reach *= 2
        return float(brentq(lambda shift: t_cdf(t, df, shift) - target, t - reach, t + reach, xtol=1e-11))

    return solve((1 + level) / 2), solve((1 - level) / 2)


def f_interval(f: float, df1: float, df2: float, level: float) -> tuple[float, float]:
    """Interval of the noncentrality of an F statistic; its lower end is 0 exactly where p >= (1 - level)/2."""
    from scipy.special import fdtrc

    return _from_zero(float(fdtrc(df1, df2, f)), lambda noncentrality: f_cdf(f, df1, df2, noncentrality), max(10.0, 2 * df1 * f), level)


def chi2_interval(x: float, df: float, level: float) -> tuple[float, float]:
    """Interval of the noncentrality of a χ² statistic; its lower end is 0 exactly where p >= (1 - level)/2."""
    from scipy.special import chdtrc

    return _from_zero(float(chdtrc(df, x)), lambda noncentrality: chi2_cdf(x, df, noncentrality), max(10.0, 2 * x), level)


def _from_zero(p: float, below: Callable[[float], float], reach: float, level: float) -> tuple[float, float]:
    from scipy.optimize import brentq

    tail = (1 - level) / 2

    def solve(target: float) -> float:
        edge = reach
        while below(edge) > target:
            edge *= 2
        return float(brentq(lambda noncentrality: below(noncentrality) - target, 0.0, edge, xtol=1e-10))

    return (solve(1 - tail) if p < tail else 0.0), (solve(tail) if p < 1 - tail else 0.0)

"""Almost stochastic order: is one method better over its whole distribution of scores, and not only on average? Knows no pairs."""

from __future__ import annotations

import math

import numpy as np

from ..errors import StatisticsError
from ..records import Estimate
from .samples import Floats, Values, check_level, two_groups

__all__ = ["almost_stochastic_order"]


def _violation(a: Floats, b: Floats) -> Floats:
    """Share of the squared distance between quantile functions where b is below a, for sorted rows of a and b; 0.5 where they are equal."""
    edges = np.unique(np.concatenate([np.arange(1, a.shape[1] + 1) / a.shape[1], np.arange(1, b.shape[1] + 1) / b.shape[1]]).round(12))
    widths, middles = np.diff(edges, prepend=0.0), edges - np.diff(edges, prepend=0.0) / 2
    gap = b[:, (middles * b.shape[1]).astype(np.intp)] - a[:, (middles * a.shape[1]).astype(np.intp)]
    total, against = (gap**2) @ widths, (np.minimum(gap, 0.0) ** 2) @ widths
    return np.asarray(np.where(total > 0, against / np.where(total > 0, total, 1.0), 0.5), dtype=np.float64)


def almost_stochastic_order(name: str, before: Values, after: Values, *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Estimate:
    """How much is missing for `after` to dominate `before` stochastically (larger is better).

    The value is the violation ratio: 0 where each quantile of `after` is at least that of `before`, 1 the other way round. `high` is its upper
    bound at `level` (Dror's ε_min): below 0.5, `after` is almost stochastically dominant; Ulmer et al. advise 0.2. `low` is 0: one-sided.

    Raises:
        TooFewError: a group has fewer than two values.
        StatisticsError: fewer than 100 resamples.

    Source: del Barrio, Cuesta-Albertos & Matrán 2018; Dror, Shlomov & Reichart 2019 (ACL); Ulmer, Hardmeier & Frellsen 2022, arXiv 2204.06815.
    """
    from scipy.special import ndtri

    check_level(level)
    if resamples < 100:
        raise StatisticsError(f"resamples is {resamples!r}; expected at least 100. Usual: 1000.")
    a, b = two_groups(name, before, after)
    n, m = len(a.x), len(b.x)
    value = float(_violation(np.sort(a.x)[None, :], np.sort(b.x)[None, :])[0])
    random, scale = np.random.default_rng(seed), math.sqrt(n * m / (n + m))
    drawn = [np.sort(random.choice(data.x, size=(resamples, len(data.x))), axis=1) for data in (a, b)]
    spread = float(np.std(scale * (_violation(*drawn) - value), ddof=1))
    high = min(1.0, value + float(ndtri(level)) * spread / scale)
    text = f"almost stochastic order: violation ratio with its one-sided upper bound ({resamples} bootstrap resamples){a.note()}{b.note()}"
    return Estimate(name=name, value=value, low=0.0, high=high, n=n + m, level=level, method=text)

"""Looking while data arrive: a comparison of pairs that stays valid however often one looks and whenever one stops. Knows no fixed n."""

from __future__ import annotations

import math

import numpy as np

from ..errors import StatisticsError
from ..records import Finding
from .samples import Floats, Values, check_level, differences, pair_up

__all__ = ["anytime_difference"]

_SOURCE = "Waudby-Smith & Ramdas 2024, Estimating means of bounded random variables by betting, JRSS B 86:1-27 (hedged capital); Ville 1939"


def _bets(y: Floats, alpha: float) -> Floats:
    """The predictable plug-in bets: each knows only the values before its own."""
    t = np.arange(1, len(y) + 1)
    means = (0.5 + np.cumsum(y)) / (t + 1)
    variances = (0.25 + np.cumsum((y - means) ** 2)) / (t + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    return np.asarray(np.sqrt(2 * math.log(2 / alpha) / (before * t * np.log1p(t))), dtype=np.float64)


def _peak(y: Floats, bets: Floats, mean: float) -> float:
    """Largest logarithm so far of the capital of who bets half his money that the mean is above `mean`."""
    stakes = np.minimum(bets, 0.5 / mean) if mean > 0 else bets
    return math.log(0.5) + max(0.0, float(np.cumsum(np.log1p(stakes * (y - mean))).max()))


def anytime_difference(
    name: str, before: Values, after: Values, *, bounds: tuple[float, float] = (0.0, 1.0), level: float = 0.95
) -> Finding:  # fmt: skip
    """Mean difference after - before of pairs in the order in which they came, with a p-value and interval valid at every time at once.

    Look after each pair and stop whenever you like: the chance that the interval *ever* leaves the truth out is at most 1 - level. The price
    is a wider interval than `paired_difference` gives at one fixed n. Nothing is approximated; scores only need bounds.

    Args:
        before, after: scores within `bounds`, in random order; with clusters give one mean per cluster.
        bounds: the least and largest score possible.

    Raises:
        TooFewError: fewer than two pairs.
        StatisticsError: a score outside the bounds, or bounds that are not two rising numbers.
    """
    check_level(level)
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise StatisticsError(f"bounds is {bounds!r}; expected two rising numbers: the least and the largest score possible.")
    pairs, ends = pair_up(name, before, after)
    both = np.concatenate([pairs.x, ends.x])
    if both.min() < low or both.max() > high:
        raise StatisticsError(f"{name!r} has scores from {both.min():g} to {both.max():g}; expected them within bounds {bounds}.")
    d, width = differences(pairs, ends), high - low
    y, alpha = (d.x / width + 1) / 2, 1 - level
    bets, needed = _bets(y, alpha), math.log(1 / alpha)
    # The capital of the upward bet falls as the mean rises, and that of the downward bet is the upward one of the mirrored values.
    left, right = _edge(y, bets, needed), 1 - _edge(1 - y, bets, needed)
    capital = max(_peak(y, bets, 0.5), _peak(1 - y, bets, 0.5))
    ends_of = sorted(((2 * left - 1) * width, (2 * right - 1) * width))
    return Finding(
        name=name,
        test="anytime-valid betting test",
        statistic=capital,
        p_value=min(1.0, math.exp(-capital)),
        effect=d.mean,
        interval=(ends_of[0], ends_of[1]),
        n=len(d.x),
        why=f"{len(d.x)} pairs in order of arrival; valid at every look and stopping time; the statistic is the log of the largest capital{d.note()}",
        source=_SOURCE,
        level=level,
    )


def _edge(y: Floats, bets: Floats, needed: float) -> float:
    """The smallest mean that the upward bet has never refused."""
    if _peak(y, bets, 0.0) <= needed:
        return 0.0
    low, high = 0.0, 1.0
    if _peak(y, bets, 0.5) > needed:
        low = 0.5
    else:
        high = 0.5  # so that 0 is on the side of the interval that the p-value says
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _peak(y, bets, middle) > needed else (low, middle)
    return high

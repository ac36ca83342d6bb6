"""Looking a planned number of times: the levels at which each look may stop, so that all looks together keep α. Knows no data.

At look k compare with `level=1 - bounds.nominal[k]`; interval and p-value of that look then agree with the decision, and the intervals of all looks
hold together (repeated confidence intervals). Where the number of looks is open, `anytime_difference` is the tool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from ..errors import StatisticsError
from ..records import record
from .samples import Floats

__all__ = ["Boundaries", "Spending", "group_sequential"]

Spending: TypeAlias = Literal["obrien-fleming", "pocock", "linear"]
_SOURCE = "Lan & DeMets 1983, Biometrika 70:659-663; O'Brien & Fleming 1979; Pocock 1977; Armitage, McPherson & Rowe 1969; Jennison & Turnbull 2000"
_REACH, _POINTS = 8.0, 801


@record
class Boundaries:
    """When to stop.

    Attributes:
        fractions: of the planned information (items, seeds) that each look has.
        z: two-sided critical values of the standard normal statistic.
        nominal: the p-value that stops at each look.
        spent: α used up to and with each look; the last is α.
    """

    fractions: tuple[float, ...]
    z: tuple[float, ...]
    nominal: tuple[float, ...]
    spent: tuple[float, ...]
    alpha: float
    spending: Spending
    source: str = _SOURCE


def _spent(spending: Spending, alpha: float, fractions: Sequence[float]) -> list[float]:
    from scipy.special import ndtr, ndtri

    edge = -float(ndtri(alpha / 4))
    curve: Callable[[float], float] = {
        "obrien-fleming": lambda t: 4 * float(ndtr(-edge / math.sqrt(t))),
        "pocock": lambda t: alpha * math.log(1 + (math.e - 1) * t),
        "linear": lambda t: alpha * t,
    }[spending]
    return [curve(t) for t in fractions]


def _weights(points: int, step: float) -> Floats:
    weights = np.full(points, 4.0)
    weights[::2] = 2.0
    weights[[0, -1]] = 1.0
    return np.asarray(weights * step / 3, dtype=np.float64)


def _crossing(density: Floats, at: Floats, weights: Floats, spread: float, wanted: float) -> float:
    """The end beyond which the sum of earlier increments and a new one of standard deviation `spread` lies with chance `wanted`, both sides together."""
    from scipy.optimize import brentq
    from scipy.special import ndtr

    mass = density * weights

    def outside(edge: float) -> float:
        return float(mass @ (ndtr((at - edge) / spread) + ndtr((-edge - at) / spread)))

    high = 1.0
    while outside(high) > wanted:
        high *= 2
    return float(brentq(lambda edge: outside(edge) - wanted, 0.0, high, xtol=1e-10))


def group_sequential(looks: int | Sequence[float], *, alpha: float = 0.05, spending: Spending = "obrien-fleming") -> Boundaries:
    """Two-sided stopping boundaries by an error-spending function.

    Args:
        looks: how many, evenly spaced; or the fraction of the information at each, rising to 1.
        alpha: of all looks together.
        spending: "obrien-fleming" hardly ever stops early and costs little at the end; "pocock" stops early more often and costs more;
            "linear" lies between.

    Raises:
        StatisticsError: no look, fractions that do not rise to 1, an alpha outside (0, 1), or an unknown spending.

    Source: Lan & DeMets 1983; the distribution of the path by the recursion of Armitage, McPherson & Rowe 1969 (Simpson's rule).
    """
    from scipy.special import ndtr, ndtri

    if not 0 < alpha < 1:
        raise StatisticsError(f"alpha is {alpha!r}; expected a number between 0 and 1. Usual: 0.05.")
    if spending not in get_args(Spending):
        raise StatisticsError(f"spending is {spending!r}; expected one of {', '.join(get_args(Spending))}.")
    fractions = [(k + 1) / looks for k in range(looks)] if isinstance(looks, int) else [float(t) for t in looks]
    rising = bool(fractions) and all(b > a for a, b in zip([0.0, *fractions[:-1]], fractions, strict=True))
    if not rising or abs(fractions[-1] - 1) > 1e-9:
        raise StatisticsError(f"looks is {looks!r}; expected at least one look, at fractions that rise to 1.")
    spent = _spent(spending, alpha, fractions)
    z: list[float] = []
    at, density, weights = np.zeros(1), np.ones(1), np.ones(1)
    for k, (t, total) in enumerate(zip(fractions, spent, strict=True)):
        step = total - (spent[k - 1] if k else 0.0)
        spread = math.sqrt(t - (fractions[k - 1] if k else 0.0))
        edge = _REACH * math.sqrt(t) if step < 1e-15 else _crossing(density, at, weights, spread, step)
        z.append(edge / math.sqrt(t))
        grid = np.linspace(-min(edge, _REACH * math.sqrt(t)), min(edge, _REACH * math.sqrt(t)), _POINTS)
        kernel = np.exp(-0.5 * ((grid[:, None] - at[None, :]) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
        density = kernel @ (density * weights)
        at, weights = grid, _weights(_POINTS, float(grid[1] - grid[0]))
    z[0] = -float(ndtri(spent[0] / 2)) if spent[0] >= 1e-15 else z[0]
    nominal = tuple(2 * float(ndtr(-edge)) for edge in z)
    return Boundaries(fractions=tuple(fractions), z=tuple(z), nominal=nominal, spent=tuple(spent), alpha=alpha, spending=spending)

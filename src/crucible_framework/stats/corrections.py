"""Corrections for several comparisons. Knows p-values only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from ..errors import StatisticsError

__all__ = ["Correction", "adjust"]

Correction: TypeAlias = Literal["holm", "hochberg", "bonferroni", "bh", "by", "none"]
_METHODS = ("holm", "hochberg", "bonferroni", "bh", "by", "none")


def adjust(p_values: Sequence[float], method: Correction = "holm") -> tuple[float, ...]:
    """Adjusted p-values, in the order given: reject where they are below α.

    | method | keeps | holds under |
    |---|---|---|
    | bonferroni | the chance of any false rejection (family-wise) | any dependence |
    | holm | the same, and always rejects at least as much | any dependence |
    | hochberg | the same, rejects more | independence or positive dependence |
    | bh | the expected share of false rejections (false discovery rate) | independence or positive dependence |
    | by | the same | any dependence |
    | none | nothing | – |

    Raises:
        StatisticsError: a p-value is not in [0, 1], or the method is unknown.

    Source: Holm 1979; Hochberg 1988; Benjamini & Hochberg 1995; Benjamini & Yekutieli 2001.
    """
    if method not in _METHODS:
        raise StatisticsError(f"method is {method!r}; expected one of {', '.join(_METHODS)}. Usual: 'holm'.")
    for index, p in enumerate(p_values):
        if not 0 <= p <= 1:  # a NaN fails too
            raise StatisticsError(f"The p-value at position {index} is {p!r}; expected a number from 0 to 1.")
    m = len(p_values)
    if method == "none" or m == 0:
        return tuple(float(p) for p in p_values)
    order = np.argsort(np.array(p_values, dtype=np.float64), kind="stable")
    ordered, rank = np.array(p_values, dtype=np.float64)[order], np.arange(1, m + 1)
    if method == "bonferroni":
        adjusted = ordered * m
    elif method == "holm":
        adjusted = np.maximum.accumulate(ordered * (m - rank + 1))
    else:
        factor = {"hochberg": m - rank + 1.0, "bh": m / rank, "by": m / rank * float(np.sum(1 / rank))}[method]
        adjusted = np.minimum.accumulate((ordered * factor)[::-1])[::-1]
    back = np.empty(m)
    back[order] = np.minimum(adjusted, 1.0)
    return tuple(float(p) for p in back)

"""Numbers as every statistic here takes them: checked, as float64, with their independent units. Knows no test and no interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import StatisticsError, TooFewError
from ..records import Finding, record

Floats: TypeAlias = NDArray[np.float64]
Alternative: TypeAlias = Literal["two-sided", "greater", "less"]
Values: TypeAlias = Sequence[float | None]
_LARGEST = 1e60
"""Fourth powers of larger numbers overflow; smaller ones than its reciprocal count as 0."""


@record
class Sample:
    """Values that apply, with the independent units that they come from; `codes` is the unit of each value, None where each is its own."""

    x: Floats
    codes: NDArray[np.intp] | None
    units: int
    dropped: int

    @property
    def clustered(self) -> bool:
        """Whether some unit holds more than one value."""
        return self.codes is not None and self.units < len(self.x)

    @property
    def clusters(self) -> int | None:
        """The number of units, None where no clusters were given."""
        return None if self.codes is None else self.units

    @property
    def mean(self) -> float:
        """The plain mean of the values."""
        return float(self.x.mean())

    def se(self) -> float:
        """CR1 standard error of the mean (of n/(n-1) form without clusters); exactly 0 where only rounding differs; 0 with one unit."""
        if self.units < 2:
            return 0.0
        residuals = self.x - self.x.mean()
        sums = residuals if self.codes is None else np.bincount(self.codes, weights=residuals, minlength=self.units)
        se = math.sqrt(self.units / (self.units - 1) * float(sums @ sums)) / len(self.x)
        return 0.0 if se <= 1e-12 * max(1e-300, float(np.abs(self.x).max())) else se

    def sd(self) -> float:
        """Standard deviation of the values with n - 1; exactly 0 where only rounding differs."""
        if len(self.x) < 2:
            return 0.0
        sd = float(self.x.std(ddof=1))
        return 0.0 if sd <= 1e-12 * max(1e-300, float(np.abs(self.x).max())) else sd

    def note(self) -> str:
        """What was left out, as the end of a sentence; "" where nothing was."""
        return left_out(self.dropped, len(self.x) + self.dropped)


def left_out(dropped: int, of: int) -> str:
    """How many values did not apply, as the end of a sentence."""
    return f"; {dropped} of {of} did not apply and {'is' if dropped == 1 else 'are'} left out" if dropped else ""


def check_level(level: float) -> None:
    """Refuses a confidence level outside (0, 1)."""
    if not 0 < level < 1:
        raise StatisticsError(f"level is {level!r}; expected a number between 0 and 1. Usual: 0.95.")


def sample(name: str, values: Values, clusters: Sequence[str] | None = None) -> Sample:
    """Checked values without the None ones. Integers of any width become float64, so that nothing wraps around.

    Raises:
        TooFewError: no value applies.
        StatisticsError: a value is not finite, or lengths differ.
    """
    if clusters is not None and len(clusters) != len(values):
        raise StatisticsError(f"{name!r} has {len(values)} values and {len(clusters)} clusters; expected one cluster for each value.")
    kept = [index for index, value in enumerate(values) if value is not None]
    x = np.array([values[index] for index in kept], dtype=np.float64)
    if not np.isfinite(x).all():
        where = kept[int(np.flatnonzero(~np.isfinite(x))[0])]
        raise StatisticsError(f"{name!r} has the value {values[where]!r} at position {where}; expected finite numbers. Use None where there is none.")
    if len(x) and np.abs(x).max() > _LARGEST:
        raise StatisticsError(f"{name!r} has the value {x[np.abs(x).argmax()]:g}; expected sizes up to {_LARGEST:g}. Use another unit.")
    x[np.abs(x) < 1 / _LARGEST] = 0.0
    if not len(x):
        raise TooFewError(f"{name!r} has no value that applies, of {len(values)}; expected at least one.")
    if clusters is None:
        return Sample(x=x, codes=None, units=len(x), dropped=len(values) - len(x))
    names, codes = np.unique(np.array([clusters[index] for index in kept], dtype=str), return_inverse=True)
    return Sample(x=x, codes=codes.astype(np.intp), units=len(names), dropped=len(values) - len(x))


def pair_up(name: str, before: Values, after: Values, clusters: Sequence[str] | None = None) -> tuple[Sample, Sample]:
    """Both sides of the pairs that are complete; at least two units of them.

    Raises:
        TooFewError: fewer than two complete pairs or clusters.
        StatisticsError: lengths differ, or a value is not finite.
    """
    if len(before) != len(after):
        raise StatisticsError(f"{name!r} has {len(before)} values before and {len(after)} after; expected pairs by position.")
    whole = [b is not None and a is not None for b, a in zip(before, after, strict=True)]
    pairs = sample(name, [b if ok else None for b, ok in zip(before, whole, strict=True)], clusters)
    ends = sample(name, [a if ok else None for a, ok in zip(after, whole, strict=True)], clusters)
    if pairs.units < 2:
        what = "pair" if len(pairs.x) == 1 else "cluster"
        raise TooFewError(f"{name!r} has a single {what}; expected at least two {what}s for a comparison.")
    return pairs, ends


def two_groups(name: str, before: Values, after: Values, least: int = 2) -> tuple[Sample, Sample]:
    """Both groups, each with at least `least` values.

    Raises:
        TooFewError: a group is smaller.
        StatisticsError: a value is not finite.
    """
    groups = sample(f"{name} before", before), sample(f"{name} after", after)
    for group, side in zip(groups, ("before", "after"), strict=True):
        if len(group.x) < least:
            raise TooFewError(f"{name!r} has {len(group.x)} value{'s' * (len(group.x) != 1)} {side}; expected at least {least} for this test.")
    return groups


def differences(pairs: Sample, ends: Sample) -> Sample:
    """after - before of each pair, with rounding noise (of the size of the values' last digits) put to 0."""
    x = ends.x - pairs.x
    scale = max(float(np.abs(pairs.x).max()), float(np.abs(ends.x).max()))
    return Sample(x=np.where(np.abs(x) <= 1e-14 * scale, 0.0, x), codes=pairs.codes, units=pairs.units, dropped=pairs.dropped)


def inside_unit(x: Floats, bounded: bool | None) -> bool:
    """Whether a measure lies in [0, 1]: as said, or as the values suggest."""
    inside = bool((x >= 0).all() and (x <= 1).all())
    if bounded and not inside:
        raise StatisticsError(f"bounded is True, but values go from {x.min():g} to {x.max():g}; expected [0, 1]. Leave bounded out.")
    return inside if bounded is None else bounded


def is_binary(x: Floats) -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.isin(x, (0.0, 1.0)).all())


def t_critical(df: float, level: float) -> float:
    """Two-sided critical value of Student's t."""
    from scipy.special import stdtrit

    return -float(stdtrit(df, (1 - level) / 2))  # the lower tail keeps its digits for levels near 1


def paired_level(level: float, alternative: Alternative) -> float:
    """The level of the two-sided interval that leaves 0 out exactly where the test rejects: 1 - 2α beside a one-sided test at α.

    Raises:
        StatisticsError: the alternative is unknown, or a one-sided test is asked at a level of 0.5 or less.
    """
    check_level(level)
    if alternative not in ("two-sided", "greater", "less"):
        raise StatisticsError(f"alternative is {alternative!r}; expected 'two-sided', 'greater' or 'less'.")
    return level if alternative == "two-sided" else one_sided(level)


def one_sided(level: float) -> float:
    """1 - 2α of a level 1 - α, without its rounding dust (0.95 → 0.9)."""
    check_level(level)
    if level <= 0.5:
        raise StatisticsError(f"level is {level!r}; expected more than 0.5 where a test looks at one side. Usual: 0.95.")
    return round(2 * level - 1, 12)


def p_of(lower: float, upper: float, alternative: Alternative) -> float:
    """A p-value from P(as small or smaller) and P(as large or larger); two-sided is twice the smaller."""
    if alternative == "greater":
        return min(1.0, upper)
    return min(1.0, lower if alternative == "less" else 2 * min(lower, upper))


def t_finding(
    name: str,
    test: str,
    *,
    effect: float,
    se: float,
    df: float,
    n: int,
    why: str,
    source: str,
    level: float,
    alternative: Alternative = "two-sided",
    clusters: int | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Finding:
    """A finding whose statistic is effect / se with Student's t; `se` > 0, or 0 together with an effect of 0."""
    from scipy.special import stdtr

    wide = paired_level(level, alternative)
    if se == 0:
        why += "; every value is equal, so the interval has no width and says nothing of other samples"
        statistic, p, low, high = 0.0, 1.0, effect, effect
    else:
        statistic, half = effect / se, t_critical(df, wide) * se
        p = p_of(float(stdtr(df, statistic)), float(stdtr(df, -statistic)), alternative)
        low, high = max(bounds[0], effect - half), min(bounds[1], effect + half)
    return Finding(
        name=name,
        test=test,
        statistic=statistic,
        p_value=p,
        effect=effect,
        interval=(low, high),
        n=n,
        why=why + side_note(level, alternative),
        source=source,
        level=wide,
        clusters=clusters,
    )


def side_note(level: float, alternative: Alternative) -> str:
    """Says which interval stands beside a one-sided p-value."""
    if alternative == "two-sided":
        return ""
    return f"; one-sided ({alternative}), so the interval is of {one_sided(level):g}: its end leaves 0 out exactly where p < {1 - level:g}"

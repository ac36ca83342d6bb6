"""Permutation tests of a difference of means, exact where that is cheap, for independent, paired and clustered designs.

The interval inverts the test: each arrangement accepts the shifts between two roots of a quadratic, and the ends are quantiles of those
roots. So interval and p-value come from the same arrangements and cannot disagree. Knows no ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import StatisticsError, TooFewError
from ..records import Finding
from .samples import Floats, Sample, Values, check_level, differences, pair_up, sample

__all__ = ["permutation_test"]

MAX_EXACT = 20_000
"""Up to this many arrangements all are gone through."""
_SOURCE = "Fisher 1935; Pitman 1937; Phipson & Smyth 2010 (no p of 0); Garthwaite 1996, Biometrics 52:1387-1393 (inversion)"


def _blocks(total: int, n: int) -> Iterator[int]:
    """Sizes of blocks of rows of n numbers that fit in some tens of megabytes."""
    size = max(1, 2_000_000 // n)
    return (min(size, total - start) for start in range(0, total, size))


def arrangements(n: int, chosen: int, resamples: int, seed: int) -> tuple[Iterator[Floats], bool]:
    """Blocks of rows of float64[n], 1 for the `chosen` units and 0 for the others, and whether they are all that there are.

    All of them where there are at most 20,000, else `resamples` random ones.
    """
    total = math.comb(n, chosen)
    if total <= MAX_EXACT:
        every = itertools.combinations(range(n), chosen)
        picked = (np.array(list(itertools.islice(every, size))) for size in _blocks(total, n))
        return (_mark(rows, n) for rows in picked), True
    random = np.random.default_rng(seed)
    drawn = (np.argpartition(random.random((size, n)), chosen - 1, axis=1)[:, :chosen] for size in _blocks(resamples, n))
    return (_mark(rows, n) for rows in drawn), False


def _mark(picked: NDArray[np.intp], n: int) -> Floats:
    rows = np.zeros((len(picked), n))
    np.put_along_axis(rows, picked, 1.0, axis=1)
    return rows


def _signs(n: int, resamples: int, seed: int) -> tuple[Iterator[Floats], bool]:
    if 2**n <= MAX_EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return iter([(1 - 2 * bits).astype(np.float64)]), True
    random, both = np.random.default_rng(seed), np.array([-1.0, 1.0])
    return (random.choice(both, size=(size, n)) for size in _blocks(resamples, n)), False


def _invert(moved: Floats, kept: Floats, effect: float, scale: float, *, exact: bool, alpha: float) -> tuple[float, float, float]:
    """(p, low, high). An arrangement's statistic after a shift δ is moved - δ kept; it counts where |moved - δ kept| >= |effect - δ|."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (effect - moved) / (1 - kept), (effect + moved) / (1 + kept)
    own = np.abs(kept) >= 1 - 1e-12  # the sample as it is, or its mirror image: it counts at every shift
    lower, upper = np.where(own, -np.inf, np.minimum(first, second)), np.where(own, np.inf, np.maximum(first, second))
    lower, upper = (np.where(np.abs(ends) <= 1e-12 * scale, 0.0, ends) for ends in (lower, upper))
    if not exact:  # the sample's own arrangement is one of them
        lower, upper = np.append(lower, -np.inf), np.append(upper, np.inf)
    total = len(lower)
    p = float(np.count_nonzero((lower <= 0) & (upper >= 0))) / total
    needed = max(1, math.ceil(alpha * total - 1e-9))
    return p, float(np.sort(lower)[needed - 1]), float(np.sort(upper)[total - needed])


def _by_unit(data: Sample) -> tuple[Floats, Floats]:
    """(sum of the values, number of values) of each unit."""
    if data.codes is None:
        return data.x, np.ones(len(data.x))
    sums = np.bincount(data.codes, weights=data.x, minlength=data.units).astype(np.float64)
    return sums, np.bincount(data.codes, minlength=data.units).astype(np.float64)


def permutation_test(
    name: str,
    before: Values,
    after: Values,
    *,
    paired: bool = False,
    clusters: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Finding:
    """Permutation test of the difference of means, with the interval that inverts it. Two-sided.

    | design | what is exchanged |
    |---|---|
    | independent | the labels of the values |
    | independent, clustered | the labels of whole clusters, each of which must be on one side |
    | paired | the sign of each pair's difference |
    | paired, clustered | the signs of all differences of a cluster together |

    All arrangements where there are at most 20,000, else `resamples` random ones with the sample's own added, and `why` gives the Monte Carlo
    error. Exact where the groups differ by a shift at most: it tests equal distributions, not only equal means.

    Args:
        clusters: paired: one per pair; else {"before": …, "after": …}, one per value.

    Raises:
        TooFewError: so few units that no arrangement could be rare enough for the level.
        StatisticsError: lengths differ, a value is not finite, fewer than 999 resamples, or a cluster is on both sides.
    """
    check_level(level)
    if resamples < 999:
        raise StatisticsError(f"resamples is {resamples!r}; expected at least 999. Usual: 9999.")
    if paired:
        if isinstance(clusters, Mapping):
            raise StatisticsError("clusters is a mapping; expected one cluster for each pair where paired is True.")
        return _paired(name, before, after, clusters, level=level, resamples=resamples, seed=seed)
    if clusters is not None and not (isinstance(clusters, Mapping) and set(clusters) == {"before", "after"}):
        raise StatisticsError('clusters of groups that are not paired; expected {"before": …, "after": …}.')
    sides = (clusters["before"], clusters["after"]) if isinstance(clusters, Mapping) else (None, None)
    a, b = sample(f"{name} before", before, sides[0]), sample(f"{name} after", after, sides[1])
    if sides[0] is not None and sides[1] is not None and set(sides[0]) & set(sides[1]):
        raise StatisticsError(f"Cluster {min(set(sides[0]) & set(sides[1]))!r} is on both sides; expected each on one. Use clustered_t.")
    sums, sizes = (np.concatenate(parts) for parts in zip(_by_unit(a), _by_unit(b), strict=True))
    rows, exact = arrangements(a.units + b.units, b.units, resamples, seed)
    owner = np.concatenate([np.zeros(a.units), np.ones(b.units)])
    centred, owned = sums - sums.sum() / sizes.sum() * sizes, owner * sizes
    parts = [(_difference(block, centred, sizes), _difference(block, owned, sizes)) for block in rows]
    moved, kept = (np.concatenate(part) for part in zip(*parts, strict=True))
    what = f"labels of {'whole clusters' if a.clustered or b.clustered else 'values'} ({a.units} and {b.units})"
    units = None if a.codes is None else a.units + b.units
    return _finding(name, what, (a, b), moved, kept, effect=b.mean - a.mean, level=level, clusters=units, n=len(a.x) + len(b.x), exact=exact)


def _difference(picked: Floats, weights: Floats, sizes: Floats) -> Floats:
    """Mean of the picked units less that of the others, for each arrangement."""
    inside, size = picked @ weights, picked @ sizes
    return np.asarray(inside / size - (weights.sum() - inside) / (sizes.sum() - size), dtype=np.float64)


def _paired(name: str, before: Values, after: Values, clusters: Sequence[str] | None, *, level: float, resamples: int, seed: int) -> Finding:
    a, b = pair_up(name, before, after, clusters)
    d = differences(a, b)
    sums, sizes = _by_unit(d)
    signs, exact = _signs(d.units, resamples, seed)
    parts = [(block @ sums / len(d.x), block @ sizes / len(d.x)) for block in signs]
    moved, kept = (np.concatenate(part) for part in zip(*parts, strict=True))
    what = f"signs of {d.units} {'clusters' if d.clustered else 'pairs'}"
    return _finding(name, what, (a, b), moved, kept, effect=d.mean, level=level, clusters=d.clusters, n=len(d.x), exact=exact)


def _finding(
    name: str,
    what: str,
    sides: tuple[Sample, Sample],
    moved: Floats,
    kept: Floats,
    *,
    effect: float,
    level: float,
    clusters: int | None,
    n: int,
    exact: bool,
) -> Finding:
    scale = max(1e-300, *(float(np.abs(side.x).max()) for side in sides))
    effect = 0.0 if abs(effect) <= 1e-12 * scale else effect
    p, low, high = _invert(moved, kept, effect, scale, exact=exact, alpha=1 - level)
    if not (math.isfinite(low) and math.isfinite(high)):
        if len({float(value) for side in sides for value in side.x}) == 1:
            p, low, high = 1.0, 0.0, 0.0
        else:
            raise TooFewError(
                f"{name!r} has so few units ({what}) that no arrangement is rarer than 1 in {1 / (1 - level):.4g} (p = {p:.4g}); expected more. "
                "Ask for a lower level, or use a t test."
            )
    how = f"all {len(moved)} arrangements" if exact else f"{len(moved)} random arrangements, Monte Carlo error of p {math.sqrt(p * (1 - p) / len(moved)):.2g}"
    return Finding(
        name=name,
        test="permutation test of the difference of means",
        statistic=effect,
        p_value=p,
        effect=effect,
        interval=(low, high),
        n=n,
        why=f"exchanges the {what}: {how}; the interval inverts the test{sides[0].note()}",
        source=_SOURCE,
        level=level,
        clusters=clusters,
    )

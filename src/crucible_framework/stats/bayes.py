"""Bayesian comparison of pairs with a region of practical equivalence (ROPE). Knows no p-values."""

from __future__ import annotations

import math

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import record
from .samples import Sample, Values, check_level, differences, pair_up, t_critical

__all__ = ["Posterior", "rope_signed_rank", "rope_t"]


@record
class Posterior:
    """How sure one may be, after the data, that the difference after - before is below, inside or above ±rope; the three add up to 1.

    `interval` is the credible interval of `effect` at `level`.
    """

    name: str
    below: float
    inside: float
    above: float
    rope: float
    effect: float
    interval: tuple[float, float]
    n: int
    level: float
    method: str
    source: str


def _pairs(name: str, before: Values, after: Values, rope: float, level: float) -> Sample:
    check_level(level)
    if not (rope >= 0 and math.isfinite(rope)):
        raise StatisticsError(f"rope is {rope!r}; expected a number from 0 on: the largest difference that does not matter.")
    return differences(*pair_up(name, before, after))


def rope_t(name: str, before: Values, after: Values, *, rope: float, correlation: float = 0.0, level: float = 0.95) -> Posterior:
    """Posterior of the mean difference under the usual flat prior: Student's t.

    Args:
        rope: differences up to this size do not matter; declare it before looking.
        correlation: between pairs that share training data; k-fold cross-validation: 1/k (Nadeau and Bengio).

    Raises:
        TooFewError: fewer than two pairs, or differences without spread.
        StatisticsError: rope is negative, or correlation is not in [0, 1).

    Source: Corani & Benavoli 2015, Machine Learning 100:285-304; Kruschke 2013 (ROPE).
    """
    from scipy.special import stdtr

    d = _pairs(name, before, after, rope, level)
    if not 0 <= correlation < 1:
        raise StatisticsError(f"correlation is {correlation!r}; expected a number from 0 to below 1.")
    n, sd = len(d.x), d.sd()
    if sd == 0:
        raise TooFewError(f"All {n} pairs of {name!r} differ by {d.mean:g}: no spread to learn from; expected differences that vary.")
    scale = sd * math.sqrt(1 / n + correlation / (1 - correlation))
    below, above = float(stdtr(n - 1, (-rope - d.mean) / scale)), float(stdtr(n - 1, (d.mean - rope) / scale))
    half = t_critical(n - 1, level) * scale
    return Posterior(
        name=name,
        below=below,
        inside=max(0.0, 1 - below - above),
        above=above,
        rope=rope,
        effect=d.mean,
        interval=(d.mean - half, d.mean + half),
        n=n,
        level=level,
        method=f"Bayesian {'correlated ' if correlation else ''}t test, flat prior{d.note()}",
        source="Corani & Benavoli 2015, Machine Learning 100:285-304; Kruschke 2013",
    )


def rope_signed_rank(
    name: str, before: Values, after: Values, *, rope: float, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Posterior:  # fmt: skip
    """Bayesian signed-rank test: of data sets or items drawn from a Dirichlet process, where do the pairwise means of differences lie?

    `below`, `inside` and `above` are the chances that this region is the likeliest one; `effect` and `interval` are of the weighted mean.

    Raises:
        TooFewError: fewer than two pairs.
        StatisticsError: rope is negative, fewer than 1,000 draws, or more than 2,000 pairs.

    Source: Benavoli, Corani, Mangili, Zaffalon & Ruggeri 2014 (ICML); Benavoli, Corani, Demšar & Zaffalon 2017, JMLR 18:1-36.
    """
    d = _pairs(name, before, after, rope, level)
    if draws < 1000 or len(d.x) > 2000:
        raise StatisticsError(f"draws is {draws} and there are {len(d.x)} pairs; expected at least 1000 draws and at most 2000 pairs. Use rope_t.")
    x = np.append(d.x, 0.0)  # the prior: half an observation without difference
    sums = x[:, None] + x[None, :]
    above, below = (sums > 2 * rope).astype(np.float64), (sums < -2 * rope).astype(np.float64)
    weights = np.random.default_rng(seed).dirichlet(np.append(np.ones(len(d.x)), 0.5), size=draws)
    ups, downs = (np.einsum("ij,ij->i", weights @ side, weights) for side in (above, below))
    masses = np.stack([downs, 1 - ups - downs, ups])
    likeliest = (masses >= masses.max(axis=0) - 1e-12).astype(np.float64)
    shares = (likeliest / likeliest.sum(axis=0)).mean(axis=1)
    means = weights @ x
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Posterior(
        name=name,
        below=float(shares[0]),
        inside=float(shares[1]),
        above=float(shares[2]),
        rope=rope,
        effect=float(means.mean()),
        interval=(float(low), float(high)),
        n=len(d.x),
        level=level,
        method=f"Bayesian signed-rank test ({draws} draws, seed {seed}; prior: half an observation at 0){d.note()}",
        source="Benavoli et al. 2014; Benavoli, Corani, Demšar & Zaffalon 2017, JMLR 18:1-36",
    )

"""Latencies seen through cancelled calls, and the hedge that they ask for. Numbers in, numbers out: knows no models and no clock.

A winner cancels the loser, whose latency is then known only to be longer. Leaving such calls out would make the service look faster the more
it is hedged; the Kaplan–Meier estimate counts each for as long as it was watched.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..records import record

__all__ = ["HedgePlan", "Survival", "best_hedge"]

Floats: TypeAlias = NDArray[np.float64]


class Survival:
    """P(latency > t), from latencies of which some are lower bounds only (Kaplan & Meier 1958).

    Args:
        latencies_s: in any order.
        ended: False where the call was given up at that time. All ended where None.
    """

    def __init__(self, latencies_s: Floats, ended: NDArray[np.bool_] | None = None) -> None:
        order = np.argsort(latencies_s, kind="stable")
        times = np.asarray(latencies_s, dtype=np.float64)[order]
        events = np.ones(len(times)) if ended is None else np.asarray(ended, dtype=np.float64)[order]
        self.times, first = np.unique(times, return_index=True)
        deaths = np.add.reduceat(events, first) if len(times) else np.zeros(0)
        at_risk = len(times) - first
        self._steps = np.concatenate(([1.0], np.cumprod(1.0 - deaths / np.maximum(at_risk, 1))))
        self.after = self._steps[1:]

    def __call__(self, t: Floats) -> Floats:
        """P(latency > t), for an array of times in seconds."""
        found: Floats = self._steps[np.searchsorted(self.times, t, side="right")]
        return found

    def quantile(self, q: float) -> float:
        """The least time by which at least `q` of the calls have ended; the longest seen where that was never observed."""
        if not len(self.times):
            return float("nan")
        place = int(np.searchsorted(-self.after, -(1.0 - q) - 1e-12, side="left"))
        return float(self.times[min(place, len(self.times) - 1)])


@record
class HedgePlan:
    """Reissue once after `delay_s` with `probability`: the tail that this predicts, and the one without."""

    delay_s: float
    probability: float
    tail_s: float
    tail_without_s: float

    @property
    def gain(self) -> float:
        """By which share the tail falls, in [0, 1]."""
        return 0.0 if self.tail_without_s <= 0 else max(0.0, 1.0 - self.tail_s / self.tail_without_s)


def best_hedge(
    primary: Survival, backup: Survival, budget: float, quantile: float = 0.99, *, candidates: int = 160, spread: float = 0.0
) -> HedgePlan:  # fmt: skip
    """The single reissue after d with probability q that makes a quantile least, sending at most `budget` more requests.

    With S the survival of the primary and B of the backup, P(latency > t) = S(t) (1 − q (1 − B(t − d))) for t ≥ d, and q S(d) ≤ budget. For
    each candidate d the largest such q is best, and the quantile is found by bisection.

    Args:
        primary, backup: latencies.
        budget: further requests as a share of all.
        quantile: what is made least.
        candidates: delays that are tried, at quantiles of the primary.
        spread: 0 takes the estimate at its word. Above 0 the mean over the tail shares (1 − quantile) (1 ± spread) is made least instead, which
            is what to do with an estimate: where the share of slow requests is close to what the budget can mend, an estimate that is a hair
            too high would give up all of the gain.

    Source: Kaler, He & Elnikety 2017, "Optimal Reissue Policies for Reducing Tail Latency" (SPAA): one randomised reissue is as good as many.
    """
    without = primary.quantile(quantile)
    if not len(primary.times) or budget <= 0:
        return HedgePlan(delay_s=0.0, probability=0.0, tail_s=without, tail_without_s=without)
    grid = np.unique(np.concatenate(([0.0], np.interp(np.linspace(0, 1, candidates), np.linspace(0, 1, len(primary.times)), primary.times))))
    delays = grid[grid < without]
    if not len(delays):
        delays = np.zeros(1)
    share = np.minimum(1.0, budget / np.maximum(primary(delays), 1e-12))

    aims = (1 - quantile) * np.array([[1.0]] if spread == 0 else [[1.0], [1 - spread], [1 + spread]])
    high: Floats = np.maximum(delays, np.array([[primary.quantile(1 - float(aim))] for aim in aims[:, 0]]))
    low: Floats = np.broadcast_to(delays, high.shape)
    for _ in range(24):
        middle = (low + high) / 2
        met = primary(middle) * (1 - share * (1 - backup(middle - delays))) <= aims + 1e-12
        high, low = np.where(met, middle, high), np.where(met, low, middle)
    best = int(np.argmin(high.sum(axis=0)))
    return HedgePlan(delay_s=float(delays[best]), probability=float(share[best]), tail_s=float(high[0, best]), tail_without_s=without)

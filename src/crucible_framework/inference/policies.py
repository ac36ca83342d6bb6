"""When to hedge: never, after a fixed time, at a percentile, or where the tail falls most within a budget. Knows no samplers and no clock."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import ConfigError
from ..protocols import HedgePolicy
from ..records import HedgeDecision, HedgeLeg, HedgeOutcome, HedgeRequest
from .latency import HedgePlan, Survival, best_hedge

__all__ = ["Adaptive", "Fixed", "Never", "Percentile", "default_policy"]


_RESERVE, _HORIZON, _MOST = 8.0, 1000.0, 0.1
"""How `Adaptive` spends: credits beyond the reserve over so many requests, at most this share above the budget."""


class Never:
    """One call per request."""

    def plan(self, request: HedgeRequest) -> HedgeDecision:
        """Never."""
        del request
        return HedgeDecision(delay_s=None, reason="hedging is off", probability=0.0)

    def observe(self, outcome: HedgeOutcome) -> None:
        """Nothing to learn."""


class Fixed:
    """The next leg after a fixed time; with several delays the k-th leg after the k-th, each counted from the start of the leg before."""

    def __init__(self, delay_s: float | Sequence[float]) -> None:
        self._delays = tuple(delay_s) if isinstance(delay_s, Sequence) else (delay_s,)
        if not self._delays or not all(math.isfinite(d) and d >= 0 for d in self._delays):
            raise ConfigError(f"The hedge delay is {delay_s!r}; expected seconds of at least 0, at least one.")

    def plan(self, request: HedgeRequest) -> HedgeDecision:
        """The delay of that leg; the last one for all further."""
        delay_s = self._delays[min(request.started, len(self._delays)) - 1]
        return HedgeDecision(delay_s=delay_s, reason=f"fixed delay of {delay_s:g} s")

    def observe(self, outcome: HedgeOutcome) -> None:
        """Nothing to learn."""


class _Window:
    """The last calls' latencies, those that were given up as lower bounds; a ring."""

    def __init__(self, size: int) -> None:
        self._times, self._ended, self._next, self.seen = np.zeros(size), np.zeros(size, dtype=bool), 0, 0

    def __len__(self) -> int:
        return min(self.seen, len(self._times))

    def add(self, leg: HedgeLeg) -> None:
        self._times[self._next], self._ended[self._next] = leg.latency_s, leg.outcome != "cancelled"
        self._next = (self._next + 1) % len(self._times)
        self.seen += 1

    def survival(self) -> Survival:
        return Survival(self._times[: len(self)], self._ended[: len(self)])


class Percentile:
    """The next leg when the request is slower than a share of the requests: at 95 about 5 % are sent twice.

    Args:
        percentile: in (0, 100).
        window: calls that are remembered.
        least: calls before the first hedge.
    """

    def __init__(self, percentile: float = 95.0, *, window: int = 1000, least: int = 50) -> None:
        if not 0 < percentile < 100 or window < least or least < 1:
            raise ConfigError(f"Percentile has percentile={percentile!r}, window={window!r}, least={least!r}; expected (0, 100) and 1 ≤ least ≤ window.")
        self._percentile, self._least, self._seen = percentile, least, _Window(window)
        self._delay_s, self._new = math.nan, 0
        self._lock = threading.Lock()

    def plan(self, request: HedgeRequest) -> HedgeDecision:
        """The percentile, once enough is known."""
        del request
        with self._lock:
            if math.isnan(self._delay_s):
                return HedgeDecision(delay_s=None, reason=f"fewer than {self._least} calls seen", probability=0.0)
            return HedgeDecision(delay_s=self._delay_s, reason=f"percentile {self._percentile:g} is {self._delay_s:.4g} s")

    def observe(self, outcome: HedgeOutcome) -> None:
        """Learns from the primary call, which a faster backup may have cut short."""
        primary = outcome.legs[0]
        if primary.outcome == "failed":
            return
        with self._lock:
            self._seen.add(primary)
            self._new += 1
            if len(self._seen) >= self._least and (self._new >= 25 or math.isnan(self._delay_s)):
                self._delay_s, self._new = self._seen.survival().quantile(self._percentile / 100), 0


class Adaptive:
    """Learns delay and probability so that a quantile of the latency falls most within a budget: SingleR on a sliding window.

    Latencies of cut-off calls are lower bounds (Kaplan–Meier). Once enough backups were seen, their own latencies decide, not the primaries':
    where slow requests are slow anywhere, backups do not win, the gain vanishes and hedging stops, but for rare probes at the delay that would be
    best if backups were like primaries. Credits saved beyond a reserve are spent slowly, so that a plan that is a little too careful
    does not leave the budget unused, and slow requests that come in bunches still find a credit.

    Args:
        budget: further calls as a share of the requests.
        quantile: what is made small.
        window: calls that are remembered.
        least: calls before the first hedge.
        trust: backups from which on their own latencies decide.
        probe: share of requests hedged where there seems to be nothing to gain, to notice when there is.
        min_gain: by which share the quantile must fall for hedging to be worth it.
        seed: of the draws.

    Source: Kaler, He & Elnikety 2017 (SPAA), with the estimate under censoring of Kaplan & Meier 1958.
    """

    def __init__(
        self,
        budget: float = 0.05,
        *,
        quantile: float = 0.99,
        window: int = 4000,
        least: int = 200,
        trust: int = 15,
        probe: float = 0.001,
        min_gain: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not budget >= 0 or not 0 < quantile < 1 or not 1 <= least <= window or not 0 <= probe <= 1 or trust < 1:
            raise ConfigError(
                f"Adaptive has budget={budget!r}, quantile={quantile!r}, least={least!r}, window={window!r}, probe={probe!r}, trust={trust!r}; "
                "expected a budget of at least 0, a quantile in (0, 1), 1 ≤ least ≤ window, a probe in [0, 1] and trust ≥ 1."
            )
        self._budget, self._quantile, self._least, self._trust = budget, quantile, least, trust
        self._probe, self._min_gain = min(probe, budget), min_gain
        self._primary, self._backup = _Window(window), _Window(max(200, window // 10))
        self._found: HedgePlan | None = None
        self._yes = self._no = HedgeDecision(delay_s=None, reason="", probability=0.0)
        self._new, self._credit = 0, 0.0
        self._random = random.Random(seed)  # noqa: S311  # a coin, no secret
        self._lock = threading.Lock()

    @property
    def found(self) -> HedgePlan | None:
        """What is in force; None before enough was seen."""
        with self._lock:
            return self._found

    def plan(self, request: HedgeRequest) -> HedgeDecision:
        """One reissue, after the best delay with the best probability."""
        with self._lock:
            self._credit = request.credit
            if self._found is None:
                return HedgeDecision(delay_s=None, reason=f"fewer than {self._least} calls seen", probability=0.0)
            if request.started > 1:
                return HedgeDecision(delay_s=None, reason="one reissue is enough", probability=0.0)
            return self._yes if self._random.random() < self._yes.probability else self._no

    def observe(self, outcome: HedgeOutcome) -> None:
        """Learns from every leg; every so many requests, and once backups can be trusted, the plan is made anew."""
        with self._lock:
            for leg in outcome.legs:
                if leg.outcome != "failed":
                    (self._backup if leg.index else self._primary).add(leg)
            self._new += 1
            seen = len(self._primary)
            wait = max(50, seen // 10)
            if seen >= self._least and (self._found is None or self._new >= wait or (self._backup.seen == self._trust and len(outcome.legs) > 1)):
                self._new = 0
                self._replan()

    def _replan(self) -> None:
        primary = self._primary.survival()
        surplus = max(0.0, self._credit - _RESERVE) / (_HORIZON * self._budget) if self._budget else 0.0
        spend = self._budget * (1 + min(_MOST, surplus))
        # half a standard error of a share of slow requests that is what the budget can just mend
        spread = min(0.3, 0.5 * math.sqrt((1 - self._budget) / (self._budget * len(self._primary)))) if 0 < self._budget < 1 else 0.0
        ideal = best_hedge(primary, primary, spend, self._quantile, spread=spread)
        known = self._backup.seen >= self._trust
        self._found = best_hedge(primary, self._backup.survival(), spend, self._quantile, spread=spread) if known else ideal
        plan, reason = self._found, f"the {self._quantile:.0%} quantile is expected to fall by {self._found.gain:.0%}"
        if plan.gain < self._min_gain:
            plan, reason = replace(ideal, probability=self._probe / max(spend, 1e-12) * ideal.probability), "probe: nothing to gain is expected"
        self._yes = HedgeDecision(delay_s=plan.delay_s, reason=reason, probability=plan.probability)
        self._no = HedgeDecision(delay_s=None, reason=f"{reason}; the draw was against", probability=plan.probability)


def default_policy(service: str, budget: float = 0.05) -> HedgePolicy:
    """Off on Tinker services, whose loser cannot be cancelled and is paid for; adaptive within the budget elsewhere.

    Args:
        service: the name in the backend's capabilities.
        budget: further calls as a share of the requests.
    """
    return Never() if service.startswith("tinker") else Adaptive(budget)

"""What hedging may spend and what it has spent: credits, calls, tokens, cost. Knows no samplers and no policies.

Every call is booked with its tokens, also those of losers: a hedge that looks free is one whose loser was not booked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import fields, replace

from ..errors import ConfigError
from ..protocols import Clock
from ..records import Completion, HedgeRequest, record
from .pool import Price

__all__ = ["HedgeStats", "Ledger"]


@record
class HedgeStats:
    """What was sent. `extra` is calls beyond one per request, as a share of the requests.

    Tokens and cost are those of calls that ended, and of streams that were cut off as far as they had come; a call that was cancelled
    without a sign of life has none, and what a service charges for it is not known (see `cost_at_most`).

    Attributes:
        requests: how many came.
        calls: how many were sent for them.
        fired: further calls; `calls` is `requests` + `fired`.
        wins: requests that a later leg answered, `rescued` those of them where an earlier leg had failed.
        refused: further calls that the policy wanted and the budget, the brake or a service did not allow.
        cancelled, failed, in_flight: calls.
        tokens: prompt and answer, `wasted_tokens` those that nobody saw.
        drawn: tokens of answers alone, `wasted_drawn` those that nobody saw.
        cost: of priced legs; None where a leg has no price.
    """

    requests: int = 0
    calls: int = 0
    fired: int = 0
    wins: int = 0
    rescued: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    wasted_tokens: int = 0
    drawn: int = 0
    wasted_drawn: int = 0
    in_flight: int = 0
    cost: float | None = None
    wasted_cost: float | None = None

    @property
    def extra(self) -> float:
        """Calls beyond one per request, as a share of the requests."""
        return 0.0 if not self.requests else self.calls / self.requests - 1

    @property
    def cost_at_most(self) -> float | None:
        """The cost if every cancelled call is charged like the mean call that ended; None where that is not known."""
        ended = self.calls - self.cancelled - self.failed - self.in_flight
        return None if self.cost is None else self.cost * (1 + self.cancelled / ended) if ended > 0 else math.inf if self.cancelled else self.cost


class Ledger:
    """Credits and counters under one lock.

    Args:
        clock: of the pause after a pushback.
        budget: credits that a request earns; a further call costs one.
        burst: credits that can be saved at most.
        unlimited: the budget can never run out, so nothing is paid.
        brake_at: calls in flight from which nothing is added.
        priced: every leg has a price.
    """

    def __init__(self, clock: Clock, *, budget: float, burst: float, unlimited: bool, brake_at: int | None, priced: bool) -> None:
        if not (math.isfinite(budget) and budget >= 0 and burst >= 1):
            raise ConfigError(f"HedgedSampler has budget={budget!r} and burst={burst!r}; expected a finite share of at least 0, and at least 1 credit.")
        self._clock, self._budget, self._burst, self._unlimited, self._brake_at, self._priced = clock, budget, burst, unlimited, brake_at, priced
        self._lock = threading.Lock()
        self._credit, self._quiet_until_s = 0.0, -math.inf
        self._paid = {"cost": 0.0, "wasted_cost": 0.0}
        self._count = {field.name: 0 for field in fields(HedgeStats) if field.name not in self._paid}

    @property
    def stats(self) -> HedgeStats:
        """The counts so far."""
        with self._lock:
            counts = HedgeStats(**self._count)
            return replace(counts, cost=self._paid["cost"], wasted_cost=self._paid["wasted_cost"]) if self._priced else counts

    @property
    def credit(self) -> float:
        """What is saved now."""
        with self._lock:
            return self._credit

    def open(self) -> int:
        """Counts a request with its first call, earns its credit; gives its number from 0."""
        with self._lock:
            count = self._count
            count["requests"] += 1
            count["calls"] += 1
            count["in_flight"] += 1
            self._credit = min(max(self._burst, self._credit), self._credit + self._budget)
            return count["requests"] - 1

    def add(self, **more: int) -> None:
        """Adds to counters."""
        with self._lock:
            for name, value in more.items():
                self._count[name] += value

    def book(self, completions: tuple[Completion, ...], price: Price | None, **more: int) -> None:
        """The tokens and the cost of what a call gave, and more counters."""
        self._book(completions, price, ("tokens", "drawn", "cost"), more)

    def waste(self, completions: tuple[Completion, ...], price: Price | None) -> None:
        """Of what was booked, this was of no use."""
        self._book(completions, price, ("wasted_tokens", "wasted_drawn", "wasted_cost"), {})

    def _book(self, completions: tuple[Completion, ...], price: Price | None, names: tuple[str, str, str], more: Mapping[str, int]) -> None:
        prompt = max((one.prompt_tokens for one in completions), default=0)
        answer = sum(len(one.tokens) for one in completions)
        with self._lock:
            self._count[names[0]] += prompt + answer
            self._count[names[1]] += answer
            for name, value in more.items():
                self._count[name] += value
            if price is not None:
                self._paid[names[2]] += price.of(completions)

    def request(self, started: int, elapsed_s: float) -> HedgeRequest:
        """What the policy is asked."""
        with self._lock:
            return HedgeRequest(started=started, elapsed_s=elapsed_s, in_flight=self._count["in_flight"], credit=self._credit)

    def pay(self) -> str:
        """Takes one credit and counts the call; "" where that was possible, else why not."""
        with self._lock:
            refused = self._refusal()
            if refused:
                self._count["refused"] += 1
                return refused
            if not self._unlimited:
                self._credit -= 1
            for name in ("fired", "calls", "in_flight"):
                self._count[name] += 1
            return ""

    def _refusal(self) -> str:
        if self._clock.now() < self._quiet_until_s:
            return "the service asked for fewer requests"
        if self._brake_at is not None and self._count["in_flight"] >= self._brake_at:
            return f"{self._count['in_flight']} calls are in flight"
        if not self._unlimited and self._credit < 1 - 1e-9:
            return "the budget is used up"
        return ""

    def push_back(self, pause_s: float) -> None:
        """No further calls for a while."""
        with self._lock:
            self._quiet_until_s = self._clock.now() + pause_s

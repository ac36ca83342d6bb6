"""A request that is slow is sent a second time, and the first answer counts. `HedgedSampler` is a Sampler made of Samplers.

How long to wait, and whether at all, is a policy's word (`policies.py`); what the budget allows is this file's. Every call is counted with
its tokens, also those of losers: a hedge that looks free is one whose loser was not booked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields
from typing import Literal, TypeAlias

from .. import events
from ..clock import system_clock
from ..errors import AllMembersFailedError, AuthError, CapabilityError, ConfigError, DataError, ServiceError
from ..protocols import Clock, HedgePolicy, Sampler
from ..records import Completion, HedgeDecision, HedgeLeg, HedgeOutcome, HedgeRequest, Prompt, SamplingParams, record
from .policies import Adaptive
from .promise import Promise
from .telling import tell_hedge

__all__ = ["HedgeStats", "HedgedSampler"]

Answer: TypeAlias = tuple[Completion, ...]
_FATAL = (ConfigError, DataError, AuthError, CapabilityError)


@record
class HedgeStats:
    """What was sent. `extra` is calls beyond one per request, as a share of the requests.

    Tokens are those of calls that ended; a call that could be cancelled before it ran has none. `rescued` counts requests that a later leg
    answered after an earlier one had failed.
    """

    requests: int
    calls: int
    fired: int
    wins: int
    rescued: int
    cancelled: int
    failed: int
    tokens: int
    wasted_tokens: int
    in_flight: int

    @property
    def extra(self) -> float:
        """Calls beyond one per request, as a share of the requests."""
        return 0.0 if not self.requests else self.calls / self.requests - 1


class HedgedSampler:
    """Sends a request to the first leg, and where the policy and the budget say so to the next ones; the first good answer is given.

    A leg that fails starts the next at once. A fault of the request itself (ConfigError, DataError, AuthError, CapabilityError) is given at
    once, since it would fail anywhere. A leg that answers "too many requests" or "unavailable" (ServiceError 429, 503) is not added to, and
    no request is hedged for `pushback_s`.

    Args:
        legs: one sampler, which is then asked again; or several: replicas, or levels from cheap to strong.
        policy: when to start the next leg; `Adaptive(budget)` where None.
        budget: credits per request; every further leg costs one, after a failure too. 0 never sends a second; 1 or more is no limit for two legs.
        burst: credits that can be saved at most.
        max_legs: calls per request at most.
        accept: whether an answer is good enough; if not, the next leg starts at once, and of answers none of which is the last leg's is given.
        idempotent: False where asking twice has effects; then one call is made. A function decides per request.
        brake_at: calls in flight from which nothing is hedged, because a pool that is full gets slower by it.
        rotate: starts each request at the next leg in turn; for replicas.
        clock: delays and latencies.
    """

    def __init__(
        self,
        legs: Sampler | Sequence[Sampler],
        policy: HedgePolicy | None = None,
        *,
        budget: float = 0.05,
        burst: float = 50.0,
        max_legs: int | None = None,
        accept: Callable[[Answer], bool] | None = None,
        idempotent: bool | Callable[[Prompt, SamplingParams], bool] = True,
        brake_at: int | None = None,
        pushback_s: float = 10.0,
        rotate: bool = False,
        clock: Clock = system_clock,
    ) -> None:
        self.legs: tuple[Sampler, ...] = tuple(legs) if isinstance(legs, Sequence) else (legs,)
        self.max_legs = max_legs if max_legs is not None else max(2, len(self.legs))
        if not self.legs or self.max_legs < 1:
            raise ConfigError(f"HedgedSampler has {len(self.legs)} legs and max_legs={max_legs!r}; expected at least one of each.")
        if not (math.isfinite(budget) and budget >= 0 and burst >= 1):
            raise ConfigError(f"HedgedSampler has budget={budget!r} and burst={burst!r}; expected a finite share of at least 0, and at least 1 credit.")
        self.policy: HedgePolicy = policy if policy is not None else Adaptive(budget)
        self.budget, self.burst, self.accept, self.idempotent = budget, burst, accept, idempotent
        self.brake_at, self.pushback_s, self.rotate, self.clock = brake_at, pushback_s, rotate, clock
        self._lock = threading.Lock()
        self._credit, self._quiet_until_s = 0.0, -math.inf
        self._count: dict[str, int] = {field.name: 0 for field in fields(HedgeStats)}

    @property
    def model(self) -> str:
        """The legs' models, each once."""
        return f"hedged({', '.join(dict.fromkeys(leg.model for leg in self.legs))})"

    @property
    def stats(self) -> HedgeStats:
        """The counts so far."""
        with self._lock:
            return HedgeStats(**self._count)

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[Answer]:
        """The first good answer of the legs. Cancelling the future cancels every leg.

        The future fails with the error of the only call, or with AllMembersFailedError where several were made and none gave an answer.
        """
        return _Race(self, prompt, params, n).begin()

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """The first leg's, not hedged."""
        return self.legs[0].compute_logprobs(prompt, completion)

    # -------------------------------------------------------------------------------------------------- used by the races
    def opened(self) -> int:
        """Counts a request, earns its credit; gives its number from 0."""
        with self._lock:
            self._count["requests"] += 1
            self._credit = min(max(self.burst, self._credit), self._credit + self.budget)
            return self._count["requests"] - 1

    def counted(self, **more: int) -> None:
        """Adds to counters."""
        with self._lock:
            for name, value in more.items():
                self._count[name] += value

    def request_now(self, started: int, elapsed_s: float) -> HedgeRequest:
        """What the policy is asked."""
        with self._lock:
            return HedgeRequest(started=started, elapsed_s=elapsed_s, in_flight=self._count["in_flight"], credit=self._credit)

    def pay(self) -> str:
        """Takes one credit; "" where that was possible, else why not."""
        with self._lock:
            if self.clock.now() < self._quiet_until_s:
                return "the service asked for fewer requests"
            if self.brake_at is not None and self._count["in_flight"] >= self.brake_at:
                return f"{self._count['in_flight']} calls are in flight"
            if self.budget < self.max_legs - 1:  # else the budget can never run out
                if self._credit < 1 - 1e-9:
                    return "the budget is used up"
                self._credit -= 1
            return ""

    def push_back(self) -> None:
        """No hedges for a while."""
        with self._lock:
            self._quiet_until_s = self.clock.now() + self.pushback_s


class _Leg:
    """A call that was started."""

    __slots__ = ("began_s", "end_s", "future", "index", "outcome")

    def __init__(self, index: int, began_s: float) -> None:
        self.index, self.began_s, self.end_s = index, began_s, began_s
        self.future: Future[Answer] | None = None
        self.outcome: Literal["", "won", "lost", "cancelled", "failed"] = ""


class _Race:
    """One request and its legs. State changes under a re-entrant lock, since a leg may answer at once on the thread that starts it."""

    __slots__ = ("base", "errors", "fallback", "hedged", "legs", "lock", "n", "over", "params", "promise", "prompt", "sampler", "start_s", "timer")

    def __init__(self, sampler: HedgedSampler, prompt: Prompt, params: SamplingParams, n: int) -> None:
        self.sampler, self.prompt, self.params, self.n = sampler, prompt, params, n
        self.promise: Promise[Answer] = Promise(self._given_up)
        self.lock = threading.RLock()
        self.start_s = sampler.clock.now()
        self.legs: list[_Leg] = []
        self.errors: list[BaseException] = []
        self.fallback: tuple[int, Answer] | None = None
        self.timer: Callable[[], None] | None = None
        self.over = False
        number = sampler.opened()
        self.base = number if sampler.rotate else 0
        idempotent = sampler.idempotent
        self.hedged = idempotent(prompt, params) if callable(idempotent) else idempotent

    def begin(self) -> Future[Answer]:
        future = self.promise.future
        with self.lock:
            self._launch()
        return future

    # --------------------------------------------------------------------------------------------------------------- legs
    def _launch(self) -> None:
        one, index = self.sampler, len(self.legs)
        leg = _Leg(index, one.clock.now())
        self.legs.append(leg)
        one.counted(calls=1, in_flight=1)
        self._plan()
        try:
            leg.future = one.legs[(self.base + index) % len(one.legs)].sample(self.prompt, self.params, self.n)
        except Exception as error:
            self._failed(leg, error)
            return
        leg.future.add_done_callback(lambda future: self._ended(leg, future))

    def _plan(self) -> None:
        """Arms the timer of the next leg."""
        one, started = self.sampler, len(self.legs)
        if not self.hedged or started >= one.max_legs or one.budget == 0:
            return
        now_s = one.clock.now()
        decision = one.policy.plan(one.request_now(started, now_s - self.start_s))
        if decision.delay_s is not None:
            self._disarm()
            self.timer = one.clock.call_later(decision.delay_s, lambda: self._due(decision))

    def _disarm(self) -> None:
        timer, self.timer = self.timer, None
        if timer is not None:
            timer()

    def _due(self, decision: HedgeDecision) -> None:
        self._fire(decision.reason, decision.probability, decision.delay_s)

    def _fire(self, reason: str, probability: float, delay_s: float | None = None) -> bool:
        """Starts the next leg if there may be one."""
        with self.lock:
            one = self.sampler
            if self.over or not self.hedged or len(self.legs) >= one.max_legs:
                return False
            refused = one.pay()
            if refused:
                return False
            one.counted(fired=1)
            events.emit(
                "hedge.fired",
                leg=len(self.legs),
                delay_s=delay_s,
                elapsed_s=one.clock.now() - self.start_s,
                probability=probability,
                credit=one.request_now(0, 0.0).credit,
                reason=reason,
                model=one.legs[(self.base + len(self.legs)) % len(one.legs)].model,
            )
            self._disarm()
            self._launch()
            return True

    # --------------------------------------------------------------------------------------------------------- what happens
    def _ended(self, leg: _Leg, future: Future[Answer]) -> None:
        with self.lock:
            error = None if future.cancelled() else future.exception()
            if future.cancelled() and not self.over:
                error = ServiceError(f"The call to {self.sampler.legs[(self.base + leg.index) % len(self.sampler.legs)].model} was cancelled from outside.")
            self.sampler.counted(in_flight=-1)
            if error is not None:
                leg.end_s, leg.outcome = self.sampler.clock.now(), "failed"
                self.sampler.counted(failed=1)
                self._after_failure(leg, error)
                return
            if future.cancelled():
                self.sampler.counted(cancelled=1)
                return
            answer = future.result()
            tokens = (max((c.prompt_tokens for c in answer), default=0)) + sum(len(c.tokens) for c in answer)
            self.sampler.counted(tokens=tokens)
            if self.over:
                self.sampler.counted(wasted_tokens=tokens)
                return
            leg.end_s = self.sampler.clock.now()
            self._answered(leg, answer, tokens)

    def _failed(self, leg: _Leg, error: BaseException) -> None:
        leg.end_s, leg.outcome = self.sampler.clock.now(), "failed"
        self.sampler.counted(in_flight=-1, failed=1)
        self._after_failure(leg, error)

    def _answered(self, leg: _Leg, answer: Answer, tokens: int) -> None:
        one = self.sampler
        try:
            good = one.accept is None or one.accept(answer)
        except Exception as error:
            self._finish(None, error)
            return
        if good:
            leg.outcome = "won"
            self._finish(answer, None)
            return
        leg.outcome = "lost"
        one.counted(wasted_tokens=tokens)
        if self.fallback is None or leg.index > self.fallback[0]:
            self.fallback = (leg.index, answer)
        if not self._fire("the answer was not accepted", 1.0):
            self._nobody_left()

    def _after_failure(self, leg: _Leg, error: BaseException) -> None:
        if self.over:
            return
        self.errors.append(error)
        if isinstance(error, _FATAL):
            self._finish(None, error)
            return
        if isinstance(error, ServiceError) and error.status in (429, 503):
            self.sampler.push_back()
            self._disarm()
        elif self._fire(f"leg {leg.index} failed", 1.0):
            return
        self._nobody_left()

    def _nobody_left(self) -> None:
        """Ends the request where no leg is running any more."""
        if self.over or any(not leg.outcome for leg in self.legs):
            return
        if self.fallback is not None:
            self._finish(self.fallback[1], None)
        elif len(self.errors) == 1:
            self._finish(None, self.errors[0])
        else:
            causes = {f"leg {i}": f"{type(error).__name__}: {error}" for i, error in enumerate(self.errors)}
            listed = "; ".join(f"{who}: {why}" for who, why in causes.items())
            self._finish(None, AllMembersFailedError(f"All {len(causes)} calls failed; expected one answer. {listed}.", causes))

    # ---------------------------------------------------------------------------------------------------------------- end
    def _finish(self, answer: Answer | None, error: BaseException | None) -> None:
        if self.over:
            return
        late = self._close()
        winner = next((leg for leg in self.legs if leg.outcome == "won"), None)
        if winner is not None and winner.index:
            self.sampler.counted(wins=1, rescued=int(bool(self.errors)))
        self._learn(ok=answer is not None)
        for leg in late:
            if leg.future is not None:
                leg.future.cancel()
        if error is not None:
            self.promise.fail(error)
        elif answer is not None:
            self.promise.give(answer)

    def _close(self) -> list[_Leg]:
        """Ends the race; gives the legs that are still running."""
        self.over = True
        self._disarm()
        now_s = self.sampler.clock.now()
        late = [leg for leg in self.legs if not leg.outcome]
        for leg in late:
            leg.end_s, leg.outcome = now_s, "cancelled"
        return late

    def _learn(self, *, ok: bool) -> None:
        legs = tuple(
            HedgeLeg(index=leg.index, started_s=leg.began_s - self.start_s, latency_s=leg.end_s - leg.began_s, outcome=leg.outcome or "cancelled")
            for leg in self.legs
        )
        outcome = HedgeOutcome(latency_s=self.sampler.clock.now() - self.start_s, ok=ok, legs=legs)
        tell_hedge(outcome, [self.sampler.legs[(self.base + leg.index) % len(self.sampler.legs)].model for leg in self.legs])
        self.sampler.policy.observe(outcome)

    def _given_up(self) -> None:
        """The receiver cancelled."""
        with self.lock:
            if self.over:
                return
            late = self._close()
        for leg in late:
            if leg.future is not None:
                leg.future.cancel()

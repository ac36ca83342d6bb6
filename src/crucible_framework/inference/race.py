"""One hedged request and its legs. State changes under a re-entrant lock, since a leg may answer at once on the thread that starts it.

How long to wait is a policy's word, what may be spent the ledger's; this file knows neither the maths nor the budget.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, TypeAlias, cast

from .. import events
from ..errors import AllMembersFailedError, AuthError, CapabilityError, ConfigError, DataError, ServiceError
from ..promise import Promise
from ..protocols import Clock, HedgePolicy, OnPiece, Sampler, StreamSampler
from ..records import Completion, HedgeDecision, HedgeLeg, HedgeOutcome, Json, Piece, Prompt, SamplingParams, record
from .ledger import Ledger
from .pool import Price
from .telling import tell_fired, tell_first, tell_hedge

__all__ = ["Answer", "Race", "Terms"]

Answer: TypeAlias = tuple[Completion, ...]
_FATAL = (ConfigError, DataError, AuthError, CapabilityError)


@record
class Terms:
    """What all requests of a hedged sampler share; the arguments of `HedgedSampler` say what they mean."""

    legs: tuple[Sampler, ...]
    prices: tuple[Price | None, ...]
    policy: HedgePolicy
    ledger: Ledger
    clock: Clock
    max_legs: int
    accept: Callable[[Answer], bool] | None
    pushback_s: float
    rotate: bool
    may_add: bool


class _Leg:
    """A call that was started. `drawn` counts the tokens that a stream has given."""

    __slots__ = ("began_s", "drawn", "end_s", "future", "index", "outcome", "price", "sampler", "span")

    def __init__(self, index: int, began_s: float, sampler: Sampler, price: Price | None) -> None:
        self.index, self.began_s, self.end_s, self.sampler, self.price, self.drawn = index, began_s, began_s, sampler, price, 0
        self.future: Future[Answer] | None = None
        self.outcome: Literal["", "won", "lost", "cancelled", "failed"] = ""
        self.span: events.OpenSpan | None = None

    @property
    def told(self) -> tuple[str, ...]:
        """Ids of what an answer of this call comes from."""
        return () if self.span is None else (self.span.id, *self.span.found)

    def tell_end(self) -> None:
        """Ends its span."""
        if self.span is not None:
            self.span.end(outcome=self.outcome or "cancelled")


class Race:
    """A request. With `on_piece` the legs stream, and the first token decides: its leg gives the whole answer.

    `over` says that the winner is known and nothing may be added; a stream's winner (`leader`) goes on after that.
    """

    __slots__ = (
        "base", "errors", "fallback", "hedged", "leader", "legs", "lock", "n", "on_piece", "over", "params", "promise", "prompt", "span", "start_s",
        "terms", "timer",
    )  # fmt: skip

    def __init__(self, terms: Terms, prompt: Prompt, params: SamplingParams, n: int, *, base: int, hedged: bool, on_piece: OnPiece | None = None) -> None:
        self.terms, self.prompt, self.params, self.n, self.base, self.on_piece = terms, prompt, params, n, base, on_piece
        self.hedged = hedged and terms.may_add
        self.promise: Promise[Answer] = Promise(self._given_up)
        self.lock = threading.RLock()
        self.start_s = terms.clock.now()
        self.legs: list[_Leg] = []
        self.errors: list[BaseException] = []
        self.fallback: tuple[int, Answer] | None = None
        self.timer: Callable[[], None] | None = None
        self.leader: _Leg | None = None
        self.over = False
        self.span = events.opened("hedge.request", legs=len(terms.legs), n=n)

    def begin(self) -> Future[Answer]:
        """Sends the first call, which the ledger has counted."""
        future = self.promise.future
        with self.lock:
            self._launch()
        return future

    # --------------------------------------------------------------------------------------------------------------- legs
    def _place(self) -> int:
        return (self.base + len(self.legs)) % len(self.terms.legs)

    def _launch(self, cause: str = "") -> None:
        one, place = self.terms, self._place()
        leg = _Leg(len(self.legs), one.clock.now(), one.legs[place], one.prices[place])
        self.legs.append(leg)
        plan = self._plan()
        if self.span is not None:
            with events.within(self.span, cause if leg.index else self._tell_first(leg, plan)):
                leg.span = events.opened("hedge.leg", leg=leg.index, model=leg.sampler.model)
        try:
            with events.within(leg.span):
                if self.on_piece is None:
                    leg.future = leg.sampler.sample(self.prompt, self.params, self.n)
                else:
                    streaming = cast("StreamSampler", leg.sampler)
                    leg.future = streaming.stream(self.prompt, self.params, lambda piece: self._came(leg, piece), self.n)
        except Exception as error:
            self._failed(leg, error)
            return
        if self.over and leg is not self.leader:  # it was decided while this one was being sent
            leg.future.cancel()
        leg.future.add_done_callback(lambda future: self._ended(leg, future))

    def _tell_first(self, leg: _Leg, plan: HedgeDecision | None) -> str:
        one = self.terms
        never = "the request may not be asked twice" if one.may_add else "budget or max_legs allow one call"
        order = "the only one" if len(one.legs) == 1 else "its turn" if one.rotate else "the first in order"
        return tell_first(self.span, leg.sampler.model, [leg.model for leg in one.legs], order=order, plan=plan or never, credit=one.ledger.credit)

    def _plan(self) -> HedgeDecision | None:
        """Arms the timer of the next leg; gives what the policy said, None where there may be no next one."""
        one, started = self.terms, len(self.legs)
        if not self.hedged or started >= one.max_legs:
            return None
        decision = one.policy.plan(one.ledger.request(started, one.clock.now() - self.start_s))
        if decision.delay_s is not None:
            self._disarm()
            self.timer = one.clock.call_later(decision.delay_s, lambda: self._due(decision))
        return decision

    def _disarm(self) -> None:
        timer, self.timer = self.timer, None
        if timer is not None:
            timer()

    def _due(self, decision: HedgeDecision) -> None:
        self._fire(decision.reason, decision.probability, decision.delay_s)

    def _fire(self, reason: str, probability: float, delay_s: float | None = None) -> bool:
        """Starts the next leg if there may be one."""
        with self.lock:
            one = self.terms
            if self.over or not self.hedged or len(self.legs) >= one.max_legs:
                return False
            refused = one.ledger.pay()
            fired = ""
            if events.listening():
                fired = tell_fired(
                    self.span, one.legs[self._place()].model, [leg.model for leg in one.legs], [leg.span.id for leg in self.legs if leg.span is not None],
                    refused=refused, reason=reason, leg=len(self.legs), delay_s=delay_s, elapsed_s=one.clock.now() - self.start_s, probability=probability,
                    credit=one.ledger.credit,
                )  # fmt: skip
            if refused:
                return False
            self._disarm()
            self._launch(fired)
            return True

    # --------------------------------------------------------------------------------------------------------- what happens
    def _came(self, leg: _Leg, piece: Piece) -> None:
        """A piece of a stream. The first piece of all decides; those of other legs that still come are waste."""
        with self.lock:
            leg.drawn += len(piece.tokens)
            late = self._decide(leg) if self.leader is None and not self.over else []
        _cancel(late)
        if self.leader is leg and self.on_piece is not None and not self.promise.future.done():
            try:
                self.on_piece(piece)
            except Exception as error:  # the caller's own function
                self.promise.fail(error)
                _cancel([leg])

    def _decide(self, leg: _Leg) -> list[_Leg]:
        """This leg gives the answer; gives the others that run."""
        self.leader, leg.outcome, leg.end_s = leg, "won", self.terms.clock.now()
        late = self._close()
        self._learn(ok=True)
        return late

    def _ended(self, leg: _Leg, future: Future[Answer]) -> None:
        with self.lock:
            one, ledger = self.terms, self.terms.ledger
            error = None if future.cancelled() else future.exception()
            if future.cancelled() and (not self.over or leg is self.leader) and not self.promise.future.done():
                error = ServiceError(f"The call to {leg.sampler.model} was cancelled from outside.")
            if error is not None:
                ledger.add(in_flight=-1, failed=1)
                self._cut(leg)
                self._after_failure(leg, error)
                return
            if future.cancelled():
                ledger.add(in_flight=-1, cancelled=1)
                self._cut(leg)
                return
            answer = future.result()
            ledger.book(answer, leg.price, in_flight=-1)
            if leg is self.leader:
                self._end_stream(leg)
            if (self.over and leg is not self.leader) or self.promise.future.done():
                ledger.waste(answer, leg.price)
            if leg is self.leader:
                self.promise.give(answer)
            elif not self.over:
                leg.end_s = one.clock.now()
                self._answered(leg, answer)

    def _cut(self, leg: _Leg) -> None:
        """Books what a stream had given when it broke off."""
        if leg.drawn:
            part = Completion(text="", tokens=(0,) * leg.drawn, logprobs=(), stop_reason="length", prompt_tokens=0)
            self.terms.ledger.book((part,), leg.price)
            self.terms.ledger.waste((part,), leg.price)

    def _failed(self, leg: _Leg, error: BaseException) -> None:
        self.terms.ledger.add(in_flight=-1, failed=1)
        self._after_failure(leg, error)

    def _answered(self, leg: _Leg, answer: Answer) -> None:
        one = self.terms
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
        one.ledger.waste(answer, leg.price)
        if self.fallback is None or leg.index > self.fallback[0]:
            self.fallback = (leg.index, answer)
        if not self._fire("the answer was not accepted", 1.0):
            self._nobody_left()

    def _after_failure(self, leg: _Leg, error: BaseException) -> None:
        if leg is self.leader:  # its first words are with the caller, so no other leg can take over
            self._end_stream(leg, error=type(error).__name__)
            self.promise.fail(error)
            return
        leg.end_s, leg.outcome = self.terms.clock.now(), "failed"
        if self.over:
            return
        self.errors.append(error)
        if isinstance(error, _FATAL):
            self._finish(None, error)
            return
        if isinstance(error, ServiceError) and error.status in (429, 503):
            self.terms.ledger.push_back(self.terms.pushback_s)
            self._disarm()
        elif self._fire(f"leg {leg.index} failed: {type(error).__name__}", 1.0):
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
        self._learn(ok=answer is not None)
        _cancel(late)
        if error is not None:
            self.promise.fail(error)
        elif answer is not None:
            self.promise.give(answer)

    def _close(self) -> list[_Leg]:
        """Ends the race; gives the legs that are still running."""
        self.over = True
        self._disarm()
        now_s = self.terms.clock.now()
        late = [leg for leg in self.legs if not leg.outcome]
        for leg in late:
            leg.end_s, leg.outcome = now_s, "cancelled"
        return late

    def _learn(self, *, ok: bool) -> None:
        winner = next((leg for leg in self.legs if leg.outcome == "won"), None)
        if winner is not None and winner.index:
            self.terms.ledger.add(wins=1, rescued=int(bool(self.errors)))
        legs = tuple(
            HedgeLeg(index=leg.index, started_s=leg.began_s - self.start_s, latency_s=leg.end_s - leg.began_s, outcome=leg.outcome or "cancelled")
            for leg in self.legs
        )
        outcome = HedgeOutcome(latency_s=self.terms.clock.now() - self.start_s, ok=ok, legs=legs)
        if events.listening():
            for leg in self.legs:
                if leg is not self.leader:
                    leg.tell_end()
            ended = tell_hedge(self.span, outcome, [leg.sampler.model for leg in self.legs], () if winner is None else winner.told)
            if self.span is not None and self.leader is None:
                self.span.end(ended, **({} if ok else {"error": "no answer"}))
        self.terms.policy.observe(outcome)

    def _end_stream(self, leg: _Leg, **fields: Json) -> None:
        """Ends the spans of a stream, which go on after its leg was chosen."""
        leg.tell_end()
        if self.span is not None:
            self.span.end(leg.told[-1] if leg.told else "", **fields)

    def _given_up(self) -> None:
        """The receiver cancelled."""
        with self.lock:
            for leg in self.legs:
                leg.tell_end()
            if self.span is not None:
                self.span.end(error="CancelledError")
            late = self._close() if not self.over else []
            if self.leader is not None:
                late.append(self.leader)
        _cancel(late)


def _cancel(legs: list[_Leg]) -> None:
    for leg in legs:
        if leg.future is not None:
            leg.future.cancel()

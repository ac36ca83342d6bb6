"""Several members answer, a rule decides. An `Ensemble` is itself a Sampler, so it can be hedged, routed, evaluated or be a member.

Nothing here blocks: members answer through futures, time comes from a clock, so the same code runs on real and on virtual time. How a
rule counts is in `voting.py`, how answers are read in `answers.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal, TypeAlias

from .. import events
from ..clock import system_clock
from ..errors import AllMembersFailedError, CapabilityError, ConfigError, NoConsensusError
from ..promise import Promise, failure_of
from ..protocols import Clock, Sampler, Vote
from ..records import Ballot, Completion, Json, Prompt, SamplingParams, Verdict
from .answers import Equal, Kind, Reading, merge_by_meaning, read_answer
from .pool import Breaker, Member, Pool, token_confidence
from .telling import tell_vote
from .voting import LogOdds, settled, votes

__all__ = ["Confidence", "Ensemble", "Mode", "Read"]

Mode: TypeAlias = Literal["parallel", "sequential", "hedged", "cascade"]
Read: TypeAlias = Reading | Kind | Callable[[str], "str | Sequence[str] | None"]
"""How the answer is read out of a text: a kind, a `Reading`, or a function of your own. None is an abstention, several answers are a ranking,
best first (`read_ranking`), which `borda` and `instant_runoff` count."""
Confidence: TypeAlias = Callable[[Verdict], float | None]
"""The probability that a verdict is right, None where it cannot be said: see `calibration.fit_confidence`."""
_DEFAULT = SamplingParams(max_tokens=64, temperature=0.7)


def ballot_of(member: Member, completion: Completion, read: Read, latency_s: float) -> Ballot:
    """What a completion votes for."""
    found = read(completion.text) if callable(read) else read_answer(completion.text, read)
    ranking = () if found is None or isinstance(found, str) else tuple(found)
    return Ballot(
        member=member.name,
        answer=found if found is None or isinstance(found, str) else next(iter(ranking), None),
        ranking=ranking,
        text=completion.text,
        confidence=token_confidence(completion),
        weight=member.weight,
        latency_s=latency_s,
        cost=None if member.price is None else member.price.of((completion,)),
        completion=completion,
    )


class Ensemble:
    """Asks the members of a pool and votes.

    Args:
        pool: the members, in the order in which "sequential" and "hedged" ask them.
        vote: a registered rule, or any function from ballots to a verdict.
        mode: "parallel" asks all at once; "sequential" one after the other, until the rest cannot change the outcome; "hedged" asks
            `quorum` members, a further one for each that fails or is not done after another `hedge_delay_s`, and votes on the first
            `quorum` answers; "cascade" one after the other, the cheapest first where all have
            a price, until `confidence` says `stop_at` or more.
        read: how answers are read.
        merge: makes answers of one meaning one, where the rules of `read` do not.
        confidence: sets the verdict's `probability`; needed by "cascade".
        stop_at: the probability at which a cascade stops.
        abstain: says of a verdict's probability whether to answer; see `abstain_at`, which promises an error rate.
        quorum: members that must not fail.
        deadline_s: after it the vote is on what has come; members that are late count as failed.
        hedge_delay_s: of "hedged".
        clock: times and deadlines.
        failures, retry_after_s: of the breaker of each member.

    Raises:
        ConfigError: the settings do not fit each other.
    """

    def __init__(
        self,
        pool: Pool | Mapping[str, Sampler],
        vote: str | Vote = "majority",
        mode: Mode = "parallel",
        *,
        read: Read = "auto",
        merge: Equal | None = None,
        confidence: Confidence | None = None,
        stop_at: float = 0.9,
        abstain: Callable[[float | None], bool] | None = None,
        quorum: int = 1,
        deadline_s: float | None = None,
        hedge_delay_s: float = 1.0,
        clock: Clock = system_clock,
        failures: int = 5,
        retry_after_s: float = 30.0,
    ) -> None:
        self.pool = pool if isinstance(pool, Pool) else Pool(pool)
        self.vote: Vote = votes.get(vote)
        if mode not in ("parallel", "sequential", "hedged", "cascade"):
            raise ConfigError(f"Ensemble.mode is {mode!r}; expected 'parallel', 'sequential', 'hedged' or 'cascade'.")
        if not 1 <= quorum <= len(self.pool):
            raise ConfigError(f"Ensemble.quorum is {quorum!r}; expected a whole number from 1 to the {len(self.pool)} members.")
        if mode == "cascade" and confidence is None:
            raise ConfigError(
                "A cascade stops at a calibrated confidence and got none. Fit one on labelled answers: confidence=fit_confidence(verdicts, right)."
            )
        if abstain is not None and confidence is None and not isinstance(self.vote, LogOdds):
            raise ConfigError("An ensemble abstains by a probability and knows none. Fit one on labelled answers: confidence=fit_confidence(verdicts, right).")
        if not 0 < stop_at <= 1 or hedge_delay_s < 0 or (deadline_s is not None and not deadline_s > 0):
            raise ConfigError(f"Ensemble has stop_at={stop_at!r}, hedge_delay_s={hedge_delay_s!r}, deadline_s={deadline_s!r}; expected (0, 1], ≥ 0 and > 0.")
        self.mode: Mode = mode
        self.read: Read = read
        self.merge, self.abstain = merge, abstain
        self.confidence, self.stop_at, self.quorum = confidence, stop_at, quorum
        self.deadline_s, self.hedge_delay_s, self.clock = deadline_s, hedge_delay_s, clock
        self.breakers = {name: Breaker(clock, failures=failures, retry_after_s=retry_after_s) for name in self.pool.names}

    @property
    def model(self) -> str:
        """The members' names."""
        return f"ensemble({', '.join(self.pool.names)})"

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Future[Verdict]:
        """Asks; the future fails with AllMembersFailedError below the quorum. Cancelling it cancels every member's request."""
        return _Round(self, prompt, params or _DEFAULT).begin()

    def ask(self, prompt: Prompt, params: SamplingParams | None = None) -> Verdict:
        """Asks and waits.

        Raises:
            AllMembersFailedError: fewer than `quorum` members answered or abstained.
        """
        return self.submit(prompt, params).result()

    def judge(self, ballots: tuple[Ballot, ...]) -> Verdict:
        """The verdict on ballots, with merged answers, a calibrated probability, and no answer where that is too low."""
        verdict = self.vote(ballots if self.merge is None else merged_ballots(ballots, self.merge))
        if self.confidence is not None and verdict.answer is not None:
            verdict = replace(verdict, probability=self.confidence(verdict))
        if self.abstain is None or verdict.answer is None or self.abstain(verdict.probability):
            return verdict
        sure = "unknown" if verdict.probability is None else f"{verdict.probability:.3g}"
        return replace(verdict, answer=None, text="", reason=f"the probability that {verdict.answer!r} is right is {sure}, too low to answer")

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        """`n` verdicts as completions, each the winner's; with a seed the i-th asks with seed + i.

        The future fails with NoConsensusError where the rule abstains.
        """
        if n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        several = [params if params.seed is None else replace(params, seed=params.seed + i) for i in range(n)]
        asked = [self.submit(prompt, one) for one in several]
        return gathered(asked, winners_completion)

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """An ensemble has no token probabilities of its own: CapabilityError."""
        del prompt, completion
        raise CapabilityError(f"{self.model} votes on answers and has no log-probs of tokens; ask a member: ensemble.pool[name].sampler.compute_logprobs(…).")


def merged_ballots(ballots: tuple[Ballot, ...], equal: Equal) -> tuple[Ballot, ...]:
    """The ballots with one name for answers of one meaning, in rankings too."""
    every = [answer for ballot in ballots for answer in (ballot.answer, *ballot.ranking)]
    names = dict(zip(every, merge_by_meaning(every, equal), strict=True))
    return tuple(
        replace(b, answer=names[b.answer], ranking=tuple(dict.fromkeys(name for one in b.ranking if (name := names[one]) is not None))) for b in ballots
    )


def winners_completion(verdict: Verdict) -> Completion:
    """The completion that a verdict shows.

    Raises:
        NoConsensusError: it has no answer.
    """
    if verdict.answer is None:
        raise NoConsensusError(f"The rule {verdict.strategy!r} gave no winner: {verdict.reason}. Look at the ballots, or vote by another rule.", verdict)
    mine = [b.completion for b in verdict.ballots if b.answer == verdict.answer and b.completion is not None]
    shown = next((one for one in mine if one.text == verdict.text), mine[0])
    return replace(shown, duration_s=verdict.duration_s)


def gathered(asked: list[Future[Verdict]], shape: Callable[[Verdict], Completion]) -> Future[tuple[Completion, ...]]:
    """All verdicts as completions, in order; the first failure fails the whole and cancels the rest."""

    def cancel_all() -> None:
        for one in asked:
            one.cancel()

    promise: Promise[tuple[Completion, ...]] = Promise(cancel_all)
    left, lock = [len(asked)], threading.Lock()

    def done(future: Future[Verdict]) -> None:
        if future.cancelled():
            promise.future.cancel()
            return
        error = future.exception()
        with lock:
            left[0] -= 1
            last = not left[0]
        if error is None and not last:
            return
        if error is not None:
            promise.fail(error)
            cancel_all()
            return
        try:
            promise.give(tuple(shape(one.result()) for one in asked))
        except Exception as failure:  # reaches whoever waits
            promise.fail(failure)

    for one in asked:
        one.add_done_callback(done)
    return promise.future


class _Round:
    """One question on its way through the members. Every change of state is under the lock; samplers and votes are called with it too, since
    a sampler may answer at once, on this thread (the lock is re-entrant)."""

    def __init__(self, ensemble: Ensemble, prompt: Prompt, params: SamplingParams) -> None:
        self.ensemble, self.prompt, self.params = ensemble, prompt, params
        self.promise: Promise[Verdict] = Promise(self._given_up)
        self.start_s = ensemble.clock.now()
        self.lock = threading.RLock()
        self.ballots: dict[str, Ballot] = {}
        self.queue: list[Member] = []
        self.running: dict[str, Future[tuple[Completion, ...]]] = {}
        self.timers: list[Callable[[], None]] = []
        self.over = False
        self.span = events.opened("ensemble.request", model=ensemble.model, mode=ensemble.mode)
        self.members: dict[str, events.OpenSpan] = {}

    def begin(self) -> Future[Verdict]:
        one, future = self.ensemble, self.promise.future
        with self.lock:
            self.queue = list(one.pool)
            priced = one.mode == "cascade" and all(member.price is not None for member in self.queue)
            if priced:
                self.queue.sort(key=lambda member: member.price.input_per_million + member.price.output_per_million if member.price else 0.0)
            if one.deadline_s is not None:
                self.timers.append(one.clock.call_later(one.deadline_s, self._late))
            first = {"parallel": len(self.queue), "hedged": one.quorum}.get(one.mode, 1)
            order = "one of the first" if first > 1 else "the cheapest" if priced else "the first in order"
            why = "" if self.span is None else f"{order}; a further one {self._until()}"
            for _ in range(first):
                self._start_next(why)
            if one.mode == "hedged":
                self._arm()
            self._look()
        return future

    # ------------------------------------------------------------------------------------------------------ what happens
    def _until(self) -> str:
        """When a further member is asked, in words."""
        one = self.ensemble
        ways = {"hedged": f"every {one.hedge_delay_s:g} s and for each failure", "cascade": f"while the vote is less sure than {one.stop_at:g}"}
        return ways.get(one.mode, "as long as it can change the vote")

    def _tell_asked(self, member: Member, why: str, after: Sequence[str]) -> str:
        """Why this member, and why now, where they are asked one after another; `after` names those whose way led to it."""
        if self.ensemble.mode == "parallel":
            return ""
        causes = [self.members[name].id for name in after if name in self.members]
        among: list[Json] = [member.name, *(one.name for one in self.queue)]
        elapsed_s = self.ensemble.clock.now() - self.start_s
        return events.linked(self.span, "ensemble.asked", causes, what="member", chose=member.name, among=among, reason=why, elapsed_s=elapsed_s)

    def _start_next(self, why: str, after: Sequence[str] = ()) -> None:
        """Asks the next member that its breaker lets through."""
        while self.queue and not self.over:
            member = self.queue.pop(0)
            breaker = self.ensemble.breakers[member.name]
            if not breaker.admit():
                self.ballots[member.name] = Ballot(member=member.name, answer=None, weight=member.weight, error="set aside by its breaker")
                why = f"{why}; {member.name} is set aside by its breaker"
                continue
            began_s = self.ensemble.clock.now()
            asked = None
            if self.span is not None:
                with events.within(self.span, self._tell_asked(member, why, after)):
                    asked = self.members[member.name] = events.OpenSpan("ensemble.member", {"member": member.name, "model": member.sampler.model})
            try:
                with events.within(asked):
                    future = member.sampler.sample(self.prompt, self.params, 1)
            except Exception as error:  # a member that refuses at once has failed like any other
                breaker.report(False)
                self.ballots[member.name] = self._failed(member, f"{type(error).__name__}: {error}", began_s)
                why, after = f"{member.name} failed", (member.name,)
                continue
            self.running[member.name] = future
            future.add_done_callback(lambda done, member=member, began_s=began_s: self._answered(member, began_s, done))  # type: ignore[misc]
            return

    def _failed(self, member: Member, why: str, began_s: float) -> Ballot:
        if member.name in self.members:
            self.members[member.name].end(error=why)
        return Ballot(member=member.name, answer=None, weight=member.weight, error=why, latency_s=self.ensemble.clock.now() - began_s)

    def _answered(self, member: Member, began_s: float, future: Future[tuple[Completion, ...]]) -> None:
        why = failure_of(future)
        self.ensemble.breakers[member.name].report(None if future.cancelled() else not why)
        with self.lock:
            self.running.pop(member.name, None)
            if self.over:
                return
            latency_s = self.ensemble.clock.now() - began_s
            try:
                ballot = self._failed(member, why, began_s) if why else ballot_of(member, future.result()[0], self.ensemble.read, latency_s)
            except Exception as error:  # a reading function of the caller's own
                self._end(error)
                return
            self.ballots[member.name] = ballot
            if member.name in self.members:
                self.members[member.name].end(answer_read=ballot.answer, confidence=ballot.confidence)
            if self.ensemble.mode == "hedged" and why:
                self._start_next(f"{member.name} failed", (member.name,))
            self._look()

    def _arm(self) -> None:
        if self.queue and not self.over:
            self.timers.append(self.ensemble.clock.call_later(self.ensemble.hedge_delay_s, self._hedge))

    def _hedge(self) -> None:
        with self.lock:
            if not self.over:
                self._start_next(f"no vote after another {self.ensemble.hedge_delay_s:g} s", tuple(self.running))
                self._arm()
                self._look()

    def _late(self) -> None:
        with self.lock:
            if self.over:
                return
            for name in tuple(self.running):
                member = self.ensemble.pool[name]
                self.ballots[name] = self._failed(member, f"no answer within the deadline of {self.ensemble.deadline_s:g} s", self.start_s)
            self._finish()

    # ---------------------------------------------------------------------------------------------------------- decisions
    def _cast(self) -> tuple[Ballot, ...]:
        return tuple(self.ballots[name] for name in self.ensemble.pool.names if name in self.ballots)

    def _look(self) -> None:
        """Ends the round where nothing more is needed, else asks on."""
        mode = self.ensemble.mode
        while not self.over and mode in ("sequential", "cascade") and not self.running:
            if not self.queue or self._enough():
                break
            heard = sum(not ballot.error for ballot in self.ballots.values())
            need = self.ensemble.quorum
            self._start_next(f"{heard} of {need} needed answers" if heard < need else f"{heard} answers; a further one {self._until()}", tuple(self.ballots))
        if self.over:
            return
        heard = sum(not ballot.error for ballot in self.ballots.values())
        out_of_members = not self.running and (not self.queue or mode in ("sequential", "cascade"))
        if out_of_members or (mode == "hedged" and heard >= self.ensemble.quorum):
            self._finish()

    def _enough(self) -> bool:
        cast, one = self._cast(), self.ensemble
        heard = sum(not ballot.error for ballot in cast)
        if heard < one.quorum:
            return False
        try:
            if one.mode == "cascade":
                probability = one.judge(cast).probability
                return probability is not None and probability >= one.stop_at
            if one.merge is not None:
                return False  # a further answer could join any group
            return settled(one.vote, cast, [Ballot(member=m.name, answer=None, weight=m.weight, confidence=1.0) for m in self.queue])
        except Exception as error:  # a rule or a calibration of the caller's own
            self._end(error)
            return True

    # ---------------------------------------------------------------------------------------------------------------- end
    def _finish(self) -> None:
        cast, one = self._cast(), self.ensemble
        heard = sum(not ballot.error for ballot in cast)
        if heard < one.quorum:
            causes = {ballot.member: ballot.error for ballot in cast if ballot.error}
            listed = "; ".join(f"{name}: {why}" for name, why in causes.items())
            self._end(AllMembersFailedError(f"{heard} of {len(one.pool)} members answered; expected at least {one.quorum}. {listed}.", causes))
            return
        try:
            verdict = one.judge(cast)
        except Exception as error:
            self._end(error)
            return
        skipped = tuple(member.name for member in one.pool if member.name not in self.ballots)
        verdict = replace(verdict, skipped=skipped, duration_s=one.clock.now() - self.start_s)
        heard_of = [cause for ballot in cast if not ballot.error and (span := self.members.get(ballot.member)) for cause in (span.id, *span.found)]
        vote = tell_vote(self.span, self.prompt, verdict, one.mode, heard=heard, causes=heard_of)
        self._end(verdict, vote)

    def _end(self, outcome: Verdict | Exception, vote: str = "") -> None:
        self._given_up(vote, **({"error": type(outcome).__name__} if isinstance(outcome, Exception) else {}))
        if isinstance(outcome, Exception):
            self.promise.fail(outcome)
        else:
            self.promise.give(outcome)

    def _given_up(self, vote: str = "", **fields: Json) -> None:
        """Ends the round; without a vote or an error who asked has cancelled."""
        if self.span is not None:
            for member in self.members.values():
                member.end(error="CancelledError")
            self.span.end(vote, **(fields if vote or fields else {"error": "CancelledError"}))
        with self.lock:
            self.over = True
            timers, running = self.timers, list(self.running.values())
            self.timers, self.queue = [], []
        for cancel in timers:
            cancel()
        for future in running:
            future.cancel()

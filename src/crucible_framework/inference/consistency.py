"""Self-consistency: one model answers several times and the answers vote (Wang et al. 2022, arXiv 2203.11171); it stops when enough agree."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace

from .. import events
from ..clock import system_clock
from ..errors import ConfigError
from ..promise import Promise
from ..protocols import Clock, Sampler, Vote
from ..records import Ballot, Completion, Prompt, SamplingParams, Verdict
from .answers import Equal
from .calibration import majority_is_safe
from .ensemble import Read, ballot_of, gathered, merged_ballots, winners_completion
from .pool import Member
from .telling import tell_vote
from .voting import votes

__all__ = ["SelfConsistent"]


class SelfConsistent:
    """Draws up to `samples` answers of one sampler, `batch` at a time, and votes.

    Args:
        sampler: asked at the caller's temperature, which should not be 0.
        samples: at the most.
        batch: drawn in one call; after each it is seen whether more are needed.
        confidence: stops once the leading answer would stay ahead with this probability; None draws all.
        vote: a registered rule, or your own.
        read: how answers are read.
        merge: makes answers of one meaning one, where the rules of `read` do not.
        clock: for the verdict's duration.
    """

    def __init__(
        self,
        sampler: Sampler,
        samples: int = 10,
        *,
        batch: int = 4,
        confidence: float | None = 0.95,
        vote: str | Vote = "majority",
        read: Read = "auto",
        merge: Equal | None = None,
        clock: Clock = system_clock,
    ) -> None:
        if samples < 1 or batch < 1 or (confidence is not None and not 0.5 < confidence < 1):
            raise ConfigError(f"SelfConsistent has samples={samples!r}, batch={batch!r}, confidence={confidence!r}; expected ≥ 1, ≥ 1 and (0.5, 1) or none.")
        self.sampler, self.samples, self.batch, self.confidence = sampler, samples, batch, confidence
        self.read: Read = read
        self.vote, self.merge, self.clock = votes.get(vote), merge, clock

    @property
    def model(self) -> str:
        """The one model's name and the number of samples."""
        return f"self_consistent({self.sampler.model}, {self.samples})"

    def submit(self, prompt: Prompt, params: SamplingParams) -> Future[Verdict]:
        """Draws and votes; cancelling the future stops drawing."""
        return _Draws(self, prompt, params).begin()

    def ask(self, prompt: Prompt, params: SamplingParams | None = None) -> Verdict:
        """Draws, votes and waits."""
        return self.submit(prompt, params or SamplingParams(max_tokens=64, temperature=0.7)).result()

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        """`n` verdicts as completions; the future fails with NoConsensusError where the rule abstains."""
        if n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        several = [params if params.seed is None else replace(params, seed=params.seed + 100_003 * i) for i in range(n)]
        return gathered([self.submit(prompt, one) for one in several], winners_completion)

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """The sampler's own."""
        return self.sampler.compute_logprobs(prompt, completion)


class _Draws:
    """One question's answers so far."""

    def __init__(self, owner: SelfConsistent, prompt: Prompt, params: SamplingParams) -> None:
        self.owner, self.prompt, self.params = owner, prompt, params
        self.promise: Promise[Verdict] = Promise(self._given_up)
        self.ballots: list[Ballot] = []
        self.running: Future[tuple[Completion, ...]] | None = None
        self.over = False
        self.lock = threading.RLock()
        self.start_s = owner.clock.now()
        self.span = events.opened("ensemble.request", model=owner.model, mode="self_consistency")

    def begin(self) -> Future[Verdict]:
        future = self.promise.future
        self._more()
        return future

    def _more(self) -> None:
        count = min(self.owner.batch, self.owner.samples - len(self.ballots))
        params = self.params if self.params.seed is None else replace(self.params, seed=self.params.seed + len(self.ballots))
        try:
            with events.within(self.span):
                future = self.owner.sampler.sample(self.prompt, params, count)
        except Exception as error:
            self._fail(error)
            return
        with self.lock:
            self.running = future
            over = self.over
        if over:
            future.cancel()
        future.add_done_callback(self._came)

    def _came(self, future: Future[tuple[Completion, ...]]) -> None:
        if self.over:
            return
        if future.cancelled():
            self.promise.future.cancel()
            return
        try:
            member = Member(name=self.owner.sampler.model, sampler=self.owner.sampler)
            latency_s = self.owner.clock.now() - self.start_s
            for completion in future.result():
                one = ballot_of(member, completion, self.owner.read, latency_s)
                self.ballots.append(replace(one, member=f"{one.member}#{len(self.ballots)}"))
            if len(self.ballots) < self.owner.samples and not self._enough():
                self._more()
                return
            verdict = replace(self.owner.vote(self._cast()), duration_s=self.owner.clock.now() - self.start_s)
        except Exception as error:
            self._fail(error)
            return
        vote = tell_vote(
            self.span, self.prompt, verdict, "self_consistency", heard=len(self.ballots), causes=() if self.span is None else self.span.found
        )  # fmt: skip
        if self.span is not None:
            self.span.end(vote)
        self.promise.give(verdict)

    def _fail(self, error: Exception) -> None:
        if self.span is not None:
            self.span.end(error=type(error).__name__)
        self.promise.fail(error)

    def _cast(self) -> tuple[Ballot, ...]:
        cast, merge = tuple(self.ballots), self.owner.merge
        return cast if merge is None else merged_ballots(cast, merge)

    def _enough(self) -> bool:
        if self.owner.confidence is None:
            return False
        answers = [ballot.answer for ballot in self._cast() if ballot.answer is not None]
        return majority_is_safe({answer: answers.count(answer) for answer in answers}, self.owner.confidence)

    def _given_up(self) -> None:
        if self.span is not None:
            self.span.end(error="CancelledError")
        with self.lock:
            self.over = True
            running = self.running
        if running is not None:
            running.cancel()

"""Samplers that answer at a given time on a virtual clock, and a loop that sends a trace of requests through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from crucible_framework.errors import BackendError
from crucible_framework.promise import Promise
from crucible_framework.protocols import OnPiece, Sampler
from crucible_framework.records import Completion, Piece, Prompt, SamplingParams
from crucible_framework.testing import VirtualClock

PARAMS = SamplingParams(max_tokens=8)


def said(text: str, *, logprobs: tuple[float, ...] = (-0.1,), tokens: int = 1) -> Completion:
    return Completion(text=text, tokens=tuple(range(tokens)), logprobs=logprobs, stop_reason="stop", prompt_tokens=10)


class Timed:
    """Answers with the next of `answers` (a text, an error, or None: never) after the next of `after_s`; both are repeated."""

    def __init__(
        self, clock: VirtualClock, answers: Sequence[str | Exception | None] = ("yes",), after_s: Sequence[float] = (1.0,), model: str = "timed"
    ) -> None:
        self.clock, self.answers, self.after_s, self.model = clock, answers, after_s, model
        self.calls = 0
        self.asked: list[tuple[float, SamplingParams]] = []
        self.futures: list[Future[tuple[Completion, ...]]] = []
        self.keep = True

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        answer, delay_s = self.answers[self.calls % len(self.answers)], self.after_s[self.calls % len(self.after_s)]
        self.calls += 1
        future: Future[tuple[Completion, ...]] = Future()
        if self.keep:
            self.asked.append((self.clock.now(), params))
            self.futures.append(future)

        def end() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(tuple(said(answer or "") for _ in range(n)))

        if answer is not None:
            cancel = self.clock.call_later(delay_s, end)
            future.add_done_callback(lambda done: cancel() if done.cancelled() else None)
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        future: Future[tuple[float, ...]] = Future()
        future.set_result((-1.0,) * len(completion))
        return future


class Ready:
    """Answers at once; `answers` as in `Timed`."""

    def __init__(self, *answers: str | Exception, model: str = "ready", logprobs: tuple[float, ...] = (-0.1,)) -> None:
        self.answers, self.model, self.logprobs, self.calls = answers, model, logprobs, 0
        self.seeds: list[int | None] = []

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        future: Future[tuple[Completion, ...]] = Future()
        self.seeds.append(params.seed)
        taken = [self.answers[(self.calls + i) % len(self.answers)] for i in range(n)]
        self.calls += n
        error = next((one for one in taken if isinstance(one, Exception)), None)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(tuple(said(str(one), logprobs=self.logprobs) for one in taken))
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        future: Future[tuple[float, ...]] = Future()
        future.set_result((-1.0,) * len(completion))
        return future


class Talking:
    """Streams `max_tokens` words, the first after the next of `first_s`, then one every `each_s`; fails after so many, if it is told to."""

    model = "talking"

    def __init__(self, clock: VirtualClock, first_s: Sequence[float] = (1.0,), *, each_s: float = 0.1, word: str = "w", fails_after: int | None = None,
                 stops: bool = True) -> None:  # fmt: skip
        self.clock, self.first_s, self.each_s, self.word, self.fails_after, self.stops = clock, first_s, each_s, word, fails_after, stops
        self.calls = self.given_up = 0

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[tuple[Completion, ...]]:
        assert n == 1
        future: Future[tuple[Completion, ...]] = Future()
        if not self.stops:
            future.set_running_or_notify_cancel()
        timer: list[Callable[[], None]] = []

        def say(number: int) -> None:
            if self.fails_after == number:
                future.set_exception(BackendError(f"the stream broke off after {number} tokens"))
                return
            on_piece(Piece(index=0, text=f"{self.word} ", tokens=(number,), logprobs=(-0.1,)))
            if future.cancelled():
                return
            if number + 1 < params.max_tokens:
                timer[:] = [self.clock.call_later(self.each_s, lambda: say(number + 1))]
                return
            tokens = tuple(range(params.max_tokens))
            future.set_result((Completion(text=f"{self.word} " * len(tokens), tokens=tokens, logprobs=(), stop_reason="length", prompt_tokens=10),))

        def ended(done: Future[tuple[Completion, ...]]) -> None:
            if done.cancelled():
                self.given_up += 1
                timer[0]()

        timer.append(self.clock.call_later(self.first_s[self.calls % len(self.first_s)], lambda: say(0)))
        self.calls += 1
        future.add_done_callback(ended)
        return future

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        inner = self.stream(prompt, params, lambda piece: None)

        def given_up() -> None:
            inner.cancel()

        promise: Promise[tuple[Completion, ...]] = Promise(given_up)
        inner.add_done_callback(lambda done: None if done.cancelled() else promise.give(done.result()))
        return promise.future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        raise NotImplementedError


def replay(clock: VirtualClock, sampler: Sampler, n: int, apart_s: float, *, count_from: int = 0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Sends `n` requests `apart_s` apart; latencies and successes of those from `count_from` on."""
    latency, ok = np.zeros(n), np.zeros(n, dtype=bool)

    def arrive(i: int) -> None:
        began_s = clock.now()

        def done(future: Future[tuple[Completion, ...]]) -> None:
            latency[i], ok[i] = clock.now() - began_s, future.exception() is None

        sampler.sample("x", PARAMS).add_done_callback(done)
        if i + 1 < n:
            clock.call_later(apart_s, lambda: arrive(i + 1))

    arrive(0)
    clock.advance(apart_s * n + 1e4)
    return latency[count_from:], ok[count_from:]


TRACES: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "bimodal": lambda rng, n: 0.8 * rng.lognormal(0, 0.15, n) * np.where(rng.random(n) < 0.05, 10, 1),
    "rare": lambda rng, n: rng.lognormal(0, 0.2, n) * np.where(rng.random(n) < 0.015, 20, 1),
    "lognormal": lambda rng, n: rng.lognormal(0, 0.9, n),
    "pareto": lambda rng, n: 1 + rng.pareto(1.8, n),
    "light": lambda rng, n: rng.uniform(0.9, 1.1, n),
}

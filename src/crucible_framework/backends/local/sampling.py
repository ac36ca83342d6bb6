"""Samplers of frozen weights, and the work behind them: whose turn it is among models, samples and log-probs.

Requests of one base model are served together, whatever adapter they ask. Every sample has its own generator, so the same seed gives the
same sample however many are drawn and whoever shares the batch, up to rounding. This file does not know training or files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from ... import events
from ...errors import BackendError, ConfigError
from ...protocols import OnPiece
from ...records import Completion, Prompt, SamplingParams
from .asks import Answer, Ask, AskJob, Frozen, prompt_tokens
from .bases import Base
from .compiled import NativeSteps
from .drawing import Batch
from .engine import check_tokens, completion_logprobs
from .lora import Active
from .steps import Steps

__all__ = ["Answer", "Ask", "Frozen", "LocalSampler", "Sampling"]

SCORED = 2048
"""Tokens of the log-prob requests that are answered in one step, where there are several."""


Scorer = Callable[[Active | None, Sequence[tuple[list[int], list[int]]]], list[tuple[float, ...]]]
"""Per (prompt, completion), of at least one token each, the log p of the completion's tokens."""


class Door(Protocol):
    """Where a sampler's requests go."""

    def share(self, item: Ask) -> Future[Answer]:
        """A request that others may join."""
        ...


class LocalSampler:
    """A frozen model that answers prompts; see `Sampler`.

    `tokens` and `logprobs` of a completion hold all that was drawn, the stop too; `text` ends before it. At temperature 0 the log-probs
    are those of temperature 1. A completion ends with "length" where the context is full.

    Args:
        door: takes the requests.
        model: its name.
        frozen: the weights, once the requests before have run.
    """

    def __init__(self, door: Door, model: str, frozen: Future[Frozen]) -> None:
        self._door, self._model, self._frozen = door, model, frozen

    @property
    def model(self) -> str:
        """The base model's name, the checkpoint's URI, or that of the session."""
        return self._model

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        """`n` completions of a prompt. Cancelling the future ends their drawing with the step under way.

        Raises:
            ConfigError: n is below 1.
            DataError (from the future): the prompt has no token, one outside the vocabulary, or leaves no room in the context.
            NumericError (from the future): the model's logits are not finite.
        """
        return self._ask(prompt, params, n, None)

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[tuple[Completion, ...]]:
        """The same, each token told as it is drawn, on a thread of the stream's own; see `StreamSampler`.

        Raises:
            ConfigError, DataError, NumericError: as `sample`; tokens that were drawn before an error are told before it.
        """
        return self._ask(prompt, params, n, on_piece)

    def _ask(self, prompt: Prompt, params: SamplingParams, n: int, on_piece: OnPiece | None) -> Future[tuple[Completion, ...]]:
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        ask = Ask(model=self._model, frozen=self._frozen, prompt=prompt, params=params, n=n, on_piece=on_piece)
        return self._door.share(ask)  # type: ignore[return-value]

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """log p of each token of `completion` after `prompt` at temperature 1, in nats; a string is encoded without an end token."""
        ask = Ask(model=self._model, frozen=self._frozen, prompt=prompt, completion=completion)
        return self._door.share(ask)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ on the engine's thread
class Lane(Protocol):
    """Requests of one base and kind."""

    @property
    def busy(self) -> bool:
        """Whether anybody waits."""
        ...

    def add(self, job: AskJob) -> None:
        """Takes a request whose weights are there."""
        ...

    def step(self) -> None:
        """Does a little of it."""
        ...


class Sampling:
    """All sample and log-prob requests of a backend, in steps; see `Stepwise`. Bases and kinds take turns.

    Args:
        threads: that the compiled step uses.
        int8: whether matrices are rounded to int8, for samples and for log-probs.
    """

    def __init__(self, threads: int, *, int8: bool = False) -> None:
        self._threads, self._int8 = threads, int8
        self._arrived: deque[AskJob] = deque()
        self._lanes: dict[tuple[int, bool], Lane] = {}
        self._turns: deque[Lane] = deque()

    def add(self, job: AskJob) -> None:
        """Takes a request; it is served once its weights are there."""
        self._arrived.append(job)

    def busy(self) -> bool:
        """Whether there is anything to do now."""
        return bool(self._turns) or any(job.item.frozen.done() for job in list(self._arrived))

    def step(self) -> None:
        """Lets the next lane do a little."""
        for _ in range(len(self._arrived)):
            job = self._arrived.popleft()
            if job.item.frozen.done():
                self._enter(job)
            else:
                self._arrived.append(job)
        if self._turns:
            lane = self._turns.popleft()
            lane.step()
            if lane.busy:
                self._turns.append(lane)

    def _enter(self, job: AskJob) -> None:
        """Puts a request into its lane; fails it where its weights could not be had."""
        try:
            base, draws = job.item.frozen.result().base, job.item.completion is None
            key = id(base), draws
            if key not in self._lanes:
                self._lanes[key] = Batch(base, self._steps(base)) if draws else _Scores(base, self._scorer(base))
        except Exception as error:
            job.promise.fail(error)
            return
        lane = self._lanes[key]
        lane.add(job)
        if lane not in self._turns:
            self._turns.append(lane)

    def _steps(self, base: Base) -> Steps:
        native = NativeSteps.of(base, threads=self._threads, int8=self._int8)
        if native is None and self._int8:
            raise BackendError(
                f"{base.name!r} cannot be sampled with int8 weights here; expected a model of the Llama or Qwen family, a processor and a C++ compiler. "
                "Install g++ (the event 'native.unavailable' says what was missing), or take dtype='bfloat16'."
            )
        if native is not None:
            return native
        from .torch_steps import TorchSteps  # imports transformers, which takes longer than a short answer

        return TorchSteps(base)

    def _scorer(self, base: Base) -> Scorer:
        """Log-probs by the weights that are sampled: those of training, or those rounded to int8."""
        steps = self._steps(base) if self._int8 else None
        return steps.scores if isinstance(steps, NativeSteps) else lambda active, pairs: completion_logprobs(base, active, pairs)


class _Scores:
    """Log-prob requests of one base: those of one adapter that stand near each other are answered in shared passes."""

    def __init__(self, base: Base, scorer: Scorer) -> None:
        self._base, self._scorer = base, scorer
        self._jobs: deque[AskJob] = deque()

    @property
    def busy(self) -> bool:
        """See `Lane`."""
        return bool(self._jobs)

    def add(self, job: AskJob) -> None:
        """See `Lane`."""
        self._jobs.append(job)

    def step(self) -> None:
        """Answers the oldest request, and others of the same weights."""
        active = self._jobs[0].item.frozen.result().active
        jobs, pairs, tokens = list[AskJob](), list[tuple[list[int], list[int]]](), 0
        for job in list(self._jobs):
            if job.item.frozen.result().active is not active:
                continue
            if tokens >= SCORED:
                break
            self._jobs.remove(job)
            if not job.future.cancelled() and (pair := self._pair(job)) is not None:
                jobs.append(job)
                pairs.append(pair)
                tokens += len(pair[0]) + len(pair[1])
        started = time.perf_counter()
        try:
            found = self._scorer(active, pairs)
            for answered, (prompt, answer), logprobs in zip(jobs, pairs, found, strict=True):
                told: dict[str, str | int] = {"model": answered.item.model, "prompt_tokens": len(prompt), "completion_tokens": len(answer)}
                answered.context.run(events.emit, "inference.logprobs", **told, duration_s=time.perf_counter() - started)
                answered.promise.give(logprobs)
        except Exception as error:
            for failed in jobs:
                failed.promise.fail(error)

    def _pair(self, job: AskJob) -> tuple[list[int], list[int]] | None:
        """Tokens of the prompt and of the completion; one that cannot be served, or asks nothing, is answered alone."""
        base, completion = self._base, job.item.completion or ""
        try:
            prompt = prompt_tokens(base, job.item.prompt)
            answer = base.tokenizer.encode(completion) if isinstance(completion, str) else list(completion)
            if answer:
                check_tokens(base, [*prompt, *answer][:-1], "The prompt with its completion", "Shorten them.")
                check_tokens(base, answer[-1:], "The completion", "")
                return prompt, answer
            job.promise.give(())
        except Exception as error:
            job.promise.fail(error)
        return None

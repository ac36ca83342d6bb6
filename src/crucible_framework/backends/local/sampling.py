"""Drawing completions: requests of one model join a running batch, leave it when they are done, and never wait for each other's end.

Every sample has its own generator, so the same seed gives the same sample however many are drawn and whoever shares the batch, up to
rounding. The samples of a prompt share its prefill, and with our own
decoder prompts that begin alike share that of their common start. This file does not know training or files.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ... import events
from ...data.tokens import render_prompt
from ...errors import ConfigError, DataError, NumericError
from ...records import Completion, Prompt, SamplingParams, record
from .bases import Base
from .draws import draw, generator
from .engine import check_tokens, completion_logprobs
from .kv import Past, Shared, pasts_of
from .layout import lay_out
from .lora import Active
from .queue import Job, Waiting

__all__ = ["Ask", "Frozen", "LocalSampler", "serve"]

ROWS = 32
"""Samples that are drawn together."""
COLUMNS = 32768
"""Cached tokens of one batch, padding and reserved room included; a sample that needs more goes alone."""
ROOM = 64
"""Columns that are reserved at a time."""


@dataclass(slots=True, frozen=True, eq=False)
class Frozen:
    """Weights that no longer change: a base and, unless it is sampled as it is, an adapter."""

    base: Base
    active: Active | None = None


@record
class Ask:
    """A request for samples, or with `completion` for log-probs."""

    model: str
    frozen: Future[Frozen]
    prompt: Prompt
    params: SamplingParams = SamplingParams()
    n: int = 1
    completion: str | tuple[int, ...] | None = None


Answer: TypeAlias = tuple[Completion, ...] | tuple[float, ...]
AskJob: TypeAlias = Job[Ask, Answer]


class Door(Protocol):
    """Where a sampler's requests go."""

    def share(self, key: object, item: Ask) -> Future[Answer]:
        """A request that neighbours of the same key may join."""
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
        """`n` completions of a prompt.

        Raises:
            ConfigError: n is below 1.
            DataError (from the future): the prompt has no token, one outside the vocabulary, or leaves no room in the context.
            NumericError (from the future): the model's logits are not finite.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        ask = Ask(model=self._model, frozen=self._frozen, prompt=prompt, params=params, n=n)
        return self._door.share(("sample", id(self._frozen)), ask)  # type: ignore[return-value]

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """log p of each token of `completion` after `prompt` at temperature 1, in nats; a string is encoded without an end token."""
        ask = Ask(model=self._model, frozen=self._frozen, prompt=prompt, completion=completion)
        return self._door.share(("logprobs", id(self._frozen)), ask)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ on the engine's thread
@dataclass(slots=True, eq=False)
class _Request:
    """A sample request that is being served."""

    job: AskJob
    base: Base
    prompt: list[int]
    started: float
    done: dict[int, Completion] = field(default_factory=dict)

    def fail(self, error: BaseException) -> None:
        """The future raises; later results of the request are dropped."""
        if not self.job.future.done():
            self.job.future.set_exception(error)
            _tell(self.job, self.started, error=type(error).__name__)

    def add(self, index: int, completion: Completion) -> None:
        """One sample is there; with the last one the future resolves."""
        self.done[index] = completion
        if len(self.done) == self.job.item.n and not self.job.future.done():
            completions = tuple(self.done[i] for i in range(self.job.item.n))
            drawn = sum(len(completion.tokens) for completion in completions)
            _tell(self.job, self.started, prompt_tokens=len(self.prompt), completion_tokens=drawn)
            self.job.future.set_result(completions)


def _tell(job: AskJob, started: float, **fields: int | str) -> None:
    duration_s = time.perf_counter() - started
    job.context.run(lambda: events.emit("inference.sample", model=job.item.model, n=job.item.n, duration_s=duration_s, **fields))


@dataclass(slots=True, eq=False)
class _Row:
    """One sample being drawn."""

    request: _Request
    index: int
    generator: np.random.Generator
    past: Past
    limit: int
    ends: frozenset[int]
    strings: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one drawn."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def add(self, token: int, logprob: float) -> bool:
        """Takes a drawn token; True once the sample is over, which its request is told."""
        if not math.isfinite(logprob):
            message = f"The logits of {self.request.job.item.model!r} are not finite after {len(self.tokens)} tokens. Look at the training run's loss."
            self.request.fail(NumericError(message, tensor="logits"))
            return True
        self.tokens.append(token)
        self.logprobs.append(logprob)
        tokenizer, stopped, text = self.request.base.tokenizer, token in self.ends, None
        if not stopped and self.strings:
            text = tokenizer.decode(self.tokens)
            cuts = [at for string in self.strings if (at := text.find(string)) >= 0]
            stopped, text = bool(cuts), text[: min(cuts, default=len(text))]
        if not stopped and len(self.tokens) < self.limit:
            return False
        if text is None:
            text = tokenizer.decode(self.tokens[:-1] if stopped else self.tokens)
            text = text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]
        request = self.request
        request.add(
            self.index,
            Completion(
                text=text,
                tokens=tuple(self.tokens),
                logprobs=tuple(self.logprobs),
                stop_reason="stop" if stopped else "length",
                prompt_tokens=len(request.prompt),
                duration_s=time.perf_counter() - request.started,
            ),
        )
        return True


def serve(waiting: Waiting[Ask, Answer]) -> None:
    """Serves the oldest request and all that may join it; does nothing where all were served before."""
    job = waiting.take()
    if job is None:
        return
    try:
        frozen = job.item.frozen.result()
    except Exception as error:
        job.future.set_exception(error)
        return
    with torch.no_grad(), frozen.base.slot.using(frozen.active):
        if job.item.completion is None:
            _Batch(frozen.base, lambda: waiting.take(job.key)).run(job)
        else:
            _serve_logprobs(frozen, job, waiting)


class _Batch:
    """Samples that are drawn together, and those that wait for a place.

    Args:
        base: the model; its slot holds the adapter.
        more: gives the next request that may join, or None.
    """

    def __init__(self, base: Base, more: Callable[[], AskJob | None]) -> None:
        self._base, self._more = base, more
        self._requests: set[_Request] = set()
        self._queue: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._shared: Shared | None = None

    def run(self, job: AskJob) -> None:
        """Draws until nobody is left."""
        try:
            self._admit([job])
            while self._queue or self._rows:
                if not self._queue:
                    self._admit([])
                self._seat()
                if self._rows:
                    self._step()
        except Exception as error:
            for request in self._requests:
                request.fail(error)

    def _admit(self, jobs: list[AskJob]) -> None:
        """Prefills requests: those given, and those that wait, as long as there are free places."""
        free = ROWS - len(self._rows) - sum(job.item.n for job in jobs)
        while free > 0 and (job := self._more()) is not None:
            jobs.append(job)
            free -= job.item.n
        requests = [request for job in jobs if (request := self._request(job)) is not None]
        self._requests.update(requests)
        own = self._base.decoder is not None  # then prompts that begin alike are read as one start with many ends
        for one in lay_out([request.prompt for request in requests], self._base.device, share=own, pack=own):
            cache = DynamicCache()
            hidden = self._base.read(one, cache)
            last = torch.tensor([int(places[-1]) for places in one.where], device=self._base.device)
            logits = self._base.logits(hidden[last])
            for place, (member, past) in enumerate(zip(one.members, pasts_of(cache, one.where), strict=True)):
                self._begin(requests[member], past, logits[place])

    def _request(self, job: AskJob) -> _Request | None:
        """A request with its prompt's tokens; one that cannot be served fails alone."""
        base, ask = self._base, job.item
        request = _Request(job, base, [], time.perf_counter())
        try:
            request.prompt = prompt_tokens(base, ask.prompt, room=1)
        except Exception as error:
            request.fail(error)
            return None
        return request

    def _begin(self, request: _Request, past: Past, logits: Tensor) -> None:
        """Draws the first token of each of a request's samples; those that go on wait for a place."""
        ask = request.job.item
        params, limit = ask.params, min(ask.params.max_tokens, self._base.context - len(request.prompt))
        ends = frozenset({*self._base.tokenizer.eos_ids, *(stop for stop in params.stop if isinstance(stop, int))})
        strings = tuple(stop for stop in params.stop if isinstance(stop, str))
        rows = [_Row(request, index, generator(params.seed, index, request.prompt), past, limit, ends, strings) for index in range(ask.n)]
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            drawn = draw(logits.expand(len(some), -1), [params] * len(some), [row.generator for row in some])
            self._queue.extend(row for row, token, logprob in zip(some, *drawn, strict=True) if not row.add(token, logprob))
        if request.job.future.done():
            self._requests.discard(request)

    def _room(self, rows: list[_Row]) -> int:
        """Columns to reserve: what the longest-running sample may still need, at most `ROOM`."""
        return min(ROOM, max(row.limit - len(row.tokens) for row in rows))

    def _seat(self) -> None:
        """Gives places to those that wait, and makes the buffers anew where that or their end asks for it."""
        shared, rows = self._shared, self._rows
        changed = shared is None or shared.width >= shared.capacity
        width = max((row.cached for row in rows), default=0)
        joined = list[_Row]()
        while self._queue and len(rows) + len(joined) < ROWS:
            width = max(width, self._queue[0].cached)
            if (rows or joined) and (width + ROOM) * (len(rows) + len(joined) + 1) > COLUMNS:
                break
            joined.append(self._queue.popleft())
        if rows and shared is not None and (changed or joined):
            for row, past in zip(rows, shared.pasts(), strict=True):
                row.past = past
        if changed or joined:
            self._rows = [*rows, *joined]
            self._shared = Shared.of([row.past for row in self._rows], self._room(self._rows)) if self._rows else None

    def _step(self) -> None:
        """One more token for every sample; those that are over leave."""
        shared, rows = self._shared, self._rows
        if shared is None:
            return
        ids = torch.tensor([[row.tokens[-1]] for row in rows], device=self._base.device)
        mask = None if shared.mask is None else shared.mask[:, : shared.width + 1]
        hidden = self._base.hidden(ids, shared.cache, mask=mask, places=shared.lengths)
        shared.advance()
        drawn = draw(self._base.logits(hidden[:, -1]), [row.request.job.item.params for row in rows], [row.generator for row in rows])
        over = [row.add(token, logprob) or row.request.job.future.done() for row, token, logprob in zip(rows, *drawn, strict=True)]
        if any(over):
            stay = [(row, past) for row, past, left in zip(rows, shared.pasts(), over, strict=True) if not left]
            for row, past in stay:
                row.past = past
            self._requests = {request for request in self._requests if not request.job.future.done()}
            self._rows = [row for row, _ in stay]
            self._shared = None


def prompt_tokens(base: Base, prompt: Prompt, room: int = 0) -> list[int]:
    """The prompt's tokens, checked against the model's vocabulary and context.

    Raises:
        DataError: they do not fit, or leave less than `room` tokens of the context for an answer.
    """
    tokens = render_prompt(prompt, base.tokenizer)
    check_tokens(base, tokens, "The prompt", "Shorten it.")
    if len(tokens) + room > base.context:
        raise DataError(f"The prompt has {len(tokens)} tokens, which leaves no room for an answer: {base.name!r} reads at most {base.context}. Shorten it.")
    return tokens


def _serve_logprobs(frozen: Frozen, first: AskJob, waiting: Waiting[Ask, Answer]) -> None:
    """Answers log-prob requests that stand next to each other in shared passes."""
    base, jobs, pairs = frozen.base, list[AskJob](), list[tuple[list[int], list[int]]]()
    job: AskJob | None = first
    while job is not None:
        try:
            prompt, completion = prompt_tokens(base, job.item.prompt), job.item.completion or ""
            answer = base.tokenizer.encode(completion) if isinstance(completion, str) else list(completion)
            if answer:
                check_tokens(base, [*prompt, *answer][:-1], "The prompt with its completion", "Shorten them.")
                check_tokens(base, answer[-1:], "The completion", "")
                jobs.append(job)
                pairs.append((prompt, answer))
            else:
                job.future.set_result(())
        except Exception as error:
            job.future.set_exception(error)
        job = waiting.take(first.key) if len(jobs) < ROWS else None
    try:
        for answered, logprobs in zip(jobs, completion_logprobs(base, frozen.active, pairs), strict=True):
            answered.future.set_result(logprobs)
    except Exception as error:
        for failed in jobs:
            if not failed.future.done():
                failed.future.set_exception(error)

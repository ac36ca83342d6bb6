"""Samples of one base model that are drawn together: they join and leave token by token, each with its own adapter.

A step takes one more token of every sample that is being drawn, and some tokens of prompts that are still being read. What prompts have in
common at the start is computed once. Memory for keys and values is bounded: a sample waits until there is room for its prompt, and where
samples grow beyond what there is, the youngest gives its room back and is read again later. This file does not know how a step is computed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from ... import events
from ...errors import NumericError
from ...promise import Promise
from ...records import Completion
from ..telling import Teller
from .asks import AskJob, prompt_tokens
from .bases import Base
from .draws import generator
from .kv import PAGE, Pages, key_after
from .lora import Active
from .steps import Chunk, Steps

__all__ = ["Batch"]

ROWS = 32
"""Samples that are drawn together."""
TOKENS = 32768
"""Tokens whose keys and values are kept; one sample that is alone may have more."""


@dataclass(slots=True, eq=False)
class _Request:
    """A sample request that is being served."""

    job: AskJob
    base: Base
    active: Active | None
    prompt: list[int]
    started: float
    ends: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    limit: int = 0
    done: dict[int, Completion] = field(default_factory=dict)
    drawn: int = 0
    teller: Teller | None = None
    ended: bool = False

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ended or self.job.future.done()

    def fail(self, error: BaseException) -> None:
        """The future raises; later results of the request are dropped."""
        if not self.over:
            self._end(error=type(error).__name__)
            if self.teller is None:
                self.job.promise.fail(error)
            else:
                self.teller.fail(error)

    def drop(self) -> None:
        """Tells it where who asked has given up."""
        if self.over and not self.ended:
            self._end(error="CancelledError", prompt_tokens=len(self.prompt), completion_tokens=self.drawn)

    def add(self, index: int, token: int, logprob: float, completion: Completion | None) -> None:
        """A sample has a token more, and with its last one is there; with the last sample the future resolves."""
        if self.over:
            return
        self.drawn += 1
        if completion is not None:
            self.done[index] = completion
        if len(self.done) == self.job.item.n:
            self._end(prompt_tokens=len(self.prompt), completion_tokens=self.drawn)
        if self.teller is not None:
            self.teller.put(index, token, logprob, completion)
        elif self.ended:
            self.job.promise.give(tuple(self.done[i] for i in range(self.job.item.n)))

    def _end(self, **fields: int | str) -> None:
        self.ended = True
        _tell(self.job, self.started, **fields)


def _tell(job: AskJob, started: float, **fields: int | str) -> None:
    duration_s = time.perf_counter() - started
    job.context.run(lambda: events.past("inference.sample", duration_s, model=job.item.model, n=job.item.n, **fields))


@dataclass(slots=True, eq=False)
class _Row:
    """One sample being drawn.

    Attributes:
        tokens: drawn so far.
        pages: of its keys and values.
        computed: tokens of prompt and sample whose keys and values are there.
        keys: of its full pages.
        heirs: samples of the same prompt that begin where this one's prompt has been read.
    """

    request: _Request
    index: int
    generator: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    keys: list[bytes] = field(default_factory=list)
    heirs: list[_Row] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and sample."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens that must be computed before the next one is drawn."""
        return self.length - self.computed

    def ids(self, start: int, stop: int) -> list[int]:
        """Tokens of prompt and sample."""
        prompt = self.request.prompt
        return self.tokens[start - len(prompt) : stop - len(prompt)] if start >= len(prompt) else [*prompt, *self.tokens][start:stop]

    def key(self, index: int) -> bytes:
        """The key of a full page."""
        while len(self.keys) <= index:
            active, at = self.request.active, len(self.keys) * PAGE
            before = self.keys[-1] if self.keys else str(0 if active is None else active.serial).encode()
            self.keys.append(key_after(before, self.ids(at, at + PAGE)))
        return self.keys[index]

    def add(self, token: int, logprob: float) -> bool:
        """Takes a drawn token; True once the sample is over, which its request is told."""
        request = self.request
        if not math.isfinite(logprob):
            message = f"The logits of {request.job.item.model!r} are not finite after {len(self.tokens)} tokens. Look at the training run's loss."
            request.fail(NumericError(message, tensor="logits"))
            return True
        self.tokens.append(token)
        self.logprobs.append(logprob)
        stopped, text = token in request.ends, None
        if not stopped and request.strings:
            text = request.base.tokenizer.decode(self.tokens)
            cut = _cut(text, request.strings)
            stopped, text = cut < len(text), text[:cut]
        if not stopped and len(self.tokens) < request.limit:
            request.add(self.index, token, logprob, None)
            return False
        if text is None:
            text = request.base.tokenizer.decode(self.tokens[:-1] if stopped else self.tokens)
            text = text[: _cut(text, request.strings)]
        whole = Completion(
            text=text,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            stop_reason="stop" if stopped else "length",
            prompt_tokens=len(request.prompt),
            duration_s=time.perf_counter() - request.started,
        )
        request.add(self.index, token, logprob, whole)
        return True


def _cut(text: str, strings: Sequence[str]) -> int:
    """Where the first of the strings begins, or the text ends."""
    return min((at for string in strings if (at := text.find(string)) >= 0), default=len(text))


class Batch:
    """The sample requests of one base; see the file's head.

    Args:
        base: the model.
        steps: computes.
    """

    def __init__(self, base: Base, steps: Steps) -> None:
        self._base, self._steps = base, steps
        self._pages: Pages = steps.pages(TOKENS)
        self._jobs: deque[AskJob] = deque()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []

    def add(self, job: AskJob) -> None:
        """Takes a request whose weights are there."""
        self._jobs.append(job)

    @property
    def busy(self) -> bool:
        """Whether anybody waits for a sample."""
        return bool(self._jobs or self._waiting or self._rows)

    def step(self) -> None:
        """One more token for every sample that has a place, and a piece of the prompts that are being read."""
        try:
            self._sweep()
            self._admit()
            self._seat()
            self._advance(self._chunks())
        except Exception as error:
            for row in [*self._rows, *self._waiting]:
                row.request.fail(error)
            self._rows, self._waiting, self._pages = [], deque(), self._steps.pages(TOKENS)

    # --------------------------------------------------------------------------------------------------- who has a place
    def _sweep(self) -> None:
        """Whoever nobody waits for any more gives place and pages back."""
        for row in [row for row in (*self._rows, *self._waiting) if row.request.over]:
            row.request.drop()
            if row in self._rows:
                self._leave(row)
            else:
                self._waiting.remove(row)
                self._pages.drop(row.pages)

    def _admit(self) -> None:
        """Makes requests of jobs, as many as may soon have places."""
        while self._jobs and len(self._rows) + len(self._waiting) < ROWS:
            job = self._jobs.popleft()
            if job.future.cancelled():
                continue
            ask = job.item
            request = _Request(job, self._base, ask.frozen.result().active, [], time.perf_counter())
            try:
                request.prompt = prompt_tokens(self._base, ask.prompt, room=1)
            except Exception as error:
                request.fail(error)
                continue
            request.limit = min(ask.params.max_tokens, self._base.context - len(request.prompt))
            request.ends = frozenset({*self._base.tokenizer.eos_ids, *(stop for stop in ask.params.stop if isinstance(stop, int))})
            request.strings = tuple(stop for stop in ask.params.stop if isinstance(stop, str))
            if ask.on_piece is not None:
                promise = cast("Promise[tuple[Completion, ...]]", job.promise)
                request.teller = Teller(promise, ask.on_piece, self._base.tokenizer, ask.params, n=ask.n, context=job.context.copy())
            first, *heirs = (_Row(request, index, generator(ask.params.seed, index, request.prompt)) for index in range(ask.n))
            first.heirs = heirs
            self._waiting.append(first)

    def _seat(self) -> None:
        """Gives places to those that wait, in their order, while there is room for what they have so far."""
        for row in list(self._waiting):
            if len(self._rows) >= ROWS:
                break
            if self._follows(row):
                continue  # what it has in common with another is being computed now
            if not self._sit(row):
                break

    def _follows(self, row: _Row) -> bool:
        """Whether another one computes pages that this one could share."""
        if row.computed or self._steps.joins:
            return False
        keys = [row.key(index) for index in range((row.length - 1) // PAGE)]
        next_one = self._pages.known(keys)
        if next_one == len(keys):
            return False
        return any(other.left > 1 and other.length // PAGE > next_one and other.key(next_one) == keys[next_one] for other in self._rows)

    def _sit(self, row: _Row) -> bool:
        """Gives a place and pages, unless there are too few and others have some."""
        fresh = not row.computed
        if fresh:
            row.pages = self._pages.find([row.key(index) for index in range((row.length - 1) // PAGE)])
            row.computed = len(row.pages) * PAGE
        missing = row.length // PAGE + 1 - len(row.pages) + (row.computed % PAGE > 0)
        if self._rows and missing > self._pages.left:
            if fresh:
                self._pages.drop(row.pages)
                row.pages, row.computed = [], 0
            return False
        self._waiting.remove(row)
        self._rows.append(row)
        return True

    def _leave(self, row: _Row) -> None:
        self._rows.remove(row)
        self._pages.drop(row.pages)
        row.pages, row.computed = [], 0

    def _page(self, row: _Row) -> int | None:
        """A page for the row; who came last gives up its own where there is none. None where the row itself came last."""
        while (page := self._pages.take(beyond=len(self._rows) == 1)) is None:
            last = self._rows[-1]
            self._leave(last)
            self._waiting.appendleft(last)
            if last is row:
                return None
        return page

    def _reserve(self, row: _Row, stop: int) -> bool:
        """Room for tokens up to `stop`, in pages that nobody else reads."""
        at = row.computed // PAGE
        if at < len(row.pages) and self._pages.shared(row.pages[at]):
            if (page := self._page(row)) is None:
                return False
            self._pages.copy(row.pages[at], page)
            self._pages.drop([row.pages[at]])
            row.pages[at] = page
        while len(row.pages) * PAGE < stop:
            if (page := self._page(row)) is None:
                return False
            row.pages.append(page)
        return True

    # ------------------------------------------------------------------------------------------------------------ a step
    def _chunks(self) -> list[tuple[_Row, Chunk]]:
        """The tokens of the next step: the last one of each sample, and the next ones of prompts."""
        budget, found = self._steps.chunk, list[tuple[_Row, Chunk]]()
        for row in list(self._rows):
            many = 1 if row.left == 1 else min(row.left, budget)
            if many and row in self._rows and self._reserve(row, row.computed + many):
                budget -= many if row.left > 1 else 0
                stop = row.computed + many
                found.append((row, Chunk(row.ids(row.computed, stop), row.computed, row.pages, row.request.active, stop == row.length)))
        return found

    def _advance(self, chunks: list[tuple[_Row, Chunk]]) -> None:
        """Computes the chunks and draws a token for whom all is computed."""
        if not chunks:
            return
        logits = self._steps.logits([chunk for _, chunk in chunks], self._pages)
        drawers, source = list[_Row](), list[int]()
        for row, chunk in chunks:
            before, row.computed = row.computed, row.computed + len(chunk.tokens)
            for index in range(before // PAGE, row.computed // PAGE):
                self._pages.remember(row.key(index), row.pages[index])
            if chunk.wanted:
                place = source[-1] + 1 if source else 0
                for heir in row.heirs:
                    heir.pages, heir.computed, heir.keys = list(row.pages), row.computed, list(row.keys)
                    self._pages.share(heir.pages)
                drawers += [row, *row.heirs]
                source += [place] * (1 + len(row.heirs))
        for start in range(0, len(drawers), ROWS):
            some = drawers[start : start + ROWS]
            rows = source[start : start + ROWS]
            drawn = self._steps.draw(
                logits[rows] if rows != list(range(rows[0], rows[-1] + 1)) else logits[rows[0] : rows[-1] + 1],
                [row.request.job.item.params for row in some],
                [row.generator for row in some],
            )
            for row, token, logprob in zip(some, *drawn, strict=True):
                self._took(row, over=row.add(token, logprob) or row.request.over)
        self._sweep()

    def _took(self, row: _Row, *, over: bool) -> None:
        """A sample that has drawn its next token goes on, waits for a place if it has none, or leaves."""
        seated = row in self._rows
        row.request.drop()
        if over:
            if seated:
                self._leave(row)
            else:
                self._pages.drop(row.pages)
        elif not seated:
            self._waiting.append(row)
        row.heirs = []

"""Any sampler, asked for a few tokens at a time, tells its answer while it is being drawn. Knows no hedging and no engines."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal

from ..data import Unfolding, render_prompt
from ..errors import ConfigError
from ..promise import Promise
from ..protocols import OnPiece, Sampler, Tokenizer
from ..records import Completion, Piece, Prompt, SamplingParams

__all__ = ["Streamed"]


class Streamed:
    """A `StreamSampler` made of any Sampler: `every` tokens are drawn, told, and appended to the prompt for the next request.

    Greedy answers are those of one request, to within floating-point tolerance; at other temperatures they are draws of the same distribution,
    with the seed + the number of tokens so far for each piece. The prompt is read once per piece, which engines that keep common starts
    do cheaply and services charge for: `every` trades that against how early the first piece comes. Cancelling takes effect between pieces
    at the latest.

    Args:
        sampler: asked with token ids.
        tokenizer: that of its base model: `backend.tokenizer(base_model)`.
        every: tokens per piece.
        first: tokens of the first piece, whose time is the one that is waited for.
    """

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, *, every: int = 16, first: int = 1) -> None:
        if every < 1 or first < 1:
            raise ConfigError(f"Streamed has every={every!r} and first={first!r}; expected whole numbers of at least 1.")
        self._sampler, self._tokenizer, self._every, self._first = sampler, tokenizer, every, first

    @property
    def model(self) -> str:
        """The sampler's."""
        return self._sampler.model

    @property
    def service(self) -> str:
        """The sampler's, where it has one."""
        return str(getattr(self._sampler, "service", ""))

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        """The sampler's own, whole."""
        return self._sampler.sample(prompt, params, n)

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[tuple[Completion, ...]]:
        """`n` completions, told piece by piece; see `StreamSampler`."""
        if n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        ids = tuple(render_prompt(prompt, self._tokenizer))
        return _Telling(self._sampler, self._tokenizer, ids, on_piece=on_piece, sizes=(self._first, self._every)).begin(params, n)

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """The sampler's own."""
        return self._sampler.compute_logprobs(prompt, completion)


class _Telling:
    """One request: what its answers share."""

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, ids: tuple[int, ...], *, on_piece: OnPiece, sizes: tuple[int, int]) -> None:
        self.sampler, self.tokenizer, self.ids, self.sizes, self._on_piece = sampler, tokenizer, ids, sizes, on_piece
        self.promise: Promise[tuple[Completion, ...]] = Promise()
        self.promise.future.add_done_callback(lambda _: self._end())
        self.over = False
        self._drawings: list[_Drawing] = []
        self._done: dict[int, Completion] = {}
        self._lock = threading.RLock()

    def begin(self, params: SamplingParams, n: int) -> Future[tuple[Completion, ...]]:
        seeds = [None if params.seed is None else params.seed + 100_003 * index for index in range(n)]
        self._drawings = [_Drawing(self, index, replace(params, seed=seed)) for index, seed in enumerate(seeds)]
        for drawing in self._drawings:
            drawing.more()
        return self.promise.future

    def tell(self, piece: Piece) -> None:
        with self._lock:  # answers are drawn on any threads, and told one piece at a time
            if not self.over:
                self._on_piece(piece)

    def give(self, index: int, completion: Completion) -> None:
        with self._lock:
            self._done[index] = completion
            whole = len(self._done) == len(self._drawings)
        if whole:
            self.promise.give(tuple(self._done[place] for place in range(len(self._done))))

    def _end(self) -> None:
        self.over = True
        for drawing in self._drawings:
            drawing.give_up()


class _Drawing:
    """One answer so far."""

    def __init__(self, telling: _Telling, index: int, params: SamplingParams) -> None:
        self.telling, self.index, self.params = telling, index, params
        self.stops = tuple(stop for stop in params.stop if isinstance(stop, str))
        self.unfolding = Unfolding(telling.tokenizer, self.stops)
        self.lock = threading.Lock()
        self.tokens: tuple[int, ...] = ()
        self.logprobs: tuple[float, ...] = ()
        self.running: Future[tuple[Completion, ...]] | None = None
        self.started = time.perf_counter()

    def more(self) -> None:
        one = self.telling
        size = min(one.sizes[1] if self.tokens else one.sizes[0], self.params.max_tokens - len(self.tokens))
        seed = None if self.params.seed is None else self.params.seed + len(self.tokens)
        try:
            future = one.sampler.sample((*one.ids, *self.tokens), replace(self.params, max_tokens=size, seed=seed), 1)
        except Exception as error:
            one.promise.fail(error)
            return
        with self.lock:
            self.running = future
        if one.over:
            future.cancel()
        future.add_done_callback(self._came)

    def _came(self, future: Future[tuple[Completion, ...]]) -> None:
        one = self.telling
        if one.over or future.cancelled():
            one.promise.future.cancel()
            return
        try:
            piece = future.result()[0]
            self.tokens, self.logprobs = (*self.tokens, *piece.tokens), (*self.logprobs, *piece.logprobs)
            stopped = piece.stop_reason == "stop"
            text = self._text(piece, ended=stopped)
            cut = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)
            stopped, text = stopped or cut >= 0, text[:cut] if cut >= 0 else text
            over = stopped or len(self.tokens) >= self.params.max_tokens or not piece.tokens
            reason: Literal["stop", "length"] = "stop" if stopped else "length"
            new = self.unfolding.end(text) if over else self.unfolding.add(piece.tokens)
            one.tell(Piece(index=self.index, text=new, tokens=piece.tokens, logprobs=piece.logprobs, stop_reason=reason if over else None))
        except Exception as error:
            one.promise.fail(error)
            return
        if not over:
            self.more()
            return
        duration_s = time.perf_counter() - self.started
        one.give(
            self.index, Completion(text=text, tokens=self.tokens, logprobs=self.logprobs, stop_reason=reason, prompt_tokens=len(one.ids), duration_s=duration_s)
        )

    def _text(self, piece: Completion, *, ended: bool) -> str:
        """All that was drawn, as text; the end token is no part of it."""
        if len(piece.tokens) == len(self.tokens):
            return piece.text
        tokenizer, drawn = self.telling.tokenizer, self.tokens
        if ended and drawn and (drawn[-1] in tokenizer.eos_ids or drawn[-1] in self.params.stop):
            drawn = drawn[:-1]
        return tokenizer.decode(drawn)

    def give_up(self) -> None:
        with self.lock:
            running = self.running
        if running is not None:
            running.cancel()

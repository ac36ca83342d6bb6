"""Any sampler, asked for a few tokens at a time, tells its answer while it is being drawn. Knows no hedging and no engines."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace

from ..data import render_prompt
from ..errors import ConfigError
from ..protocols import OnTokens, Sampler, Tokenizer
from ..records import Completion, Prompt, SamplingParams
from .promise import Promise

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

    def stream(self, prompt: Prompt, params: SamplingParams, on_tokens: OnTokens) -> Future[Completion]:
        """One completion, told piece by piece. What `on_tokens` raises fails the future."""
        ids = tuple(render_prompt(prompt, self._tokenizer))
        return _Drawing(self._sampler, self._tokenizer, ids, params, on_tokens=on_tokens, sizes=(self._first, self._every)).begin()

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """The sampler's own."""
        return self._sampler.compute_logprobs(prompt, completion)


class _Drawing:
    """One answer so far."""

    def __init__(
        self, sampler: Sampler, tokenizer: Tokenizer, ids: tuple[int, ...], params: SamplingParams, *, on_tokens: OnTokens, sizes: tuple[int, int]
    ) -> None:
        self.sampler, self.tokenizer, self.ids, self.params, self.on_tokens, self.sizes = sampler, tokenizer, ids, params, on_tokens, sizes
        self.promise: Promise[Completion] = Promise(self._given_up)
        self.stops = tuple(stop for stop in params.stop if isinstance(stop, str))
        self.lock = threading.Lock()
        self.tokens: tuple[int, ...] = ()
        self.logprobs: tuple[float, ...] = ()
        self.told = ""
        self.running: Future[tuple[Completion, ...]] | None = None
        self.over = False
        self.started = time.perf_counter()

    def begin(self) -> Future[Completion]:
        self._more()
        return self.promise.future

    def _more(self) -> None:
        size = min(self.sizes[1] if self.tokens else self.sizes[0], self.params.max_tokens - len(self.tokens))
        seed = None if self.params.seed is None else self.params.seed + len(self.tokens)
        try:
            future = self.sampler.sample((*self.ids, *self.tokens), replace(self.params, max_tokens=size, seed=seed), 1)
        except Exception as error:
            self.promise.fail(error)
            return
        with self.lock:
            self.running, over = future, self.over
        if over:
            future.cancel()
        future.add_done_callback(self._came)

    def _came(self, future: Future[tuple[Completion, ...]]) -> None:
        if self.over or future.cancelled():
            self.promise.future.cancel()
            return
        try:
            piece = future.result()[0]
            self.tokens, self.logprobs = (*self.tokens, *piece.tokens), (*self.logprobs, *piece.logprobs)
            ended = piece.stop_reason == "stop"
            text = self._text(piece, ended=ended)
            cut = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)
            ended, text = ended or cut >= 0, text[:cut] if cut >= 0 else text
            full = len(self.tokens) >= self.params.max_tokens or not piece.tokens
            self._tell(text if ended or full else text[: len(text) - self._open(text)], piece.tokens)
            if ended or full:
                self.promise.give(
                    Completion(
                        text=text, tokens=self.tokens, logprobs=self.logprobs, stop_reason="stop" if ended else "length", prompt_tokens=len(self.ids),
                        duration_s=time.perf_counter() - self.started,
                    )
                )  # fmt: skip
                return
        except Exception as error:
            self.promise.fail(error)
            return
        self._more()

    def _text(self, piece: Completion, *, ended: bool) -> str:
        """All that was drawn, as text; the end token is no part of it."""
        if len(piece.tokens) == len(self.tokens):
            return piece.text
        drawn = self.tokens
        if ended and drawn and (drawn[-1] in self.tokenizer.eos_ids or drawn[-1] in self.params.stop):
            drawn = drawn[:-1]
        return self.tokenizer.decode(drawn)

    def _open(self, text: str) -> int:
        """Characters at the end that further tokens may still change: a broken character, or the beginning of a stop."""
        broken = len(text) - len(text.rstrip("\ufffd"))
        starts = (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(broken, max(starts, default=0))

    def _tell(self, text: str, tokens: tuple[int, ...]) -> None:
        if not text.startswith(self.told):  # a tokenizer that rewrites what it decoded before: say only what is certain
            text = self.told
        new, self.told = text[len(self.told) :], text
        if not self.over:
            self.on_tokens(new, tokens)

    def _given_up(self) -> None:
        with self.lock:
            self.over, running = True, self.running
        if running is not None:
            running.cancel()

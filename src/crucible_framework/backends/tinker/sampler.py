"""Weights at a service that answer prompts. This file does not know training."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

from ... import events
from ...data.tokens import render_prompt
from ...errors import ConfigError, DataError
from ...protocols import Tokenizer
from ...records import Completion, Prompt, SamplingParams
from .line import Pending, fail
from .spending import Spending
from .watching import watch
from .wire import completion as made_completion
from .wire import sampling_params

if TYPE_CHECKING:
    import tinker
    from tinker import types

__all__ = ["SamplerOwner", "TinkerSampler"]

T = TypeVar("T")
R = TypeVar("R")


class SamplerOwner(Protocol):
    """What a sampler needs of its backend."""

    pending: Pending
    pool: ThreadPoolExecutor
    spending: Spending

    def check_open(self) -> None:
        """Raises SessionClosedError where the backend is closed."""
        ...

    def tokenizer(self, base_model: str) -> Tokenizer:
        """That of a base model."""
        ...


class TinkerSampler:
    """Weights at a service that answer prompts; see `Sampler`. `service` is read where a second call would be paid for."""

    service = "tinker"

    def __init__(self, backend: SamplerOwner, model: str, base_model: str, ready: Future[tinker.SamplingClient], spending: Spending | None = None) -> None:
        self._backend, self._model, self._base_model, self._ready = backend, model, base_model, ready
        self._spending = spending or backend.spending

    @property
    def model(self) -> str:
        """The base model's name, the checkpoint's path, or that of the session."""
        return self._model

    def _ask(self, doing: str, ask: Callable[[tinker.SamplingClient], Future[R]], finish: Callable[[R], T]) -> Future[T]:
        """Submits once the client is there; the pool's threads never wait for an answer."""
        self._backend.check_open()
        outer: Future[T] = Future()
        context, backend = contextvars.copy_context(), self._backend
        backend.pending.add(outer)
        outer.add_done_callback(backend.pending.discard)

        def settle(inner: Future[R]) -> None:
            try:
                outer.set_result(context.run(finish, inner.result()))
            except BaseException as error:
                fail(outer, error, doing, ())

        def submit(ready: Future[tinker.SamplingClient]) -> None:
            try:
                watch(ready.result(), self._model)
                ask(ready.result()).add_done_callback(lambda inner: backend.pool.submit(settle, inner))
            except BaseException as error:
                fail(outer, error, doing, ())

        self._ready.add_done_callback(lambda ready: backend.pool.submit(context.copy().run, submit, ready))  # a copy: an answer may come meanwhile
        return outer

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        """`n` completions of a prompt.

        Raises:
            ConfigError: n is below 1.
            CapabilityError: stops that are texts and token ids at once.
            DataError: the prompt has no tokens.
        """
        from tinker import types

        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"n is {n!r}; expected a whole number of at least 1.")
        self._backend.check_open()
        tokenizer, wanted, started = self._backend.tokenizer(self._base_model), sampling_params(params), time.perf_counter()
        ids = _ids(prompt, tokenizer)

        def finish(response: types.SampleResponse) -> tuple[Completion, ...]:
            duration_s = time.perf_counter() - started
            made = tuple(made_completion(one, params, tokenizer, len(ids), duration_s) for one in response.sequences)
            drawn = sum(len(one.tokens) for one in made)
            self._spending.add(prompt=len(ids), sampled=drawn)
            events.emit("inference.sample", model=self._model, n=n, prompt_tokens=len(ids), completion_tokens=drawn, duration_s=duration_s)
            return made

        return self._ask("the request sample", lambda client: client.sample(types.ModelInput.from_ints(ids), n, wanted).future(), finish)

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """log p of each token of `completion` after `prompt` at temperature 1, in nats."""
        from tinker import types

        self._backend.check_open()
        tokenizer = self._backend.tokenizer(self._base_model)
        ids, answer = _ids(prompt, tokenizer), tokenizer.encode(completion) if isinstance(completion, str) else list(completion)
        if not answer:
            empty: Future[tuple[float, ...]] = Future()
            empty.set_result(())
            return empty

        started = time.perf_counter()

        def finish(found: Sequence[float | None]) -> tuple[float, ...]:
            self._spending.add(prompt=len(ids) + len(answer))
            told: dict[str, str | int] = {"model": self._model, "prompt_tokens": len(ids), "completion_tokens": len(answer)}
            events.emit("inference.logprobs", **told, duration_s=time.perf_counter() - started)
            return tuple(float("nan") if value is None else float(value) for value in found[-len(answer) :])

        whole = types.ModelInput.from_ints([*ids, *answer])
        return self._ask("the request compute_logprobs", lambda client: client.compute_logprobs(whole, prompt_logprobs_last_n=len(answer)).future(), finish)


def _ids(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    ids = render_prompt(prompt, tokenizer)
    if not ids:
        raise DataError("The prompt has no tokens; expected at least one.")
    return ids

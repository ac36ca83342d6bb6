"""A sample request: completions, log-probs of the prompt, and the likeliest tokens where they are asked.

This file does not know HTTP, order or tenants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import CapabilityError, DataError
from ..protocols import Backend, Sampler
from ..records import Completion, SamplingParams
from .looks import Look, Tails, wanted_targets
from .wire import TopK, encode_sample, prompt_of, sampling_params

if TYPE_CHECKING:
    from tinker import types
    from torch import Tensor

__all__ = ["Looks", "complete", "sample", "shown"]

MAX_TOP = 128


@runtime_checkable
class Looks(Protocol):
    """A backend that shows logits."""

    def look(self, sampler: Any, rows: Sequence[Sequence[int]], seen: Callable[[int, int, Tensor], None]) -> Future[None]:
        """Shows `seen` the logits of one of its samplers after each token of each row: (row, first position, fp32 [t, V])."""
        ...


class _Card(Protocol):
    """The part of a sampler's card that is read here."""

    @property
    def sampler(self) -> Sampler: ...


async def complete(sampler: Sampler, prompt: tuple[int, ...], params: SamplingParams, n: int, *, ends: bool = True) -> tuple[Completion, ...]:
    """`n` completions. Without `ends` an end of turn does not end them: they are continued up to `max_tokens`."""
    drawn = await asyncio.wrap_future(sampler.sample(prompt, params, n))
    if ends:
        return drawn
    return tuple(await asyncio.gather(*(_continue(sampler, prompt, params, one, place) for place, one in enumerate(drawn))))


async def _continue(sampler: Sampler, prompt: tuple[int, ...], params: SamplingParams, one: Completion, place: int) -> Completion:
    turn = 0
    while one.stop_reason == "stop" and len(one.tokens) < params.max_tokens:
        turn += 1
        seed = None if params.seed is None else (params.seed * 1_000_003 + place * 1009 + turn) % 2**63
        rest = replace(params, max_tokens=params.max_tokens - len(one.tokens), seed=seed)
        (more,) = await asyncio.wrap_future(sampler.sample((*prompt, *one.tokens), rest))
        one = replace(one, text=one.text + more.text, tokens=one.tokens + more.tokens, logprobs=one.logprobs + more.logprobs, stop_reason=more.stop_reason)
    return replace(one, stop_reason="length")


async def _prompt_logprobs(sampler: Sampler, prompt: tuple[int, ...], last: int | None) -> NDArray[np.float32]:
    """log p of each prompt token after those before it at temperature 1; NaN for the first, and before the `last` so many."""
    if last is not None and not 1 <= last < len(prompt):
        raise DataError(f"prompt_logprobs_last_n is {last}; expected 1 to {len(prompt) - 1} for this prompt.")
    skipped = 1 if last is None else len(prompt) - last
    found = np.full(len(prompt), np.nan, dtype=np.float32)
    if len(prompt) > skipped:
        scores: tuple[float, ...] = await asyncio.wrap_future(sampler.compute_logprobs(prompt[:skipped], prompt[skipped:]))
        found[skipped:] = scores
    return found


def _check_width(k: int, name: str) -> None:
    if not 0 <= k <= MAX_TOP:
        raise DataError(f"{name} is {k}; expected 0 to {MAX_TOP}.")


async def sample(backend: Backend, card: _Card, asked: types.SampleRequest, *, longest: int) -> tuple[bytes, int]:
    """The response as protobuf, and how many tokens were drawn.

    Raises:
        DataError, ConfigError: the request makes no sense.
        CapabilityError: it asks for something that this server does not give.
    """
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        _check_width(getattr(asked, name), name)
    prompt = prompt_of(asked.prompt.chunks)
    targets = None if asked.target_prompt_logprobs is None else wanted_targets(asked.target_prompt_logprobs, len(prompt))
    params, ends = sampling_params(asked.sampling_params, longest)
    scores = await _prompt_logprobs(card.sampler, prompt, asked.prompt_logprobs_last_n) if asked.prompt_logprobs else None
    completions = await complete(card.sampler, prompt, params, asked.num_samples, ends=ends)
    first = 1 if asked.prompt_logprobs_last_n is None else len(prompt) - asked.prompt_logprobs_last_n
    look = Look(prompt, first=first, top_k=asked.topk_prompt_logprobs, alternatives=asked.prompt_alt_tokens_k, params=params, targets=targets)
    if look.wants:
        await shown(backend, card.sampler, [prompt], look)
    tops: list[TopK] | None = None
    if (k := asked.topk_sample_logprobs) > 0:
        tails = Tails(len(prompt), k, params.temperature, [len(one.tokens) for one in completions])
        await shown(backend, card.sampler, [(*prompt, *one.tokens[:-1]) for one in completions], tails)
        tops = tails.tops
    body = await asyncio.to_thread(
        encode_sample, completions, prompt_logprobs=scores, prompt_top=look.top, sample_tops=tops, targets=look.scored, alternatives=look.drawn
    )
    return body, sum(len(one.tokens) for one in completions)


async def shown(backend: Backend, sampler: Sampler, rows: Sequence[Sequence[int]], seen: Callable[[int, int, Tensor], None]) -> None:
    """Shows `seen` the logits after each token of each row.

    Raises:
        CapabilityError: the backend gives none.
    """
    if not isinstance(backend, Looks):
        raise CapabilityError(f"The backend {backend.capabilities.name!r} gives no logits; expected one that runs the model itself, such as 'local'.")
    await asyncio.wrap_future(backend.look(sampler, rows, seen))

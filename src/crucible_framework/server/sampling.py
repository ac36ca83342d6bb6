"""A sample request: completions, log-probs of the prompt, and the likeliest tokens where they are asked.

This file does not know HTTP, order or tenants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CapabilityError, DataError
from ..protocols import Backend, Loss, Sampler
from ..records import Batch, Completion, Datum, LoraConfig, SamplingParams
from .wire import TopK, encode_sample, prompt_of, sampling_params

if TYPE_CHECKING:
    from tinker import types
    from torch import Tensor

__all__ = ["complete", "sample"]

MAX_TOP = 128


class _Card(Protocol):
    """The part of a sampler's card that is read here."""

    @property
    def sampler(self) -> Sampler: ...
    @property
    def model(self) -> str: ...
    @property
    def path(self) -> str | None: ...


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


def _likeliest(backend: Backend, card: _Card, rows: Sequence[tuple[int, ...]], k: int, temperature: float) -> list[TopK]:
    """Per sequence the k likeliest next tokens after each of its tokens.

    Raises:
        CapabilityError: the backend gives no logits, or the sampler is no base model.
    """
    if card.path is not None or card.sampler.model != card.model:
        raise CapabilityError("The likeliest tokens are known for base models only; this sampler has an adapter. Ask a sampler of the base model.")
    if backend.capabilities.gradients != "parameters":
        raise CapabilityError(f"The backend {backend.capabilities.name!r} gives no logits; expected one that runs the model itself, such as 'local'.")
    found = list[TopK]()

    def look(_: Sequence[Datum], logits: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        for one in logits:
            top = (one / (temperature or 1.0)).log_softmax(-1).topk(k)
            found.append(TopK(ids=top.indices.int().cpu().numpy(), logprobs=top.values.float().cpu().numpy()))
        return logits[0].sum() * 0, {}

    data = tuple(
        Datum(id=str(i), tokens=np.array(row, dtype=np.int32), targets=np.zeros(len(row), dtype=np.int64), weights=np.ones(len(row), dtype=np.float32))
        for i, row in enumerate(rows)
    )
    session = backend.train(card.model, LoraConfig(rank=1, dropout=0.0, target_modules=("q_proj",)))  # fresh: the base model's own numbers
    try:
        session.forward(Batch(data=data), Loss(name="likeliest", fn=look, source="none", needs="logits")).result()
    finally:
        session.close()
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
    if asked.prompt_alt_tokens_k or asked.target_prompt_logprobs is not None:
        raise CapabilityError(
            "prompt_alt_tokens_k and target_prompt_logprobs are not served here. Use topk_prompt_logprobs on a base model, or compute_logprobs."
        )
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        _check_width(getattr(asked, name), name)
    prompt = prompt_of(asked.prompt.chunks)
    params, ends = sampling_params(asked.sampling_params, longest)
    scores = await _prompt_logprobs(card.sampler, prompt, asked.prompt_logprobs_last_n) if asked.prompt_logprobs else None
    completions = await complete(card.sampler, prompt, params, asked.num_samples, ends=ends)
    prompt_top: TopK | None = None
    tops: list[TopK] | None = None
    if (k := asked.topk_prompt_logprobs) > 0:
        (top,) = await asyncio.to_thread(_likeliest, backend, card, [prompt], k, 1.0)
        ids, logprobs = np.zeros((len(prompt), k), dtype=np.int32), np.full((len(prompt), k), -99999.0, dtype=np.float32)
        skipped = 1 if asked.prompt_logprobs_last_n is None else len(prompt) - asked.prompt_logprobs_last_n
        ids[skipped:], logprobs[skipped:] = top.ids[skipped - 1 : -1], top.logprobs[skipped - 1 : -1]
        prompt_top = TopK(ids=ids, logprobs=logprobs)
    if (k := asked.topk_sample_logprobs) > 0:
        rows = [(*prompt, *one.tokens[:-1]) for one in completions]
        found = await asyncio.to_thread(_likeliest, backend, card, rows, k, params.temperature)
        tops = [TopK(ids=top.ids[len(prompt) - 1 :], logprobs=top.logprobs[len(prompt) - 1 :]) for top in found]
    body = await asyncio.to_thread(encode_sample, completions, prompt_logprobs=scores, prompt_top=prompt_top, sample_tops=tops)
    return body, sum(len(one.tokens) for one in completions)

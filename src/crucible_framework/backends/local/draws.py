"""One token from logits: temperature, top-k, top-p, and a draw that each sample makes from its own generator.

A draw is one uniform number through the inverse of the distribution function in vocabulary order, so that rounding differences between
batches move a sample only where the number hits a boundary. This file knows no model and no text.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...records import SamplingParams

__all__ = ["draw", "generator", "kept"]


def generator(seed: int | None, index: int, prompt: Sequence[int]) -> np.random.Generator:
    """The generator of the `index`-th sample of a prompt: the same for the same seed, fresh without one.

    Other prompts have other numbers under the same seed, so that answers to different questions are independent.
    """
    if seed is None:
        return np.random.default_rng()
    return np.random.default_rng([seed, index, zlib.crc32(np.array(prompt, dtype=np.int64).tobytes())])


def kept(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities float64 [V] after top-k, then top-p; not normalised, 0 for what is left out.

    Top-p keeps the smallest set of the likeliest tokens whose mass, of what top-k kept, is at least `top_p`.

    Source: Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2020, arXiv 1904.09751 (top-p).
    """
    if 0 < top_k < len(logprobs):
        values, order = logprobs.topk(top_k)
    else:
        values, order = logprobs.sort(descending=True, stable=True)
    mass = values.double().softmax(-1)
    if top_p < 1:
        mass = torch.where(mass.cumsum(-1) - mass < top_p, mass, 0.0)
    return torch.zeros_like(logprobs, dtype=torch.float64).scatter_(0, order, mass)


def draw(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[np.random.Generator]) -> tuple[list[int], list[float]]:
    """One token per row of fp32 logits [B, V], and its log-prob after temperature and before top-k and top-p.

    Temperature 0 takes the likeliest token and draws nothing; its log-prob is that of temperature 1.
    """
    temperatures = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)
    logprobs = torch.log_softmax(logits / temperatures[:, None], dim=-1)
    tokens = logprobs.argmax(-1)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        rows = logprobs[drawn].double().exp()
        for place, row in enumerate(drawn):
            if params[row].top_k or params[row].top_p < 1:
                rows[place] = kept(logprobs[row], params[row].top_k, params[row].top_p)
        mass = rows.cumsum(-1)
        total = mass[:, -1:]
        uniform = torch.tensor([[generators[row].random()] for row in drawn], dtype=torch.float64, device=logits.device)
        point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))  # never beyond the last token with mass
        tokens[drawn] = torch.searchsorted(mass, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist()

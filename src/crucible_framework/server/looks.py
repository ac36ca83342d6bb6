"""What a sample request asks of the model's logits: the likeliest tokens, given tokens' log-probs, and draws beside the prompt.

A backend shows logits a few positions at a time; nothing here holds more of them. This file does not know how they are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..records import SamplingParams, record
from .wire import MAX_CELLS, TopK

if TYPE_CHECKING:
    from tinker.types._pydantic_types.tensor_data import TensorData
    from torch import Tensor

__all__ = ["MASKED", "Look", "Tails", "Targets", "wanted_targets"]

MASKED = -99999.0


@record
class Targets:
    """Cells whose log-probs are asked: rows and columns of [P − 1, K], the token of each (−1: none), and the layout to answer in."""

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    shape: tuple[int, int]
    crow: NDArray[np.int64] | None = None
    columns: NDArray[np.int64] | None = None


def wanted_targets(asked: TensorData, prompt: int) -> Targets:
    """The cells that a request names.

    Raises:
        DataError: it is no int64 tensor [P − 1, K], or contradicts itself.
    """
    shape, tokens = tuple(asked.shape or ()), np.asarray(asked.data)
    if asked.dtype != "int64" or len(shape) != 2 or shape[0] != prompt - 1 or shape[1] < 0 or shape[0] * shape[1] > MAX_CELLS:
        raise DataError(f"target_prompt_logprobs is {asked.dtype} of shape {shape}; expected int64 of shape ({prompt - 1}, K) for this prompt.")
    rows, width = shape
    if asked.sparse_crow_indices is None:
        if len(tokens) != rows * width:
            raise DataError(f"target_prompt_logprobs holds {len(tokens)} numbers for shape {shape}; expected {rows * width}.")
        return Targets(rows=np.repeat(np.arange(rows), width), tokens=tokens.astype(np.int64), shape=(rows, width))
    crow, columns = np.asarray(asked.sparse_crow_indices, dtype=np.int64), np.asarray(asked.sparse_col_indices or (), dtype=np.int64)
    counts = np.diff(crow)
    whole = len(crow) == rows + 1 and crow[0] == 0 and not (counts < 0).any() and crow[-1] == len(tokens) == len(columns)
    if not whole or ((columns < 0) | (columns >= width)).any():
        raise DataError(
            f"target_prompt_logprobs is no valid CSR tensor of shape {shape}: {len(tokens)} values, {len(columns)} columns, {len(crow)} row starts."
        )
    return Targets(rows=np.repeat(np.arange(rows), counts), tokens=tokens.astype(np.int64), shape=(rows, width), crow=crow, columns=columns)


class Look:
    """What a prompt's own logits give; called with them, position by position.

    Args:
        prompt: its tokens.
        first: the first token whose likeliest rivals are told.
        top_k: so many of them; 0: none.
        alternatives: draws beside each token after the first, at the request's temperature; 0: none.
        params: of the request.
        targets: tokens whose log-probs are asked.
    """

    def __init__(self, prompt: tuple[int, ...], *, first: int, top_k: int, alternatives: int, params: SamplingParams, targets: Targets | None) -> None:
        self._first, self._k, self._params, self._targets = first, top_k, params, targets
        n = len(prompt)
        self.top = TopK(ids=np.zeros((n, top_k), dtype=np.int32), logprobs=np.full((n, top_k), MASKED, dtype=np.float32)) if top_k else None
        self.drawn = TopK(ids=np.zeros((n - 1, alternatives), np.int32), logprobs=np.zeros((n - 1, alternatives), np.float32)) if alternatives else None
        self.scored = None if targets is None else (targets, np.zeros(len(targets.tokens), dtype=np.float32))
        self._random = np.random.default_rng(params.seed)

    @property
    def wants(self) -> bool:
        """Whether any logits are needed."""
        return self.top is not None or self.drawn is not None or self.scored is not None

    def __call__(self, row: int, start: int, logits: Tensor) -> None:
        """Takes the logits after the prompt's tokens from `start` on: they speak of the tokens one further."""
        del row
        scores = logits.log_softmax(-1)
        if self.top is not None:
            best = scores.topk(self._k)
            low, high = max(start + 1, self._first), min(start + 1 + len(scores), len(self.top.ids))
            if low < high:
                some = slice(low - start - 1, high - start - 1)
                self.top.ids[low:high], self.top.logprobs[low:high] = best.indices[some].int().cpu().numpy(), best.values[some].cpu().numpy()
        if self.drawn is not None:
            end = min(start + len(scores), len(self.drawn.ids))
            temperature = self._params.temperature
            for place in range(start, end):
                self._draw(place, scores[place - start].cpu().numpy(), (logits[place - start] / (temperature or 1.0)).softmax(-1).cpu().numpy())
        if self.scored is not None:
            targets, found = self.scored
            here = np.flatnonzero((targets.rows >= start) & (targets.rows < start + len(scores)) & (targets.tokens >= 0))
            if len(here):
                if (over := targets.tokens[here].max()) >= scores.shape[-1]:
                    raise DataError(f"target_prompt_logprobs names the token {over}; the model knows 0 to {scores.shape[-1] - 1}.")
                found[here] = scores[targets.rows[here] - start, targets.tokens[here]].cpu().numpy()

    def _draw(self, place: int, scores: NDArray[np.float32], chances: NDArray[np.float32]) -> None:
        if self.drawn is None:
            return
        sums = chances.astype(np.float64).cumsum()
        count = self.drawn.ids.shape[1]
        draws = self._random.random(count)
        ids = np.full(count, scores.argmax()) if self._params.temperature == 0 else np.searchsorted(sums, draws * sums[-1], side="right")
        self.drawn.ids[place], self.drawn.logprobs[place] = ids, scores[ids]


class Tails:
    """The likeliest tokens at each drawn token of answers to one prompt.

    Args:
        prompt: its tokens.
        k: so many.
        temperature: of the draws.
        lengths: of the answers.
    """

    def __init__(self, prompt: int, k: int, temperature: float, lengths: list[int]) -> None:
        self._prompt, self._k, self._temperature = prompt, k, temperature or 1.0
        self.tops = [TopK(ids=np.zeros((n, k), dtype=np.int32), logprobs=np.zeros((n, k), dtype=np.float32)) for n in lengths]

    def __call__(self, row: int, start: int, logits: Tensor) -> None:
        """Takes the logits after the prompt and an answer."""
        top, skipped = self.tops[row], max(0, self._prompt - 1 - start)
        best = (logits[skipped:] / self._temperature).log_softmax(-1).topk(self._k)
        low = start + skipped - (self._prompt - 1)
        high = min(low + len(best.indices), len(top.ids))
        if low < high:
            top.ids[low:high], top.logprobs[low:high] = best.indices[: high - low].int().cpu().numpy(), best.values[: high - low].cpu().numpy()

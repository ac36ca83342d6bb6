"""One step of a model for new tokens of several sequences, whose earlier keys and values stand in pages: what is asked, and of whom.

`compiled` computes it by C++, `torch_steps` by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from ...records import SamplingParams
from .kv import Pages
from .lora import Active

__all__ = ["Chunk", "Steps", "by_adapter"]


@dataclass(slots=True, eq=False)
class Chunk:
    """New tokens of one sequence.

    Attributes:
        tokens: at least one.
        start: tokens of the sequence before them.
        pages: of the sequence, with room for the new tokens.
        active: the adapter, None for the base.
        wanted: whether the logits after the last token are asked for.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    active: Active | None
    wanted: bool


class Steps(Protocol):
    """A way to compute steps.

    Attributes:
        chunk: tokens of prompts that go well into one step.
        joins: whether it reads what prompts of one step have in common at the start only once.
    """

    chunk: int
    joins: bool

    def pages(self, limit: int) -> Pages:
        """Pages as this way reads them, for at most `limit` tokens."""
        ...

    def logits(self, chunks: Sequence[Chunk], pages: Pages) -> Tensor:
        """fp32 logits [wanted, V] after the chunks that want them, in their order; keys and values go into the pages."""
        ...

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[np.random.Generator]) -> tuple[list[int], list[float]]:
        """A token per row, and its log-prob; see `draws.draw`."""
        ...


def by_adapter(chunks: Sequence[Chunk]) -> tuple[list[int], list[tuple[Active | None, int, int]]]:
    """An order of the chunks in which those of one adapter stand beside each other, and where each adapter begins and ends."""
    number: dict[int, int] = {}
    for chunk in chunks:
        number.setdefault(id(chunk.active), len(number))
    order = sorted(range(len(chunks)), key=lambda i: number[id(chunks[i].active)])
    groups = list[tuple[Active | None, int, int]]()
    for place, i in enumerate(order):
        if groups and groups[-1][0] is chunks[i].active:
            groups[-1] = (chunks[i].active, groups[-1][1], place + 1)
        else:
            groups.append((chunks[i].active, place, place + 1))
    return order, groups

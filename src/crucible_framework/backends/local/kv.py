"""Keys and values of sequences of different lengths in one set of buffers, ending in the same column.

A sequence that is shorter than the longest has padding before it, which a mask hides; positions are those of the sequence itself. Room for
new columns is reserved, so that a step copies one column and not the whole past. This file does not know tokens or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["Past", "Shared", "pasts_of"]

Past: TypeAlias = list[tuple[Tensor, Tensor]]
"""One sequence's keys and values per layer, [heads, length, width]."""


class _Layer(DynamicLayer):  # type: ignore[misc] # transformers is not typed for mypy
    """One layer's keys and values in buffers [B, heads, capacity, width], of which the first `filled` columns count."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()
        self.buffers = keys, values
        self.filled = filled
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]

    def update(self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object) -> tuple[Tensor, Tensor]:
        """Adds new columns and gives all that are filled."""
        start, end = self.filled, self.filled + key_states.shape[2]
        keys, values = self.buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.filled = end
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return keys[:, :, :end], values[:, :, :end]


def pasts_of(cache: DynamicCache, where: Sequence[NDArray[np.int64]]) -> list[Past]:
    """Per sequence of a prefilled batch its own keys and values; `where` holds the indices of its tokens in the flattened [B · L]."""
    layers = [(cast("Tensor", vars(layer)["keys"]), cast("Tensor", vars(layer)["values"])) for layer in cache.layers]
    length = layers[0][0].shape[2]
    pasts = list[Past]()
    for places in where:
        row, first = divmod(int(places[0]), length)
        if int(places[-1]) - int(places[0]) + 1 == len(places):
            pasts.append([(keys[row, :, first : first + len(places)], values[row, :, first : first + len(places)]) for keys, values in layers])
        else:  # a common start and an end further on: copied, one row holds all
            index = torch.from_numpy(places).to(layers[0][0].device)
            pasts.append([(keys[0].index_select(1, index), values[0].index_select(1, index)) for keys, values in layers])
    return pasts


@dataclass(slots=True)
class Shared:
    """A batch of pasts as the model's cache.

    Attributes:
        cache: what the model reads and adds to.
        mask: bool [B, capacity], False before a sequence's start; None where all are of one length.
        lengths: of the sequences, int64 [B, 1].
        width: filled columns.
        capacity: columns that there is room for.
    """

    cache: Cache
    mask: Tensor | None
    lengths: Tensor
    width: int
    capacity: int

    @classmethod
    def of(cls, pasts: Sequence[Past], room: int) -> Shared:
        """Copies pasts into buffers with `room` more columns."""
        lengths = [past[0][0].shape[1] for past in pasts]
        width = max(lengths)
        layers = list[_Layer]()
        for parts in zip(*pasts, strict=True):
            both = list[Tensor]()
            for which in (0, 1):
                heads, _, size = parts[0][which].shape
                buffer = parts[0][which].new_zeros((len(pasts), heads, width + room, size))  # zeros: a masked NaN would still be one
                for place, part in enumerate(parts):
                    buffer[place, :, width - lengths[place] : width] = part[which]
                both.append(buffer)
            layers.append(_Layer(both[0], both[1], width))
        device = pasts[0][0][0].device
        starts = torch.tensor([[width - length] for length in lengths], device=device)
        mask = None if min(lengths) == width else torch.arange(width + room, device=device)[None] >= starts
        return cls(Cache(layers=list(layers)), mask, torch.tensor([[length] for length in lengths], device=device), width, width + room)

    def advance(self) -> None:
        """Counts the column that the model has added."""
        self.width += 1
        self.lengths = self.lengths + 1

    def pasts(self) -> list[Past]:
        """The sequences' keys and values as they stand, as views."""
        lengths = self.lengths[:, 0].tolist()
        layers = [layer.buffers for layer in self.cache.layers if isinstance(layer, _Layer)]
        return [
            [(keys[place, :, self.width - length : self.width], values[place, :, self.width - length : self.width]) for keys, values in layers]
            for place, length in enumerate(lengths)
        ]

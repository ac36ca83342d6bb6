"""Steps of a model by torch: for other devices, other architectures, machines without a compiler.

Single tokens of all sequences go through the model together, each with its own adapter; prompts that begin together are laid out as in
training. This file does not know when a sequence ends or who asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from ...records import SamplingParams
from .bases import Base
from .draws import draw
from .kv import PAGE, Pages
from .layout import lay_out
from .lora import Active, Mixed
from .steps import Chunk, by_adapter

__all__ = ["TorchSteps"]


class TorchSteps:
    """Steps through torch; see the file's head."""

    chunk = 1024

    def __init__(self, base: Base) -> None:
        self._base, self.joins = base, base.decoder is not None
        config = cast("Any", base.model.config)
        self._layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        self._heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self._size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    def pages(self, limit: int) -> Pages:
        """See `Steps`: per layer and page [keys and values, heads, 16, size]."""
        weight = next(self._base.model.parameters())
        return Pages(self._layers, 2 * self._heads * PAGE * self._size, dtype=weight.dtype, device=self._base.device, limit=-(-limit // PAGE))

    @torch.no_grad()
    def logits(self, chunks: Sequence[Chunk], pages: Pages) -> Tensor:
        """See `Steps`."""
        found: dict[int, Tensor] = {}
        singles = [i for i, chunk in enumerate(chunks) if chunk.start and len(chunk.tokens) == 1]
        order, groups = by_adapter([chunks[i] for i in singles])
        if singles:
            self._single([singles[place] for place in order], groups, chunks=chunks, pages=pages, found=found)
        fresh = [i for i, chunk in enumerate(chunks) if not chunk.start]
        order, groups = by_adapter([chunks[i] for i in fresh])
        for active, low, high in groups:
            self._fresh([fresh[place] for place in order[low:high]], active, chunks=chunks, pages=pages, found=found)
        for i, chunk in enumerate(chunks):
            if chunk.start and len(chunk.tokens) > 1:
                self._single([i], [(chunk.active, 0, 1)], chunks=chunks, pages=pages, found=found)
        wanted = [found[i] for i, chunk in enumerate(chunks) if chunk.wanted]
        return torch.stack(wanted) if wanted else torch.empty((0, self._base.vocab_size), device=self._base.device)

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[np.random.Generator]) -> tuple[list[int], list[float]]:
        """See `Steps`."""
        return draw(logits, params, generators)

    def _single(
        self, members: Sequence[int], groups: Sequence[tuple[Active | None, int, int]], *, chunks: Sequence[Chunk], pages: Pages, found: dict[int, Tensor]
    ) -> None:
        """Sequences of which equally many tokens are new, after those in their pages; several only with one token each."""
        device, some = self._base.device, [chunks[i] for i in members]
        width = max(-(-chunk.start // PAGE) for chunk in some)
        table = torch.tensor([[*chunk.pages[:width], *[0] * (width - len(chunk.pages))] for chunk in some], device=device)
        lengths = torch.tensor([[chunk.start] for chunk in some], device=device)
        new = len(some[0].tokens)
        keep = width * PAGE if len(some) > 1 else some[0].start
        view = _View(pages, table, some, self._shape, keep)
        cache = Cache(layers=[_Layer(view, layer) for layer in range(self._layers)])
        mask = None
        if len(some) > 1:
            seen = torch.arange(keep, device=device)[None] < lengths
            mask = torch.cat([seen, seen.new_ones((len(some), 1))], dim=1)
        places = lengths + torch.arange(new, device=device)
        with self._base.slot.using(groups[0][0] if len(groups) == 1 else Mixed(tuple(groups))):
            hidden = self._base.hidden(torch.tensor([list(chunk.tokens) for chunk in some], device=device), cache, mask=mask, places=places)
            logits = self._base.logits(hidden[:, -1])
        found.update(zip(members, logits, strict=True))

    def _fresh(self, members: Sequence[int], active: Active | None, *, chunks: Sequence[Chunk], pages: Pages, found: dict[int, Tensor]) -> None:
        """Sequences that begin now, with one adapter: those that begin alike are read as one start with many ends."""
        base, own = self._base, self.joins
        with base.slot.using(active):
            for one in lay_out([chunks[i].tokens for i in members], base.device, share=own, pack=own):
                cache = DynamicCache()
                hidden = base.read(one, cache)
                logits = base.logits(hidden[torch.tensor([int(places[-1]) for places in one.where], device=base.device)])
                for member, where, row in zip(one.members, one.where, logits, strict=True):
                    found[members[member]] = row
                    line, index = int(where[0]) // one.ids.shape[1], torch.from_numpy(where % one.ids.shape[1]).to(base.device)
                    for layer, part in enumerate(cache.layers):
                        new = tuple(cast("Tensor", vars(part)[name])[line].index_select(1, index) for name in ("keys", "values"))
                        _write(pages, layer, chunks[members[member]], new, self._shape)

    @property
    def _shape(self) -> tuple[int, int]:
        return self._heads, self._size


def _write(pages: Pages, layer: int, chunk: Chunk, new: tuple[Tensor, ...], shape: tuple[int, int]) -> None:
    """Puts a chunk's keys and values [heads, L, size] into its pages."""
    heads, size = shape
    room = pages.tensor[layer].view(-1, 2, heads, PAGE, size)
    done = 0
    while done < len(chunk.tokens):
        page, column = divmod(chunk.start + done, PAGE)
        many = min(PAGE - column, len(chunk.tokens) - done)
        for which, part in enumerate(new):
            room[chunk.pages[page], which, :, column : column + many] = part[:, done : done + many]
        done += many


@dataclass(slots=True, frozen=True, eq=False)
class _View:
    """What all layers of a step read: the pages of each chunk's sequence beside each other, of which the first `keep` columns count."""

    pages: Pages
    table: Tensor
    chunks: Sequence[Chunk]
    shape: tuple[int, int]
    keep: int


class _Layer(DynamicLayer):  # type: ignore[misc] # transformers is not typed for mypy
    """One layer's pages as transformers' caches are, with padding where a sequence is shorter than others."""

    def __init__(self, view: _View, layer: int) -> None:
        super().__init__()
        self._view, self._layer = view, layer
        self.dtype, self.device, self.is_initialized = view.pages.tensor.dtype, view.pages.tensor.device, True

    def get_seq_length(self) -> int:
        """Columns before the new ones, padding included."""
        return self._view.keep

    def get_mask_sizes(self, query_length: object) -> tuple[int, int]:
        """Columns that a query sees, and the first of them."""
        length = query_length if isinstance(query_length, int) else len(cast("Tensor", query_length))
        return self._view.keep + length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object) -> tuple[Tensor, Tensor]:
        """Puts new columns into the pages; gives all columns, the new ones last."""
        view, (heads, size) = self._view, self._view.shape
        room = view.pages.tensor[self._layer].view(-1, 2, heads, PAGE, size)
        past = room[view.table].permute(2, 0, 3, 1, 4, 5).reshape(2, len(view.chunks), heads, -1, size)[:, :, :, : view.keep]
        if len(view.chunks) > 1:  # zeros where there is padding: a masked NaN would still be one
            starts = torch.tensor([[chunk.start] for chunk in view.chunks], device=past.device)
            past = past.masked_fill((torch.arange(view.keep, device=past.device)[None] >= starts)[None, :, None, :, None], 0.0)
        for row, chunk in enumerate(view.chunks):
            _write(view.pages, self._layer, chunk, (key_states[row], value_states[row]), view.shape)
        return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)

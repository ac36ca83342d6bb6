"""How sequences go through the model together: in slices of similar length, packed behind each other, or as one start with many ends.

Under causal attention a real token never sees a later pad, so slices padded on the right need no mask. A decoder that keeps attention
inside spans takes sequences of any lengths packed into one row, without a pad. Sequences that begin alike (claims
about one passage, answers to one question) are laid out as one row: the common start once, then each one's own end, whose tokens attend to
the start and to themselves only and count their positions on from it. Each token's numbers are those of its sequence alone, up to rounding;
with dropout the start has one mask for all. This file does not know losses or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .walks import Span

__all__ = ["TOKENS_PER_SLICE", "Pass", "joined", "lay_out", "padded", "slices"]

TOKENS_PER_SLICE = 2048
"""Tokens, padding included, that go through the model together."""
FILL = 0.75
"""The shortest sequence of a slice is at least this part of the longest: less is slower than going alone."""
ALIKE = 0.5
"""Sequences share a start that is at least this part of each."""

Tokens = Sequence[int] | NDArray[np.int32]


@dataclass(slots=True, frozen=True, eq=False)
class Pass:
    """Sequences that go through the model in one call.

    Attributes:
        members: the sequences' indices.
        ids: int64 [B, L].
        where: per member, the indices of its tokens in the flattened [B · L].
        mask: float [1, 1, L, L], 0 where a token (row) sees another (column) and −inf-like where not; None for plain causal attention.
        places: int64 [1, L], positions within each one's sequence; None where they count from 0.
        spans: of a packed row, which of its tokens see each other; None where the mask says it.
    """

    members: tuple[int, ...]
    ids: Tensor
    where: tuple[NDArray[np.int64], ...]
    mask: Tensor | None = None
    places: Tensor | None = None
    spans: tuple[Span, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.ids.numel()


def slices(lengths: Sequence[int], limit: int = TOKENS_PER_SLICE) -> list[list[int]]:
    """Indices grouped by similar length, longest first; every index once, each group within `limit` padded tokens or alone."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and lengths[index] >= FILL * longest and longest * (len(groups[-1]) + 1) <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def padded(sequences: Sequence[Tokens], device: torch.device) -> Tensor:
    """int64 [B, longest], padded with 0 on the right."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for place, tokens in enumerate(sequences):
        ids[place, : len(tokens)] = tokens
    return torch.from_numpy(ids).to(device)


def lay_out(sequences: Sequence[Tokens], device: torch.device, *, share: bool, pack: bool = False, limit: int = TOKENS_PER_SLICE) -> list[Pass]:
    """The passes for some sequences; every one is in exactly one.

    Args:
        sequences: non-empty.
        share: whether common starts may be computed once; the model must take a mask of its own, or spans.
        pack: whether sequences of any lengths may stand behind each other in one row; the model must take spans.
        limit: tokens per pass; a sequence that is longer goes alone.
    """
    arrays = [np.asarray(tokens, dtype=np.int64) for tokens in sequences]
    families = _families(arrays, limit) if share else [[i] for i in range(len(arrays))]
    if pack:
        return _packed(arrays, families, device, limit)
    passes = [_joined(arrays, family, device) for family in families if len(family) > 1]
    rest = [family[0] for family in families if len(family) == 1]
    for group in slices([len(arrays[i]) for i in rest], limit):
        members = tuple(rest[place] for place in group)
        ids = padded([sequences[i] for i in members], device)
        where = tuple(np.arange(len(arrays[i]), dtype=np.int64) + place * ids.shape[1] for place, i in enumerate(members))
        passes.append(Pass(members, ids, where))
    return passes


def joined(passes: Sequence[Pass]) -> tuple[Pass, list[int]]:
    """Packed passes behind each other as one, which numbers no members, and where each begins."""
    starts = [sum(one.tokens for one in passes[:place]) for place in range(len(passes))]
    spans = tuple(replace(span, start=span.start + start) for one, start in zip(passes, starts, strict=True) for span in one.spans or ())
    ids, places = (torch.cat([part for part in parts if part is not None], dim=1) for parts in ([one.ids for one in passes], [one.places for one in passes]))
    return Pass((), ids, (), None, places, spans), starts


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Tokens that two sequences have in common at the start."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


def _families(arrays: Sequence[NDArray[np.int64]], limit: int) -> list[list[int]]:
    """Indices grouped so that all of a group share a start that is long for each of them."""
    families: list[list[int]] = []
    start = 0
    for index in sorted(range(len(arrays)), key=lambda i: (arrays[i].tolist(), i)):
        tokens = arrays[index]
        if families:
            family = families[-1]
            common = min(start, _common(arrays[family[0]], tokens))
            longest = max(len(tokens), *(len(arrays[i]) for i in family))
            cost = common + sum(len(arrays[i]) - common for i in family) + len(tokens) - common
            if common >= ALIKE * longest and cost <= limit:
                family.append(index)
                start = common
                continue
        families.append([index])
        start = len(tokens)
    return families


@dataclass(slots=True, frozen=True, eq=False)
class _Row:
    """A family's tokens behind each other: the common start, then each one's end."""

    ids: NDArray[np.int64]
    places: NDArray[np.int64]
    where: tuple[NDArray[np.int64], ...]
    mask: Tensor | None
    common: int = 0


def _row(arrays: Sequence[NDArray[np.int64]], family: Sequence[int]) -> _Row:
    if len(family) == 1:
        order = np.arange(len(arrays[family[0]]))
        return _Row(arrays[family[0]], order, (order,), None)
    common = min(_common(arrays[family[0]], arrays[i]) for i in family[1:])
    ends = [arrays[i][common:] for i in family]
    ids = np.concatenate([arrays[family[0]][:common], *ends])
    owner = np.concatenate([np.zeros(common, np.int64), *(np.full(len(end), k, np.int64) for k, end in enumerate(ends, 1))])
    places = np.concatenate([np.arange(common), *(np.arange(common, common + len(end)) for end in ends)])
    order = np.arange(len(ids))
    seen = (order[:, None] >= order[None, :]) & ((owner[:, None] == owner[None, :]) | (owner[None, :] == 0))
    mask = torch.where(torch.from_numpy(seen), 0.0, torch.finfo(torch.float32).min)[None, None]
    firsts = common + np.cumsum([0, *(len(end) for end in ends[:-1])])
    where = tuple(np.concatenate([order[:common], np.arange(first, first + len(end))]) for first, end in zip(firsts, ends, strict=True))
    return _Row(ids, places, where, mask, common)


def _joined(arrays: Sequence[NDArray[np.int64]], family: Sequence[int], device: torch.device) -> Pass:
    row = _row(arrays, family)
    mask = None if row.mask is None else row.mask.to(device)
    return Pass(tuple(family), torch.from_numpy(row.ids)[None].to(device), row.where, mask, torch.from_numpy(row.places)[None].to(device))


def _packed(arrays: Sequence[NDArray[np.int64]], families: list[list[int]], device: torch.device, limit: int) -> list[Pass]:
    """Families behind each other, the longest first, those of one length without a mask as one span."""
    rows = sorted(((_row(arrays, family), family) for family in families), key=lambda pair: (-len(pair[0].ids), pair[1]))
    groups: list[list[tuple[_Row, list[int]]]] = []
    for row, family in rows:
        if groups and sum(len(other.ids) for other, _ in groups[-1]) + len(row.ids) <= limit:
            groups[-1].append((row, family))
        else:
            groups.append([(row, family)])
    return [_packed_pass(group, device) for group in groups]


def _packed_pass(group: Sequence[tuple[_Row, list[int]]], device: torch.device) -> Pass:
    spans, where, start = list[Span](), list[NDArray[np.int64]](), 0
    for row, _ in group:
        length, mask = len(row.ids), None if row.mask is None else row.mask.to(device)
        if mask is None and spans and spans[-1].mask is None and spans[-1].length == length:
            spans[-1] = Span(spans[-1].start, spans[-1].count + 1, length)
        elif mask is None or row.common == length:  # alone, or several that are the same to the end
            spans.append(Span(start, 1, length))
        else:
            spans += [Span(start, 1, row.common), Span(start, 1, length, mask[:, :, row.common :].contiguous(), row.common)]
        where += [places + start for places in row.where]
        start += length
    ids, places = (torch.from_numpy(np.concatenate(parts))[None].to(device) for parts in ([row.ids for row, _ in group], [row.places for row, _ in group]))
    return Pass(tuple(i for _, family in group for i in family), ids, tuple(where), None, places, tuple(spans))

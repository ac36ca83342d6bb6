"""The exact gradient norm of every example of a batch, from the one backward pass that training makes anyway.

A frozen layer with an adapter, y = W x + s B A x, has for example i with tokens t the gradients dB = s Σ g_t (A x_t)ᵀ and dA = Σ (s Bᵀ g_t) x_tᵀ:
both are U_iᵀ V_i of two matrices with a row per token, which the backward pass has in its hands. Their squared norms are summed over layers. All examples
of about one length are one batched product, in whichever of two ways is the cheaper: ‖Uᵀ V‖² itself, or Σ (U Uᵀ) ∘ (V Vᵀ) where an example has fewer
tokens than the adapter has ranks (the "ghost norm"). This file does not know layers, models or losses.

Source: Goodfellow 2015, arXiv 1510.01799 (the norm without the gradient); Li et al. 2021, arXiv 2110.05679 (sequences, ghost norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ExampleNorms"]

_ALIKE = 0.5
"""Examples of one product: the shortest has at least this part of the longest one's tokens."""


@dataclass(slots=True, frozen=True, eq=False)
class _Group:
    """Examples [n] of similar length and the rows [n, L] of their tokens; a row past the last means no token. `span`: they stand so already."""

    members: Tensor
    rows: Tensor
    span: slice | None


def _groups(members: Sequence[int], rows: Sequence[NDArray[np.int64]], total: int) -> list[_Group]:
    order = sorted(range(len(members)), key=lambda k: (-len(rows[k]), k))
    parts: list[list[int]] = []
    for k in order:
        if parts and len(rows[k]) >= _ALIKE * len(rows[parts[-1][0]]):
            parts[-1].append(k)
        elif len(rows[k]):
            parts.append([k])
    found = []
    for part in parts:
        index = np.full((len(part), len(rows[part[0]])), total, dtype=np.int64)
        for line, k in enumerate(part):
            index[line, : len(rows[k])] = rows[k]
        first = int(index[0, 0])
        dense = first + index.size <= total and np.array_equal(index.ravel(), np.arange(first, first + index.size))
        found.append(_Group(torch.tensor([members[k] for k in part]), torch.from_numpy(index), slice(first, first + index.size) if dense else None))
    return found


class ExampleNorms:
    """Collects squared norms while a backward pass runs; one per batch.

    Args:
        examples: how many the batch has.
    """

    def __init__(self, examples: int) -> None:
        self._squares = torch.zeros(examples, dtype=torch.float64)
        self._tokens: list[_Group] = []
        self._read: list[_Group] = []

    def begin(self, members: Sequence[int], tokens: Sequence[NDArray[np.int64]], total: int, read: Sequence[int]) -> None:
        """A pass through the model.

        Args:
            members: its examples.
            tokens: per member the rows of its tokens among all that the layers see; no two members share one.
            total: rows that the layers see.
            read: per member how many rows the output layer sees, one member's behind the other's.
        """
        self._tokens = _groups(members, tokens, total)
        ends = np.cumsum(read)
        self._read = _groups(members, [np.arange(end - size, end) for end, size in zip(ends, read, strict=True)], int(ends[-1]) if len(ends) else 0)

    def add(self, left: Tensor, right: Tensor, scale: float = 1.0, *, head: bool = False) -> None:
        """Adds ‖scale · leftᵢᵀ rightᵢ‖² for every example i.

        Args:
            left: [rows, p], the gradient at the product's output.
            right: [rows, q], its input.
            scale: a factor of the product.
            head: whether the rows are the output layer's.
        """
        for group in self._read if head else self._tokens:
            u, v = _blocks(left, group), _blocks(right, group)
            length, p, q = u.shape[1], u.shape[2], v.shape[2]
            if length * (p + q) < p * q:
                squares = ((u @ u.mT).float() * (v @ v.mT).float()).sum((1, 2))
            else:
                squares = torch.linalg.vector_norm((u.mT @ v).float().flatten(1), dim=1).square_()
            self._squares.index_add_(0, group.members, squares.double().cpu().mul_(scale * scale))

    def norms(self) -> NDArray[np.float64]:
        """The L2 norm of each example's gradient, float64 [examples]; 0 where an example was in no pass."""
        return self._squares.clamp(min=0).sqrt().numpy()


def _blocks(values: Tensor, group: _Group) -> Tensor:
    """[rows, width] as [n, L, width], 0 where there is no token."""
    n, length = group.rows.shape
    if group.span is not None:
        return values[group.span].view(n, length, -1) if values.is_contiguous() else values[group.span].reshape(n, length, -1)
    padded = torch.cat([values, values.new_zeros((1, values.shape[1]))])
    return padded[group.rows.to(values.device)]

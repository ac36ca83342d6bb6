"""fp32 matrices whose numbers are all bf16 numbers, said in half the bytes. Nothing is rounded: a matrix that would be has no short form.

Weights of most published models are bf16, so that fp32 copies of them hold 16 zero bits in every number. This file does not know files,
models or who reads the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Short", "shortened"]

_PIECE = 1 << 18
"""Numbers that are compared at a time: the piece and its copies stay near the core."""


def shortened(weight: Tensor) -> Tensor | None:
    """An fp32 tensor in bf16, or None where that would change a number (or where one is no number)."""
    weight = weight.detach().contiguous()
    found = torch.empty(weight.shape, dtype=torch.bfloat16)
    for short, long in zip(torch.split(found.view(-1), _PIECE), torch.split(weight.view(-1), _PIECE), strict=True):
        if not torch.equal(short.copy_(long).float(), long):
            return None
    return found


@dataclass(slots=True, frozen=True, eq=False)
class Short:
    """The short form of the matrices that stand in one storage of fp32 numbers.

    Attributes:
        numbers: bf16 [N], each where it stands in that storage.
        address: of the storage.
    """

    numbers: Tensor
    address: int

    def of(self, weight: Tensor) -> Tensor | None:
        """A matrix of the storage, or several that touch, in bf16; None for others."""
        start = weight.storage_offset()
        if weight.untyped_storage().data_ptr() != self.address or not weight.is_contiguous() or start + weight.numel() > self.numbers.numel():
            return None
        return self.numbers[start : start + weight.numel()].view(weight.shape)

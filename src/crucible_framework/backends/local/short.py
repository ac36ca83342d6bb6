"""fp32 matrices said in fewer bytes without changing a number: as bf16, or as whole numbers with a scale and a lowest value for each 32.

Weights of most published models are bf16, so that fp32 copies of them hold 16 zero bits in every number; a model that went through
quantisation has few different numbers in each of its groups, which stand at equal distances. Both are found from the numbers themselves, and
a matrix that is neither has no short form. This file does not know files, models or who reads the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GROUP", "GROUP_BYTES", "Short", "grouped", "shortened"]

GROUP = 32
"""Neighbours of a row with one scale and one lowest value, both fp32; then come 32 bytes: number = lowest + scale · byte."""
GROUP_BYTES = 8 + GROUP
_PIECE = 1 << 15
"""Numbers that are looked at together: they and their copies stay near the core."""


def shortened(weight: Tensor) -> Tensor | None:
    """An fp32 tensor in bf16, or None where that would change a number (or where one is no number)."""
    weight = weight.detach().contiguous()
    found = torch.empty(weight.shape, dtype=torch.bfloat16)
    for short, long in zip(torch.split(found.view(-1), _PIECE), torch.split(weight.view(-1), _PIECE), strict=True):
        if not torch.equal(short.copy_(long).float(), long):
            return None
    return found


def grouped(weight: Tensor) -> Tensor | None:
    """An fp32 matrix [out, in] as groups, bytes [out, in / 32 · 40], or None where a group has no such form.

    In a group of whole numbers the scale is the greatest common divisor of their distances from the lowest. It takes some 100 ns per number,
    and nothing where the first groups have no such form.
    """
    out, into = weight.shape
    if into % GROUP:
        return None
    found = torch.empty((weight.numel() // GROUP, GROUP_BYTES), dtype=torch.uint8)
    for place, long in enumerate(torch.split(weight.detach().reshape(-1, GROUP), _PIECE // GROUP)):
        if (piece := _groups(long[:64])) is None or (piece := _groups(long)) is None:
            return None
        found[place * _PIECE // GROUP :][: len(long)] = piece
    return found.view(out, -1)


def _groups(numbers: Tensor) -> Tensor | None:
    """fp32 [N, 32] as bytes [N, 40]; None where these do not say every number."""
    exact, size = numbers.double(), numbers.abs()
    least = torch.frexp(size.masked_fill_(size == 0, torch.finfo().max).amin(1, keepdim=True))[1] - 24  # what the last bit of the smallest stands for
    unit = torch.ldexp(torch.ones_like(least, dtype=torch.float64), least)
    distance = (exact - exact.amin(1, keepdim=True)) / unit  # whole numbers
    if not (distance.amax(1) < 2**53).all():  # also where one is no number
        return None
    step = _divisor(distance[:, :: GROUP // 8])  # of a few neighbours; nearly always that of all
    steps = distance / step
    missed = ((steps - steps.round()).abs_().amax(1) > 0) | (steps.amax(1) > 255)
    if missed.any():
        step[missed] = _divisor(distance[missed])
        steps[missed] = distance[missed] / step[missed]
    scale, low = (step * unit).float(), numbers.amin(1, keepdim=True)
    product = steps * scale
    if steps.amax() > 255 or not torch.equal(product.float().double(), product) or not torch.equal(low + product, exact):
        return None
    return torch.cat([scale.view(torch.uint8), low.view(torch.uint8), steps.to(torch.uint8)], 1)


def _divisor(whole: Tensor) -> Tensor:
    """The greatest common divisor [N, 1] of each row, or 1 where all are 0; the number of columns is a power of two."""
    found = whole.long()
    while found.shape[1] > 1:
        found = torch.gcd(*found.chunk(2, 1))
    return found.clamp_(min=1).double()


@dataclass(slots=True, frozen=True, eq=False)
class Short:
    """The short form of the matrices that stand in one storage of fp32 numbers.

    Attributes:
        numbers: bf16 [N], or bytes [N / 32 · 40] of groups, each where it stands in that storage.
        address: of the storage.
    """

    numbers: Tensor
    address: int

    def of(self, weight: Tensor) -> Tensor | None:
        """A matrix [out, in] of the storage, or several that touch: bf16 [out, in], or groups as bytes [out, in / 32 · 40]; None for others."""
        each, many = (1, 1) if self.numbers.dtype == torch.bfloat16 else (GROUP, GROUP_BYTES)
        start, size = int(weight.storage_offset()) // each * many, weight.numel() // each * many
        if weight.untyped_storage().data_ptr() != self.address or not weight.is_contiguous() or start + size > self.numbers.numel():
            return None
        return self.numbers[start : start + size].view(weight.shape[0], -1)

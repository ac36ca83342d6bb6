"""A matrix step of a decoder as two compiled calls, forward and backward: norm or gate, frozen matrix, adapters with dropout, residual.

bf16 on a processor with bf16 products (AVX-512 or AMX), sums in fp32; everything else is for kernels.py, whose torch code gives the same
numbers up to rounding. The structures are those of native/linear.cpp. This file does not know autograd, models or adapters' names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .buffers import Buffers
from .native import library

if TYPE_CHECKING:
    from .kernels import Matmul

__all__ = ["Kept", "Linear", "Panels"]

_P, _I, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_BLOCK = 32
"""Widths, and where one adapter's outputs end and another's begin, are multiples of it."""


class _Part(ctypes.Structure):
    _fields_ = (*((name, _I) for name in ("low", "high", "first", "ranks")), ("scale", _F), *((name, _P) for name in ("a", "b", "da", "db")))


class _Drop(ctypes.Structure):
    _fields_ = (("low", _I), ("high", _I), ("start", ctypes.c_uint64), ("threshold", _I))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("h", "norm", "residual", "bias", "forward", "backward", "g", "extra")),
        *((name, _P) for name in ("y", "low", "dh", "inner", "dropped")),
        *((name, _P) for name in ("scales", "r", "part", "drop")),
        *((name, _I) for name in ("rows", "inputs", "outputs", "gated", "parts", "drops", "ranks")),
        ("eps", _F),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(slots=True, frozen=True, eq=False)
class Panels:
    """A frozen matrix [out, in] in the order in which products read it, forward and backward: twice its memory."""

    forward: Tensor
    backward: Tensor
    outputs: int
    inputs: int


@dataclass(slots=True, frozen=True, eq=False)
class Kept:
    """What the backward pass of a step needs beside its input.

    Attributes:
        r: 1 / rms fp32 [T, 1] of the norm, if there is one.
        low: the adapters' products with their factors, bf16 [T, ranks], each adapter's from a multiple of 32 on.
    """

    r: Tensor | None
    low: Tensor | None


class Linear:
    """The compiled calls."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib, self.buffers, self._frozen = lib, Buffers(), Buffers()

    @classmethod
    def of(cls, folder: Path | None) -> Linear | None:
        """The calls, or None where this processor has no bf16 products or nothing was compiled; `folder` keeps compiled code."""
        lib = None if folder is None else library("linear.cpp", folder)
        return cls(lib) if lib is not None and hasattr(lib, "crucible_linear") else None

    def takes(self, weight: Tensor) -> bool:
        """Whether a matrix can be in panels."""
        return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and all(size % _BLOCK == 0 for size in weight.shape)

    def panels(self, weight: Tensor) -> Panels:
        """The panels of a matrix [out, in]."""
        given = weight.detach().contiguous()
        forward, backward = (self._frozen.empty(tuple(given.shape), given.dtype) for _ in range(2))
        self._lib.crucible_panels(*(_P(tensor.data_ptr()) for tensor in (given, forward, backward)), *given.shape)
        return Panels(forward, backward, *given.shape)

    @staticmethod
    def covers(step: Matmul, h: Tensor) -> bool:
        """Whether a step over h [T, width] is for these calls."""
        regular = all(part.low % _BLOCK == 0 and part.high % _BLOCK == 0 for part in step.parts)
        return h.dtype == torch.bfloat16 and h.is_contiguous() and h.shape[0] > 0 and regular

    def forward(self, step: Matmul, panels: Panels, h: Tensor, residual: Tensor | None, pairs: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        """y [T, out] of h [T, in], or [T, 2 · in] where the step is gated.

        Args:
            step: says what is computed.
            panels: of the step's matrix.
            residual: [T, out], added to y.
            pairs: A [rank, in], B [out, rank], A, B, …, one pair per part of the step.
        """
        rows, ranks = h.shape[0], _ranks(pairs)
        y = self.buffers.empty((rows, panels.outputs), h.dtype)
        r = h.new_empty((rows, 1), dtype=torch.float32) if step.norm is not None else None
        low = self.buffers.empty((rows, ranks), h.dtype) if pairs else None
        call, held = _call(step, panels, h, pairs, r)
        residual = None if residual is None else residual.contiguous()
        call.y, call.residual, call.low = y.data_ptr(), _address(residual), _address(low)
        self._lib.crucible_linear(ctypes.byref(call))
        del held
        return y, Kept(r, low)

    def backward(
        self, step: Matmul, panels: Panels, h: Tensor, g: Tensor, kept: Kept, pairs: Sequence[Tensor], *, wanted: bool, extra: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of h, where it is `wanted`, and fp32 of A, B, A, B, …, of that with respect to y, g [T, out].

        `step.note` is told as kernels.py says; `extra`, which has the shape of h, is added to the gradient of h where the step has a norm.
        """
        rows, noted = h.shape[0], step.note is not None and bool(pairs)
        dh = self.buffers.empty(tuple(h.shape), h.dtype) if wanted else None
        found = [torch.empty(pair.shape, dtype=torch.float32) for pair in pairs]
        call, held = _call(step, panels, h, pairs, kept.r, found)
        inner = h.new_empty((rows, _ranks(pairs))) if noted else None
        dropped = h.new_empty((rows, panels.inputs)) if noted else None
        call.g, call.low, call.dh, call.extra = g.data_ptr(), _address(kept.low), _address(dh), _address(extra)
        call.inner, call.dropped = _address(inner), _address(dropped)
        self._lib.crucible_linear_back(ctypes.byref(call))
        del held
        if step.note is not None and inner is not None and dropped is not None and kept.low is not None:
            first, columns = 0, list[Tensor]()
            for part, a in zip(step.parts, pairs[::2], strict=True):
                step.note(g[:, part.low : part.high], kept.low[:, first : first + a.shape[0]], 1.0)
                columns.append(inner[:, first : first + a.shape[0]])
                first += _up(a.shape[0])
            step.note(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1), dropped, 1.0)
        return dh, found


def _up(ranks: int) -> int:
    return -(-ranks // _BLOCK) * _BLOCK


def _ranks(pairs: Sequence[Tensor]) -> int:
    return sum(_up(a.shape[0]) for a in pairs[::2])


def _call(step: Matmul, panels: Panels, h: Tensor, pairs: Sequence[Tensor], r: Tensor | None, found: Sequence[Tensor] = ()) -> tuple[_Call, list[object]]:
    """What both directions say alike, and what must live until the call is over."""
    exact = [pair.detach().to(torch.float32).contiguous() for pair in pairs]
    parts, first, scales = (_Part * max(len(step.parts), 1))(), 0, None
    for place, part in enumerate(step.parts if pairs else ()):
        a, b = exact[2 * place : 2 * place + 2]
        if isinstance(part.scale, Tensor):
            scales = part.scale.float().contiguous()
        factor = 1.0 if isinstance(part.scale, Tensor) else part.scale
        gradients = (tensor.data_ptr() for tensor in found[2 * place : 2 * place + 2]) if found else (None, None)
        parts[place] = _Part(part.low, part.high, first, a.shape[0], factor, a.data_ptr(), b.data_ptr(), *gradients)
        first += _up(a.shape[0])
    drops = (_Drop * max(len(step.drops), 1))(*(_Drop(rows.start, rows.stop, drop.start, drop.threshold) for rows, drop in step.drops))
    call = _Call(
        h=h.data_ptr(),
        norm=_address(step.norm),
        bias=_address(step.frozen.bias),
        forward=panels.forward.data_ptr(),
        backward=panels.backward.data_ptr(),
        scales=_address(scales),
        r=_address(r),
        part=ctypes.addressof(parts),
        drop=ctypes.addressof(drops),
        rows=h.shape[0],
        inputs=panels.inputs,
        outputs=panels.outputs,
        gated=int(step.gated),
        parts=len(step.parts) if pairs else 0,
        drops=len(step.drops),
        ranks=first,
        eps=step.eps,
    )
    return call, [exact, parts, drops, scales, found]

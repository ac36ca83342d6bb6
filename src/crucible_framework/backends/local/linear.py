"""A matrix step of a decoder as two compiled calls, forward and backward: norm or gate, frozen matrix, adapters with dropout, residual.

fp32, and bf16 with sums in fp32 on a processor with bf16 products (AVX-512 or AMX); everything else is for kernels.py, whose torch code
gives the same numbers up to rounding. The structures are those of native/linear.cpp. This file does not know autograd, models or adapters' names.
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

__all__ = ["Kept", "Linear", "Panels", "Step"]

_P, _I, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_BLOCK = 32
"""Widths, and where one adapter's outputs end and another's begin, are multiples of it."""


class _Part(ctypes.Structure):
    _fields_ = (*((name, _I) for name in ("low", "high", "begin", "end", "first", "ranks")), ("scale", _F), *((name, _P) for name in ("a", "b", "da", "db")))


class _Drop(ctypes.Structure):
    _fields_ = (("low", _I), ("high", _I), ("start", ctypes.c_uint64), ("threshold", _I))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("h", "norm", "residual", "bias", "forward", "backward", "g", "extra")),
        *((name, _P) for name in ("y", "low", "dh", "inner", "dropped")),
        *((name, _P) for name in ("r", "part", "drop")),
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
        low: the adapters' products with their factors [T, ranks], each adapter's from a multiple of 32 on.
    """

    r: Tensor | None = None
    low: Tensor | None = None


@dataclass(slots=True, eq=False)
class Step:
    """A step and its pairs A [rank, in], B [out, rank], A, B, …, one per part; `kept` is set by its forward pass."""

    step: Matmul
    pairs: Sequence[Tensor]
    kept: Kept = Kept()

    @property
    def panels(self) -> Panels:
        """Of its matrix."""
        panels = self.step.frozen.panels
        assert panels is not None, "covers() was not asked"
        return panels


class Linear:
    """The compiled calls. All take steps that `covers`."""

    def __init__(self, lib: ctypes.CDLL, buffers: Buffers) -> None:
        self._lib, self._buffers, self._frozen = lib, buffers, Buffers()

    @classmethod
    def of(cls, folder: Path | None, buffers: Buffers) -> Linear | None:
        """The calls, or None where nothing was compiled.

        Args:
            folder: where compiled code is kept, or None.
            buffers: memory for what the calls fill.
        """
        lib = None if folder is None else library("linear.cpp", folder)
        return None if lib is None else cls(lib, buffers)

    def has(self, dtype: torch.dtype) -> bool:
        """Whether there are calls for numbers of this kind."""
        return dtype in _KINDS and hasattr(self._lib, f"crucible_linear_{_KINDS[dtype]}")

    def takes(self, weight: Tensor) -> bool:
        """Whether a matrix can be in panels."""
        return weight.device.type == "cpu" and self.has(weight.dtype) and all(size % _BLOCK == 0 for size in weight.shape)

    def _run(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        getattr(self._lib, f"crucible_{name}_{_KINDS[dtype]}")(*arguments)

    def panels(self, weight: Tensor) -> Panels:
        """The panels of a matrix [out, in]."""
        given = weight.detach().contiguous()
        forward, backward = (self._frozen.empty(tuple(given.shape), given.dtype) for _ in range(2))
        self._run("panels", given.dtype, *(_P(tensor.data_ptr()) for tensor in (given, forward, backward)), *given.shape)
        return Panels(forward, backward, *given.shape)

    @staticmethod
    def covers(step: Matmul, h: Tensor) -> bool:
        """Whether a step over h [T, width] is for these calls, as far as its matrix is."""
        regular = all(part.low % _BLOCK == part.high % _BLOCK == 0 and not isinstance(part.scale, Tensor) for part in step.parts)
        return h.dtype == step.frozen.weight.dtype and h.is_contiguous() and h.shape[0] > 0 and regular

    def forward(self, asked: Step, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """y [T, out] of h [T, in], or [T, 2 · in] where the step is gated; the residual is added to it."""
        call, y, _held = self._forward(asked, h, residual)
        self._run("linear", h.dtype, ctypes.byref(call))
        return y

    def gated(self, up: Step, down: Step, h: Tensor) -> tuple[Tensor, Tensor]:
        """A step over h and a gated one over its result, to which h is added: the results of both."""
        first, both, _held = self._forward(up, h, None)
        second, y, _kept = self._forward(down, both, h)
        self._run("gated", h.dtype, ctypes.byref(first), ctypes.byref(second))
        return both, y

    def backward(self, asked: Step, h: Tensor, g: Tensor, *, wanted: bool, extra: Tensor | None = None) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of h, where it is `wanted`, and fp32 of the pairs, from that of y, g [T, out].

        `step.note` is told as kernels.py says; `extra`, which has the shape of h, is added to the gradient of h where the step has a norm.
        """
        dh = self._buffers.empty(tuple(h.shape), h.dtype) if wanted else None
        back = self._backward(asked, h, g, dh=dh, extra=extra)
        self._run("linear_back", h.dtype, ctypes.byref(back.call))
        back.tell()
        return dh, back.found

    def gated_back(self, up: Step, down: Step, h: Tensor, both: Tensor, g: Tensor, *, wanted: bool) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """The gradients of h, where it is `wanted`, and of both steps' pairs, from that of what `gated` gave last, g; `both` is what it gave first."""
        if up.step.note is not None or not wanted:  # the gradient of `both` must be seen, or the first step may not matter
            slope, of_down = self.backward(down, both, g, wanted=wanted or bool(up.pairs))
            dh, of_up = (None, list[Tensor]()) if slope is None else self.backward(up, h, slope, wanted=wanted, extra=g)
            return dh, of_up, of_down
        dh = self._buffers.empty(tuple(h.shape), h.dtype)
        first, second = self._backward(up, h, None, dh=dh, extra=g), self._backward(down, both, g)
        self._run("gated_back", h.dtype, ctypes.byref(first.call), ctypes.byref(second.call))
        return dh, first.found, second.found

    def times(self, panels: Panels, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in] → [T, out]."""
        y = self._buffers.empty((x.shape[0], panels.outputs), x.dtype)
        call = _bare(panels, x)
        call.y, call.bias = y.data_ptr(), _address(bias)
        self._run("linear", x.dtype, ctypes.byref(call))
        return y

    def back(self, panels: Panels, g: Tensor) -> Tensor:
        """The gradient [T, in] of what `times` reads, from that of its result."""
        dx = self._buffers.empty((g.shape[0], panels.inputs), g.dtype)
        call = _bare(panels, g)
        call.g, call.dh = g.data_ptr(), dx.data_ptr()
        self._run("linear_back", g.dtype, ctypes.byref(call))
        return dx

    def scores(self, panels: Panels, h: Tensor, targets: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """log p fp32 [R] of targets int64 [R] under a matrix on h [R, in], in nats; with `slope` the gradient of each with respect to its h."""
        found, dh = h.new_empty(h.shape[0], dtype=torch.float32), torch.empty_like(h) if slope else None
        call, given = _bare(panels, h), targets.contiguous()
        call.dh = _address(dh)
        self._run("scores", h.dtype, ctypes.byref(call), _P(given.data_ptr()), _P(found.data_ptr()))
        return found, dh

    def _forward(self, asked: Step, h: Tensor, residual: Tensor | None) -> tuple[_Call, Tensor, object]:
        """The call, what it fills, and what must live until it is over."""
        step, rows = asked.step, h.shape[0]
        y = self._buffers.empty((rows, asked.panels.outputs), h.dtype)
        r = h.new_empty((rows, 1), dtype=torch.float32) if step.norm is not None else None
        low = self._buffers.empty((rows, _ranks(asked.pairs)), h.dtype) if asked.pairs else None
        asked.kept = Kept(r, low)
        call, held = _call(asked, h, ())
        residual = None if residual is None else residual.contiguous()
        call.y, call.residual = y.data_ptr(), _address(residual)
        return call, y, (held, residual)

    def _backward(self, asked: Step, h: Tensor, g: Tensor | None, *, dh: Tensor | None = None, extra: Tensor | None = None) -> _Back:
        noted = asked.step.note is not None and bool(asked.pairs)
        found = [torch.empty(pair.shape, dtype=torch.float32) for pair in asked.pairs]
        call, held = _call(asked, h, found)
        inner = h.new_empty((h.shape[0], _ranks(asked.pairs))) if noted else None
        dropped = h.new_empty((h.shape[0], asked.panels.inputs)) if noted else None
        call.g, call.dh, call.extra = _address(g), _address(dh), _address(extra)
        call.inner, call.dropped = _address(inner), _address(dropped)
        return _Back(asked, call, found, g, inner, dropped, held)


@dataclass(slots=True, frozen=True, eq=False)
class _Back:
    """A backward call with what it fills and what must live until it is over."""

    asked: Step
    call: _Call
    found: list[Tensor]
    g: Tensor | None
    inner: Tensor | None
    dropped: Tensor | None
    held: object

    def tell(self) -> None:
        """Tells the step's `note` of the matrices whose products are the gradients of its pairs."""
        step, low = self.asked.step, self.asked.kept.low
        if step.note is None or self.g is None or self.inner is None or self.dropped is None or low is None:
            return
        first, columns = 0, list[Tensor]()
        for part, a in zip(step.parts, self.asked.pairs[::2], strict=True):
            step.note(self.g[:, part.low : part.high], low[:, first : first + a.shape[0]], 1.0)
            columns.append(self.inner[:, first : first + a.shape[0]])
            first += _up(a.shape[0])
        step.note(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1), self.dropped, 1.0)


def _up(ranks: int) -> int:
    return -(-ranks // _BLOCK) * _BLOCK


def _ranks(pairs: Sequence[Tensor]) -> int:
    return sum(_up(a.shape[0]) for a in pairs[::2])


def _bare(panels: Panels, h: Tensor) -> _Call:
    """A matrix alone."""
    forward, backward = panels.forward.data_ptr(), panels.backward.data_ptr()
    return _Call(h=h.data_ptr(), forward=forward, backward=backward, rows=h.shape[0], inputs=panels.inputs, outputs=panels.outputs)


def _call(asked: Step, h: Tensor, found: Sequence[Tensor]) -> tuple[_Call, object]:
    """What both directions say alike, and what must live until the call is over."""
    step, panels = asked.step, asked.panels
    exact = [pair.detach().to(torch.float32).contiguous() for pair in asked.pairs]
    parts, first = (_Part * max(len(step.parts), 1))(), 0
    for place, part in enumerate(step.parts):
        a, b = exact[2 * place : 2 * place + 2]
        rows = slice(0, h.shape[0]) if part.rows is None else part.rows
        gradients = (tensor.data_ptr() for tensor in found[2 * place : 2 * place + 2]) if found else (None, None)
        parts[place] = _Part(part.low, part.high, rows.start, rows.stop, first, a.shape[0], part.factor, a.data_ptr(), b.data_ptr(), *gradients)
        first += _up(a.shape[0])
    drops = (_Drop * max(len(step.drops), 1))(*(_Drop(rows.start, rows.stop, drop.start, drop.threshold) for rows, drop in step.drops))
    call = _bare(panels, h)
    call.norm, call.eps, call.gated, call.bias = _address(step.norm), step.eps, int(step.gated), _address(step.frozen.bias)
    call.low, call.r = _address(asked.kept.low), _address(asked.kept.r)
    call.parts, call.part, call.ranks = len(step.parts), ctypes.addressof(parts), first
    call.drops, call.drop = len(step.drops), ctypes.addressof(drops)
    return call, (exact, parts, drops)

"""The elementwise work between the matrix products of a decoder, as one walk over memory each.

Every step is there twice: in C++ (native/train.cpp), used on a processor where it could be compiled, and in torch, used everywhere else;
their numbers agree to rounding. All of it runs without a graph: kernels.py and attention.py give it its place in a backward pass. This
file does not know layers, adapters or models.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .buffers import Buffers
from .linear import Linear
from .native import library

__all__ = ["Drop", "Span", "Walks"]

_POINTER, _INT, _FLOAT, _WORD = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_uint64
_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "norm": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT),
    "norm_back": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT),
    "gate": (_POINTER, _POINTER, _INT, _INT),
    "gate_back": (_POINTER, _POINTER, _POINTER, _INT, _INT),
    "drop": (_POINTER, _POINTER, _INT, _INT, _WORD, _INT),
    "drop_add": (_POINTER, _POINTER, _INT, _INT, _WORD, _INT),
    "rotate": (_POINTER, _INT, _INT, _INT, _INT, _POINTER, _POINTER, _FLOAT),
    "fold": (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _FLOAT),
    "unfold": (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _FLOAT, _INT),
    "softmax": (_POINTER, _POINTER, _INT, _INT, _INT, _INT),
    "softmax_back": (_POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT),
    "score": (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT),
}
_GOLDEN, _FIRST, _SECOND, _WORD_MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1
STEPS = 1 << 16
"""Dropout compares 16 random bits per number, so its probability is a whole number of these steps."""


# --------------------------------------------------------------------------------------------------------------- records
@dataclass(slots=True, frozen=True, eq=False)
class Span:
    """`count` runs of `length` tokens each from `start` on, that see their own run only.

    Attributes:
        mask: float broadcastable to [count, 1, length − skip, length], added to the scores; where None, a token sees those before it and itself.
        skip: tokens at the run's start whose own attention an earlier span computes; the others see them.
    """

    start: int
    count: int
    length: int
    mask: Tensor | None = None
    skip: int = 0

    @property
    def stop(self) -> int:
        """One beyond the last token."""
        return self.start + self.count * self.length


def _mixed(z: int) -> int:
    """The finaliser of splitmix64. Source: Steele, Lea & Flood 2014, OOPSLA, and Vigna's reference code."""
    z = ((z ^ (z >> 30)) * _FIRST) & _WORD_MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _WORD_MASK
    return z ^ (z >> 31)


@dataclass(slots=True, frozen=True)
class Drop:
    """A dropout mask as a function of a seed and a key, so that it can be made again anywhere and is never kept.

    Attributes:
        seed, key: whole numbers; together they name the mask.
        threshold: a number is zeroed with probability threshold / `STEPS`.
    """

    seed: int
    key: int
    threshold: int

    @property
    def start(self) -> int:
        """Where the counter starts."""
        return _mixed((self.seed ^ _mixed(self.key + _GOLDEN)) & _WORD_MASK)

    def kept(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """bool of the shape, False where a number is zeroed."""
        if device.type != "cpu":
            there = torch.Generator(device).manual_seed(self.start >> 1)
            return torch.rand(shape, generator=there, device=device) >= self.threshold / STEPS
        count = math.prod(shape)
        return torch.from_numpy((_random(self.start, -(-count // 4)).view(np.uint16)[:count] >= self.threshold).reshape(shape))


def _random(start: int, words: int) -> NDArray[np.uint64]:
    """A counter's words through splitmix64's finaliser."""
    z = np.arange(1, words + 1, dtype=np.uint64)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(start)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


class _CSpan(ctypes.Structure):
    _fields_ = (("start", ctypes.c_int32), ("count", ctypes.c_int32), ("length", ctypes.c_int32), ("skip", ctypes.c_int32))


def _exact(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------------------------- walks
class Walks:
    """The steps, in C++ where that was compiled and the tensors are fp32 or bf16 on a processor.

    Args:
        folder: where compiled code is kept, also that of other libraries; None: torch alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.buffers = folder, Buffers()
        self._library = None if folder is None else library("train.cpp", folder)

    @cached_property
    def linear(self) -> Linear | None:
        """Whole matrix steps, where they were compiled."""
        return Linear.of(self.folder, self.buffers)

    @property
    def compiled(self) -> bool:
        """Whether there is compiled code."""
        return self._library is not None

    def covers(self, *tensors: Tensor) -> bool:
        """Whether compiled code takes these tensors: of one dtype, on a processor, without gaps."""
        first = tensors[0]
        return self.compiled and first.dtype in _KINDS and all(t.device.type == "cpu" and t.dtype == first.dtype and t.is_contiguous() for t in tensors)

    def _call(self, name: str, kind: torch.dtype, *arguments: object) -> None:
        function = getattr(self._library, f"crucible_{name}_{_KINDS[kind]}")
        if function.argtypes is None:
            function.argtypes, function.restype = _SIGNATURES[name], None
        function(*arguments)

    # ------------------------------------------------------------------------------------------------------- norm, gate
    def norm(self, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Root-mean-square norm over the last dimension, and 1 / rms in fp32. Source: Zhang & Sennrich 2019, arXiv 1910.07467."""
        if self.covers(h, weight) and weight.ndim == 1:
            y, r = torch.empty_like(h), h.new_empty((*h.shape[:-1], 1), dtype=torch.float32)
            self._call("norm", h.dtype, h.data_ptr(), weight.data_ptr(), y.data_ptr(), r.data_ptr(), r.numel(), h.shape[-1], eps)
            return y, r
        exact = _exact(h)
        r = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
        return (exact * r).to(h.dtype).mul_(weight), r

    def norm_back(self, g: Tensor, h: Tensor, weight: Tensor, r: Tensor) -> Tensor:
        """The gradient with respect to h."""
        if self.covers(g, h, weight) and weight.ndim == 1:
            dh = torch.empty_like(h)
            self._call("norm_back", h.dtype, g.data_ptr(), h.data_ptr(), weight.data_ptr(), r.data_ptr(), dh.data_ptr(), r.numel(), h.shape[-1])
            return dh
        up, x = _exact(g * weight), _exact(h)
        slope = torch.linalg.vecdot(up, x)[..., None].mul_(r.pow(3)).div_(-h.shape[-1])
        return (up * r).addcmul_(x, slope).to(h.dtype)

    def gate(self, both: Tensor) -> Tensor:
        """silu(a) · b of [T, 2 W] = (a, b). Source: Shazeer 2020, arXiv 2002.05202."""
        if self.covers(both):
            y = both.new_empty((both.shape[0], both.shape[1] // 2))
            self._call("gate", both.dtype, both.data_ptr(), y.data_ptr(), *y.shape)
            return y
        a, b = both.chunk(2, -1)
        return functional.silu(a).mul_(b)

    def gate_back(self, g: Tensor, both: Tensor) -> Tensor:
        """The gradient with respect to both halves; `g` may be overwritten."""
        result = torch.empty_like(both)
        if self.covers(g, both):
            self._call("gate_back", both.dtype, g.data_ptr(), both.data_ptr(), result.data_ptr(), *g.shape)
            return result
        a, b = both.chunk(2, -1)
        da, db = result.chunk(2, -1)
        torch.mul(g, functional.silu(a), out=db)
        torch.ops.aten.silu_backward.grad_input(g.mul_(b), a, grad_input=da)
        return result

    # ---------------------------------------------------------------------------------------------------------- dropout
    def drop(self, x: Tensor, drop: Drop) -> Tensor:
        """x [T, W] with some numbers zeroed; those that stay are not raised."""
        if self.covers(x) and x.shape[1] % 4 == 0:
            y = torch.empty_like(x)
            self._call("drop", x.dtype, x.data_ptr(), y.data_ptr(), *x.shape, drop.start, drop.threshold)
            return y
        return drop.kept(tuple(x.shape), x.device).to(x.dtype).mul_(x)

    def drop_add(self, y: Tensor, x: Tensor, drop: Drop) -> None:
        """Adds x [T, W] with some numbers zeroed to y."""
        if self.covers(x, y) and x.shape[1] % 4 == 0:
            self._call("drop_add", x.dtype, x.data_ptr(), y.data_ptr(), *x.shape, drop.start, drop.threshold)
        else:
            y.addcmul_(x, drop.kept(tuple(x.shape), x.device).to(x.dtype))

    # -------------------------------------------------------------------------------------------------------- attention
    def rotate(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
        """Turns the first `heads` of [T, …, D] in place by angles [T, 1, D / 2]. Source: Su et al. 2021, arXiv 2104.09864."""
        size, sign = x.shape[-1], -1.0 if back else 1.0
        if self.covers(x, cos, sin):
            self._call("rotate", x.dtype, x.data_ptr(), x.shape[0], x.shape[1] * size, heads, size, cos.data_ptr(), sin.data_ptr(), sign)
            return
        first, second = x[:, :heads, : size // 2], x[:, :heads, size // 2 :]
        before = first.clone()
        first.mul_(cos).addcmul_(second, sin, value=-sign)
        second.mul_(cos).addcmul_(before, sin, value=sign)

    def fold(self, x: Tensor, span: Span, first: int, heads: int, *, scale: float = 1.0) -> Tensor:
        """Heads `first` … of a span's tokens in [T, all heads, D], without those it skips, as [count, heads, length − skip, D], scaled."""
        size, kept = x.shape[-1], span.length - span.skip
        if self.covers(x):
            out = x.new_empty((span.count, heads, kept, size))
            place = _CSpan(span.start, span.count, span.length, span.skip)
            self._call("fold", x.dtype, x.data_ptr(), out.data_ptr(), ctypes.addressof(place), x.shape[1] * size, first, heads, size, scale)
            return out
        rows = _rows(x, span)[:, span.skip :, first : first + heads].transpose(1, 2)
        return (rows * scale) if scale != 1.0 else rows.contiguous()

    def unfold(self, folded: Tensor, x: Tensor, span: Span, first: int, *, scale: float = 1.0, add: int = 0) -> None:
        """Writes [count, heads, length − skip, D], scaled, back to its place in x; the first `add` tokens of a run are added to."""
        size, heads = x.shape[-1], folded.shape[1]
        if self.covers(folded, x):
            place = _CSpan(span.start, span.count, span.length, span.skip)
            stride = x.shape[1] * size
            self._call("unfold", x.dtype, folded.data_ptr(), x.data_ptr(), ctypes.addressof(place), stride, first, heads, size, scale, add)
            return
        rows = _rows(x, span)[:, span.skip :, first : first + heads]
        values = folded.transpose(1, 2) * scale if scale != 1.0 else folded.transpose(1, 2)
        rows[:, :add].add_(values[:, :add])
        rows[:, add:].copy_(values[:, add:])

    def softmax(self, scores: Tensor, span: Span) -> Tensor:
        """Softmax of scores [B, G · (length − skip), length] over what each token sees, in place where that can be."""
        kept = span.length - span.skip
        mask = None if span.mask is None else span.mask.float().reshape(kept, span.length).contiguous()
        if self.covers(scores):
            rows, pointer = scores.numel() // span.length, 0 if mask is None else mask.data_ptr()
            self._call("softmax", scores.dtype, scores.data_ptr(), pointer, rows, kept, span.length, span.skip)
            return scores
        if mask is None:
            mask = scores.new_full((kept, span.length), torch.finfo(scores.dtype).min).triu_(span.skip + 1)
        scores.view(-1, kept, span.length).add_(mask.to(scores.dtype))
        return scores.softmax(-1)

    def softmax_back(self, g: Tensor, p: Tensor, span: Span) -> Tensor:
        """The gradient of the scores from that of the probabilities p; `g` may be overwritten."""
        if self.covers(g, p):
            causal = int(span.mask is None)
            kept, rows = span.length - span.skip, g.numel() // span.length
            self._call("softmax_back", g.dtype, g.data_ptr(), p.data_ptr(), rows, kept, span.length, span.skip, causal)
            return g
        return cast("Tensor", torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype))

    # ------------------------------------------------------------------------------------------------------------- head
    def score(self, logits: Tensor, targets: Tensor, *, slope: bool) -> tuple[Tensor, Tensor]:
        """log p fp32 [R] of targets [R] under logits [R, V] in nats and, with `slope`, its gradient with respect to the logits, maybe in their place."""
        if self.covers(logits):
            scores = logits.new_empty(logits.shape[0], dtype=torch.float32)
            self._call("score", logits.dtype, logits.data_ptr(), targets.data_ptr(), scores.data_ptr(), *logits.shape, int(slope))
            return scores, logits
        z, index = logits.float(), targets[:, None]
        norm = z.logsumexp(-1, keepdim=True)
        scores = (z.gather(1, index) - norm)[:, 0]
        if slope:
            z.sub_(norm).exp_().neg_().scatter_add_(1, index, torch.ones_like(norm))
        return scores, z.to(logits.dtype)


def _rows(x: Tensor, span: Span) -> Tensor:
    """A span's tokens as [count, length, heads, D], a view."""
    return torch.unflatten(x[span.start : span.stop], 0, (span.count, span.length))

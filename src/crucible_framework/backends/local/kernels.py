"""The matrix steps that a decoder is made of, each with a backward pass of its own that keeps little.

What frozen weights allow is used: no gradient of a weight, none below the first adapted layer, a norm or a gate is computed again
instead of kept, and the matrices may be packed for oneDNN. Tokens stand in one dimension, [T, width]. This file does not know attention,
models, layouts or adapters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Context", "Frozen", "LoraMatmul", "Matmul", "Norm", "Part", "can_pack", "gate", "norm_back", "normed", "target_scores"]

_PACK_ROWS = 8
"""From so many rows on the packed matrix is the faster one in fp32; one row reads the plain one at memory speed."""
_CHUNK = 128
"""Rows of logits that exist at a time: [128, vocabulary] in fp32 stays near the cache."""


class Context(Protocol):
    """What is used of autograd's context."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps tensors."""
        ...


# ------------------------------------------------------------------------------------------------------ frozen matrices
def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can hold the matrix in its own order here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@dataclass(slots=True, eq=False)
class Frozen:
    """A matrix [out, in] that never changes, with an optional bias [out]; with `pack`, copies in oneDNN's order are made on first use."""

    weight: Tensor
    bias: Tensor | None = None
    pack: bool = False
    _forward: Tensor | None = field(default=None, init=False)
    _backward: Tensor | None = field(default=None, init=False)

    def times(self, x: Tensor) -> Tensor:
        """[T, in] → [T, out], a new tensor."""
        if not self._packed(x):
            return functional.linear(x, self.weight, self.bias)
        if self._forward is None:
            self._forward = _reordered(self.weight)
        return _packed_linear(x, self._forward, self.bias)

    def back(self, g: Tensor) -> Tensor:
        """The gradient [T, in] with respect to x, of that [T, out] with respect to the result."""
        if not self._packed(g):
            return g @ self.weight
        if self._backward is None:
            self._backward = _reordered(self.weight.t().contiguous())
        return _packed_linear(g, self._backward, None)

    def _packed(self, x: Tensor) -> bool:
        return self.pack and (x.shape[0] >= _PACK_ROWS or x.dtype == torch.bfloat16)


def _reordered(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return cast("Tensor", torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1024))


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


# ------------------------------------------------------------------------------------------------------------ norm, gate
def _exact(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normed(h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, and 1 / rms in fp32. Source: Zhang & Sennrich 2019, arXiv 1910.07467."""
    wide = _exact(h)
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    return (wide * r).to(h.dtype).mul_(weight), r


def norm_back(g: Tensor, h: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """The gradient with respect to h; `g` may be overwritten."""
    wide, x = _exact(g.mul_(weight)), _exact(h)
    slope = torch.linalg.vecdot(wide, x)[..., None].mul_(r.pow(3)).div_(-h.shape[-1])
    return (wide * r).addcmul_(x, slope).to(h.dtype)


def gate(both: Tensor) -> Tensor:
    """silu(a) · b of [T, 2 W] = (a, b). Source: Shazeer 2020, arXiv 2002.05202."""
    a, b = both.chunk(2, -1)
    return functional.silu(a).mul_(b)


def _gate_back(g: Tensor, both: Tensor) -> Tensor:
    """The gradient with respect to both halves; `g` is overwritten."""
    a, b = both.chunk(2, -1)
    result = torch.empty_like(both)
    da, db = result.chunk(2, -1)
    torch.mul(g, functional.silu(a), out=db)
    torch.ops.aten.silu_backward.grad_input(g.mul_(b), a, grad_input=da)
    return result


# ---------------------------------------------------------------------------------------------------------- matmul + LoRA
@dataclass(slots=True, eq=False)
class Part:
    """An adapter on some rows of a matrix: a pair of tensors A [rank, in] and B [rows, rank] belongs to it.

    Attributes:
        low, high: the output columns.
        mask: bool [T, in], False where dropout zeroes the input; None without dropout.
    """

    low: int
    high: int
    mask: Tensor | None = None


@dataclass(slots=True, eq=False)
class Matmul:
    """One step of a layer: (norm or gate, then) a frozen matrix, adapters on it, and a residual.

    Attributes:
        frozen: the matrix.
        parts: the adapters, all with masks or all without.
        scale: of the adapters, dropout's 1 / (1 − p) included.
        norm: weight of the norm before the matrix.
        eps: of the norm.
        gated: the input is [T, 2 · in] and goes through `gate` first.
    """

    frozen: Frozen
    parts: Sequence[Part] = ()
    scale: float = 1.0
    norm: Tensor | None = None
    eps: float = 0.0
    gated: bool = False

    def enter(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the matrix reads, and 1 / rms where there is a norm."""
        if self.norm is not None:
            return normed(h, self.norm, self.eps)
        return (gate(h), None) if self.gated else (h, None)

    def leave(self, g: Tensor, h: Tensor, r: Tensor | None) -> Tensor:
        """The gradient with respect to h of that with respect to what `enter` gave."""
        if self.norm is not None and r is not None:
            return norm_back(g, h, self.norm, r)
        return _gate_back(g, h) if self.gated else g


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else mask.to(x.dtype).mul_(x)


def _joint(pairs: Sequence[Tensor]) -> Tensor:
    """The A matrices above each other, so that one product serves all."""
    return pairs[0] if len(pairs) == 2 else torch.cat(tuple(pairs[::2]))


def _low_rank(step: Matmul, x: Tensor, pairs: Sequence[Tensor]) -> list[Tensor]:
    """Per part A x [T, rank]."""
    if step.parts[0].mask is None:
        return list(torch.split(x @ _joint(pairs).t(), [a.shape[0] for a in pairs[::2]], dim=1))
    return [_dropped(x, part.mask) @ a.t() for part, a in zip(step.parts, pairs[::2], strict=True)]


class LoraMatmul(torch.autograd.Function):
    """y = W x + b (+ residual), each part of y plus scale · B A x; x is `step.enter(h)`.

    Called as `apply(h, residual, step, A, B, A, B, …)`. It keeps h, the products A x and the masks; the pairs are of h's dtype.
    """

    @staticmethod
    def forward(ctx: Context, h: Tensor, residual: Tensor | None, step: Matmul, *pairs: Tensor) -> Tensor:
        """See the class."""
        x, r = step.enter(h)
        y = step.frozen.times(x)
        low = _low_rank(step, x, pairs) if pairs else []
        for part, a, b in zip(step.parts, low, pairs[1::2], strict=bool(pairs)):
            y[:, part.low : part.high].addmm_(a, b.t(), alpha=step.scale)
        if residual is not None:
            y.add_(residual)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(h, *([] if r is None else [r]), *pairs, *low)
            ctx.step, ctx.count = step, len(pairs)  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of h, of the residual and of the pairs."""
        (g,) = grad_outputs
        step, count = cast("Matmul", ctx.step), cast("int", ctx.count)  # type: ignore[attr-defined]
        h, *kept = ctx.saved_tensors
        r = kept.pop(0) if step.norm is not None else None
        pairs, low = kept[:count], kept[count:]
        wanted = ctx.needs_input_grad[0]
        dx = step.frozen.back(g) if wanted else None
        found: list[Tensor | None] = []
        if pairs:
            x = step.enter(h)[0] if step.norm is not None or step.gated else h
            found = _pair_gradients(step, x, g, pairs=pairs, low=low, dx=dx)
        dh = step.leave(dx, h, r) if dx is not None else None
        return dh, g if ctx.needs_input_grad[1] else None, None, *found


def _pair_gradients(step: Matmul, x: Tensor, g: Tensor, *, pairs: Sequence[Tensor], low: Sequence[Tensor], dx: Tensor | None) -> list[Tensor | None]:
    """The gradients of A, B, A, B, …; what comes through the adapters is added to `dx`."""
    found: list[Tensor | None] = []
    inner = list[Tensor]()
    for part, a, b in zip(step.parts, low, pairs[1::2], strict=True):
        mine = g[:, part.low : part.high]
        inner.append((mine @ b).mul_(step.scale))
        found += [None, (mine.t() @ a).mul_(step.scale)]
    if step.parts[0].mask is None:
        joined = inner[0] if len(inner) == 1 else torch.cat(inner, dim=1)
        found[::2] = torch.split(joined.t() @ x, [d.shape[1] for d in inner])
        if dx is not None:
            dx.addmm_(joined, _joint(pairs))
        return found
    for place, (part, d, a) in enumerate(zip(step.parts, inner, pairs[::2], strict=True)):
        mask = cast("Tensor", part.mask).to(x.dtype)
        found[2 * place] = d.t() @ (mask * x)
        if dx is not None:
            dx.addcmul_(d @ a, mask)
    return found


# ------------------------------------------------------------------------------------------------------------------ head
class Norm(torch.autograd.Function):
    """The norm before the head; called as `apply(h, weight, eps)`."""

    @staticmethod
    def forward(ctx: Context, h: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See the class."""
        y, r = normed(h, weight, eps)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(h, weight, r)
        return y

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of h."""
        (g,) = grad_outputs
        h, weight, r = ctx.saved_tensors
        return norm_back(g.clone(), h, weight, r), None, None


class _TargetScores(torch.autograd.Function):
    """log p of one target per row. The gradient of a row's number is computed with it, so logits live for one chunk only."""

    @staticmethod
    def forward(ctx: Context, h: Tensor, frozen: Frozen, targets: Tensor) -> Tensor:
        """See the class."""
        result = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
        slope = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, h.shape[0], _CHUNK):
            rows = slice(start, start + _CHUNK)
            index = targets[rows, None]
            z = frozen.times(h[rows]).float()
            norm = z.logsumexp(-1, keepdim=True)
            result[rows] = (z.gather(1, index) - norm)[:, 0]
            if slope is not None:
                z.sub_(norm).exp_().neg_().scatter_add_(1, index, torch.ones_like(norm))
                slope[rows] = frozen.back(z.to(h.dtype))
        if slope is not None:
            ctx.save_for_backward(slope)
        return result

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of h."""
        (g,) = grad_outputs
        (slope,) = ctx.saved_tensors
        return slope * g[:, None].to(slope.dtype), None, None


def target_scores(hidden: Tensor, frozen: Frozen, targets: Tensor) -> Tensor:
    """log p fp32 [R] of targets [R] under the head on hidden states [R, H], in nats; never more than a chunk of logits exists."""
    apply = cast("Callable[[Tensor, Frozen, Tensor], Tensor]", _TargetScores.apply)
    return apply(hidden if torch.is_grad_enabled() else hidden.detach(), frozen, targets)

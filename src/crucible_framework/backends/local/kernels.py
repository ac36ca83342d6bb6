"""The matrix steps that a decoder is made of, each with a backward pass of its own that keeps little.

What frozen weights allow is used: no gradient of a weight, none below the first adapted layer, a norm or a gate is computed again
instead of kept, and the matrices may be packed. Tokens stand in one dimension, [T, width]. Adapters stay fp32 and are rounded
to the dtype of the base where they are used. This file does not know attention, models, layouts or adapters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from .linear import Linear, Panels
from .walks import Drop, Walks

__all__ = ["Context", "Frozen", "LoraMatmul", "Matmul", "Norm", "Part", "can_pack", "target_scores"]

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
    """A matrix [out, in] that never changes, with an optional bias [out]; with `pack`, copies in another order are made on first use.

    Attributes:
        linear: what multiplies with copies of its own, where it takes the matrix; else they are oneDNN's.
    """

    weight: Tensor
    bias: Tensor | None = None
    pack: bool = False
    linear: Linear | None = None
    _panels: Panels | None = field(default=None, init=False)
    _forward: Tensor | None = field(default=None, init=False)
    _backward: Tensor | None = field(default=None, init=False)

    @property
    def panels(self) -> Panels | None:
        """The matrix in the order of `linear`, which is then there."""
        if self._panels is None and self.pack and self.linear is not None and self.linear.takes(self.weight):
            self._panels = self.linear.panels(self.weight)
        return self._panels

    def times(self, x: Tensor) -> Tensor:
        """[T, in] → [T, out], a new tensor."""
        if not self._packed(x):
            return functional.linear(x, self.weight, self.bias)
        if self.linear is not None and x.dtype == self.weight.dtype and (panels := self.panels) is not None:
            return self.linear.times(panels, x.contiguous(), self.bias)
        if self._forward is None:
            self._forward = _reordered(self.weight)
        return _packed_linear(x, self._forward, self.bias)

    def back(self, g: Tensor) -> Tensor:
        """The gradient [T, in] with respect to x, of that [T, out] with respect to the result."""
        if not self._packed(g):
            return g @ self.weight
        if self.linear is not None and g.dtype == self.weight.dtype and (panels := self.panels) is not None:
            return self.linear.back(panels, g.contiguous())
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


# ---------------------------------------------------------------------------------------------------------- matmul + LoRA
@dataclass(slots=True, frozen=True, eq=False)
class Part:
    """An adapter on some rows of a matrix: a pair of tensors A [rank, in] and B [high − low, rank] belongs to it.

    Attributes:
        low, high: the output columns.
        scale: of A x: a number, or [T, rank] where every token has its own.
        rows: the tokens that use it, all where None; only compiled steps know others.
    """

    low: int
    high: int
    scale: float | Tensor
    rows: slice | None = None

    @property
    def factor(self) -> float:
        """The scale where it is one number, else 1."""
        return 1.0 if isinstance(self.scale, Tensor) else self.scale


@dataclass(slots=True, eq=False)
class Matmul:
    """One step of a layer: (norm or gate, then) a frozen matrix, adapters on it, and a residual.

    Attributes:
        frozen: the matrix.
        walks: how elementwise work is done.
        parts: the adapters.
        drops: which rows of the adapters' input go through which dropout mask; those that are not named are kept.
        norm: weight of the norm before the matrix.
        eps: of the norm.
        gated: the input is [T, 2 · in] and goes through a gate first.
        note: told, in the backward pass, the two matrices whose product is a gradient of the adapter's, and a factor.
    """

    frozen: Frozen
    walks: Walks
    parts: Sequence[Part] = ()
    drops: Sequence[tuple[slice, Drop]] = ()
    norm: Tensor | None = None
    eps: float = 0.0
    gated: bool = False
    note: Callable[[Tensor, Tensor, float], None] | None = None

    def compiled(self, h: Tensor) -> Linear | None:
        """The compiled calls, where they cover this step over h."""
        return self.frozen.linear if Linear.covers(self, h) and self.frozen.panels is not None else None

    def enter(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the matrix reads, and 1 / rms where there is a norm."""
        if self.norm is not None:
            return self.walks.norm(h, self.norm, self.eps)
        return (self.walks.gate(h), None) if self.gated else (h, None)

    def leave(self, g: Tensor, h: Tensor, r: Tensor | None) -> Tensor:
        """The gradient with respect to h of that with respect to what `enter` gave."""
        if self.norm is not None and r is not None:
            return self.walks.norm_back(g, h, self.norm, r)
        return self.walks.gate_back(g, h) if self.gated else g

    def dropped(self, x: Tensor) -> Tensor:
        """What the adapters read."""
        if not self.drops:
            return x
        if len(self.drops) == 1 and self.drops[0][0] == slice(0, x.shape[0]):
            return self.walks.drop(x, self.drops[0][1])
        y = x.clone()
        for rows, drop in self.drops:
            y[rows] = self.walks.drop(x[rows], drop)
        return y

    def add_dropped(self, y: Tensor, d: Tensor) -> None:
        """Adds the gradient of what the adapters read to that of the input."""
        if not self.drops:
            y.add_(d)
        done = 0
        for rows, drop in self.drops:
            y[done : rows.start].add_(d[done : rows.start])
            self.walks.drop_add(y[rows], d[rows], drop)
            done = rows.stop
        if self.drops:
            y[done:].add_(d[done:])


class LoraMatmul(torch.autograd.Function):
    """y = W x + b (+ residual), each part of y plus B (scale · A x); x is `step.enter(h)`. Source: Hu et al. 2021, arXiv 2106.09685.

    Called as `apply(h, residual, step, A, B, A, B, …)`. It keeps h and the products A x; the pairs may be of a wider dtype than h.
    """

    @staticmethod
    def forward(ctx: Context, h: Tensor, residual: Tensor | None, step: Matmul, *pairs: Tensor) -> Tensor:
        """See the class."""
        x, r = step.enter(h)
        y = step.frozen.times(x)
        near = [pair.to(h.dtype) for pair in pairs]
        low = list(torch.split(step.dropped(x) @ _stacked(near).t(), [a.shape[0] for a in near[::2]], dim=1)) if pairs else []
        for place, (part, b) in enumerate(zip(step.parts, near[1::2], strict=bool(pairs))):
            if isinstance(part.scale, Tensor):
                low[place] = low[place] * part.scale
            y[:, part.low : part.high].addmm_(low[place], b.t(), alpha=part.factor)
        if residual is not None:
            y.add_(residual)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(h, *([] if r is None else [r]), *near, *low)
            ctx.step, ctx.dtypes = step, [pair.dtype for pair in pairs]  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of h, of the residual and of the pairs."""
        g = grad_outputs[0].contiguous()
        step, dtypes = cast("Matmul", ctx.step), cast("list[torch.dtype]", ctx.dtypes)  # type: ignore[attr-defined]
        h, *kept = ctx.saved_tensors
        r = kept.pop(0) if step.norm is not None else None
        pairs, low = kept[: len(dtypes)], kept[len(dtypes) :]
        wanted = ctx.needs_input_grad[0]
        dx = step.frozen.back(g) if wanted else None
        found: list[Tensor] = []
        if pairs:
            x = step.enter(h)[0] if step.norm is not None or step.gated else h
            found = _pair_gradients(step, x, g, pairs=pairs, low=low, dx=dx)
        dh = step.leave(dx, h, r) if dx is not None else None
        return dh, g if ctx.needs_input_grad[1] else None, None, *(t.to(dtype) for t, dtype in zip(found, dtypes, strict=True))


def _stacked(pairs: Sequence[Tensor]) -> Tensor:
    """The A matrices above each other, so that one product serves all."""
    return pairs[0] if len(pairs) == 2 else torch.cat(tuple(pairs[::2]))


def _pair_gradients(step: Matmul, x: Tensor, g: Tensor, *, pairs: Sequence[Tensor], low: Sequence[Tensor], dx: Tensor | None) -> list[Tensor]:
    """The gradients of A, B, A, B, …; what comes through the adapters is added to `dx`."""
    inner, second = list[Tensor](), list[Tensor]()
    for part, a, b in zip(step.parts, low, pairs[1::2], strict=True):
        mine = g[:, part.low : part.high]
        inner.append((mine @ b).mul_(part.scale))
        second.append(mine.t() @ a if isinstance(part.scale, Tensor) else (mine.t() @ a).mul_(part.scale))
        if step.note is not None:
            step.note(mine, a, part.factor)
    joined = inner[0] if len(inner) == 1 else torch.cat(inner, dim=1)
    dropped = step.dropped(x)
    first = torch.split(joined.t() @ dropped, [d.shape[1] for d in inner])
    if step.note is not None:
        step.note(joined, dropped, 1.0)
    if dx is not None and not step.drops:
        dx.addmm_(joined, _stacked(pairs))
    elif dx is not None:
        step.add_dropped(dx, joined @ _stacked(pairs))
    return [tensor for pair in zip(first, second, strict=True) for tensor in pair]


# ------------------------------------------------------------------------------------------------------------------ head
class Norm(torch.autograd.Function):
    """The norm before the head; called as `apply(h, weight, eps, walks)`."""

    @staticmethod
    def forward(ctx: Context, h: Tensor, weight: Tensor, eps: float, walks: Walks) -> Tensor:
        """See the class."""
        y, r = walks.norm(h, weight, eps)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(h, weight, r)
            ctx.walks = walks  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of h."""
        h, weight, r = ctx.saved_tensors
        walks = cast("Walks", ctx.walks)  # type: ignore[attr-defined]
        return walks.norm_back(grad_outputs[0].contiguous(), h, weight, r), None, None, None


class _TargetScores(torch.autograd.Function):
    """log p of one target per row. The gradient of a row's number is computed with it, so logits live for one chunk only."""

    @staticmethod
    def forward(ctx: Context, h: Tensor, frozen: Frozen, targets: Tensor, walks: Walks) -> Tensor:
        """See the class."""
        if frozen.linear is not None and frozen.bias is None and h.dtype == frozen.weight.dtype and (panels := frozen.panels) is not None:
            result, near = frozen.linear.scores(panels, h.contiguous(), targets, slope=ctx.needs_input_grad[0])
            if near is not None:
                ctx.save_for_backward(near)
            return result
        result = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
        slope = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, h.shape[0], _CHUNK):
            rows = slice(start, start + _CHUNK)
            result[rows], z = walks.score(frozen.times(h[rows]), targets[rows], slope=slope is not None)
            if slope is not None:
                slope[rows] = frozen.back(z)
        if slope is not None:
            ctx.save_for_backward(slope)
        return result

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of h."""
        (g,) = grad_outputs
        (slope,) = ctx.saved_tensors
        return slope * g[:, None].to(slope.dtype), None, None, None


def target_scores(hidden: Tensor, frozen: Frozen, targets: Tensor, walks: Walks) -> Tensor:
    """log p fp32 [R] of targets [R] under the head on hidden states [R, H], in nats; never more than a chunk of logits exists."""
    apply = cast("Callable[[Tensor, Frozen, Tensor, Walks], Tensor]", _TargetScores.apply)
    return apply(hidden if torch.is_grad_enabled() else hidden.detach(), frozen, targets, walks)

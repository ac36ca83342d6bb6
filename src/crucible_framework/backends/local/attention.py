"""Attention inside spans of packed tokens, with rotary positions, and its backward pass.

Runs that begin alike are one span for their common start and one for their ends, which see the start and themselves. This file does not
know models, layouts or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from .kernels import Context, norm_back, normed

__all__ = ["Attention", "Rotation", "Span", "attend", "rotate"]

_SHORT = 512
"""Tokens of a run up to which attention may keep its probabilities."""


@dataclass(slots=True, eq=False)
class Rotation:
    """Rotary positions of T tokens and the norms of queries and keys, where a model has them.

    Attributes:
        cos, sin: [T, 1, D / 2]; both halves of a head turn by the same angles.
        norm: [heads + key-value heads, D], or None.
    """

    cos: Tensor
    sin: Tensor
    norm: Tensor | None = None
    eps: float = 0.0

    def turn(self, x: Tensor, *, back: bool = False) -> None:
        """Rotates [T, heads, D] in place. Source: Su et al. 2021, arXiv 2104.09864."""
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        before = first.clone()
        sign = -1 if back else 1
        first.mul_(self.cos).addcmul_(second, self.sin, value=-sign)
        second.mul_(self.cos).addcmul_(before, self.sin, value=sign)


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


def _wide(x: Tensor, groups: int) -> Tensor:
    """Key-value heads [B, KV, L, D] repeated for the query heads that share them."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _by_products(x: Tensor, span: Span) -> bool:
    """Whether scores are kept as a matrix: on a processor that is faster for short runs with a mask, and in bf16 for all short runs."""
    return x.device.type == "cpu" and span.length <= _SHORT and (span.mask is not None or x.dtype == torch.bfloat16)


def _folded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, heads, L, D] with the heads that share a key-value head as rows of one product: [B · KV, heads / KV · L, D]; q scaled."""
    groups = q.shape[1] // k.shape[1]
    rows = torch.unflatten(q * q.shape[-1] ** -0.5, 1, (k.shape[1], groups)).flatten(2, 3).flatten(0, 1)
    return rows, k.flatten(0, 1), v.flatten(0, 1)


def _short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention by two products: [B, heads, L, D], and the probabilities [B · KV, heads / KV · L, L]."""
    length, width = q.shape[2], k.shape[2]
    rows, columns, values = _folded(q, k, v)
    if mask is None:
        mask = torch.full((length, length), torch.finfo(q.dtype).min, dtype=q.dtype).triu_(1)
    scores = torch.bmm(rows, columns.transpose(1, 2))
    scores.view(q.shape[0], k.shape[1], -1, length, width).add_(mask if mask.ndim == 2 else mask[:, :, None])
    p = scores.softmax(-1)
    return torch.bmm(p, values).view(q.shape), p


def _short_back(g: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_short` with respect to q, k and v."""
    rows, columns, values = _folded(q, k, v)
    up = torch.unflatten(g, 1, (k.shape[1], -1)).flatten(2, 3).flatten(0, 1)
    dv = torch.bmm(p.transpose(1, 2), up)
    slope = torch.ops.aten._softmax_backward_data(torch.bmm(up, values.transpose(1, 2)), p, -1, p.dtype)
    dq = torch.bmm(slope, columns).mul_(q.shape[-1] ** -0.5)
    return dq.view(q.shape), torch.bmm(slope.transpose(1, 2), rows).view(k.shape), dv.view(v.shape)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's fused attention on a processor: [B, heads, L, D], and the scores' norms."""
    out, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask)
    return out, norms


def _forward(x: Tensor, span: Span, queries: int, keys: int) -> tuple[Tensor, Tensor | None]:
    """A span's [count, heads, length, D], and what its backward pass needs."""
    q, k, v = _heads(x, span, queries, keys)
    if _by_products(x, span):
        return _short(q, k, v, span.mask)
    k, v = _wide(k, queries // keys), _wide(v, queries // keys)
    return _flash(q, k, v, span.mask) if x.device.type == "cpu" else (_sdpa(q, k, v, span.mask), None)


def _backward(g: Tensor, x: Tensor, o: Tensor, span: Span, *, kept: Tensor | None, heads: tuple[int, int]) -> Sequence[Tensor]:
    """The gradients of a span's q, k and v; those of k and v for every query head, or already summed."""
    queries, keys = heads
    q, k, v = _heads(x, span, queries, keys)
    up = _rows(g, span)[:, span.skip :].transpose(1, 2)
    if kept is not None and _by_products(x, span):
        return _short_back(up, q, k, v, kept)
    k, v = _wide(k, queries // keys), _wide(v, queries // keys)
    if kept is not None:
        out, back = _rows(o, span)[:, span.skip :].transpose(1, 2), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return cast("Sequence[Tensor]", back(up, q, k, v, out, kept, 0.0, span.mask is None, attn_mask=span.mask))
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (q, k, v)]
        return torch.autograd.grad(_sdpa(leaves[0], leaves[1], leaves[2], span.mask), leaves, up)


class Attention(torch.autograd.Function):
    """Causal attention of packed heads [T, heads + 2 · key-value heads, D] → [T, heads, D]; it rotates its input in place and owns it.

    Called as `apply(heads, count of query heads, rotation, spans)`.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, queries: int, rotation: Rotation, spans: Sequence[Span]) -> Tensor:
        """See the class."""
        keys = (x.shape[1] - queries) // 2
        raw = rotate(x, queries + keys, rotation)
        o = x.new_empty((x.shape[0], queries, x.shape[2]))
        kept = list[Tensor]()
        for span in spans:
            out, needed = _forward(x, span, queries, keys)
            _rows(o, span)[:, span.skip :].copy_(out.transpose(1, 2))
            kept += [] if needed is None else [needed]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, o, *kept, *(raw or ()))
            ctx.given = queries, keys, rotation, spans, len(kept)  # type: ignore[attr-defined]
        return o

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the heads as they came."""
        (g,) = grad_outputs
        queries, keys, rotation, spans, count = cast("tuple[int, int, Rotation, Sequence[Span], int]", ctx.given)  # type: ignore[attr-defined]
        x, o, *rest = ctx.saved_tensors
        dx = torch.empty_like(x)
        for place, span in enumerate(spans):
            found = _backward(g, x, o, span, kept=rest[place] if count else None, heads=(queries, keys))
            q, k, v = torch.split(_rows(dx, span), [queries, keys, keys], dim=2)
            q[:, span.skip :].copy_(found[0].transpose(1, 2))
            for part, gradient in ((k, found[1]), (v, found[2])):
                turned = gradient.transpose(1, 2)
                turned = turned if turned.shape[2] == keys else torch.unflatten(turned, 2, (keys, queries // keys)).sum(dim=3)
                part[:, : span.skip].add_(turned[:, : span.skip])
                part[:, span.skip :].copy_(turned[:, span.skip :])
        _rotate_back(dx, queries + keys, rotation, rest[count:])
        return dx, None, None, None


def rotate(x: Tensor, heads: int, rotation: Rotation) -> tuple[Tensor, Tensor] | None:
    """Norms and rotates the first `heads` of [T, …, D] in place; gives what a norm's backward pass needs."""
    qk, raw = x[:, :heads], None
    if rotation.norm is not None:
        before = qk.clone()
        new, r = normed(before, rotation.norm, rotation.eps)
        qk.copy_(new)
        raw = before, r
    rotation.turn(qk)
    return raw


def _rotate_back(dx: Tensor, heads: int, rotation: Rotation, raw: Sequence[Tensor]) -> None:
    qk = dx[:, :heads]
    rotation.turn(qk, back=True)
    if rotation.norm is not None:
        qk.copy_(norm_back(qk.clone(), raw[0], rotation.norm, raw[1]))


def _rows(x: Tensor, span: Span) -> Tensor:
    """A span's tokens as [count, length, heads, D], a view."""
    return torch.unflatten(x[span.start : span.stop], 0, (span.count, span.length))


def _heads(x: Tensor, span: Span, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [count, heads, length − skip, D], keys and values [count, key-value heads, length, D]."""
    q, k, v = (part.transpose(1, 2) for part in torch.split(_rows(x, span), [queries, keys, keys], dim=2))
    return q[:, :, span.skip :], k, v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention without a graph of q [B, H, L, D] to k, v [B, KV, S, D] → [B, H, L, D]; the mask is bool [B or 1, 1, L, S] or float.

    One query per row is not causal: it sees all that the mask lets it. Its heads that share a key-value head go as rows of one product.
    """
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:
        rows = torch.unflatten(q, 1, (k.shape[1], groups))[:, :, :, 0]
        return functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask).flatten(1, 2)[:, :, None]
    return _sdpa(q, _wide(k, groups), _wide(v, groups), mask)

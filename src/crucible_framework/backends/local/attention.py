"""Attention inside spans of packed tokens, with rotary positions, and its backward pass.

Runs that begin alike are one span for their common start and one for their ends, which see the start and themselves. What attending.py
covers goes there as a whole; the rest span by span through torch. This file does not know models, layouts or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from .attending import attend_packed, attend_packed_back, covers
from .kernels import Context
from .walks import Span, Walks

__all__ = ["SHORT", "Attention", "Found", "Pattern", "Rotation", "Span", "attend", "attention", "attention_back", "rotate"]

SHORT = 512
"""Tokens of a run up to which attention may keep its probabilities, where attending.py does not cover it."""


@dataclass(slots=True, eq=False)
class Rotation:
    """Rotary positions of T tokens and the norms of queries and keys, where a model has them.

    Attributes:
        cos, sin: [T, 1, D / 2]; both halves of a head turn by the same angles.
        walks: how elementwise work is done.
        norm: [heads + key-value heads, D], or None.
    """

    cos: Tensor
    sin: Tensor
    walks: Walks
    norm: Tensor | None = None
    eps: float = 0.0


def _wide(x: Tensor, groups: int) -> Tensor:
    """Key-value heads [B, KV, L, D] repeated for the query heads that share them."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)  # CUDA's kernels refuse another dtype, or misread it
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


@dataclass(slots=True, frozen=True, eq=False)
class _Work:
    """A span of packed heads: how many are queries' and keys', and how elementwise work is done."""

    span: Span
    queries: int
    keys: int
    walks: Walks

    def by_products(self, x: Tensor) -> bool:
        """Whether scores are kept as a matrix: on a processor that is faster for short runs where the softmax is compiled, with a mask, or in bf16."""
        apt = self.walks.compiled or self.span.mask is not None or x.dtype == torch.bfloat16
        return x.device.type == "cpu" and self.span.length <= SHORT and apt

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B · KV, heads / KV · (L − skip), D], scaled, keys and values [B · KV, L, D]: heads that share a key-value head are one product's rows."""
        span, size = self.span, x.shape[-1]
        q = self.walks.fold(x, span, 0, self.queries, scale=size**-0.5).reshape(span.count * self.keys, -1, size)
        k, v = (
            self.walks.fold(x, replace(span, skip=0), first, self.keys).reshape(-1, span.length, size) for first in (self.queries, self.queries + self.keys)
        )
        return q, k, v


def _short(x: Tensor, o: Tensor, work: _Work) -> Tensor:
    """Attention by two products into o [T, heads, D]; gives the probabilities [B · KV, heads / KV · (L − skip), L]."""
    q, k, v = work.parts(x)
    p = work.walks.softmax(torch.bmm(q, k.transpose(1, 2)), work.span)
    work.walks.unfold(torch.bmm(p, v).view(work.span.count, work.queries, -1, x.shape[-1]), o, work.span, 0)
    return p


def _short_back(g: Tensor, x: Tensor, p: Tensor, dx: Tensor, work: _Work) -> None:
    """Writes the gradients of `_short`'s queries, keys and values into dx, which has the shape of x."""
    span, queries, keys, size = work.span, work.queries, work.keys, x.shape[-1]
    q, k, v = work.parts(x)
    up = work.walks.fold(g, span, 0, queries).reshape(q.shape)
    dv = torch.bmm(p.transpose(1, 2), up)
    slope = work.walks.softmax_back(torch.bmm(up, v.transpose(1, 2)), p, span)
    work.walks.unfold(torch.bmm(slope, k).view(span.count, queries, -1, size), dx, span, 0, scale=size**-0.5)
    dk = torch.bmm(slope.transpose(1, 2), q)
    for first, part in ((queries, dk), (queries + keys, dv)):
        work.walks.unfold(part.view(span.count, keys, span.length, size), dx, replace(span, skip=0), first, add=span.skip)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's fused attention on a processor: [B, heads, L, D], and the scores' norms."""
    out, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask)
    return out, norms


def _forward(x: Tensor, o: Tensor, work: _Work) -> Tensor | None:
    """Writes a span's result into o; gives what its backward pass needs."""
    span, queries, keys = work.span, work.queries, work.keys
    if work.by_products(x):
        return _short(x, o, work)
    q, k, v = _heads(x, span, queries, keys)
    k, v = _wide(k, queries // keys), _wide(v, queries // keys)
    out, kept = _flash(q, k, v, span.mask) if x.device.type == "cpu" else (_sdpa(q, k, v, span.mask), None)
    _rows(o, span)[:, span.skip :].copy_(out.transpose(1, 2))
    return kept


def _backward(g: Tensor, x: Tensor, o: Tensor, dx: Tensor, *, kept: Tensor | None, work: _Work) -> None:
    """Writes the gradients of a span's q, k and v into dx, by torch's fused attention."""
    span, queries, keys = work.span, work.queries, work.keys
    q, k, v = _heads(x, span, queries, keys)
    k, v = _wide(k, queries // keys), _wide(v, queries // keys)
    up = _rows(g, span)[:, span.skip :].transpose(1, 2)
    if kept is not None:
        out, back = _rows(o, span)[:, span.skip :].transpose(1, 2), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = cast("Sequence[Tensor]", back(up, q, k, v, out, kept, 0.0, span.mask is None, attn_mask=span.mask))
    else:
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in (q, k, v)]
            found = torch.autograd.grad(_sdpa(leaves[0], leaves[1], leaves[2], span.mask), leaves, up)
    dq, dk, dv = torch.split(_rows(dx, span), [queries, keys, keys], dim=2)
    dq[:, span.skip :].copy_(found[0].transpose(1, 2))
    for part, gradient in ((dk, found[1]), (dv, found[2])):
        turned = torch.unflatten(gradient.transpose(1, 2), 2, (keys, queries // keys)).sum(dim=3)
        part[:, : span.skip].add_(turned[:, : span.skip])
        part[:, span.skip :].copy_(turned[:, span.skip :])


@dataclass(slots=True, frozen=True, eq=False)
class Pattern:
    """How packed heads [T, heads + 2 · key-value heads, D] attend: query heads, positions, and which tokens see each other."""

    queries: int
    rotation: Rotation
    spans: Sequence[Span]


@dataclass(slots=True, frozen=True, eq=False)
class Found:
    """Attention's result o [T, heads, D] and what its backward pass needs beside its input.

    Attributes:
        raw: two tensors of the norms of queries and keys, if there are any, then what the spans keep.
        has: which span keeps something; None: one tensor is kept for all.
    """

    o: Tensor
    raw: Sequence[Tensor]
    has: Sequence[bool] | None


def attention(x: Tensor, pattern: Pattern, *, wanted: bool) -> Found:
    """Causal attention of packed heads, which it rotates in place; `wanted`: there will be a backward pass."""
    queries, rotation, spans = pattern.queries, pattern.rotation, pattern.spans
    keys, walks = (x.shape[1] - queries) // 2, rotation.walks
    raw = rotate(x, queries + keys, rotation) or ()
    if covers(walks, x, spans):
        o, norms = attend_packed(walks, x, queries, spans, norms=wanted)
        return Found(o, [*raw, *([] if norms is None else [norms])], None)
    o = x.new_empty((x.shape[0], queries, x.shape[2]))
    kept = [_forward(x, o, _Work(span, queries, keys, walks)) for span in spans]
    return Found(o, [*raw, *(part for part in kept if part is not None)], [part is not None for part in kept])


def attention_back(g: Tensor, x: Tensor, found: Found, pattern: Pattern) -> Tensor:
    """The gradient of the heads as they came, from that of o, contiguous; x is what `attention` left of its input."""
    queries, rotation, spans = pattern.queries, pattern.rotation, pattern.spans
    keys, rest = (x.shape[1] - queries) // 2, list(found.raw)
    raw = [rest.pop(0), rest.pop(0)] if rotation.norm is not None else []
    if found.has is None:
        dx = attend_packed_back(rotation.walks, g, x, spans, o=found.o, norms=rest[0])
    else:
        dx = torch.empty_like(x)
        for span, there in zip(spans, found.has, strict=True):
            kept = rest.pop(0) if there else None
            work = _Work(span, queries, keys, rotation.walks)
            if kept is not None and work.by_products(x):
                _short_back(g, x, kept, dx, work)
            else:
                _backward(g, x, found.o, dx, kept=kept, work=work)
    _rotate_back(dx, queries + keys, rotation, raw)
    return dx


class Attention(torch.autograd.Function):
    """`attention` in a graph: packed heads → [T, heads, D]; it owns its input. Called as `apply(heads, pattern)`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, pattern: Pattern) -> Tensor:
        """See the class."""
        found = attention(x, pattern, wanted=ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, found.o, *found.raw)
            ctx.given = pattern, found.has  # type: ignore[attr-defined]
        return found.o

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the heads as they came."""
        pattern, has = cast("tuple[Pattern, Sequence[bool] | None]", ctx.given)  # type: ignore[attr-defined]
        x, o, *raw = ctx.saved_tensors
        return attention_back(grad_outputs[0].contiguous(), x, Found(o, raw, has), pattern), None


def rotate(x: Tensor, heads: int, rotation: Rotation) -> tuple[Tensor, Tensor] | None:
    """Norms and rotates the first `heads` of [T, …, D] in place; gives what a norm's backward pass needs."""
    raw = None
    if rotation.norm is not None:
        qk = x[:, :heads]
        before = qk.clone()
        new, r = rotation.walks.norm(before, rotation.norm, rotation.eps)
        qk.copy_(new)
        raw = before, r
    rotation.walks.rotate(x, heads, rotation.cos, rotation.sin)
    return raw


def _rotate_back(dx: Tensor, heads: int, rotation: Rotation, raw: Sequence[Tensor]) -> None:
    rotation.walks.rotate(dx, heads, rotation.cos, rotation.sin, back=True)
    if rotation.norm is not None:
        qk = dx[:, :heads]
        qk.copy_(rotation.walks.norm_back(qk.clone(), raw[0], rotation.norm, raw[1]))


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

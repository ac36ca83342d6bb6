"""A decoder layer over whole sequences as one node of a graph, where its steps are compiled.

One node adds the gradients of the two residual ways inside the steps that compute them, instead of in tensors of their own. What runs
here is linear.py's steps and attention.py's functions; layers that have a step which linear.py does not cover go step by step. This file
does not know models or adapters' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .attention import Found, Pattern, attention, attention_back
from .kernels import Context, Matmul
from .linear import Kept, Linear, Panels

__all__ = ["Layer", "Plan"]


@dataclass(slots=True, frozen=True, eq=False)
class Plan:
    """What a layer computes: its steps, each of which has its pairs of adapters among the layer's in this order, and how its heads attend."""

    qkv: Matmul
    out: Matmul
    up: Matmul
    down: Matmul
    pattern: Pattern

    @property
    def steps(self) -> tuple[Matmul, Matmul, Matmul, Matmul]:
        """In the order in which they run."""
        return self.qkv, self.out, self.up, self.down

    def covers(self, x: Tensor) -> bool:
        """Whether a layer over x [T, H] can be one node."""
        return all(step.panels(x) is not None for step in self.steps)


@dataclass(slots=True, eq=False)
class _Step:
    """A compiled step with its pairs, and of a pass what its backward pass needs."""

    step: Matmul
    linear: Linear
    panels: Panels
    pairs: list[Tensor]
    kept: Kept = Kept(None, None)

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        y, self.kept = self.linear.forward(self.step, self.panels, h, residual, self.pairs)
        return y

    def backward(self, h: Tensor, g: Tensor, *, wanted: bool, extra: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The gradients of h, where it is wanted, and of the pairs; else the first is g."""
        dh, found = self.linear.backward(self.step, self.panels, h, g, self.kept, self.pairs, wanted=wanted, extra=extra)
        return g if dh is None else dh, found


def _compiled(plan: Plan, x: Tensor, pairs: Sequence[Tensor]) -> list[_Step]:
    rest, steps = iter(pairs), list[_Step]()
    for step in plan.steps:
        mine = [next(rest) for _ in range(2 * len(step.parts))]
        steps.append(_Step(step, cast("Linear", step.frozen.linear), cast("Panels", step.panels(x)), mine))
    return steps


class Layer(torch.autograd.Function):
    """x + attention, then + the gated layers: x [T, H] → [T, H]. Called as `apply(x, plan, A, B, A, B, …)` for a plan that `covers` x."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, plan: Plan, *pairs: Tensor) -> Tensor:
        """See the class."""
        qkv, out, up, down = steps = _compiled(plan, x, pairs)
        wanted, size = any(ctx.needs_input_grad), out.panels.inputs // plan.pattern.queries
        heads = qkv.forward(x).view(x.shape[0], -1, size)
        found = attention(heads, plan.pattern, wanted=wanted)
        middle = out.forward(found.o.flatten(1), x)
        both = up.forward(middle)
        y = down.forward(both, middle)
        if wanted:
            kept = [part for step in steps for part in (step.kept.r, step.kept.low)]
            ctx.save_for_backward(x, heads, middle, both, *(part for part in kept if part is not None), found.o, *found.raw, *pairs)
            ctx.given = plan, [part is not None for part in kept], len(found.raw), found.has  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the pairs; nothing is computed below the first step that has pairs where x wants none."""
        plan, there, count, has = cast("tuple[Plan, list[bool], int, Sequence[bool] | None]", ctx.given)  # type: ignore[attr-defined]
        x, heads, middle, both, *rest = ctx.saved_tensors
        kept = [rest.pop(0) if one else None for one in there]
        found, pairs = Found(rest[0], rest[1 : 1 + count], has), rest[1 + count :]
        qkv, out, up, down = steps = _compiled(plan, x, pairs)
        for place, step in enumerate(steps):
            step.kept = Kept(kept[2 * place], kept[2 * place + 1])
        below = ctx.needs_input_grad[0]
        heads_too = below or bool(qkv.pairs)
        first_half = heads_too or bool(out.pairs)
        g = grad_outputs[0].contiguous()
        found_up, found_out, found_qkv = list[Tensor](), list[Tensor](), list[Tensor]()
        slope, found_down = down.backward(both, g, wanted=first_half or bool(up.pairs))
        if first_half or up.pairs:
            g, found_up = up.backward(middle, slope, wanted=first_half, extra=g)
        if first_half:
            slope, found_out = out.backward(found.o.flatten(1), g, wanted=heads_too)
        if heads_too:
            slope = attention_back(slope.view(found.o.shape), heads, found, plan.pattern)
            g, found_qkv = qkv.backward(x, slope.flatten(1), wanted=below, extra=g)
        gradients = (part.to(pair.dtype) for part, pair in zip([*found_qkv, *found_out, *found_up, *found_down], pairs, strict=True))
        return g if below else None, None, *gradients

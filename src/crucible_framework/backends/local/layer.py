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
from .linear import Kept, Linear, Step

__all__ = ["Layer", "Plan"]


@dataclass(slots=True, frozen=True, eq=False)
class Plan:
    """What a layer computes: its steps, each of which has its pairs of adapters among the layer's in this order, and how its heads attend."""

    qkv: Matmul
    out: Matmul
    up: Matmul
    down: Matmul
    pattern: Pattern

    def linear(self, x: Tensor) -> Linear | None:
        """The compiled calls, where a layer over x [T, H] can be one node."""
        steps = (self.qkv, self.out, self.up, self.down)
        return self.qkv.compiled(x) if all(step.compiled(x) is not None for step in steps) else None

    def steps(self, pairs: Sequence[Tensor]) -> tuple[Step, Step, Step, Step]:
        """The steps with their pairs."""
        rest = iter(pairs)
        qkv, out, up, down = (Step(step, [next(rest) for _ in range(2 * len(step.parts))]) for step in (self.qkv, self.out, self.up, self.down))
        return qkv, out, up, down


class Layer(torch.autograd.Function):
    """x + attention, then + the gated layers: x [T, H] → [T, H]. Called as `apply(x, plan, linear, A, B, A, B, …)`, with the plan's calls for x."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, plan: Plan, linear: Linear, *pairs: Tensor) -> Tensor:
        """See the class."""
        steps = qkv, out, up, down = plan.steps(pairs)
        wanted, size = any(ctx.needs_input_grad), out.panels.inputs // plan.pattern.queries
        heads = linear.forward(qkv, x).view(x.shape[0], -1, size)
        found = attention(heads, plan.pattern, wanted=wanted)
        middle = linear.forward(out, found.o.flatten(1), x)
        both, y = linear.gated(up, down, middle)
        if wanted:
            kept = [part for step in steps for part in (step.kept.r, step.kept.low)]
            ctx.save_for_backward(x, heads, middle, both, *(part for part in kept if part is not None), found.o, *found.raw, *pairs)
            ctx.given = plan, linear, [part is not None for part in kept], (len(found.raw), found.has)  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the pairs; nothing is computed below the first step that has pairs where x wants none."""
        plan, linear, there, (count, has) = cast("tuple[Plan, Linear, list[bool], tuple[int, Sequence[bool] | None]]", ctx.given)  # type: ignore[attr-defined]
        x, heads, middle, both, *rest = ctx.saved_tensors
        kept = [rest.pop(0) if one else None for one in there]
        found, pairs = Found(rest[0], rest[1 : 1 + count], has), rest[1 + count :]
        steps = qkv, out, up, down = plan.steps(pairs)
        for place, step in enumerate(steps):
            step.kept = Kept(kept[2 * place], kept[2 * place + 1])
        g, below, of_qkv, of_out = grad_outputs[0].contiguous(), ctx.needs_input_grad[0], list[Tensor](), list[Tensor]()
        heads_too = below or bool(qkv.pairs)
        dx, of_up, of_down = linear.gated_back(up, down, middle, both, g, wanted=heads_too or bool(out.pairs))
        if dx is not None:
            slope, of_out = linear.backward(out, found.o.flatten(1), dx, wanted=heads_too)
            if slope is not None:
                slope = attention_back(slope.view(found.o.shape), heads, found, plan.pattern)
                dx, of_qkv = linear.backward(qkv, x, slope.flatten(1), wanted=below, extra=dx)
        gradients = (part.to(pair.dtype) for part, pair in zip([*of_qkv, *of_out, *of_up, *of_down], pairs, strict=True))
        return dx if below else None, None, None, *gradients

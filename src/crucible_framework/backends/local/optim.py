"""AdamW and global-norm clipping over named tensors, number for number those of `torch.optim.AdamW` and `clip_grad_norm_`.

Tensors are replaced, never written to, so that whoever holds the old ones has a snapshot. Knows nothing of models, adapters or batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import NumericError
from ...records import AdamConfig, record

__all__ = ["AdamState", "adamw", "first_not_finite", "fresh", "global_norm"]


_LISTS: Any = torch
"""torch's operations over lists of tensors have no public name; one of them costs what three calls for single tensors cost."""


@record
class AdamState:
    """How many steps were made and the moving averages of the gradient and of its square, by parameter name."""

    step: int
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]


def fresh(parameters: Mapping[str, Tensor]) -> AdamState:
    """The state before the first step: zeros."""
    first, second = ({name: torch.zeros_like(parameter) for name, parameter in parameters.items()} for _ in range(2))
    return AdamState(step=0, exp_avg=first, exp_avg_sq=second)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None."""
    if tensors and bool(torch.isfinite(global_norm(tensors))):
        return None  # a sum of squares hides none of them
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """The L2 norm over all gradients together, a scalar."""
    return cast("Tensor", torch.linalg.vector_norm(torch.stack(_LISTS._foreach_norm(list(gradients.values())))))


@torch.no_grad()
def adamw(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: AdamState, config: AdamConfig, norm: Tensor
) -> tuple[dict[str, Tensor], AdamState]:
    """The parameters and the state after one step.

    Args:
        parameters: what is trained, fp32.
        gradients: of the same names and shapes.
        state: before the step.
        config: learning rate and the rest, of this step.
        norm: the gradients' global norm, which clipping compares.

    Raises:
        NumericError: the learning rate is beyond float32.

    Source: Loshchilov & Hutter 2019, arXiv 1711.05101; the order of operations is that of torch.optim's single-tensor path.
    """
    clip = None if config.max_grad_norm is None else torch.clamp(config.max_grad_norm / (norm + 1e-6), max=1.0)
    step = state.step + 1
    step_size = config.lr / (1 - config.beta1**step)
    if max(step_size, config.lr * config.weight_decay) > torch.finfo(torch.float32).max:
        raise NumericError(f"The learning rate {config.lr!r} gives a step that no float32 holds. The weights were not touched: lower it.", tensor="lr")
    root_correction = (1 - config.beta2**step) ** 0.5
    names = list(parameters)
    found, before, first, second = ([given[name] for name in names] for given in (gradients, parameters, state.exp_avg, state.exp_avg_sq))
    if clip is not None:
        found = list(_LISTS._foreach_mul(found, clip))
    averages = _LISTS._foreach_lerp(first, found, 1 - config.beta1)
    squares = _LISTS._foreach_mul(second, config.beta2)
    _LISTS._foreach_addcmul_(squares, found, found, value=1 - config.beta2)
    new = _LISTS._foreach_mul(before, 1 - config.lr * config.weight_decay)
    roots = _LISTS._foreach_sqrt(squares)
    _LISTS._foreach_div_(roots, root_correction)
    _LISTS._foreach_add_(roots, config.eps)
    _LISTS._foreach_addcdiv_(new, averages, roots, value=-step_size)
    kept = AdamState(step=step, exp_avg=dict(zip(names, averages, strict=True)), exp_avg_sq=dict(zip(names, squares, strict=True)))
    return dict(zip(names, new, strict=True)), kept

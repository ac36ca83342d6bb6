"""AdamW and global-norm clipping over named tensors, number for number those of `torch.optim.AdamW` and `clip_grad_norm_`.

Tensors are replaced, never written to, so that whoever holds the old ones has a snapshot. Knows nothing of models, adapters or batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ...errors import NumericError
from ...records import AdamConfig, record

__all__ = ["AdamState", "adamw", "first_not_finite", "fresh", "global_norm"]


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
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """The L2 norm over all gradients together, a scalar."""
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
    return cast("Tensor", torch.linalg.vector_norm(norms))


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
    new, averages, squares = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, parameter in parameters.items():
        gradient = gradients[name] if clip is None else gradients[name] * clip
        averages[name] = average = state.exp_avg[name].lerp(gradient, 1 - config.beta1)
        squares[name] = square = state.exp_avg_sq[name].mul(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        decayed = parameter.mul(1 - config.lr * config.weight_decay) if config.weight_decay else parameter.clone()
        new[name] = decayed.addcdiv_(average, (square.sqrt() / root_correction).add_(config.eps), value=-step_size)
    return new, AdamState(step=step, exp_avg=averages, exp_avg_sq=squares)

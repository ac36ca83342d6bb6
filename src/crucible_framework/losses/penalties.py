"""Terms on the adapter's own tensors, to add to a loss: L1, L2, orthogonality, and the norm of the loss's gradient.

A loss function sees log-probs only, so these are a `Penalty` beside it, which backends that compute here add to value and gradient. A penalty counts once
per unit of token weight: in batches that are normalised, as the trainer's are, once per optimizer step, however many slices it has. `forward`, and so a dev
loss, leaves penalties out. This file does not know models, backends or the registry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError, NumericError
from ..protocols import Gradients, Loss, Penalty, PenaltyFn, Slope
from ..records import Datum, StepOutput

__all__ = ["GRADIENT_PENALTY", "L1", "L2", "ORTHOGONALITY", "gradient_penalty", "l1", "l2", "nothing", "orthogonality", "penalise"]

Valued = tuple[float, dict[str, Tensor]]


def norm_of(gradients: Gradients) -> float:
    """The L2 norm over all tensors."""
    return math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in gradients.values()))


def l1(adapter: Gradients, slope: Slope) -> Valued:
    """Σ |θ| over all adapter tensors, in the parameters' unit; its gradient is sign θ, 0 at 0.

    With Adam it makes entries small; exact zeros stay rare, as no step is a proximal one.

    Source: Tibshirani 1996, "Regression shrinkage and selection via the lasso".
    """
    del slope
    return math.fsum(float(tensor.abs().sum(dtype=torch.float64)) for tensor in adapter.values()), {name: tensor.sign() for name, tensor in adapter.items()}


def l2(adapter: Gradients, slope: Slope) -> Valued:
    """½ Σ θ² over all adapter tensors, in the parameters' unit squared; its gradient is θ.

    It goes through Adam's scaling, which `AdamConfig.weight_decay` does not: that is the better choice where only smaller weights are wanted.

    Source: Krogh & Hertz 1991, "A simple weight decay can improve generalization"; the difference: Loshchilov & Hutter 2019, arXiv 1711.05101.
    """
    del slope
    return 0.5 * math.fsum(float(tensor.square().sum(dtype=torch.float64)) for tensor in adapter.values()), dict(adapter)


def orthogonality(adapter: Gradients, slope: Slope) -> Valued:
    """¼ Σ_layers ‖off(A Aᵀ)‖² + ‖off(Bᵀ B)‖², off(·) without the diagonal, so that each rank of an adapter is a direction of its own.

    0 exactly where the rows of A, and the columns of B, are orthogonal; in the parameters' unit to the fourth. The diagonal is free, so B may start at
    zero; the price is that shrinking lowers it too.

    Source: Bansal et al. 2018, arXiv 1810.09102 (soft orthogonality), without the diagonal; on low-rank pairs: Zhang et al. 2023, arXiv 2303.10512.
    """
    del slope
    value, gradients = 0.0, dict[str, Tensor]()
    for name, tensor in adapter.items():
        wide = tensor if ".lora_A." in name else tensor.mT  # [rank, width]
        off = wide @ wide.mT
        off.fill_diagonal_(0.0)
        value += 0.25 * float(off.square().sum(dtype=torch.float64))
        gradient = off @ wide
        gradients[name] = gradient if ".lora_A." in name else gradient.mT.contiguous()
    return value, gradients


def _gradient_norm(adapter: Gradients, slope: Slope, *, radius: float) -> Valued:
    here = slope(adapter)
    norm = norm_of(here)
    if norm == 0:
        return 0.0, {name: torch.zeros_like(gradient) for name, gradient in here.items()}
    there = slope({name: tensor + (radius / norm) * here[name] for name, tensor in adapter.items()})
    return norm, {name: (there[name] - gradient) / radius for name, gradient in here.items()}


def nothing(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """0, with a graph: what a penalty alone is as a function of log-probs."""
    del data
    return torch.stack([values[:0].sum() for values in logprobs]).sum(), {}


def gradient_penalty(radius: float = 0.01) -> Loss:
    """‖∇θ L‖ of the other terms, per unit of weight: steps prefer flat places. A second pass per step is its price.

    Its gradient, the curvature along the gradient, is a difference: (∇L(θ + radius · g / ‖g‖) − g) / radius with g = ∇L(θ), the dropout masks being the same.
    The error falls with the radius until rounding takes over; with bfloat16 weights take 0.1 and more. The norm is of each slice's gradient.

    Args:
        radius: length of the step, in the parameters' unit.

    Raises:
        ConfigError: the radius is not positive.

    Source: Zhao, Zhang & Hu 2022, arXiv 2202.03599, eq. 9; Barrett & Dherin 2021, arXiv 2009.11162 (why it regularises).
    """
    if not (math.isfinite(radius) and radius > 0):
        raise ConfigError(f"gradient_penalty got radius={radius!r}; expected a positive number, for example 0.01.")

    def fn(adapter: Gradients, slope: Slope) -> Valued:
        return _gradient_norm(adapter, slope, radius=radius)

    return _alone("gradient_penalty", fn, "Zhao, Zhang & Hu 2022, arXiv 2202.03599")


def penalise(loss: Loss, output: StepOutput, gradients: Gradients, adapter: Gradients, slope: Slope) -> tuple[StepOutput, dict[str, Tensor]]:
    """A pass's output and summed gradient with the loss's penalties in them, and `loss/<name>`, `grad_norm/<name>` of each, without its factor.

    `grad_norm/data` is the norm of all the rest: these norms are of gradients of parameters, where a log-prob term's is that of log-probs.

    Args:
        loss: with or without penalties.
        output: of the pass.
        gradients: of the summed loss, by adapter tensor.
        adapter: where the gradient was taken.
        slope: gives the summed gradient of the same pass, with the same masks, at other values of the adapter.

    Raises:
        NumericError: a penalty is not finite.
    """
    if not loss.penalties:
        return output, dict(gradients)
    per_weight = {name: gradient / output.weight for name, gradient in gradients.items()}

    def at(values: Gradients) -> Gradients:
        return per_weight if values is adapter else {name: gradient / output.weight for name, gradient in slope(values).items()}

    total, metrics, added = dict(gradients), {**output.metrics, "grad_norm/data": norm_of(per_weight)}, 0.0
    for penalty in loss.penalties:
        value, gradient = penalty.fn(adapter, at)
        if not math.isfinite(value):
            raise NumericError(f"The penalty {penalty.name!r} is {value}; expected a finite number. The weights were not touched.", tensor=penalty.name)
        metrics |= {f"loss/{penalty.name}": value, f"grad_norm/{penalty.name}": norm_of(gradient)}
        added += penalty.factor * value
        total = {name: part + (output.weight * penalty.factor) * gradient[name] for name, part in total.items()}
    return replace(output, loss=output.loss + added, metrics=metrics), total


def _alone(name: str, fn: PenaltyFn, source: str) -> Loss:
    return Loss(name=name, fn=nothing, source=source, penalties=(Penalty(name=name, fn=fn),))


L1 = _alone("l1", l1, "Tibshirani 1996")
L2 = _alone("l2", l2, "Krogh & Hertz 1991")
ORTHOGONALITY = _alone("orthogonality", orthogonality, "Bansal et al. 2018, arXiv 1810.09102; Zhang et al. 2023, arXiv 2303.10512")
GRADIENT_PENALTY = gradient_penalty()

"""What a backend does with a loss, written once: which positions count, the loss's value and gradient, and the `StepOutput`.

The loss function sees detached log-probs (or logits) of the whole batch; its gradient with respect to them is all that goes back into
the model. So every backend gives one loss the same numbers, in one pass or two, here or far away. This file does not know where logits
come from, nor what is done with the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BackendError, DataError, NumericError
from ..protocols import Loss
from ..records import Datum, StepOutput, record
from .tokenwise import extra

__all__ = ["Applied", "apply_loss", "positions", "some", "spread", "step_output", "target_logprobs", "total_weight"]


@record
class Applied:
    """A loss's value on a batch.

    Attributes:
        value: summed, finite.
        metrics: what the loss reported.
        gradients: d value / d input per datum, of its input's shape; empty where none was asked.
    """

    value: float
    metrics: Mapping[str, float]
    gradients: tuple[Tensor, ...] = ()


def some(ids: Sequence[str]) -> str:
    """The first ids of many, for a message."""
    return ", ".join(map(repr, ids[:4])) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")


def total_weight(data: Sequence[Datum]) -> float:
    """Σ w over a batch, by which a reported loss is divided; 1 where all weights are zero."""
    return float(sum(float(datum.weights.sum(dtype=np.float64)) for datum in data)) or 1.0


def positions(loss: Loss, data: Sequence[Datum], vocab_size: int) -> list[NDArray[np.int64]]:
    """Per datum the positions at which its loss needs the model's output: those with a weight that is not 0.

    All positions where the loss needs logits or every weight of the batch is zero. Elsewhere log-probs are 0 for the loss too, and a
    target may be any number.

    Raises:
        DataError: no data, an extra that the loss needs is missing, a token or a target at these positions is outside the vocabulary.
    """
    if not data:
        raise DataError("The batch is empty; expected at least one datum. Make batches of the data that are left.")
    every = loss.needs == "logits" or not any(datum.weights.any() for datum in data)
    rows: list[NDArray[np.int64]] = []
    for datum in data:
        for name in loss.extras:
            extra(datum, name, loss.name)
        used = np.arange(len(datum)) if every else np.flatnonzero(datum.weights.reshape(len(datum), -1).any(axis=1))
        for what, ids in (("token", datum.tokens), ("target", datum.targets[used])):
            bad = ids[(ids < 0) | (ids >= vocab_size)]
            if bad.size:
                raise DataError(
                    f"Datum {datum.id!r} has {what} {int(bad.flat[0])}; expected 0 to {vocab_size - 1}. "
                    "Use the base model's own tokenizer, and give targets to ignore weight 0."
                )
        rows.append(used.astype(np.int64))
    return rows


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of targets [R] or [R, K] under logits [R, V], of the targets' shape, in nats."""
    norms = logits.logsumexp(-1)
    if targets.ndim == 1:
        return logits.gather(1, targets[:, None])[:, 0] - norms
    return logits.gather(1, targets) - norms[:, None]


def spread(values: Tensor, rows: NDArray[np.int64], length: int) -> Tensor:
    """Values [R, …] at their rows of [length, …], 0 elsewhere; without a graph."""
    full = values.new_zeros((length, *values.shape[1:]))
    full[torch.from_numpy(rows).to(values.device)] = values.detach()
    return full


def apply_loss(loss: Loss, data: Sequence[Datum], inputs: Sequence[Tensor], *, grad: bool) -> Applied:
    """The loss's value and, with `grad`, its gradient with respect to what it saw.

    Args:
        loss: any loss.
        data: at least one datum.
        inputs: per datum log-probs of the shape of its targets, or logits [T, V] where `loss.needs` says so. Their graph is not used.
        grad: whether the gradient is wanted.

    Raises:
        BackendError: the loss gave no scalar tensor, or one that does not depend on its input.
        NumericError: the value or its gradient is not finite; the message names the data.
    """
    ids = tuple(datum.id for datum in data)
    leaves = [values.detach().requires_grad_(grad) for values in inputs]
    with torch.set_grad_enabled(grad):
        total, metrics = loss.fn(data, leaves)
    given: object = total
    if not isinstance(given, Tensor) or given.numel() != 1:
        what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise BackendError(f"The loss {loss.name!r} gave {what}; expected a tensor with one number. Sum over the weighted tokens.")
    value = float(total.detach())
    if not math.isfinite(value):
        message = f"The loss {loss.name!r} is {value} on examples {some(ids)}; expected a finite number. "
        raise NumericError(message + "The weights were not touched: look at these examples, or lower the learning rate.", tensor="loss", examples=ids)
    reported = {name: float(number) for name, number in metrics.items()}
    if not grad:
        return Applied(value=value, metrics=reported)
    if not total.requires_grad:
        raise BackendError(f"The loss {loss.name!r} does not depend on the {loss.needs} that it was given. Do not detach them in the loss function.")
    gradients = torch.autograd.grad(total.reshape(()), leaves, allow_unused=True, materialize_grads=True)
    for datum, gradient in zip(data, gradients, strict=True):
        if not bool(gradient.isfinite().all()):
            message = f"The gradient of the loss {loss.name!r} is not finite on example {datum.id!r}; expected finite numbers. "
            raise NumericError(message + "The weights were not touched: look at this example and at the loss.", tensor=loss.needs, examples=(datum.id,))
    return Applied(value=value, metrics=reported, gradients=tuple(gradients))


def step_output(data: Sequence[Datum], applied: Applied, logprobs: Sequence[Tensor]) -> StepOutput:
    """What a backend reports: nats per weight, and per datum the log-probs of the shape of its targets."""
    weight = total_weight(data)
    seen = tuple(values.detach().float().cpu().numpy() for values in logprobs)
    return StepOutput(loss=applied.value / weight, weight=weight, logprobs=seen, metrics=applied.metrics)

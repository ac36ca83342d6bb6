"""Gradients of single examples and of tasks, without a step: through any session whose backend gives gradients of parameters.

A session gives its gradient to the hook of `optim_step` and clears it; a hook that raises refuses the step, so weights, optimizer and step
number stay as they are. That is how a gradient is taken here. The price: one pass per example, and where the adapter has dropout the
passes draw masks, so a run that looks draws other masks afterwards than one that does not. Take gradients between steps: what had
accumulated before is cleared. This file does not know how a backend computes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, CrucibleError, DataError
from ..losses import resolve
from ..protocols import Gradients, Loss, LossFn, Report, TrainingSession
from ..records import AdamConfig, Batch, Datum, OptimOutput, StepOutput, record
from .gradients import dot, noise_and_signal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NoiseScale", "example_gradients", "example_norms", "gradient_of", "measure_noise_scale", "unit_weights"]

_AHEAD = 2


class _TakenError(CrucibleError):
    """Refuses the step once the gradient has been taken."""


class _Keep:
    """A hook that keeps what it is given and refuses the step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, gradients: Gradients, report: Report) -> Gradients:
        del report
        self.gradients = {name: gradient.detach().clone() for name, gradient in gradients.items()}
        raise _TakenError("The gradient was taken and no step was made, as asked.")


def unit_weights(datum: Datum) -> Datum:
    """The datum with weights that sum to 1, so that its loss is its mean per token and long examples count like short ones.

    Raises:
        DataError: its weights do not have a positive sum.
    """
    total = float(datum.weights.sum(dtype=np.float64))
    if not (math.isfinite(total) and total > 0):
        raise DataError(f"Example {datum.id!r} has weights that sum to {total}; expected a positive number. Leave the example out.")
    return replace(datum, weights=(datum.weights / np.float64(total)).astype(np.float32))


def _submit(session: TrainingSession, batch: Batch, loss: Loss) -> tuple[Future[StepOutput], Future[OptimOutput], _Keep]:
    keep = _Keep()
    backward = session.forward_backward(batch, loss)
    return backward, session.optim_step(AdamConfig(lr=0.0), keep), keep


def _take(pending: tuple[Future[StepOutput], Future[OptimOutput], _Keep]) -> dict[str, Tensor]:
    backward, optim, keep = pending
    failure = optim.exception()  # waited for even where the pass before it failed, so that nothing is left running
    backward.result()
    if isinstance(failure, _TakenError):
        return keep.gradients
    if failure is not None:
        raise failure
    raise BackendError("The session stepped although its gradient hook raised; expected it to refuse the step. Restore the weights from a checkpoint.")


def gradient_of(session: TrainingSession, batch: Batch, loss: str | Loss | LossFn = "cross_entropy") -> dict[str, Tensor]:
    """The gradient of the summed loss of a batch, by parameter name; the session stays as it is.

    Raises:
        CapabilityError: the backend has no gradients of parameters.
        NumericError, DataError: as `forward_backward` does.
    """
    return _take(_submit(session, batch, resolve(loss)))


def example_gradients(session: TrainingSession, data: Sequence[Datum], loss: str | Loss | LossFn = "cross_entropy") -> Iterator[dict[str, Tensor]]:
    """The exact gradient of each example on its own, in order; one in memory at a time besides those submitted ahead.

    Raises: as `gradient_of`.
    """
    resolved = resolve(loss)
    window: deque[tuple[Future[StepOutput], Future[OptimOutput], _Keep]] = deque()
    for datum in data:
        window.append(_submit(session, Batch(data=(datum,)), resolved))
        if len(window) > _AHEAD:
            yield _take(window.popleft())
    while window:
        yield _take(window.popleft())


def example_norms(session: TrainingSession, data: Sequence[Datum], loss: str | Loss | LossFn = "cross_entropy") -> NDArray[np.float64]:
    """The L2 norm of each example's own gradient, float64[n]: which examples pull hardest, and where a clipping norm would cut.

    Weights count: with those of `unit_weights` a long example does not pull harder for being long.
    """
    return np.array([math.sqrt(dot(gradient, gradient)) for gradient in example_gradients(session, data, loss)])


@record
class NoiseScale:
    """The simple noise scale at one set of weights.

    Attributes:
        value: tr(Σ) / |G|², in examples; None where the estimate of |G|² is not positive: take more examples.
        trace: tr(Σ), the summed variance over examples of the gradient's entries.
        signal: |G|², the squared norm of the true gradient, estimated without bias.
        examples: how many were used.
    """

    value: float | None
    trace: float
    signal: float
    examples: int


def measure_noise_scale(session: TrainingSession, data: Sequence[Datum], loss: str | Loss | LossFn = "cross_entropy") -> NoiseScale:
    """The simple noise scale from single examples with the weights as they stand: both parts are unbiased (their ratio is not quite).

    Each example counts alike (`unit_weights`), where training weighs by tokens.

    Raises:
        DataError: fewer than two examples, or one without positive weights.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1 with small batches of one example.
    """
    if len(data) < 2:
        raise DataError(f"The noise scale was asked of {len(data)} examples; expected at least 2. Usual: 64 or more.")
    total: dict[str, Tensor] = {}
    squares: list[float] = []
    for gradient in example_gradients(session, [unit_weights(datum) for datum in data], loss):
        squares.append(dot(gradient, gradient))
        total = {name: total[name] + part if total else part for name, part in gradient.items()}
    n = len(squares)
    trace, signal = noise_and_signal(math.fsum(squares) / n, dot(total, total) / n**2, 1, n)
    return NoiseScale(value=trace / signal if signal > 0 else None, trace=trace, signal=signal, examples=n)

"""Gradients of single examples and of tasks, without a step: through any session whose backend gives gradients of parameters.

A session gives its gradient to the hook of `optim_step` and clears it; a hook that raises refuses the step, so weights, optimizer and step
number stay as they are. That is how a gradient is taken here. Where the adapter has dropout the passes draw masks, so a run that looks draws
other masks afterwards than one that does not. Take gradients between steps: what had accumulated before is cleared. Norms come from passes of
many examples where the session is an `ExampleSession`; else, and for whole gradients, each example is a pass of its own. This file does not know
how a backend computes.
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

from .. import events
from ..errors import BackendError, CrucibleError, DataError
from ..losses import resolve
from ..protocols import ExampleSession, Gradients, Loss, LossFn, Report, TrainingSession
from ..records import AdamConfig, Batch, Datum, OptimOutput, StepOutput, record
from .gradients import dot, noise_and_signal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NoiseScale", "clipped_sum", "example_gradients", "example_metrics", "example_norms", "gradient_of", "measure_noise_scale", "unit_weights"]

_AHEAD = 2
_TOGETHER = 32
"""Examples of one pass where norms are asked for."""


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


_Taking = tuple[Future[StepOutput], Future[OptimOutput], _Keep]


def _submit(session: TrainingSession, batch: Batch, loss: Loss) -> _Taking:
    keep = _Keep()
    backward = session.forward_backward(batch, loss)
    return backward, session.optim_step(AdamConfig(lr=0.0), keep), keep


def _together(session: ExampleSession, data: Sequence[Datum], loss: Loss) -> Iterator[tuple[NDArray[np.float64], dict[str, Tensor]]]:
    """Some examples after the other: their norms and the gradient of their sum."""
    for start in range(0, len(data), _TOGETHER):
        keep = _Keep()
        backward = session.forward_backward_examples(Batch(data=tuple(data[start : start + _TOGETHER])), loss)
        gradient = _take((backward, session.optim_step(AdamConfig(lr=0.0), keep), keep))
        norms = backward.result().example_norms
        if norms is None:
            raise BackendError(f"{type(session).__name__}.forward_backward_examples gave no norms; expected one per example in StepOutput.example_norms.")
        yield norms, gradient


def _take(pending: _Taking) -> dict[str, Tensor]:
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
    window: deque[_Taking] = deque()
    for datum in data:
        window.append(_submit(session, Batch(data=(datum,)), resolved))
        if len(window) > _AHEAD:
            yield _take(window.popleft())
    while window:
        yield _take(window.popleft())


def example_norms(session: TrainingSession, data: Sequence[Datum], loss: str | Loss | LossFn = "cross_entropy") -> NDArray[np.float64]:
    """The L2 norm of each example's own gradient, float64[n]: which examples pull hardest, and where a clipping norm would cut.

    Weights count: with those of `unit_weights` a long example does not pull harder for being long. Of losses that compare examples, the norm is of
    what flows through the example's own log-probs; they need their partners in one pass of 32, and a session that makes such.
    """
    if isinstance(session, ExampleSession):
        return np.concatenate([np.zeros(0), *(norms for norms, _ in _together(session, data, resolve(loss)))])
    return np.array([math.sqrt(dot(gradient, gradient)) for gradient in example_gradients(session, data, loss)])


def example_metrics(slices: Sequence[tuple[Sequence[str], NDArray[np.float64] | None]]) -> dict[str, float]:
    """What a step's row says of its examples' norms, under `grad/example_norm/`: mean, median, max, and the share of the greatest in their sum.

    In a batch whose weights sum to 1 a norm is what the example adds to the step's gradient at the most.

    Args:
        slices: ids and norms of each pass; empty where none has norms.

    Emits:
        `training.example_norms` with ids and norms of the three greatest.
    """
    found = [(float(norm), name) for names, norms in slices if norms is not None for norm, name in zip(norms, names, strict=True)]
    if not found:
        return {}
    greatest = sorted(found, reverse=True)[:3]
    events.emit("training.example_norms", ids=[name for _, name in greatest], norms=[norm for norm, _ in greatest], examples=len(found))
    values = np.array([norm for norm, _ in found])
    total = float(values.sum())
    numbers = {"mean": float(values.mean()), "median": float(np.median(values)), "max": float(values.max()), "top_share": float(values.max()) / (total or 1.0)}
    return {f"grad/example_norm/{name}": value for name, value in numbers.items()}


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
    units = [unit_weights(datum) for datum in data]
    if isinstance(session, ExampleSession):
        found = _together(session, units, resolve(loss))
    else:
        found = ((np.array([math.sqrt(dot(one, one))]), one) for one in example_gradients(session, units, loss))
    for norms, gradient in found:
        squares += np.square(norms).tolist()
        total = {name: total[name] + part if total else part for name, part in gradient.items()}
    n = len(squares)
    trace, signal = noise_and_signal(math.fsum(squares) / n, dot(total, total) / n**2, 1, n)
    return NoiseScale(value=trace / signal if signal > 0 else None, trace=trace, signal=signal, examples=n)


def _scaled(loss: Loss, factors: NDArray[np.float64]) -> Loss:
    """The loss with the gradient of each example of a batch multiplied by its factor; its value is the same."""

    def fn(data: Sequence[Datum], inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return loss.fn(data, [part * factor + part.detach() * (1 - factor) for part, factor in zip(inputs, factors.tolist(), strict=True)])

    return replace(loss, fn=fn)


def clipped_sum(session: TrainingSession, data: Sequence[Datum], loss: Loss, clip: float) -> dict[str, Tensor]:
    """The sum of the examples' gradients, each scaled down to a norm of at most `clip`; empty without data.

    With an `ExampleSession` in two passes of many examples: one tells the norms, one has the factors. The second tells its norms too: where one is above
    `clip`, as dropout's new masks make it, the examples of that pass are taken one by one instead.

    Source: Lee & Kifer 2021, arXiv 2009.03106 (the second pass with weights).
    """
    total: dict[str, Tensor] = {}

    def add(gradient: Gradients, factor: float = 1.0) -> None:
        for name, part in gradient.items():
            total[name] = total[name] + factor * part if name in total else factor * part

    for start in range(0, len(data), _TOGETHER):
        part = data[start : start + _TOGETHER]
        if isinstance(session, ExampleSession):
            ((norms, _),) = _together(session, part, loss)
            factors = np.minimum(1.0, clip / np.maximum(norms, 1e-30))
            ((scaled, gradient),) = _together(session, part, _scaled(loss, factors))
            if float(scaled.max()) <= clip * (1 + 1e-5):
                add(gradient)
                continue
        for gradient in example_gradients(session, part, loss):
            add(gradient, min(1.0, clip / max(math.sqrt(dot(gradient, gradient)), 1e-30)))
    return total

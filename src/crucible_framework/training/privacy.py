"""DP-SGD: training whose result hides whether any one example was in the data, and the ε that it costs.

Each step takes every example with the same chance (Poisson sampling, which the accountant needs), clips each example's own gradient, adds
Gaussian noise to the sum and steps; see `train_privately`. What it costs is two passes per step where the session tells norms of examples and
the adapter has no dropout, else one pass per example. Only the weights are private: losses, events and example norms of the same run are not
covered by ε and should not leave the machine. The noise is floating-point noise (Mironov 2012 shows what that leaks). This file does not know
models or files.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, DataError
from ..losses import resolve
from ..protocols import Gradients, Loss, LossFn, Report, TrainingSession
from ..records import AdamConfig, Batch, Datum, record
from .examplewise import clipped_sum, unit_weights

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["PrivacyConfig", "PrivateResult", "epsilon", "noise_multiplier", "train_privately"]

_ORDERS = (*range(2, 64), *range(64, 513, 16), 1024)


@record
class PrivacyConfig:
    """What decides the privacy of a run.

    Attributes:
        clip: L2 norm that each example's gradient is cut to, with the example's weights summing to 1.
        noise: standard deviation of the noise as a multiple of `clip`.
        sampling_rate: chance of each example to be in a step.
        steps: optimizer steps.
        delta: chance that ε does not hold; well below one over the number of examples.
        seed: None draws batches and noise from the system; a number makes the run repeatable and, for whoever knows it, not private.
    """

    clip: float = 1.0
    noise: float = 1.0
    sampling_rate: float = 0.05
    steps: int = 100
    delta: float = 1e-5
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("clip", math.isfinite(self.clip) and self.clip > 0, "a positive number"),
            ("noise", math.isfinite(self.noise) and self.noise >= 0, "a number of at least 0"),
            ("sampling_rate", 0 < self.sampling_rate <= 1, "a number in (0, 1]"),
            ("steps", self.steps >= 1, "at least 1"),
            ("delta", 0 < self.delta < 1, "a number in (0, 1), usually below 1 / examples"),
        ):
            if not ok:
                raise ConfigError(f"PrivacyConfig.{name} is {getattr(self, name)!r}; expected {expected}.")


@record
class PrivateResult:
    """What a private run cost. `epsilon` is infinite without noise; sizes of batches are not told, as they are not private."""

    steps: int
    epsilon: float
    delta: float
    config: PrivacyConfig


# ---------------------------------------------------------------------------------------------------------- accounting
def _log_moment(order: int, rate: float, noise: float) -> float:
    """log Σ_k C(α, k) (1 − q)^(α − k) q^k exp((k² − k) / 2σ²), for a whole order α ≥ 2."""
    terms = []
    for k in range(order + 1):
        if rate == 1 and k < order:
            continue
        choose = math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        stay = (order - k) * math.log1p(-rate) if k < order else 0.0
        terms.append(choose + stay + k * math.log(rate) + (k * k - k) / (2 * noise * noise))
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def epsilon(*, noise: float, sampling_rate: float, steps: int, delta: float) -> float:
    """ε such that `steps` steps of the Poisson-sampled Gaussian mechanism are (ε, δ)-private against adding or removing one example.

    A Rényi accountant over whole orders: an upper bound, so the true ε is a little smaller. Infinite where noise is 0.

    Args:
        noise: multiple of the clipping norm.
        sampling_rate: chance of each example in each step.
        steps: how many.
        delta: chance that ε does not hold.

    Raises:
        ConfigError: a number out of range.

    Source: Mironov, Talwar & Zhang 2019, arXiv 1908.10530, section 3.3 (moments); Canonne, Kamath & Steinke 2020, arXiv 2004.00010,
        proposition 12 (conversion).
    """
    PrivacyConfig(noise=noise, sampling_rate=sampling_rate, steps=steps, delta=delta)
    if noise == 0:
        return math.inf
    best = math.inf
    for order in _ORDERS:
        renyi = steps * _log_moment(order, sampling_rate, noise) / (order - 1)
        best = min(best, renyi + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return max(0.0, best)


def noise_multiplier(*, target: float, sampling_rate: float, steps: int, delta: float) -> float:
    """The least noise, to 0.1 %, whose ε is at most `target`.

    Raises:
        ConfigError: the target is not positive, or no noise below 10,000 reaches it.
    """
    if not target > 0:
        raise ConfigError(f"The target ε is {target!r}; expected a positive number, usually 1 to 10.")

    def cost(noise: float) -> float:
        return epsilon(noise=noise, sampling_rate=sampling_rate, steps=steps, delta=delta)

    low, high = 0.01, 1e4
    if cost(high) > target:
        raise ConfigError(f"No noise below {high:g} gives ε ≤ {target!r} at δ = {delta!r}. Take fewer steps or a larger ε.")
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high


# ------------------------------------------------------------------------------------------------------------ training
class _Private:
    """A hook that puts the noised mean of clipped gradients in place of whatever gradient the session has."""

    def __init__(self, clipped: Gradients, scale: float, expected: float, generator: Generator) -> None:
        self.clipped, self.scale, self.expected, self.generator = clipped, scale, expected, generator

    def __call__(self, gradients: Gradients, report: Report) -> Gradients:
        import torch

        del report
        new: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            noise = self.scale * torch.randn(gradient.shape, generator=self.generator)
            total = self.clipped[name].to(gradient) + noise.to(gradient) if self.clipped else noise.to(gradient)
            new[name] = total / self.expected
        return new


def train_privately(
    session: TrainingSession, data: Sequence[Datum], config: PrivacyConfig, *, adam: AdamConfig | None = None, loss: str | Loss | LossFn = "cross_entropy"
) -> PrivateResult:
    """Trains a session by DP-SGD (with Adam) on the data, and says what ε it cost.

    An example is one unit of privacy: where several come from one person or document, ε holds for each of them alone. The number of examples
    enters as the expected batch size and is taken as public. Memory: one gradient besides those in flight.

    Args:
        session: of a backend with gradients of parameters.
        data: tokenized examples; each counts alike (`unit_weights`).
        config: clipping, noise, sampling, steps.
        adam: rate and moments; None has AdamW with lr 1e-4 and no further clipping. Whatever it is, ε does not change.
        loss: any whose examples do not see each other; a loss that compares examples of a batch would see each alone.

    Raises:
        DataError: no data, or an example without positive weights.
        ConfigError: the loss has terms on parameters.
        CapabilityError: the backend has no gradients of parameters.

    Source: Abadi et al. 2016, arXiv 1607.00133, algorithm 1.
    """
    import torch

    if not data:
        raise DataError("train_privately got no examples; expected at least one.")
    if resolve(loss).penalties:
        raise ConfigError(f"train_privately got the loss {resolve(loss).name!r} with terms on parameters, which no example's clipping bounds. Leave them out.")
    resolved, units = resolve(loss), [unit_weights(datum) for datum in data]
    adam = adam or AdamConfig(max_grad_norm=None)
    rng = np.random.default_rng(config.seed)  # None is seeded by the system
    generator = torch.Generator().manual_seed(secrets.randbits(63) if config.seed is None else config.seed)
    for _ in itertools.repeat(None, config.steps):
        chosen = [units[i] for i in np.flatnonzero(rng.random(len(units)) < config.sampling_rate)]
        clipped = clipped_sum(session, chosen, resolved, config.clip)
        hook = _Private(clipped, config.noise * config.clip, config.sampling_rate * len(units), generator)
        # A session steps only where it has a gradient; the hook puts the private one in its place, so this one reaches nothing.
        backward = session.forward_backward(Batch(data=(units[0],)), resolved)
        session.optim_step(adam, hook).result()
        backward.result()
    cost = epsilon(noise=config.noise, sampling_rate=config.sampling_rate, steps=config.steps, delta=config.delta)
    return PrivateResult(steps=config.steps, epsilon=cost, delta=config.delta, config=config)

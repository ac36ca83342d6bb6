"""Losses that look at each target token by itself: cross-entropy, squared error on probabilities, divergence from a reference.

Every function takes (data, log-probs per datum) and gives (sum over weighted tokens, metrics); none divides by tokens or batch. A token of
weight 0 adds exactly 0 to the value and to the gradient, whatever its log-prob is. This file knows no model, no backend and no registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..protocols import Loss
from ..records import Datum

__all__ = ["CROSS_ENTROPY", "KL", "MSE", "REFERENCE", "cross_entropy", "extra", "kl", "like_targets", "mse", "weighted"]

REFERENCE = "reference_logprobs"
"""The extra that holds another model's log-probs of the targets; the trainer fills it with the base model's."""


def extra(datum: Datum, name: str, loss: str = "") -> NDArray[np.float32]:
    """The datum's extra array of that name; `loss` is who needs it, for the message.

    Raises:
        DataError: the datum does not hold it.
    """
    if name not in datum.extras:
        held = ", ".join(map(repr, sorted(datum.extras))) or "none"
        hint = " A reference model's own: the logprobs of session.forward(batch, ...)." if name == REFERENCE else ""
        raise DataError(
            f"Datum {datum.id!r} has no extra {name!r}, which the loss{f' {loss!r}' if loss else ''} needs; its extras: {held}. "
            f"Supply it with dataclasses.replace(datum, extras={{{name!r}: array}}), float32.{hint}"
        )
    return datum.extras[name]


def weighted(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Iterator[tuple[Datum, Tensor, Tensor]]:
    """Each datum with its log-probs where the weight is not 0 (else 0, so that no infinity leaks) and its weights."""
    if not data or len(data) != len(logprobs):
        raise DataError(f"A loss got {len(data)} data and {len(logprobs)} log-prob tensors; expected as many of each, at least one.")
    for datum, logp in zip(data, logprobs, strict=True):
        if tuple(logp.shape) != datum.weights.shape:
            raise DataError(f"Datum {datum.id!r} has log-probs of shape {tuple(logp.shape)}; expected that of its targets, {datum.weights.shape}.")
        weights = torch.tensor(datum.weights).to(logp)
        yield datum, torch.where(weights != 0, logp, torch.zeros_like(logp)), weights


def like_targets(datum: Datum, name: str, loss: str, logp: Tensor, weights: Tensor) -> Tensor:
    """The datum's extra of that name as a tensor like its log-probs, 0 where the weight is 0.

    Raises:
        DataError: it is missing, or of another shape than the targets.
    """
    array = extra(datum, name, loss)
    if array.shape != datum.weights.shape:
        raise DataError(f"Datum {datum.id!r} has {name!r} of shape {array.shape}; expected that of its targets, {datum.weights.shape}.")
    values = torch.tensor(array).to(logp)
    return torch.where(weights != 0, values, torch.zeros_like(values))


def cross_entropy(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """−Σ w · log p: how surprised the model is by the targets, in nats.

    For [T, K] targets the weights are the target distribution (or any weight per candidate), which makes it soft-target cross-entropy.

    Raises:
        DataError: no data, or shapes that do not fit.

    Source: Shannon 1948, "A Mathematical Theory of Communication"; negative log-likelihood.
    """
    terms = [-(weights * logp).sum() for _, logp, weights in weighted(data, logprobs)]
    return torch.stack(terms).sum(), {}


def mse(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Σ w · (1 − p)²: squared error between each target's probability p = exp(log p) and 1. No unit; in [0, Σ w].

    Unlike cross-entropy it is bounded, so mislabelled tokens pull less; its gradient vanishes as p → 0.

    Raises:
        DataError: no data, or shapes that do not fit.

    Source: the target's term of Brier 1950, "Verification of forecasts expressed in terms of probability".
    """
    terms = [(weights * torch.expm1(logp).square()).sum() for _, logp, weights in weighted(data, logprobs)]
    return torch.stack(terms).sum(), {}


def kl(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """How far the model is from reference log-probs in `extras["reference_logprobs"]` (shape of the targets), in nats.

    Targets [T]: Σ w · (exp(r) − r − 1) with r = log p_ref − log p: the estimator "k3", never negative, 0 where both agree. Where the targets
    were drawn from the model, its expectation is KL(p ‖ p_ref) and that of its gradient is the gradient of KL(p_ref ‖ p); on fixed targets
    it is a penalty on the log-ratio and estimates neither.

    Targets [T, K]: Σ w · p_ref · (log p_ref − log p), the terms of KL(p_ref ‖ p) over the K candidates. With all of the vocabulary as
    candidates and w = 1 it is that divergence; with fewer it is a part of it and may be negative. log p_ref = −inf marks a candidate that
    does not count.

    Raises:
        DataError: no data, no reference, or shapes that do not fit.

    Source: Schulman 2020, "Approximating KL divergence" (k3); Kullback & Leibler 1951; Hinton et al. 2015, arXiv 1503.02531 (soft targets).
    """
    terms = []
    for datum, logp, weights in weighted(data, logprobs):
        array = extra(datum, REFERENCE, "kl")
        if array.shape != datum.weights.shape:
            raise DataError(f"Datum {datum.id!r} has {REFERENCE!r} of shape {array.shape}; expected that of its targets, {datum.weights.shape}.")
        reference = torch.tensor(array).to(logp)
        if logp.ndim == 1:
            ratio = torch.where(weights != 0, reference - logp, torch.zeros_like(logp))
            terms.append((weights * (torch.expm1(ratio) - ratio)).sum())
        else:
            counts = (weights != 0) & (reference != -torch.inf)
            zero = torch.zeros_like(logp)
            mass = torch.where(counts, weights * reference.exp(), zero)
            terms.append((mass * torch.where(counts, reference - logp, zero)).sum())
    return torch.stack(terms).sum(), {}


CROSS_ENTROPY = Loss(name="cross_entropy", fn=cross_entropy, source="Shannon 1948", native="cross_entropy")
MSE = Loss(name="mse", fn=mse, source="Brier 1950")
KL = Loss(name="kl", fn=kl, source='Schulman 2020, "Approximating KL divergence"; Kullback & Leibler 1951', extras=(REFERENCE,))

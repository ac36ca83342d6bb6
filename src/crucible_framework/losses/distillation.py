"""Learning a teacher's distribution over K candidates per position. This file knows neither teacher nor student, and no registry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..protocols import Loss
from ..records import Datum
from .tokenwise import extra

__all__ = ["DISTILLATION", "distillation", "log1mexp"]

TEACHER = "teacher_logprobs"
Direction = Literal["forward", "reverse", "jensen_shannon"]
_TINY = 1e-6
"""A rest of the distribution smaller than this is taken as this: float32 log-probs cannot tell it from 0."""
_NOTHING = -1e4
"""The log-prob of what is no candidate: exp of it is 0, and differences of it stay finite."""


def log1mexp(values: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, exact near 0 and far from it. Source: Mächler 2012, "Accurately computing log(1 − exp(−|a|))"."""
    near = values > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, values, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, values))))


def _rest(logp: Tensor) -> Tensor:
    """log of the mass [R, 1] that the candidates [R, K] leave."""
    held = logp.logsumexp(-1, keepdim=True)
    return log1mexp(held.clamp(max=math.log1p(-_TINY)))


def _divergence(teacher: Tensor, student: Tensor, direction: Direction) -> Tensor:
    """[R] from log-probs [R, K] that are distributions and finite."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if direction == "forward":
        return kl(teacher, student)
    if direction == "reverse":
        return kl(student, teacher)
    middle = torch.logaddexp(teacher, student) - math.log(2)
    return 0.5 * (kl(teacher, middle) + kl(student, middle))


def _distil(data: Sequence[Datum], logprobs: Sequence[Tensor], *, direction: Direction, temperature: float, tail: bool) -> tuple[Tensor, dict[str, float]]:
    terms, mass, total = list[Tensor](), 0.0, 0.0
    for datum, logp in zip(data, logprobs, strict=True):
        array = extra(datum, TEACHER, "distillation")
        if logp.ndim != 2 or array.shape != datum.weights.shape or tuple(logp.shape) != array.shape:
            raise DataError(
                f"Datum {datum.id!r} has targets {datum.targets.shape}, log-probs {tuple(logp.shape)} and {TEACHER!r} {array.shape}; "
                "expected [T, K] for all, the teacher's K likeliest tokens per position."
            )
        weights = torch.tensor(datum.weights).to(logp)
        used = weights.ne(0).any(-1)
        student, teacher, each = logp[used], torch.tensor(array).to(logp)[used], weights[used].sum(-1)
        gone = teacher == -torch.inf  # padding: no candidate
        student, teacher = (part.masked_fill(gone, _NOTHING) for part in (student, teacher))
        mass, total = mass + float((each * teacher.exp().sum(-1)).sum()), total + float(each.sum())
        if tail:
            student, teacher = (torch.cat([part, _rest(part)], -1) for part in (student, teacher))
        else:
            student, teacher = (torch.log_softmax(part / temperature, -1) for part in (student, teacher))
        terms.append((each * _divergence(teacher, student, direction)).sum() * temperature**2)
    return torch.stack(terms).sum(), {"teacher_mass": mass / (total or 1.0)}


def distillation(direction: Direction = "forward", temperature: float = 1.0, tail: bool = True) -> Loss:
    """Σ_t w_t · τ² · D(teacher ‖ student) over the teacher's K likeliest tokens at each position, in nats.

    Targets [T, K] are the teacher's candidates, `extras["teacher_logprobs"]` [T, K] their log-probs (−inf: no candidate), w_t = Σ_k weights[t, k].
    A datum whose weights are the teacher's probabilities thus serves this loss and the soft `cross_entropy` alike.

    Args:
        direction: "forward" KL(teacher ‖ student), which covers all that the teacher says; "reverse" KL(student ‖ teacher), which keeps to what
            it says most; "jensen_shannon".
        temperature: τ > 0, only without `tail`: both sides are p^(1/τ) renormalised over the candidates, times τ² so that gradients keep their size.
        tail: all other tokens count as one more outcome, so that the divergence is a lower bound of that over the vocabulary and the student
            learns how much mass the candidates have; without it both sides are renormalised over the candidates.

    Raises:
        ConfigError: another direction, or a temperature that is not positive, or not 1 together with `tail`.

    Metric: `teacher_mass`, the teacher's mean mass on its candidates. Source: Hinton et al. 2015, arXiv 1503.02531; the directions: Agarwal et
    al. 2023, arXiv 2306.13649.
    """
    if direction not in ("forward", "reverse", "jensen_shannon"):
        raise ConfigError(f"distillation got the direction {direction!r}; expected 'forward', 'reverse' or 'jensen_shannon'.")
    if not temperature > 0 or (tail and temperature != 1):
        raise ConfigError(f"distillation got temperature {temperature!r} with tail={tail}; expected a positive number, and 1 with tail. Set tail=False.")
    fn = partial(_distil, direction=direction, temperature=float(temperature), tail=tail)
    default = direction == "forward" and temperature == 1 and tail
    name = "distillation" if default else f"distillation(direction={direction},temperature={temperature:g},tail={tail})"
    return Loss(name=name, fn=fn, source="Hinton et al. 2015, arXiv 1503.02531; Agarwal et al. 2023, arXiv 2306.13649", extras=(TEACHER,))


DISTILLATION = distillation()

"""Losses on preferred and rejected answers: DPO, IPO, SimPO, ORPO, KTO.

Answers to one prompt are data of one batch whose ids are "<name>#chosen" and "<name>#rejected" (see `records.answer_id`); `Batches` keeps
them together. An answer's log-prob is the sum over its tokens of weight not 0, its length their number. The weights themselves say how much
a pair counts: m, the mean weight of its tokens. A batch gives (Σ w) · Σ m ℓ / Σ m over its pairs, so the reported loss is the mean of ℓ
over pairs whatever their lengths (ln 2 at the start of DPO), and scaling all weights scales the loss. This file knows no model and no registry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import ConfigError, DataError
from ..protocols import Loss
from ..records import Datum, answer_id, split_answer_id
from .distillation import log1mexp
from .tokenwise import REFERENCE, like_targets, weighted

__all__ = ["DPO", "IPO", "KTO", "ORPO", "SIMPO", "dpo", "ipo", "kto", "orpo", "simpo"]

Made = tuple[Tensor, dict[str, float]]


class _Answer(NamedTuple):
    """An answer's log p and that of the reference (nats, summed over its tokens), its number of tokens, and the mean and sum of their weights."""

    id: str
    logp: Tensor
    reference: Tensor
    length: int
    mean: float
    total: float

    @property
    def ratio(self) -> Tensor:
        """log p − log p_ref of the whole answer."""
        return self.logp - self.reference

    @property
    def average(self) -> Tensor:
        """log p per token."""
        return self.logp / self.length


def _answers(data: Sequence[Datum], logprobs: Sequence[Tensor], loss: str, *, reference: bool) -> dict[tuple[str, str], _Answer]:
    """By name and role; data whose weights are all 0 are left out."""
    found = dict[tuple[str, str], _Answer]()
    for datum, logp, weights in weighted(data, logprobs):
        if logp.ndim != 1:
            raise DataError(f"Datum {datum.id!r} has targets of shape {datum.targets.shape}; the loss {loss!r} expected [T], one answer's tokens.")
        name, role = split_answer_id(datum.id)
        if not role:
            raise DataError(
                f"Datum {datum.id!r} is neither chosen nor rejected, which the loss {loss!r} needs to know; expected an id like {answer_id('q7', 'chosen')!r}. "
                "Make the examples with data.preference_examples."
            )
        if (name, role) in found:
            raise DataError(f"Datum {datum.id!r} is in the batch twice; expected each answer once. Give every pair a name of its own.")
        ref = like_targets(datum, REFERENCE, loss, logp, weights).sum() if reference else torch.zeros_like(logp.sum())
        length = int((weights != 0).sum())
        if length:
            total = float(weights.sum())
            found[name, role] = _Answer(datum.id, logp.sum(), ref, length, total / length, total)
    return found


def _pairs(answers: dict[tuple[str, str], _Answer], loss: str) -> list[tuple[_Answer, _Answer]]:
    pairs = list[tuple[_Answer, _Answer]]()
    for (name, role), answer in answers.items():
        other = answers.get((name, "rejected" if role == "chosen" else "chosen"))
        if role != "baseline" and other is None:
            wanted = answer_id(name, "rejected" if role == "chosen" else "chosen")
            raise DataError(
                f"Datum {answer.id!r} is in a batch without {wanted!r}, with which the loss {loss!r} compares it; expected both. "
                "Use Batches, an even batch_size, and data that hold every pair whole."
            )
        if role == "chosen" and other is not None:
            pairs.append((answer, other))
    return pairs


def _mean(values: Sequence[Tensor], weights: Sequence[float], total: float, logprobs: Sequence[Tensor]) -> Tensor:
    """total · Σ m ℓ / Σ m; 0 with a graph where nothing counts."""
    scale = sum(weights)
    if not values or scale == 0:
        return torch.stack([(logp * 0).sum() for logp in logprobs]).sum()
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum() * (total / scale)


def _paired(
    data: Sequence[Datum], logprobs: Sequence[Tensor], *, name: str, each: Callable[[_Answer, _Answer], tuple[Tensor, Tensor]], reference: bool
) -> Made:
    """A loss over pairs; `each` gives (ℓ, margin), and a pair is right where its margin is positive (0 counts half)."""
    answers = _answers(data, logprobs, name, reference=reference)
    pairs = _pairs(answers, name)
    made = [each(chosen, rejected) for chosen, rejected in pairs]
    weights = [(chosen.total + rejected.total) / (chosen.length + rejected.length) for chosen, rejected in pairs]
    value = _mean([loss for loss, _ in made], weights, sum(answer.total for answer in answers.values()), logprobs)
    scale = sum(weights) or 1.0

    def mean(values: Sequence[float]) -> float:
        return sum(weight * number for weight, number in zip(weights, values, strict=True)) / scale

    margins = [float(margin.detach()) for _, margin in made]
    metrics = {"pairs": float(len(pairs)), "margin": mean(margins), "accuracy": mean([(math.copysign(1.0, m) + 1) / 2 if m else 0.5 for m in margins])}
    for place, role in enumerate(("chosen", "rejected")):
        kind = "logratio" if reference else "logp"
        metrics[f"{role}_{kind}"] = mean([float(pair[place].ratio.detach()) for pair in pairs])
    return value, metrics


def _loss(name: str, defaults: dict[str, float], given: dict[str, float], each: Callable[..., tuple[Tensor, Tensor]], source: str, *, reference: bool) -> Loss:
    for key, number in given.items():
        if not math.isfinite(number) or number < 0 or (key in ("beta", "tau") and number == 0):
            raise ConfigError(
                f"{name} got {key} {number!r}; expected a {'positive' if key in ('beta', 'tau') else 'non-negative'} number, for example {defaults[key]}."
            )
    label = name if given == defaults else f"{name}({','.join(f'{key}={number:g}' for key, number in given.items())})"
    fn = partial(_paired, name=name, each=partial(each, **given), reference=reference)
    return Loss(name=label, fn=fn, source=source, extras=(REFERENCE,) if reference else ())


def _dpo(chosen: _Answer, rejected: _Answer, *, beta: float, smoothing: float, sft: float) -> tuple[Tensor, Tensor]:
    margin = beta * (chosen.ratio - rejected.ratio)
    value = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    return value - sft * chosen.average, margin


def dpo(beta: float = 0.1, smoothing: float = 0.0, sft: float = 0.0) -> Loss:
    """ℓ = −log σ(β · h), h = (log p − log p_ref)(chosen) − (log p − log p_ref)(rejected). In nats; ln 2 where the model is the reference.

    Targets, weights and `extras["reference_logprobs"]`: [T]; the trainer fills the last with the base model's.

    Args:
        beta: β > 0: how soon a pair counts as learned; the smaller, the further from the reference.
        smoothing: ε in [0, ½): the share of pairs whose labels are thought to be wrong; ℓ = −(1 − ε) log σ(βh) − ε log σ(−βh) (cDPO).
        sft: α ≥ 0: adds α times the chosen answer's mean −log p, which keeps it likely (RPO).

    Raises:
        ConfigError: a number out of range.

    Metrics: `pairs`, `margin` (β h), `accuracy` (share of pairs with h > 0; 0 counts half), `chosen_logratio`, `rejected_logratio`: where
    both fall, the model makes both answers unlikely.
    Source: Rafailov et al. 2023, arXiv 2305.18290; smoothing: Mitchell 2023, "A note on DPO with noisy preferences"; sft: Pang et al. 2024,
    arXiv 2404.19733.
    """
    if not smoothing < 0.5:
        raise ConfigError(f"dpo got smoothing {smoothing!r}; expected a share below 0.5, for example 0.1.")
    given = {"beta": beta, "smoothing": smoothing, "sft": sft}
    return _loss("dpo", {"beta": 0.1, "smoothing": 0.0, "sft": 0.0}, given, _dpo, "Rafailov et al. 2023, arXiv 2305.18290", reference=True)


def _ipo(chosen: _Answer, rejected: _Answer, *, tau: float, average: float) -> tuple[Tensor, Tensor]:
    parts = [answer.ratio / answer.length if average else answer.ratio for answer in (chosen, rejected)]
    margin = parts[0] - parts[1]
    return (margin - 1 / (2 * tau)).square(), margin


def ipo(tau: float = 0.1, average: float = 1.0) -> Loss:
    """ℓ = (h − 1 / (2 τ))²: the margin is driven to a fixed size, so that sure preferences do not push the model away without end.

    Args:
        tau: τ > 0; no unit. The loss starts at 1 / (4 τ²).
        average: 1: h compares log-ratios per token, as implementations do on the authors' advice; 0: whole answers, as the paper writes.

    Extras and metrics as `dpo`; `margin` is h. Source: Azar et al. 2023, arXiv 2310.12036.
    """
    return _loss("ipo", {"tau": 0.1, "average": 1.0}, {"tau": tau, "average": average}, _ipo, "Azar et al. 2023, arXiv 2310.12036", reference=True)


def _simpo(chosen: _Answer, rejected: _Answer, *, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    margin = beta * (chosen.average - rejected.average)
    return -logsigmoid(margin - gamma), margin


def simpo(beta: float = 2.0, gamma: float = 1.0) -> Loss:
    """ℓ = −log σ(β · (mean log p(chosen) − mean log p(rejected)) − γ), in nats: no reference; per-token means take away the reward for length.

    Args:
        beta: β > 0.
        gamma: γ ≥ 0: by how much the chosen answer must win.

    Metrics as `dpo`, with `chosen_logp` and `rejected_logp`. Source: Meng et al. 2024, arXiv 2405.14734.
    """
    return _loss("simpo", {"beta": 2.0, "gamma": 1.0}, {"beta": beta, "gamma": gamma}, _simpo, "Meng et al. 2024, arXiv 2405.14734", reference=False)


def _orpo(chosen: _Answer, rejected: _Answer, *, weight: float) -> tuple[Tensor, Tensor]:
    odds = [answer.average - log1mexp(answer.average.clamp(max=-1e-6)) for answer in (chosen, rejected)]
    margin = odds[0] - odds[1]
    return -chosen.average - weight * logsigmoid(margin), margin


def orpo(weight: float = 0.1) -> Loss:
    """ℓ = −mean log p(chosen) − λ · log σ(log odds(chosen) − log odds(rejected)), odds = p̄ / (1 − p̄), p̄ = exp(mean log p). In nats.

    Fine-tuning and preference in one, without a reference.

    Args:
        weight: λ ≥ 0.

    Metrics as `simpo`; `margin` is the log of the odds ratio. Source: Hong et al. 2024, arXiv 2403.07691.
    """
    return _loss("orpo", {"weight": 0.1}, {"weight": weight}, _orpo, "Hong et al. 2024, arXiv 2403.07691", reference=False)


def _kto(data: Sequence[Datum], logprobs: Sequence[Tensor], *, beta: float, chosen: float, rejected: float) -> Made:
    answers = _answers(data, logprobs, "kto", reference=True)
    base = [answer.ratio.detach() for (_, role), answer in answers.items() if role == "baseline"]
    zero = torch.stack(base).mean().clamp(min=0) if base else torch.zeros((), dtype=logprobs[0].dtype, device=logprobs[0].device)
    judged = [(answer, role == "chosen") for (_, role), answer in answers.items() if role != "baseline"]
    terms = list[Tensor]()
    right = 0.0
    for answer, good in judged:
        surplus = beta * (answer.ratio - zero) if good else beta * (zero - answer.ratio)
        terms.append((chosen if good else rejected) * torch.sigmoid(-surplus))
        right += 0.5 if float(surplus.detach()) == 0 else float(surplus.detach() > 0)
    total = sum(answer.total for answer in answers.values())
    value = _mean(terms, [answer.mean for answer, _ in judged], total, logprobs)
    return value, {"answers": float(len(judged)), "accuracy": right / (len(judged) or 1), "zero_point": float(zero)}


def kto(beta: float = 0.1, chosen: float = 1.0, rejected: float = 1.0) -> Loss:
    """ℓ = λ · (1 − σ(± β (log p − log p_ref − z))): each answer is good or bad by itself (+ chosen, − rejected); no pairs are needed.

    z ≥ 0, without gradient, is where an answer is neither: the mean log-ratio of data called "<name>#baseline" in the batch (answers to other
    prompts, as the paper has them), at least 0; 0 where the batch has none.

    Args:
        beta: β > 0.
        chosen: λ of chosen answers.
        rejected: λ of rejected answers; the paper advises λ · n of both within a factor of 4/3.

    Extras as `dpo`. No unit; λ / 2 at the start. Metrics: `answers`, `accuracy` (share on the right side of z), `zero_point`.
    Source: Ethayarajh et al. 2024, arXiv 2402.01306.
    """
    given = {"beta": beta, "chosen": chosen, "rejected": rejected}
    if not (math.isfinite(beta) and beta > 0 and min(chosen, rejected) >= 0):
        raise ConfigError(f"kto got {given!r}; expected a positive beta and factors of at least 0, for example beta 0.1.")
    label = "kto" if given == {"beta": 0.1, "chosen": 1.0, "rejected": 1.0} else f"kto({','.join(f'{key}={number:g}' for key, number in given.items())})"
    fn = partial(_kto, beta=beta, chosen=chosen, rejected=rejected)
    return Loss(name=label, fn=fn, source="Ethayarajh et al. 2024, arXiv 2402.01306", extras=(REFERENCE,))


DPO, IPO, SIMPO, ORPO, KTO = dpo(), ipo(), simpo(), orpo(), kto()

"""Policy-gradient losses on sampled completions, numerically those of a Tinker service: importance sampling, PPO, CISPO, DRO, GSPO; and
on-policy distillation.

All take targets [T] and `extras["logprobs"]` [T], the sampler's log q of each target; and `extras["advantages"]` [T]. With r = p / q they sum
over tokens and data, each token times its weight w; with w = 1 on sampled tokens and 0 on the prompt they are the service's own numbers.
This file does not know where samples or rewards come from (see `advantages.py`), nor a registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..protocols import Loss
from ..records import Datum
from .tokenwise import like_targets, weighted

__all__ = [
    "CISPO", "DRO", "GSPO", "IMPORTANCE_SAMPLING", "ON_POLICY_DISTILLATION", "PPO",
    "cispo", "dro", "gspo", "importance_sampling", "on_policy_distillation", "ppo",
]  # fmt: skip

SAMPLER, ADVANTAGES = "logprobs", "advantages"
LOW, HIGH, MASK, TEACHER = "clip_low_threshold", "clip_high_threshold", "sequence_ratio_mask", "teacher_logprobs"
_PAPER = {
    "importance_sampling": "Williams 1992 (REINFORCE) with importance weights; Tinker's 'importance_sampling'",
    "ppo": "Schulman et al. 2017, arXiv 1707.06347; Tinker's 'ppo'",
    "cispo": "MiniMax 2025 (MiniMax-M1), arXiv 2506.13585; Tinker's 'cispo'",
    "dro": "Richemond et al. 2024 (DRO), arXiv 2405.19107; Tinker's 'dro'",
    "gspo": "Zheng et al. 2025 (GSPO), arXiv 2507.18071; Tinker's 'gspo'",
}


class _Sampled(NamedTuple):
    """One datum: log p, log q, advantages and weights [T], and the bounds of the ratio, all 0 (bounds: as they are) where w is 0."""

    datum: Datum
    logp: Tensor
    old: Tensor
    advantage: Tensor
    weights: Tensor
    low: Tensor
    high: Tensor


def _bound(datum: Datum, name: str, default: float, logp: Tensor, weights: Tensor) -> Tensor:
    if name not in datum.extras:
        return torch.full_like(logp, default)
    return torch.where(weights != 0, like_targets(datum, name, "", logp, weights), torch.full_like(logp, default))


def _sampled(data: Sequence[Datum], logprobs: Sequence[Tensor], loss: str, low: float = 0.0, high: float = float("inf")) -> Iterator[_Sampled]:
    for datum, logp, weights in weighted(data, logprobs):
        if logp.ndim != 1:
            raise DataError(f"Datum {datum.id!r} has targets of shape {datum.targets.shape}; the loss {loss!r} expected [T], the tokens that were sampled.")
        old, advantage = (like_targets(datum, name, loss, logp, weights) for name in (SAMPLER, ADVANTAGES))
        bounds = (_bound(datum, name, value, logp, weights) for name, value in ((LOW, low), (HIGH, high)))
        yield _Sampled(datum, logp, old, advantage, weights, *bounds)


def _made(rows: Sequence[_Sampled], terms: Sequence[Tensor], outside: Sequence[Tensor] = ()) -> tuple[Tensor, dict[str, float]]:
    """The sum, and means per weight: the ratio, the estimate −log r of KL(q ‖ p), and the share of tokens whose ratio was cut."""
    with torch.no_grad():
        total = float(sum(row.weights.sum() for row in rows)) or 1.0
        ratio = sum(float((row.weights * (row.logp - row.old).exp()).sum()) for row in rows)
        drift = sum(float((row.weights * (row.old - row.logp)).sum()) for row in rows)
        metrics = {"ratio": ratio / total, "kl_sampler": drift / total}
        if outside:
            metrics["clipped"] = sum(float((row.weights * cut).sum()) for row, cut in zip(rows, outside, strict=True)) / total
    return torch.stack([term.sum() for term in terms]).sum(), metrics


def _importance_sampling(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    rows = list(_sampled(data, logprobs, "importance_sampling"))
    return _made(rows, [-row.weights * (row.logp - row.old).exp() * row.advantage for row in rows])


def _clipped(row: _Sampled, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic term per token, and 1.0 where the bound is what counts."""
    free, held = ratio * row.advantage, torch.minimum(torch.maximum(ratio, row.low), row.high) * row.advantage
    return -row.weights * torch.minimum(free, held), (held < free).to(ratio).detach()


def _ppo(data: Sequence[Datum], logprobs: Sequence[Tensor], *, low: float, high: float) -> tuple[Tensor, dict[str, float]]:
    rows = list(_sampled(data, logprobs, "ppo", low, high))
    pairs = [_clipped(row, (row.logp - row.old).exp()) for row in rows]
    return _made(rows, [term for term, _ in pairs], [cut for _, cut in pairs])


def _cispo(data: Sequence[Datum], logprobs: Sequence[Tensor], *, low: float, high: float) -> tuple[Tensor, dict[str, float]]:
    rows = list(_sampled(data, logprobs, "cispo", low, high))
    terms, outside = list[Tensor](), list[Tensor]()
    for row in rows:
        ratio = (row.logp - row.old).exp().detach()
        held = torch.minimum(torch.maximum(ratio, row.low), row.high)
        terms.append(-row.weights * held * row.logp * row.advantage)
        outside.append((held != ratio).to(ratio))
    return _made(rows, terms, outside)


def _dro(data: Sequence[Datum], logprobs: Sequence[Tensor], *, beta: float) -> tuple[Tensor, dict[str, float]]:
    rows = list(_sampled(data, logprobs, "dro"))
    return _made(rows, [-row.weights * (row.logp * row.advantage - 0.5 * beta * (row.logp - row.old).square()) for row in rows])


def _gspo(data: Sequence[Datum], logprobs: Sequence[Tensor], *, low: float, high: float) -> tuple[Tensor, dict[str, float]]:
    rows = list(_sampled(data, logprobs, "gspo", low, high))
    terms, outside = list[Tensor](), list[Tensor]()
    for row in rows:
        used = like_targets(row.datum, MASK, "gspo", row.logp, row.weights) if MASK in row.datum.extras else (row.weights != 0).to(row.logp)
        mean = (used * (row.logp - row.old)).detach().sum() / used.sum().clamp(min=1.0)
        term, cut = _clipped(row, (mean + row.logp - row.logp.detach()).exp())
        terms.append(term)
        outside.append(cut)
    return _made(rows, terms, outside)


def _on_policy(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    terms, gap, total = list[Tensor](), 0.0, 0.0
    for datum, logp, weights in weighted(data, logprobs):
        if logp.ndim != 1:
            raise DataError(
                f"Datum {datum.id!r} has targets of shape {datum.targets.shape}; on_policy_distillation expected [T], the tokens that were sampled."
            )
        old, teacher = (like_targets(datum, name, "on_policy_distillation", logp, weights) for name in (SAMPLER, TEACHER))
        terms.append((weights * (logp - old).exp() * (old - teacher)).sum())
        gap, total = gap + float((weights * (old - teacher)).sum()), total + float(weights.sum())
    return torch.stack(terms).sum(), {"reverse_kl": gap / (total or 1.0)}


def _check_bounds(name: str, low: float, high: float) -> None:
    if not 0 <= low <= 1 <= high:
        raise ConfigError(f"{name} got the ratio bounds {low!r} and {high!r}; expected 0 <= low <= 1 <= high, for example 0.8 and 1.2 (ratios, not distances).")


def _named(name: str, fn: Callable[..., tuple[Tensor, dict[str, float]]], defaults: dict[str, float], given: dict[str, float]) -> Loss:
    label = name if given == defaults else f"{name}({', '.join(f'{key}={value:g}' for key, value in given.items())})"
    native = name if name in _PAPER else None
    extras = (SAMPLER, ADVANTAGES) if native else (SAMPLER, TEACHER)
    source = _PAPER.get(name, "Agarwal et al. 2023 (GKD), arXiv 2306.13649; Gu et al. 2023 (MiniLLM), arXiv 2306.08543")
    return Loss(name=label, fn=partial(fn, **given) if given else fn, source=source, extras=extras, native=native)


def importance_sampling() -> Loss:
    """−Σ w · r · A with r = exp(log p − log q): the policy gradient, corrected for samples that come from an older model q.

    Targets, weights, `logprobs`, `advantages`: [T]. Unit: that of the advantages. Where p = q its gradient is REINFORCE's, −w · A per token.
    Metrics: `ratio` (mean of r), `kl_sampler` (mean of log q − log p, which estimates KL(q ‖ p)).

    Source: Williams 1992, "Simple statistical gradient-following algorithms"; Tinker's `importance_sampling`.
    """
    return _named("importance_sampling", _importance_sampling, {}, {})


def ppo(low: float = 0.8, high: float = 1.2) -> Loss:
    """−Σ w · min(r · A, clip(r, low, high) · A): no reward for moving the ratio beyond its bounds.

    Args:
        low: least ratio (absolute, 0.8 is "epsilon 0.2"); `extras["clip_low_threshold"]` [T], where present, replaces it per token.
        high: greatest ratio; `extras["clip_high_threshold"]` [T] likewise.

    Raises:
        ConfigError: not 0 <= low <= 1 <= high.

    Metrics: `ratio`, `kl_sampler`, and `clipped`, the share of the weight whose bound counts (its gradient is 0).
    Source: Schulman et al. 2017, arXiv 1707.06347; Tinker's `ppo`.
    """
    _check_bounds("ppo", low, high)
    return _named("ppo", _ppo, {"low": 0.8, "high": 1.2}, {"low": low, "high": high})


def cispo(low: float = 0.8, high: float = 1.2) -> Loss:
    """−Σ w · sg(clip(r, low, high)) · log p · A: every token keeps a gradient, and only its importance weight is cut. sg: no gradient.

    Its value is not what is made small (sg hides a part of it); its gradient is −w · clip(r) · A per token.
    Source: MiniMax 2025, arXiv 2506.13585; Tinker's `cispo`.
    """
    _check_bounds("cispo", low, high)
    return _named("cispo", _cispo, {"low": 0.8, "high": 1.2}, {"low": low, "high": high})


def dro(beta: float = 0.05) -> Loss:
    """−Σ w · (log p · A − ½ β (log p − log q)²): reinforcement with a quadratic pull to the sampler; no ratio, so nothing explodes.

    Args:
        beta: strength of the pull, at least 0.

    Source: Richemond et al. 2024, arXiv 2405.19107; Tinker's `dro`.
    """
    if not beta >= 0:
        raise ConfigError(f"dro got beta {beta!r}; expected a number of at least 0, for example 0.05.")
    return _named("dro", _dro, {"beta": 0.05}, {"beta": beta})


def gspo(low: float = 0.8, high: float = 1.2) -> Loss:
    """−Σ w · min(s · A, clip(s, low, high) · A) with one ratio per sequence, s = exp(mean of log p − log q over the mask).

    The mean has no gradient; each token's is s · w · A where s is not cut. `extras["sequence_ratio_mask"]` [T], where present, says which
    tokens are averaged (1) or not (0); else those of weight not 0. A sequence's ratio stays near 1, so useful bounds are tight: the paper's
    are 1 − 3e-4 and 1 + 4e-4; the defaults are wide.

    Source: Zheng et al. 2025, arXiv 2507.18071; Tinker's `gspo`.
    """
    _check_bounds("gspo", low, high)
    return _named("gspo", _gspo, {"low": 0.8, "high": 1.2}, {"low": low, "high": high})


def on_policy_distillation() -> Loss:
    """Σ w · r · (log q − log p_teacher): the student's own samples, each token rewarded by what a teacher thinks of it.

    `importance_sampling` with the advantage log p_teacher − log q of each token (no look-ahead): at p = q the expectation of its gradient is
    that of KL(p ‖ p_teacher) at each visited prefix. `logprobs` (log q) and `teacher_logprobs`: [T], nats.
    Metric: `reverse_kl`, the mean of log q − log p_teacher.

    Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649; Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    return _named("on_policy_distillation", _on_policy, {}, {})


IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO, ON_POLICY_DISTILLATION = importance_sampling(), ppo(), cispo(), dro(), gspo(), on_policy_distillation()

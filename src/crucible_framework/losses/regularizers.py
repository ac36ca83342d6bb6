"""Terms to add to a loss with `combine`: entropy, divergences from a reference, agreement of two views. This file knows no model and no registry.

Norms of adapter weights and of gradients are not here: a loss sees log-probs only. `AdamConfig.weight_decay` is the L2 norm's; others are
gradient hooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError
from ..protocols import Loss
from ..records import Datum, split_answer_id
from .tokenwise import REFERENCE, kl, like_targets, weighted

__all__ = ["CONSISTENCY", "ENTROPY", "FORWARD_KL", "NEGATIVE_ENTROPY", "REVERSE_KL", "SYMMETRIC_KL", "consistency", "entropy", "reverse_kl", "symmetric_kl"]

Made = tuple[Tensor, dict[str, float]]


def entropy(data: Sequence[Datum], logits: Sequence[Tensor]) -> Made:
    """Σ_t w_t · H(p_t), H = −Σ_v p log p over the vocabulary, in nats; w_t = Σ_k weights[t, k] where targets are [T, K].

    Needs logits [T, V]. Made small it makes answers sure; its negative, `negative_entropy`, keeps them diverse.

    Source: Grandvalet & Bengio 2004, "Semi-supervised learning by entropy minimization"; the negative: Mnih et al. 2016, arXiv 1602.01783.
    """
    if not data or len(data) != len(logits):
        raise DataError(f"A loss got {len(data)} data and {len(logits)} tensors of logits; expected as many of each, at least one.")
    terms = list[Tensor]()
    for datum, scores in zip(data, logits, strict=True):
        weights = torch.tensor(datum.weights.reshape(len(datum), -1)).to(scores)
        used = weights.ne(0).any(-1)
        logp = torch.log_softmax(scores[used], -1)
        terms.append((weights[used].sum(-1) * -(logp.exp() * logp).sum(-1)).sum())
    return torch.stack(terms).sum(), {}


def _negative_entropy(data: Sequence[Datum], logits: Sequence[Tensor]) -> Made:
    value, metrics = entropy(data, logits)
    return -value, metrics


def reverse_kl(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    """Σ w · ½ (log p − log p_ref)² on targets [T], Σ w · p (log p − log p_ref) on candidates [T, K]; the reference as in `kl`, in nats.

    [T]: the estimator "k2". Where the targets were drawn from the model its gradient's expectation is that of KL(p ‖ p_ref), which `kl`
    ("k3") on samples does not have. [T, K]: those terms of KL(p ‖ p_ref) whose weight is not 0; a reference of −inf marks no candidate.

    Source: Schulman 2020, "Approximating KL divergence"; on gradients: Tang & Munos 2025, arXiv 2506.09477.
    """
    terms = list[Tensor]()
    for datum, logp, weights in weighted(data, logprobs):
        reference = like_targets(datum, REFERENCE, "reverse_kl", logp, weights)
        some = (weights != 0) & (reference != -torch.inf)
        apart = torch.where(some, logp - torch.where(some, reference, 0.0), 0.0)
        terms.append((weights * (0.5 * apart.square() if logp.ndim == 1 else torch.where(some, logp.exp(), 0.0) * apart)).sum())
    return torch.stack(terms).sum(), {}


def symmetric_kl(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    """½ (`kl` + `reverse_kl`): half of Jeffreys' divergence where the candidates are the vocabulary. In nats.

    Source: Jeffreys 1946, "An invariant form for the prior probability in estimation problems".
    """
    return 0.5 * (kl(data, logprobs)[0] + reverse_kl(data, logprobs)[0]), {}


def consistency(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    """How differently the model answers two wordings of a prompt, with a gradient through both. In nats (squared for targets [T]).

    Data of one batch called "<name>#view1" and "<name>#view2" have the same answer: the same targets, in the same order, where the weight is
    not 0. [T]: Σ w · ½ (log p₁ − log p₂)². [T, K]: Σ_t w_t · ½ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)) over the candidates, renormalised. w is the mean of
    both views' weights times 2, so that the reported loss is the mean per token. Metric: `views`, the number of pairs.

    Raises:
        DataError: a view without the other, or answers that differ.

    Source: Liang et al. 2021 (R-Drop), arXiv 2106.14448 (there: two dropout masks); Elazar et al. 2021, arXiv 2102.01017 (paraphrases).
    """
    views = dict[str, list[tuple[Datum, Tensor, Tensor, Tensor]]]()
    for datum, masked, weights in weighted(data, logprobs):
        name, role = split_answer_id(datum.id)
        if role not in ("view1", "view2"):
            raise DataError(f"Datum {datum.id!r} is no view of a prompt, which the loss 'consistency' compares; expected an id like 'q7#view1' or 'q7#view2'.")
        used = weights.ne(0) if weights.ndim == 1 else weights.ne(0).any(-1)
        views.setdefault(name, []).append((datum, masked[used], weights[used], torch.tensor(datum.targets)[used.cpu()]))
    terms = list[Tensor]()
    for name, pair in views.items():
        ids = sorted(datum.id for datum, *_ in pair)
        if len(pair) != 2 or ids[0] == ids[1] or pair[0][3].shape != pair[1][3].shape or not torch.equal(pair[0][3], pair[1][3]):
            raise DataError(f"The views {', '.join(ids)} of {name!r} cannot be compared; expected '#view1' and '#view2' in one batch with the same targets.")
        (_, one, left, _), (_, two, right, _) = pair
        if one.ndim == 1:
            terms.append(((left + right) * 0.5 * (one - two).square()).sum())
        else:
            one, two = torch.log_softmax(one, -1), torch.log_softmax(two, -1)
            terms.append((0.5 * (left + right).sum(-1) * ((one.exp() - two.exp()) * (one - two)).sum(-1)).sum())
    return torch.stack(terms).sum(), {"views": float(len(terms))}


ENTROPY = Loss(name="entropy", fn=entropy, source="Grandvalet & Bengio 2004", needs="logits")
NEGATIVE_ENTROPY = Loss(name="negative_entropy", fn=_negative_entropy, source="Mnih et al. 2016, arXiv 1602.01783", needs="logits")
FORWARD_KL = Loss(
    name="forward_kl", fn=kl, source='Schulman 2020, "Approximating KL divergence" (k3, whose gradient is that of KL(p_ref ‖ p))', extras=(REFERENCE,)
)
REVERSE_KL = Loss(
    name="reverse_kl", fn=reverse_kl, source='Schulman 2020, "Approximating KL divergence" (k2); Tang & Munos 2025, arXiv 2506.09477', extras=(REFERENCE,)
)
SYMMETRIC_KL = Loss(name="symmetric_kl", fn=symmetric_kl, source="Jeffreys 1946", extras=(REFERENCE,))
CONSISTENCY = Loss(name="consistency", fn=consistency, source="Liang et al. 2021 (R-Drop), arXiv 2106.14448")

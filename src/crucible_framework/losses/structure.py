"""Losses on what an argument is made of: circular support, invented citations, and the balance of support and contradiction.

They see the model's log-probs of K candidates at the few tokens where an id or a relation is decided: targets [T, K], with extras that
`claims.annotate_claims` makes from text. Column 0 is the text's own token and carries the weight, so that cross-entropy on the same data is
the usual one; candidates have weight 0. A position counts w_t = max_k |weights[t, k]|. This file knows no text, tokenizer or registry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import ConfigError, DataError
from ..protocols import Loss
from ..records import Datum
from .claims import CITATION, CLOSURE, EVIDENCE, NODES, POLARITY, SOURCE, annotate_claims
from .tokenwise import extra

__all__ = ["CHIRALITY", "CITATION_VALIDITY", "TOPOLOGICAL", "Variant", "acyclicity", "chirality", "citation_validity", "soft_adjacency", "topological"]

Variant = Literal["closure", "expm", "notears", "polynomial", "dagma"]
Made = tuple[Tensor, dict[str, float]]
_SOURCES = {
    "closure": "Welleck et al. 2019 (unlikelihood training), arXiv 1908.04319, with the targets that close a directed cycle as negative set",
    "expm": "tr(e^A) − d, after Zheng et al. 2018 (NOTEARS), arXiv 1803.01422, with A in the place of A∘A",
    "notears": "Zheng et al. 2018 (NOTEARS), arXiv 1803.01422",
    "polynomial": "Yu et al. 2019 (DAG-GNN), arXiv 1904.10098",
    "dagma": "Bello et al. 2022 (DAGMA), arXiv 2209.08037",
}


class _Row(NamedTuple):
    """The positions [R] of one datum at which something is decided: log-probs and marks [R, K], position weights [R], and the positions.

    `logp` is of one candidate each: where n columns name the same token, its probability is shared by them.
    """

    datum: Datum
    logp: Tensor
    marks: Tensor
    weights: Tensor
    rows: NDArray[np.int64]


def _rows(data: Sequence[Datum], logprobs: Sequence[Tensor], name: str, loss: str) -> Iterator[_Row]:
    for datum, logp in zip(data, logprobs, strict=True):
        marks = extra(datum, name, loss)
        if datum.targets.ndim != 2 or marks.shape != datum.targets.shape or tuple(logp.shape) != marks.shape:
            raise DataError(
                f"Datum {datum.id!r} has targets {datum.targets.shape}, log-probs {tuple(logp.shape)} and {name!r} {marks.shape}; the loss {loss!r} "
                "expected [T, K] for all. Make it with losses.claims.annotate_claims."
            )
        weights = np.abs(datum.weights).max(axis=1)
        rows = np.flatnonzero((marks != 0).any(axis=1) & (weights > 0))
        marked = marks[rows] != 0
        same = (datum.targets[rows][:, :, None] == datum.targets[rows][:, None, :]) & marked[:, None, :]
        shared = torch.tensor(np.log(np.maximum(same.sum(axis=2), 1))).to(logp)
        place = torch.from_numpy(rows).to(logp.device)
        yield _Row(datum, logp[place] - shared, torch.tensor(marks[rows]).to(logp), torch.tensor(weights[rows]).to(logp), rows)


def _nothing(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Tensor:
    """0 with a graph, for where no datum decides anything. Cells that were not computed may be infinite, so none is touched."""
    if not data or len(data) != len(logprobs):
        raise DataError(f"A loss got {len(data)} data and {len(logprobs)} log-prob tensors; expected as many of each, at least one.")
    return torch.stack([logp[:0].sum() for logp in logprobs]).sum()


def _avoid(data: Sequence[Datum], logprobs: Sequence[Tensor], *, name: str, loss: str, valid: float) -> Made:
    """−Σ_t w_t · (log(1 − c_t) + valid · log m_t), c_t the share of the bad candidates (mark < 0) in the mass m_t of all marked ones."""
    terms, mass, total, events = [_nothing(data, logprobs)], 0.0, 0.0, 0
    for row in _rows(data, logprobs, name, loss):
        good, bad = (torch.logsumexp(row.logp.masked_fill(~kept, -torch.inf), -1) for kept in (row.marks > 0, row.marks < 0))
        real = (row.marks < 0).any(-1)
        if bool((real & ~(row.marks > 0).any(-1)).any()):
            raise DataError(
                f"Datum {row.datum.id!r} has a position at which every candidate is bad for the loss {loss!r}; expected one that is not. Mark none there."
            )
        odds = torch.where(real, bad - good, 0.0)
        terms.append((torch.where(real, row.weights * softplus(odds), 0.0)).sum())
        if valid:
            mass_of_all = torch.logsumexp(row.logp.masked_fill(row.marks == 0, -torch.inf), -1)
            terms.append(-valid * torch.where(real, row.weights * mass_of_all, 0.0).sum())
        mass += float((row.weights * torch.sigmoid(odds.detach()))[real].sum())
        total, events = total + float(row.weights[real].sum()), events + int(real.sum())
    return torch.stack(terms).sum(), {"events": float(events), "bad_mass": mass / (total or 1.0)}


def soft_adjacency(choices: Tensor, nodes: Tensor, sources: Tensor, size: int) -> Tensor:
    """A_ij = 1 − Π over the lines with source i of (1 − P(target = j)): the probability that some line draws the edge, [size, size].

    Args:
        choices: log-probs [L, K] of each line's candidates; renormalised here.
        nodes: the node, from 1, that each candidate names, [L, K]; 0: none.
        sources: the node, from 1, at each line's start, [L].
        size: number of nodes.
    """
    known = nodes > 0
    share = torch.softmax(choices.masked_fill(~known, -torch.inf), -1)
    onto = torch.nn.functional.one_hot((nodes.long() - 1).clamp(min=0), size).to(choices) * known[..., None]
    absent = 1 - (share[..., None] * onto).sum(1)
    rows = [absent[sources.long() == i + 1].prod(0) if bool((sources == i + 1).any()) else torch.ones(size).to(choices) for i in range(size)]
    return 1 - torch.stack(rows)


def acyclicity(adjacency: Tensor, variant: Variant = "expm") -> Tensor:
    """How cyclic a weighted graph [d, d] with entries in [0, 1] is: 0 if and only if it has no directed cycle; its gradient is 0 off cycles.

    "expm": tr e^A − d. "notears": tr e^(A∘A) − d. "polynomial": tr (I + A/d)^d − d. "dagma": −log det(s I − A∘A) + d log s with s = d + 1, which
    is above the spectral radius of every such A∘A.

    Raises:
        ConfigError: another variant.

    Source: Zheng et al. 2018, arXiv 1803.01422; Yu et al. 2019, arXiv 1904.10098; Bello et al. 2022, arXiv 2209.08037.
    """
    d = adjacency.shape[0]
    one = torch.eye(d).to(adjacency)
    value: Tensor
    if variant == "expm":
        value = torch.matrix_exp(adjacency).trace() - d
    elif variant == "notears":
        value = torch.matrix_exp(adjacency * adjacency).trace() - d
    elif variant == "polynomial":
        value = torch.linalg.matrix_power(one + adjacency / d, d).trace() - d
    elif variant == "dagma":
        value = -torch.linalg.slogdet(one - adjacency * adjacency / (d + 1)).logabsdet
    else:
        raise ConfigError(f"The variant of acyclicity is {variant!r}; expected 'expm', 'notears', 'polynomial' or 'dagma'.")
    return value


def _cycles(data: Sequence[Datum], logprobs: Sequence[Tensor], *, variant: Variant) -> Made:
    terms, values = [_nothing(data, logprobs)], list[float]()
    for row in _rows(data, logprobs, NODES, "topological"):
        if not len(row.rows):
            continue
        sources = torch.tensor(extra(row.datum, SOURCE, "topological")[row.rows]).to(row.logp)
        if bool((sources < 1).any()):
            raise DataError(f"Datum {row.datum.id!r} names candidates of a relation without its source; expected {SOURCE!r} of at least 1 there.")
        size = int(max(row.marks.max(), sources.max()))
        value = acyclicity(soft_adjacency(row.logp, row.marks, sources, size), variant)
        terms.append(row.weights.sum() * value)
        values.append(float(value.detach()))
    return torch.stack(terms).sum(), {"graphs": float(len(values)), "cyclicity": sum(values) / (len(values) or 1)}


def _chirality(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Made:
    terms, gap, graphs = [_nothing(data, logprobs)], 0.0, 0
    for row in _rows(data, logprobs, POLARITY, "chirality"):
        if not len(row.rows):
            continue
        evidence = torch.tensor(extra(row.datum, EVIDENCE, "chirality")[row.rows]).to(row.logp)
        for_it, against = (torch.logsumexp(row.logp.masked_fill(~kept, -torch.inf), -1) for kept in (row.marks > 0, row.marks < 0))
        held = row.weights / row.weights.sum()
        support = (held * torch.sigmoid(for_it - against)).sum()
        contradiction = (held * torch.sigmoid(against - for_it)).sum()
        due = (held * evidence).sum()
        certain = torch.xlogy(due, due) + torch.xlogy(1 - due, 1 - due)  # minus the evidence's entropy, so that the divergence starts at 0
        divergence = certain - due * support.log() - (1 - due) * contradiction.log()
        terms.append(row.weights.sum() * divergence)
        gap, graphs = gap + float(support.detach() - due), graphs + 1
    return torch.stack(terms).sum(), {"graphs": float(graphs), "support_gap": gap / (graphs or 1)}


def _made(name: str, fn: Callable[..., Made], source: str, extras: tuple[str, ...]) -> Loss:
    return Loss(name=name, fn=fn, source=source, extras=extras, prepare=annotate_claims)


def topological(variant: Variant = "closure", valid: float = 0.0) -> Loss:
    """Against circular reasoning: relations "a supports b" whose edges close a directed cycle. In nats (closure) or without unit.

    "closure": −Σ_t w_t · log(1 − c_t). At the token that decides a relation's target, c_t is the share of the candidates that close a cycle with the
    relations written before (all ids from which the source can be reached, itself included) in the mass of all valid ids. So Π (1 − c_t) is the
    probability that none of the choices along the text closes a cycle, and mass that leaves the valid ids gains nothing. Where every target would close
    one, the relation's kind is judged in its place. As bad ids lose mass, the share of ids that do not exist may grow; `valid` adds −valid · log m_t, with
    m_t the mass of all valid ids, at the same tokens: at 1 the loss is −Σ w_t · log P(a valid id that closes no cycle).

    The others: Σ_graph (Σ_t w_t) · h(A), with `acyclicity` h of the soft adjacency A of the whole text. They also see cycles that
    later lines may close, but are blind to order, and large factors have side effects; use closure unless you study them.

    Ids of several tokens: each token on the text's path at which ids part is a decision of its own; a token is bad where all ids that it may become
    are, else the token that decides is judged. In the variants on A, ids that share their first token there share its mass.

    Extras: `closure` [T, K] (+1 may follow, −1 closes a cycle, 0 no candidate), or `nodes` [T, K] (from 1, 0 none) and `source` [T].
    Metrics: `events` and `bad_mass` (mean c_t), or `graphs` and `cyclicity` (mean h).

    Limits: it looks at one text's own choices, given what the text says before; it knows no other meaning of an argument than its relations.

    Raises:
        ConfigError: another variant, or `valid` is below 0, not finite, or given with one of the others.

    Source: Welleck et al. 2019, arXiv 1908.04319 (unlikelihood), with a graph's negative set; variants: see `acyclicity`.
    """
    if variant not in _SOURCES:
        raise ConfigError(f"topological got the variant {variant!r}; expected one of {', '.join(map(repr, _SOURCES))}.")
    if variant == "closure":
        return _avoiding("topological", CLOSURE, _SOURCES[variant], valid)
    if valid:
        raise ConfigError(f"topological got valid={valid!r} with the variant {variant!r}; expected it with 'closure' only. Leave it out.")
    return _made(f"topological(variant={variant})", partial(_cycles, variant=variant), _SOURCES[variant], (NODES, SOURCE))


def _avoiding(name: str, marks: str, source: str, valid: float) -> Loss:
    if not (math.isfinite(valid) and valid >= 0):
        raise ConfigError(f"{name} got valid={valid!r}; expected a finite number of at least 0, usually 0 or 1.")
    shown = f"{name}(valid={valid:g})" if valid else name
    return _made(shown, partial(_avoid, name=marks, loss=name, valid=valid), source, (marks,))


def citation_validity(valid: float = 0.0) -> Loss:
    """−Σ_t w_t · log(1 − c_t): c_t is the share of the tokens that turn a document id into one that the prompt does not have. In nats.

    The id is followed token by token: good are the tokens that begin or continue the id of a document of the prompt, bad are those by which no such
    id is left. Bad candidates are the ids that differ in one digit; mass on other tokens counts in neither sum, unless `valid` is above 0: it adds
    −valid · log m_t, with m_t the mass of all candidates.

    Extra: `citation` [T, K] (+1, −1, 0 no candidate). Metrics: `events`, `bad_mass` (mean c_t).
    Limits: it says that a document exists, not that it says what is claimed.

    Source: Welleck et al. 2019, arXiv 1908.04319 (unlikelihood training), with the invented ids as negative set.
    """
    return _avoiding("citation_validity", CITATION, _SOURCES["closure"].split(", with")[0], valid)


def chirality() -> Loss:
    """Σ_graph W · KL(Bernoulli(e) ‖ Bernoulli(s)): the model's balance of support and contradiction against the evidence's. In nats.

    At each relation's kind, s_t is the share of "supports" in the mass of supports and refutes; s is the mean of s_t over a graph's relations,
    weighted by w_t, e that of the evidence's share of support, and W = Σ w_t. 0 where the balance is the evidence's, positive elsewhere. A model that
    calls everything supported pays on every contested claim, however sure it is of each line.

    Extras: `polarity` [T, K] (+1 supports, −1 refutes, 0 no candidate), `evidence` [T] in [0, 1] (1: the evidence supports; a judge's probability will
    do). Metrics: `graphs`, `support_gap` (mean of s − e: positive where the model supports too much).

    Limits: a balance does not say which relation is wrong: swapping two labels is not seen. Add it to cross-entropy, not instead of it. With one
    relation per graph it is the cross-entropy of that choice.

    Source: own definition; matching the mean prediction to a known proportion is Ardehaly & Culotta 2017, arXiv 1709.04108 (label proportions).
    """
    return _made(
        "chirality", _chirality, "own definition, after Ardehaly & Culotta 2017, arXiv 1709.04108 (learning from label proportions)", (POLARITY, EVIDENCE)
    )


TOPOLOGICAL, CITATION_VALIDITY, CHIRALITY = topological(), citation_validity(), chirality()

"""A loss and its gradient over a batch, through one frozen base and one adapter.

Sequences go through the model together as `layout` says, with the numbers of each sequence alone. The head is computed only at positions
whose weight is not zero, and with our own decoder never for more than some rows at a time. The loss sees detached log-probs of the whole
batch once; its gradient with respect to them then goes back through the model, in one pass for small batches, and for large ones by a
second pass with the same dropout masks, so that memory does not grow with the batch. Small batches of several adapters can share one pass.

This file does not know sessions, optimizers or files. With transformers' modules, or where a loss needs logits or several targets per
position, one slice holds [rows, vocabulary] logits in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import DataError, NumericError
from ...losses.apply import apply_loss, positions, some, spread, step_output, target_logprobs
from ...protocols import Loss
from ...records import Batch, Datum, StepOutput
from .bases import Base
from .layout import Pass, joined, lay_out
from .lora import Active, Mixed
from .optim import first_not_finite

__all__ = ["FEW", "Asked", "check_tokens", "completion_logprobs", "evaluate", "evaluate_together", "few"]

FEW = 100
"""Tokens of a batch up to which sharing a pass with others is faster than going alone: larger ones fill the processor by themselves."""


def check_tokens(base: Base, tokens: Sequence[int] | NDArray[np.int32], whose: str, fix: str) -> None:
    """Raises DataError where tokens do not fit the base's vocabulary or context."""
    if len(tokens) > base.context:
        raise DataError(f"{whose} has {len(tokens)} tokens; {base.name!r} reads at most {base.context}. {fix}")
    low, high = int(np.min(tokens)), int(np.max(tokens))
    if low < 0 or high >= base.vocab_size:
        bad = low if low < 0 else high
        raise DataError(f"{whose} holds token {bad}; {base.name!r} knows 0 to {base.vocab_size - 1}. Use the tokenizer of that model.")


@dataclass(slots=True)
class _Work:
    """A checked batch: which rows of each datum are computed, and in which passes. A pass numbers the data by their place in it."""

    base: Base
    data: tuple[Datum, ...]
    rows: list[NDArray[np.int64]]
    passes: list[Pass]
    logits: bool

    def index(self, i: int) -> Tensor:
        """A datum's rows as a tensor."""
        return torch.from_numpy(self.rows[i]).to(self.base.device)

    def targets(self, i: int) -> Tensor:
        """A datum's targets at its rows."""
        return torch.from_numpy(self.data[i].targets[self.rows[i]]).to(self.base.device)

    def run(self, work: Pass) -> dict[int, Tensor]:
        """By datum of the pass its logits [R, V] or log-probs [R] or [R, K] at its rows."""
        where = np.concatenate([places[self.rows[i]] for i, places in zip(work.members, work.where, strict=True)])
        hidden = self.base.read(work)[torch.from_numpy(where).to(self.base.device)]
        sizes = [len(self.rows[i]) for i in work.members]
        if not self.logits and all(self.data[i].targets.ndim == 1 for i in work.members):
            scores = self.base.target_logprobs(hidden, torch.cat([self.targets(i) for i in work.members]))
            return dict(zip(work.members, torch.split(scores, sizes), strict=True))
        parts = torch.split(self.base.logits(hidden), sizes)
        if self.logits:
            return dict(zip(work.members, parts, strict=True))
        return {i: target_logprobs(part, self.targets(i)) for i, part in zip(work.members, parts, strict=True)}

    def whole(self, values: Mapping[int, Tensor]) -> list[Tensor]:
        """Per datum its values at all positions, 0 where they were not computed; without a graph."""
        shape = (self.base.vocab_size,) if self.logits else ()
        inputs = list[Tensor]()
        for i, datum in enumerate(self.data):
            empty = torch.zeros((0, *(shape or datum.targets.shape[1:])), device=self.base.device)
            inputs.append(spread(values.get(i, empty), self.rows[i], len(datum)))
        return inputs


def _prepare(base: Base, batch: Batch, loss: Loss, *, apart: bool = False) -> _Work:
    rows = positions(loss, batch.data, base.vocab_size)
    for datum in batch.data:
        check_tokens(base, datum.tokens, f"Datum {datum.id!r}", "Shorten it or lower max_length.")
    live, layout = [i for i, used in enumerate(rows) if len(used)], base.layout
    layout["share"] = layout["share"] and not apart
    passes = [
        replace(found, members=tuple(live[place] for place in found.members)) for found in lay_out([batch.data[i].tokens for i in live], base.device, **layout)
    ]
    return _Work(base, batch.data, rows, passes, loss.needs == "logits")


def _gradients(work: _Work, values: dict[int, Tensor], upstream: Sequence[Tensor], active: Active, *, again: bool) -> dict[str, Tensor]:
    """The gradient per adapter tensor; with `again`, each pass goes through the model once more."""
    adapter = active.adapter
    total = dict[str, Tensor]()
    for one in work.passes:
        outputs = work.run(one) if again else values
        weights = [upstream[i][work.index(i)] for i in one.members]
        if active.note is not None:
            active.note.begin(one.members, one.where, one.tokens, [len(work.rows[i]) for i in one.members])
        found = torch.autograd.grad([outputs[i] for i in one.members], list(adapter.values()), weights, allow_unused=True)
        for name, gradient in zip(adapter, found, strict=True):
            if gradient is not None:
                total[name] = gradient if name not in total else total[name].add_(gradient)
    return {name: torch.zeros_like(tensor, requires_grad=False) if (mine := total.get(name)) is None else mine for name, tensor in adapter.items()}


def evaluate(base: Base, batch: Batch, loss: Loss, active: Active, *, train: bool) -> tuple[StepOutput, dict[str, Tensor]]:
    """The loss of a batch and, with `train`, its gradient per adapter tensor; where `active.note` is there, it gets each example's norm.

    Log-probs are computed where any weight of a position is not zero, and are 0 elsewhere, for the loss function too; a loss that needs
    logits, or a batch whose weights are all zero, computes every position.

    Raises:
        DataError: an empty batch, a missing extra, a token or target outside the vocabulary, a datum longer than the context.
        NumericError: the loss or a gradient is NaN or infinite.
        BackendError: the loss function gave no scalar, or one that does not depend on its input.
    """
    work = _prepare(base, batch, loss, apart=active.note is not None)  # a token that examples share has no gradient of one of them
    if train:
        active = replace(active, adapter={name: tensor.detach().requires_grad_() for name, tensor in active.adapter.items()})
    generator = active.generator
    before = generator.get_state() if generator is not None else None
    again = len(work.passes) > 1 and sum(one.tokens for one in work.passes) > base.keeps  # one long pass keeps what its second time would
    with base.slot.using(active):
        values = dict[int, Tensor]()
        with torch.set_grad_enabled(train and not again):
            for one in work.passes:
                values |= work.run(one)
        inputs = work.whole(values)
        applied = apply_loss(loss, batch.data, inputs, grad=train)
        gradients = dict[str, Tensor]()
        if train:
            if again and generator is not None and before is not None:
                generator.set_state(before)  # the second pass draws the masks of the first
            with torch.enable_grad():
                gradients = _gradients(work, values, applied.gradients, active, again=again)
    _refuse_not_finite(gradients, batch)
    _trim(base)
    if work.logits:
        inputs = [target_logprobs(logits, work.targets(i)) for i, logits in enumerate(inputs)]
    return step_output(batch.data, applied, inputs), gradients


def _trim(base: Base) -> None:
    """Gives memory back that no pass has needed for a while."""
    if base.decoder is not None:
        base.decoder.walks.buffers.trim()


def _refuse_not_finite(gradients: Mapping[str, Tensor], batch: Batch) -> None:
    if (bad := first_not_finite(gradients)) is not None:
        message = f"The gradient of {bad!r} is not finite on examples {some(batch.ids)}; expected finite numbers. "
        raise NumericError(message + "The weights were not touched: look at these examples and at the loss.", tensor=bad, examples=batch.ids)


@dataclass(slots=True, frozen=True, eq=False)
class Asked:
    """A batch with the adapter that it trains."""

    batch: Batch
    loss: Loss
    active: Active


def few(base: Base, asked: Asked) -> bool:
    """Whether the batch may share a pass: it is small, goes through our own decoder, needs one log-prob per position of the base's own head, and no
    terms on parameters or norms of examples."""
    small = base.decoder is not None and 0 < asked.batch.tokens <= FEW and base.head not in asked.active.pairs
    return (
        small
        and asked.loss.needs == "logprobs"
        and asked.active.note is None
        and not asked.loss.penalties
        and all(datum.targets.ndim == 1 for datum in asked.batch.data)
    )


def evaluate_together(base: Base, asked: Sequence[Asked]) -> list[tuple[StepOutput, dict[str, Tensor]] | Exception]:
    """What `evaluate` gives with `train` for each of several small batches, in one pass; one that fails gives its error and harms no other.

    Gradients are those of the batches alone up to rounding, dropout masks the same. Each is `few`, and each has an adapter of its own.
    """
    found: dict[int, tuple[StepOutput, dict[str, Tensor]] | Exception] = {}
    works = dict[int, _Work]()
    for place, one in enumerate(asked):
        try:
            works[place] = _prepare(base, one.batch, one.loss)
        except Exception as error:
            found[place] = error
    alone = [place for place, work in works.items() if len(work.passes) != 1]
    for place in [*alone, *([*works] if len(works) - len(alone) == 1 else [])]:  # no token trains, or nobody is left to share with
        if works.pop(place, None) is not None:
            found[place] = _tried(base, asked[place])
    if works:
        found |= _shared(base, {place: (works[place], asked[place]) for place in works})
    _trim(base)
    return [found[place] for place in range(len(asked))]


def _tried(base: Base, asked: Asked) -> tuple[StepOutput, dict[str, Tensor]] | Exception:
    try:
        return evaluate(base, asked.batch, asked.loss, asked.active, train=True)
    except Exception as error:
        return error


def _shared(base: Base, given: Mapping[int, tuple[_Work, Asked]]) -> dict[int, tuple[StepOutput, dict[str, Tensor]] | Exception]:
    """Batches of one pass each, through the model in one."""
    actives = {
        place: replace(asked.active, adapter={name: tensor.detach().requires_grad_() for name, tensor in asked.active.adapter.items()})
        for place, (_, asked) in given.items()
    }
    whole, starts = joined([work.passes[0] for work, _ in given.values()])
    ends = [*starts[1:], whole.tokens]
    mixed = Mixed(tuple((actives[place], low, high) for place, low, high in zip(given, starts, ends, strict=True)))
    rows, targets, sizes = list[NDArray[np.int64]](), list[Tensor](), list[int]()
    for (work, _), start in zip(given.values(), starts, strict=True):
        one = work.passes[0]
        mine = [places[work.rows[i]] + start for i, places in zip(one.members, one.where, strict=True)]
        rows += mine
        targets += [work.targets(i) for i in one.members]
        sizes.append(sum(map(len, mine)))
    found: dict[int, tuple[StepOutput, dict[str, Tensor]] | Exception] = {}
    with base.slot.using(mixed), torch.enable_grad():
        hidden = base.read(whole)[torch.from_numpy(np.concatenate(rows)).to(base.device)]
        scores = base.target_logprobs(hidden, torch.cat(targets))
        upstream, outputs = list[Tensor](), dict[int, StepOutput]()
        for (place, (work, asked)), part in zip(given.items(), torch.split(scores, sizes), strict=True):
            values = dict(zip(work.passes[0].members, torch.split(part, [len(work.rows[i]) for i in work.passes[0].members]), strict=True))
            inputs = work.whole(values)
            try:
                applied = apply_loss(asked.loss, asked.batch.data, inputs, grad=True)
            except Exception as error:
                found[place] = error
                upstream.append(torch.zeros_like(part))
            else:
                outputs[place] = step_output(asked.batch.data, applied, inputs)
                upstream.append(torch.cat([applied.gradients[i][work.index(i)] for i in values]))
        leaves = [tensor for active in actives.values() for tensor in active.adapter.values()]
        gradients = iter(torch.autograd.grad(scores, leaves, torch.cat(upstream), allow_unused=True))
    for place, active in actives.items():
        own = {name: torch.zeros_like(tensor, requires_grad=False) if (g := next(gradients)) is None else g for name, tensor in active.adapter.items()}
        if place in outputs:
            try:
                _refuse_not_finite(own, given[place][1].batch)
                found[place] = outputs[place], own
            except NumericError as error:
                found[place] = error
    return found


@torch.no_grad()
def completion_logprobs(base: Base, active: Active | None, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, ...]]:
    """For each (prompt, completion) the log p of every completion token at temperature 1, in nats. Both hold at least one token.

    Sequences are laid out as in training.
    """
    found = list[tuple[float, ...]]([()] * len(pairs))
    inputs = [[*prompt, *completion[:-1]] for prompt, completion in pairs]
    with base.slot.using(active):
        for one in lay_out(inputs, base.device, **base.layout):
            hidden = base.read(one)
            rows = [torch.from_numpy(places[len(pairs[i][0]) - 1 :]).to(base.device) for i, places in zip(one.members, one.where, strict=True)]
            targets = torch.tensor([token for i in one.members for token in pairs[i][1]], device=base.device)
            scores = torch.split(base.target_logprobs(hidden[torch.cat(rows)], targets), [len(part) for part in rows])
            for i, part in zip(one.members, scores, strict=True):
                found[i] = tuple(part.tolist())
    _trim(base)
    return found

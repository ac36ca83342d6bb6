"""Which examples go together, in which order: a function of (data, size, seed, mode) and the position alone.

Nothing is kept between positions but a cache, so training resumes at any batch. This file does not know losses, and no clock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError
from ..records import Batch, Datum
from .pairs import together

__all__ = ["BatchMode", "Batches", "normalise"]

BatchMode = Literal["shuffle", "length", "prefix", "pack"]
_ALIKE = 0.5
"""Examples belong together ("prefix") where they share this part of the longer one, from its start."""
_WINDOW = 32
"""Batches whose examples are sorted by length together ("length"), and slices open at a time ("pack")."""


class Batches:
    """Batches over endless epochs. Each example comes once per epoch; a last batch with fewer examples is kept.

    Args:
        data: the rendered examples.
        size: examples per batch (all but "pack").
        seed: epoch e has the permutation that (seed, e) gives.
        mode: "shuffle"; "length" puts examples of similar length together and shuffles the batches; "prefix" keeps examples that begin
            alike together (claims about one passage), so that an engine can compute the common start once; "pack" fills each batch with as many
            examples as `max_tokens` holds, so that their number differs. Answers that a loss compares ("q7#chosen" and "q7#rejected") stay in
            one batch; they need "shuffle".
        max_tokens: input tokens per batch, for "pack" only; `size` × the longest example where it is None.

    Raises:
        DataError: no data, or an example longer than `max_tokens`.
        ConfigError: a size, seed, mode or max_tokens out of range, or a size or mode that tears such answers apart.
    """

    def __init__(self, data: Sequence[Datum], size: int, *, seed: int, mode: BatchMode = "shuffle", max_tokens: int | None = None) -> None:
        if not data:
            raise DataError("There are 0 examples to make batches of. Expected at least one: check the split and the limit.")
        for name, value, least in (("size", size, 1), ("seed", seed, 0), ("max_tokens", max_tokens, 1)):
            if value is not None and value < least:
                raise ConfigError(f"Batches.{name} is {value!r}; expected a whole number of at least {least}.")
        if mode not in get_args(BatchMode):
            raise ConfigError(f"Batches.mode is {mode!r}; expected one of {', '.join(map(repr, get_args(BatchMode)))}.")
        self.data = tuple(data)
        self.size, self.seed, self.mode = size, seed, mode
        self._lengths = np.array([len(datum) for datum in self.data], dtype=np.int64)
        longest = int(self._lengths.argmax())
        self.max_tokens = max_tokens or size * int(self._lengths[longest])
        if mode == "pack" and self._lengths[longest] > self.max_tokens:
            raise DataError(
                f"Example {self.data[longest].id!r} has {self._lengths[longest]} tokens; expected at most max_tokens {self.max_tokens}. "
                "Render with a smaller max_length, or raise max_tokens."
            )
        self._groups = together(self.data, size, mode)
        self._families = _families(self.data) if mode == "prefix" else ()
        self._starts = [0]
        self._cache: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._lock = threading.Lock()

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch; with "pack" those of the first one, as their number may differ between epochs."""
        return math.ceil(len(self.data) / self.size) if self.mode != "pack" else len(self.epoch_batches(0))

    def epoch_batches(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """Per batch of that epoch, the indices of its examples in `data`. The last two epochs asked for are kept."""
        if epoch < 0:
            raise ConfigError(f"The epoch is {epoch}; expected a whole number of at least 0.")
        with self._lock:
            return self._epoch(epoch)

    def at(self, position: int) -> Batch:
        """The batch at an absolute position, counted from 0 over all epochs.

        With "pack" the first call far into the training goes through the epochs before it once, to count their batches.

        Raises:
            ConfigError: a negative position.
        """
        if position < 0:
            raise ConfigError(f"The position is {position}; expected a whole number of at least 0.")
        with self._lock:
            epoch, offset = divmod(position, self.per_epoch) if self.mode != "pack" else self._locate(position)
            members = self._epoch(epoch)[offset]
        return Batch(data=tuple(self.data[i] for i in members), epoch=epoch, index=position)

    def _locate(self, position: int) -> tuple[int, int]:
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, position, side="right")) - 1
        return epoch, position - self._starts[epoch]

    def _epoch(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        batches = self._cache.pop(epoch, None)
        if batches is None:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            order = generator.permutation(len(self.data)) if not self._groups else self._in_groups(generator)
            batches = self._pack(order) if self.mode == "pack" else self._chunks(order, generator)
            while len(self._cache) > 1:
                del self._cache[next(iter(self._cache))]
        self._cache[epoch] = batches
        return batches

    def _in_groups(self, generator: np.random.Generator) -> NDArray[np.int64]:
        return np.concatenate([self._groups[i] for i in generator.permutation(len(self._groups))])

    def _chunks(self, order: NDArray[np.int64], generator: np.random.Generator) -> tuple[tuple[int, ...], ...]:
        if self.mode == "length":
            windows = [order[i : i + _WINDOW * self.size] for i in range(0, len(order), _WINDOW * self.size)]
            order = np.concatenate([window[np.argsort(self._lengths[window], kind="stable")] for window in windows])
        if self.mode == "prefix":
            rank = np.empty(len(order), dtype=np.int64)
            rank[order] = np.arange(len(order))
            families = [self._families[i] for i in generator.permutation(len(self._families))]
            order = np.concatenate([family[np.argsort(rank[family])] for family in families])
        batches = [tuple(order[i : i + self.size].tolist()) for i in range(0, len(order), self.size)]
        if self.mode == "length":
            batches = [batches[i] for i in generator.permutation(len(batches))]
        return tuple(batches)

    def _pack(self, order: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
        batches: list[list[int]] = []
        room: list[int] = []
        for index in order.tolist():
            length = int(self._lengths[index])
            fitting = [b for b in range(max(0, len(batches) - _WINDOW), len(batches)) if room[b] >= length]
            if fitting:
                best = min(fitting, key=room.__getitem__)
                batches[best].append(index)
                room[best] -= length
            else:
                batches.append([index])
                room.append(self.max_tokens - length)
        return tuple(map(tuple, batches))


def _families(data: Sequence[Datum]) -> tuple[NDArray[np.int64], ...]:
    """Indices of the examples that begin alike, by family."""
    families: list[list[int]] = []
    for index in sorted(range(len(data)), key=lambda i: (data[i].tokens.tolist(), i)):
        tokens = data[index].tokens
        if families:
            other = data[families[-1][-1]].tokens
            n = min(len(tokens), len(other))
            different = np.flatnonzero(tokens[:n] != other[:n])
            if (int(different[0]) if different.size else n) >= _ALIKE * max(len(tokens), len(other)):
                families[-1].append(index)
                continue
        families.append([index])
    return tuple(np.array(family, dtype=np.int64) for family in families)


def normalise(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Scales the weights of the batches of one optimizer step, so that they sum to 1 over all of them: losses are sums, steps use means.

    Weights whose sum is not positive are left as they are: there is no mean over them.

    Raises:
        DataError: a weight is NaN or infinite; the message names the example.
    """
    total = 0.0
    for datum in (datum for batch in batches for datum in batch.data):
        part = float(datum.weights.sum(dtype=np.float64))
        if not math.isfinite(part):
            raise DataError(f"Example {datum.id!r} has weights that sum to {part}; expected finite numbers. Correct its weights.")
        total += part
    if total <= 0:
        return tuple(batches)
    return tuple(
        replace(batch, data=tuple(replace(datum, weights=(datum.weights / np.float64(total)).astype(np.float32)) for datum in batch.data)) for batch in batches
    )

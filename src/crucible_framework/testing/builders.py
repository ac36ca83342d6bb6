"""Small data for tests, all from a seed. Knows no backend."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data import ByteTokenizer, render
from ..protocols import Tokenizer
from ..records import Batch, Dataset, DatasetCard, Datum, Example

__all__ = ["make_batch", "make_data", "make_dataset", "make_datum", "text_datum"]

_LABELS = ("yes", "no")


def make_datum(
    length: int = 8,
    *,
    seed: int = 0,
    vocab_size: int = 256,
    candidates: int | None = None,
    weights: ArrayLike | None = None,
    extras: Mapping[str, NDArray[np.float32]] | None = None,
    name: str = "",
) -> Datum:
    """A datum of random tokens, `length` long, with weight 1 on the second half of its targets.

    Args:
        length: T.
        seed: decides the tokens.
        vocab_size: tokens are below it.
        candidates: K for targets [T, K], with weights that sum to 1 at each weighted position; None for targets [T].
        weights: instead of those, of the targets' shape.
        extras: of the datum.
        name: its id; else from seed and length.
    """
    rng = np.random.default_rng([seed, length, candidates or 0])
    tokens = rng.integers(0, vocab_size, length + 1)
    shape = (length,) if candidates is None else (length, candidates)
    targets = tokens[1:].astype(np.int64) if candidates is None else rng.integers(0, vocab_size, shape, dtype=np.int64)
    given = np.zeros(shape, dtype=np.float32)
    given[length // 2 :] = 1.0 if candidates is None else rng.dirichlet(np.ones(candidates), length - length // 2)
    if weights is not None:
        given = np.asarray(weights, dtype=np.float32)
    return Datum(id=name or f"datum-{seed}-{length}", tokens=tokens[:-1].astype(np.int32), targets=targets, weights=given, extras=dict(extras or {}))


def make_data(lengths: Sequence[int] = (8, 5, 12), *, seed: int = 0, vocab_size: int = 256) -> tuple[Datum, ...]:
    """One datum of each length, with different tokens and ids."""
    return tuple(make_datum(length, seed=seed + place, vocab_size=vocab_size, name=f"datum-{seed}-{place}") for place, length in enumerate(lengths))


def make_batch(lengths: Sequence[int] = (8, 5, 12), *, seed: int = 0, vocab_size: int = 256) -> Batch:
    """`make_data` as a batch."""
    return Batch(data=make_data(lengths, seed=seed, vocab_size=vocab_size))


def text_datum(prompt: str, target: str, tokenizer: Tokenizer | None = None) -> Datum:
    """What training makes of a prompt and its answer; one token per byte where no tokenizer is given."""
    return render(Example(id=prompt, prompt=prompt, target=target), tokenizer or ByteTokenizer())


def make_dataset(rows: int = 12, *, seed: int = 0, documents: int = 4, name: str = "made") -> Dataset:
    """Arithmetic questions with the answers "yes" and "no"; `meta["document"]` groups them, `meta["label"]` is the answer."""
    rng = np.random.default_rng(seed)
    examples = list[Example]()
    for place in range(rows):
        left, right, claimed = (int(number) for number in rng.integers(1, 10, 3))
        total = left + right if rng.random() < 0.5 else left + claimed
        label = _LABELS[0] if total == left + right else _LABELS[1]
        meta = {"document": f"document-{place % documents}", "label": label}
        examples.append(Example(id=f"{name}-{place}", prompt=f"Is {left} + {right} = {total}?", target=label, meta=meta))
    digest = hashlib.sha256(repr(examples).encode()).hexdigest()
    card = DatasetCard(name=name, split="train", task="yes or no", rows=rows, sha256=digest, licence="CC0-1.0", source="made in the test", labels=_LABELS)
    return Dataset(examples=tuple(examples), card=card)

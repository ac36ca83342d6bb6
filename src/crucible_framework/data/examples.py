"""What data sets share: the verification prompt, the three labels, and the last checks that turn rows into a `Dataset`.

This file does not know any data set or file layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from ..config import fingerprint
from ..errors import ConfigError, DataError, FormatError, UnknownNameError
from ..records import Dataset, DatasetCard, Example, Message, record
from .sources import Row

__all__ = ["LABELS", "SPLITS", "Loader", "Source", "check_known", "first", "make_dataset", "unique", "verify_prompt"]

LABELS = ("SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO")
SPLITS = ("train", "dev", "test")
_INSTRUCTION = f"Answer {', '.join(LABELS[:-1])} or {LABELS[-1]}."
Loader: TypeAlias = Callable[[str, str | None, Path | None], Dataset]
"""(split, task or None for the data set's first, the only folder to look in or None) → data set."""


@record
class Source:
    """A data set that has a name: how it is loaded, and what can be said of it without loading it.

    Attributes:
        load: gives the examples of a split and task.
        find: its files, where they are on this machine, in the only folder to look in or (None) the usual ones; raises NotFoundError with
            the fix. It asks no network.
        tasks: the first is the default.
    """

    load: Loader
    find: Callable[[Path | None], tuple[Path, ...]]
    tasks: tuple[str, ...]
    licence: str
    splits: tuple[str, ...] = SPLITS


def verify_prompt(passage: str, claim: str) -> tuple[Message, ...]:
    """One line that names the three labels as the system's turn; passage and claim as the user's. Short, as every token is paid for at each step.

    A system's turn of its own also keeps a template from putting in a default one.
    """
    return Message(role="system", content=_INSTRUCTION), Message(role="user", content=f"{passage}\nClaim: {claim}")


def check_known(kind: str, name: str, known: Iterable[str]) -> str:
    """The name, where it is one of the known ones.

    Raises:
        UnknownNameError: it is not; the message names the nearest.
    """
    names = tuple(known)
    if name not in names:
        raise UnknownNameError(kind, name, names)
    return name


def unique(rows: Iterable[Row], key: str) -> dict[str, Row]:
    """Rows by the value of a key, as text, in file order.

    Raises:
        FormatError: a row has no such key, or its value is neither text nor a whole number.
        DataError: two rows share a value; the message names both lines.
    """
    found: dict[str, Row] = {}
    for row in rows:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise FormatError(f"{row.where}: {key!r} is {value!r}; expected text or a whole number. Correct the row.")
        _once(found, str(value), row, key)
    return found


def _once(found: dict[str, Row], value: str, row: Row, key: str) -> None:
    if value in found:
        raise DataError(f"The {key} {value!r} stands at {found[value].where} and again at {row.where}. Expected it once: rename or remove one.")
    found[value] = row


def make_dataset(pairs: Sequence[tuple[Row, Example]], card: DatasetCard) -> Dataset:
    """Checks the examples and fills `rows` and `sha256` of their card.

    Args:
        pairs: each example with the row that it was made of.
        card: the rest of the card.

    Raises:
        DataError: no examples, or two of the same id; the message names both lines.
    """
    if not pairs:
        raise DataError(f"The {card.split!r} part of data set {card.name!r} has 0 examples. Expected at least one: check the file and the split.")
    seen: dict[str, Row] = {}
    for row, example in pairs:
        _once(seen, example.id, row, "id")
    return _dataset(tuple(example for _, example in pairs), card)


def first(dataset: Dataset, limit: int | None) -> Dataset:
    """The first `limit` examples, with a card that says so; all of them for None.

    Raises:
        ConfigError: a limit below 1.
    """
    if limit is None:
        return dataset
    if limit < 1:
        raise ConfigError(f"The limit is {limit!r} examples; expected a whole number of at least 1, or none.")
    if limit >= len(dataset):
        return dataset
    return _dataset(dataset[:limit], replace(dataset.card, source=f"{dataset.card.source} Only the first {limit} of {len(dataset)} examples."))


def _dataset(examples: tuple[Example, ...], card: DatasetCard) -> Dataset:
    return Dataset(examples=examples, card=replace(card, rows=len(examples), sha256=fingerprint(examples)))

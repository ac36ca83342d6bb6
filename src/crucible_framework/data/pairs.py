"""Preferred and rejected answers: rows → examples, and which data a batch must hold together.

Answers to one prompt are examples of their own, called "<name>#chosen" and "<name>#rejected" (`records.answer_id`), next to each other. This file
does not know losses or tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..config import fingerprint
from ..errors import ConfigError, DataError, FormatError
from ..events import emit
from ..records import Dataset, DatasetCard, Datum, Example, Json, Message, Role, answer_id, split_answer_id
from .sources import file_card, read_rows

__all__ = ["load_preferences", "preference_examples", "together"]

_ROLES = ("system", "user", "assistant", "tool")


def _prompt(value: Json, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str) and value:
        return value
    turns = value if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str) for turn in turns):
        raise FormatError(f"{where}: 'prompt' is {value!r}; expected text, or a list of turns with 'role' and 'content'. Correct the row.")
    return tuple(Message(role=cast("dict[str, str]", turn)["role"], content=cast("dict[str, str]", turn)["content"]) for turn in turns)  # type: ignore[arg-type]


def _answer(row: Mapping[str, Json], role: str, where: str) -> str:
    value = row.get(role)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")  # one turn of the assistant
    if not isinstance(value, str) or not value:
        raise FormatError(f"{where}: {role!r} is {value!r}; expected the answer as text, or as one turn. Correct the row.")
    return value


def preference_examples(rows: Iterable[Mapping[str, Json]], *, baseline: bool = False) -> tuple[Example, ...]:
    """Two examples per row, "<id>#chosen" and "<id>#rejected", in the order of the rows.

    Args:
        rows: `prompt` (text or turns), `chosen`, `rejected`; `id` where there is one, else the row's number from 1; `document` for splits.
        baseline: adds a third, "<id>#baseline": the prompt with the chosen answer of the next row, from which KTO estimates its zero point.

    Raises:
        FormatError: a value is missing or has another form; the message names the row.
        DataError: no rows, one row with `baseline`, or an id twice.
    """
    found = list[tuple[str, str | tuple[Message, ...], str, str, dict[str, Json]]]()
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        given = row.get("id", number)
        name = str(given)
        if isinstance(given, bool) or not isinstance(given, (str, int)) or not name or split_answer_id(name)[1]:
            raise FormatError(f"{where}: 'id' is {given!r}; expected text or a whole number that does not end in a role such as '#chosen'. Rename it.")
        meta: dict[str, Json] = {"pair": name}
        if "document" in row:
            meta["document"] = row["document"]
        found.append((name, _prompt(row.get("prompt"), where), _answer(row, "chosen", where), _answer(row, "rejected", where), meta))
    names = [name for name, *_ in found]
    if not found or (baseline and len(found) < 2):
        raise DataError(f"There are {len(found)} preferences; expected at least {2 if baseline else 1}. Check the file.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"The preference {twice!r} is there twice; expected each id once. Rename or remove one.")
    examples = list[Example]()
    for place, (name, prompt, chosen, rejected, meta) in enumerate(found):
        answers: list[tuple[Role, str]] = [("chosen", chosen), ("rejected", rejected)]
        if baseline:
            answers.append(("baseline", found[(place + 1) % len(found)][2]))
        examples += [Example(id=answer_id(name, role), prompt=prompt, target=text, meta={**meta, "choice": role}) for role, text in answers]
    return tuple(examples)


def load_preferences(path: str | Path, *, split: str = "train", licence: str = "unknown", baseline: bool = False) -> Dataset:
    """A file of rows with `prompt`, `chosen` and `rejected` (JSON lines, or another layout that `read_rows` knows) as a data set for the preference losses.

    Raises:
        NotFoundError: there is no such file.
        FormatError, DataError: as `preference_examples`.

    Emits:
        `data.loaded`, as `load_dataset`.
    """
    place = Path(path)
    rows = [row.values for row in read_rows(place)]
    examples = preference_examples(rows, baseline=baseline)
    card = DatasetCard(
        name=place.stem,
        split=split,
        task="preference",
        rows=len(examples),
        sha256=fingerprint(examples),
        licence=licence,
        source=place.name,
        files=(file_card(place),),
    )
    emit("data.loaded", dataset=card.name, split=card.split, task=card.task, rows=card.rows, sha256=card.sha256)
    return Dataset(examples=examples, card=card)


def together(data: Sequence[Datum], size: int, mode: str) -> tuple[NDArray[np.int64], ...]:
    """Per group of data that a loss compares, their indices; nothing where each datum stands alone.

    Raises:
        ConfigError: a batch size or mode that would tear groups apart.
        DataError: groups of different sizes.
    """
    groups: dict[str, list[int]] = {}
    for index, datum in enumerate(data):
        name, role = split_answer_id(datum.id)
        groups.setdefault(name if role else f"{datum.id}#", []).append(index)
    sizes = {len(group) for group in groups.values()}
    most = max(sizes)
    if most == 1:
        return ()
    if len(sizes) > 1:
        alone = next(data[group[0]].id for group in groups.values() if len(group) < most)
        raise DataError(f"Some answers come in groups of {most}, but {alone!r} does not; expected every group whole. Leave out what has no partner.")
    if mode != "shuffle" or (size % most and size < len(data)):
        raise ConfigError(
            f"Batches of {size} examples, batching {mode!r}, tear groups of {most} answers apart; expected a multiple of {most} and 'shuffle'. "
            f"Set batch_size to {max(1, size // most) * most} and batching to 'shuffle'."
        )
    return tuple(np.array(group, dtype=np.int64) for group in groups.values())

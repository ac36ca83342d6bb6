"""Any `.jsonl` or `.csv` file of prompts and completions, or of chats, as a data set.

A row has `prompt` and `completion`, `input` and `output`, `question` and `answer`, or `messages` that end in the assistant's turn. `id` is
the example's id where the file has it, `split` chooses rows where the file has it; all other columns go to `meta`. No split is made up: a
file without the column is given whole, and its card says split "all". A `document` in two splits, of a file or of a folder, is an
error. This file does not know licences: its cards say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast

from ..errors import DataError, FormatError, NotFoundError, UnknownNameError
from ..records import Dataset, DatasetCard, Example, Json, Message
from .examples import SPLITS, check_known, make_dataset
from .sources import SUFFIXES, Row, file_card, find_path, read_rows

__all__ = ["PAIRS", "is_path", "load_table"]

PAIRS = (("prompt", "completion"), ("input", "output"), ("question", "answer"))
_ROLES = ("system", "user", "assistant", "tool")


def is_path(name: str) -> bool:
    """Whether a name is meant as a path: a known suffix, a slash, or the hub's prefix."""
    return name.lower().endswith(SUFFIXES) or "/" in name or "\\" in name


def load_table(name: str | Path, split: str, task: str | None, data: Path | None) -> Dataset:
    """The examples of a file, or of `<folder>/<split>.jsonl` (or `.csv`).

    Raises:
        NotFoundError: no such file.
        UnknownNameError: the folder or the split column has no such split, or the task is not "completion".
        FormatError: a row without prompt and completion (`file:line`).
        DataError: no rows, duplicate ids, or a document in two splits.
    """
    check_known("task of a file", task or "completion", ("completion",))
    path = find_path(name, data=data)
    stem = path.name
    siblings: dict[str, Path] = {}
    if path.is_dir():
        siblings = _in_folder(path, split)
        path = siblings[split]
    rows = read_rows(path)
    if any("document" in row.values for row in rows):
        _check_disjoint((name, row) for name, file in siblings.items() for row in (rows if name == split else read_rows(file)))
    if not rows:
        raise DataError(f"{path} holds 0 rows. Expected at least one: write one example a line.")
    shown = split if path.name != stem else "all"
    if any("split" in row.values for row in rows):
        _check_disjoint((row.text("split"), row) for row in rows)
        check_known("split", split, {row.text("split") for row in rows})
        rows = tuple(row for row in rows if row.text("split") == split)
        shown = split
    card = DatasetCard(
        name=_bare(stem),
        split=shown,
        task="completion",
        rows=0,
        sha256="",
        licence="not stated in the file",
        source=f"File {path.name}.",
        files=(file_card(path),),
    )
    return make_dataset([(row, _example(row, _bare(path.name))) for row in rows], card)


def _check_disjoint(rows: Iterable[tuple[str, Row]]) -> None:
    """No document may be in two splits; rows come with the name of theirs."""
    seen: dict[Json, tuple[str, Row]] = {}
    for split, row in rows:
        document = row.values.get("document")
        if isinstance(document, (str, int)) and document != "":
            other, first = seen.setdefault(document, (split, row))
            if other != split:
                raise DataError(
                    f"Document {document!r} is in split {other!r} at {first.where} and in {split!r} at {row.where}. "
                    "Expected each document in one split, or the test would know what was trained on: move one of the rows."
                )


def _bare(name: str) -> str:
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)


def _in_folder(folder: Path, split: str) -> dict[str, Path]:
    """The folder's files by split: the one asked for, and those that are called as splits usually are."""
    files = {_bare(path.name): path for path in sorted(folder.iterdir()) if path.is_file() and path.name.lower().endswith(SUFFIXES)}
    if not files:
        raise NotFoundError(f"The folder {str(folder)!r} holds no data file. Expected <split>{SUFFIXES[0]}; read are {', '.join(SUFFIXES)}.")
    if split not in files:
        raise UnknownNameError(f"split of the folder {folder.name!r}", split, files)
    return {name: path for name, path in files.items() if name == split or name in SPLITS}


def _example(row: Row, stem: str) -> Example:
    values = row.values
    identity = values.get("id", f"{stem}-{row.line}")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise FormatError(f"{row.where}: 'id' is {identity!r}; expected text or a whole number. Correct the row.")
    pair = next(((asked, answered) for asked, answered in PAIRS if asked in values and answered in values), None)
    if pair is not None:
        used = {"id", "split", *pair}
        prompt: str | tuple[Message, ...] = row.text(pair[0])
        target = row.text(pair[1])
    elif "messages" in values:
        used = {"id", "split", "messages"}
        *asked, last = _messages(row)
        if not asked or last.role != "assistant":
            raise FormatError(f"{row.where}: 'messages' end in {last.role!r} after {len(asked)} turns; expected a question and then the assistant's turn.")
        prompt, target = tuple(asked), last.content
    else:
        wanted = ", ".join(f"{asked!r} with {answered!r}" for asked, answered in PAIRS)
        raise FormatError(f"{row.where}: the row has {', '.join(map(repr, values)) or 'nothing'}; expected {wanted}, or 'messages'. Rename the columns.")
    meta = {key: value for key, value in values.items() if key not in used}
    return Example(id=str(identity), prompt=prompt, target=target, meta=meta)


def _messages(row: Row) -> tuple[Message, ...]:
    turns = row.values["messages"]
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"{row.where}: 'messages' is {turns!r}; expected a list of turns with 'role' and 'content'. Correct the row.")
    return tuple(_message(row, number, turn) for number, turn in enumerate(turns, start=1))


def _message(row: Row, number: int, turn: Json) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
    if role not in _ROLES or not isinstance(content, str) or (not content.strip() and role == "assistant"):
        raise FormatError(f"{row.where}: turn {number} of 'messages' is {turn!r}; expected 'role' ({', '.join(_ROLES)}) and a text 'content'. Correct the row.")
    return Message(role=cast("Literal['system', 'user', 'assistant', 'tool']", role), content=content)

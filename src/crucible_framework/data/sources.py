"""Finding and reading data files: JSON lines and CSV, plain or gzipped, with file:line in every complaint.

Files are looked for in the folder that the caller names and, without one, in `CRUCIBLE_DATA`, then in `data` under the cache, then (for
`hf://datasets/…` names) on the Hugging Face hub. This file does not know what rows mean, and it never changes a value.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import orjson

from ..config import places
from ..errors import FormatError, NotFoundError
from ..files import sha256_file, storage_errors
from ..records import FileCard, Json, record
from . import hub

__all__ = ["SUFFIXES", "Row", "file_card", "find_files", "find_path", "read_rows"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


@record
class Row:
    """One row of a file; `line` counts from 1, and is the first line of a row that spans several."""

    path: Path
    line: int
    values: Mapping[str, Json]

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.path}:{self.line}"

    def get(self, key: str) -> Json:
        """The value of a key.

        Raises:
            FormatError: the row has no such key; the message names those that it has.
        """
        if key not in self.values:
            raise FormatError(f"{self.where}: there is no {key!r}; the row has {', '.join(map(repr, self.values)) or 'nothing'}. Add it.")
        return self.values[key]

    def text(self, key: str) -> str:
        """The value of a key that must be text with more than blanks.

        Raises:
            FormatError: it is missing, no text, or blank.
        """
        value = self.get(key)
        if not isinstance(value, str) or not value.strip():
            raise FormatError(f"{self.where}: {key!r} is {value!r}; expected text. Correct the row or leave it out.")
        return value


# ------------------------------------------------------------------------------------------------------------- finding
def _roots(data: Path | None) -> tuple[Path, ...]:
    if data is not None:
        return (data,)
    found = places()
    return (*((found.data,) if found.data is not None else ()), found.cache / "data")


def find_files(dataset: str, wanted: Sequence[Sequence[str]], *, data: Path | None = None, fix: str = "") -> tuple[Path, ...]:
    """The files of a data set, all from one folder: `<root>/<dataset>` or `<root>`, for the first root that holds them all.

    Args:
        dataset: the data set's name, which is its folder's.
        wanted: per file, the names that will do, best first.
        data: the only root to look in; without it `CRUCIBLE_DATA`, then the cache.
        fix: how to get the files, for the message.

    Raises:
        NotFoundError: no folder holds them all; the message names the folders and what the nearest one lacks.
    """
    lacks: dict[Path, list[str]] = {}
    for root in _roots(data):
        for folder in (root / dataset, root):
            paths = [next((folder / name for name in names if (folder / name).is_file()), None) for names in wanted]
            found = tuple(path for path in paths if path is not None)
            if len(found) == len(wanted):
                return found
            lacks[folder] = [" or ".join(names) for names, path in zip(wanted, paths, strict=True) if path is None]
    fewest = min(lacks.values(), key=len)
    folders = ", ".join(repr(str(folder)) for folder in lacks)
    raise NotFoundError(f"Data set {dataset!r} is not here: looked in {folders} and missed {', '.join(fewest)}. {fix or 'Set CRUCIBLE_DATA to their folder.'}")


def find_path(name: str | Path, *, data: Path | None = None) -> Path:
    """A file or folder: as given, then under `data` or `CRUCIBLE_DATA` and the cache; `hf://datasets/owner/name/file` from the hub.

    Raises:
        NotFoundError: it is nowhere; the message names the places.
        ServiceError: the hub cannot be reached.
    """
    if isinstance(name, str) and name.startswith(hub.PREFIX):
        return hub.fetch(name)
    path = Path(name).expanduser()
    tried = [path, *(root / path for root in _roots(data))]
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise NotFoundError(f"There is no data file {str(name)!r}: looked at {', '.join(repr(str(p)) for p in dict.fromkeys(tried))}. Correct the path.")


def file_card(path: Path) -> FileCard:
    """Name, sha256 and size of a file."""
    with storage_errors(path, "read"):
        return FileCard(name=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size)


# ------------------------------------------------------------------------------------------------------------- reading
def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a `.jsonl`, `.csv` or gzipped file; blank lines are left out.

    Raises:
        NotFoundError: there is no such file.
        FormatError: another suffix, a broken archive, or a line that does not parse (`file:line`).
        StoreError: the file cannot be read.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise FormatError(f"{path}: the suffix {path.suffix!r} is not read. Expected {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise NotFoundError(f"There is no data file {str(path)!r}. Correct the path.")
    try:
        with storage_errors(path, "read"):
            raw = path.read_bytes()
        content = gzip.decompress(raw) if name.endswith(".gz") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: not a whole gzip file: {error}. Get the file again.") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    _check_utf8(path, content)
    return tuple(_csv_rows(path, content) if name.endswith((".csv", ".csv.gz")) else _json_rows(path, content))


def _check_utf8(path: Path, content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FormatError(f"{path}:{line}: not UTF-8: {error.reason} at byte {error.start}. Save the file as UTF-8.") from error


def _json_rows(path: Path, content: bytes) -> Iterator[Row]:
    for line, text in enumerate(content.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            values = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise FormatError(f"{path}:{line}: not valid JSON: {error}. Expected one JSON object a line: correct or remove the line.") from error
        if not isinstance(values, dict):
            raise FormatError(f"{path}:{line}: the line is a JSON {type(values).__name__}; expected an object. Write {{…}} with named values.")
        yield Row(path=path, line=line, values=values)


def _csv_rows(path: Path, content: bytes) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                if len(set(header)) < len(header) or not all(header):
                    raise FormatError(f"{path}:{line}: the header is {header!r}; expected a name of its own for each column. Rename them.")
            elif cells and header is not None:
                if len(cells) != len(header):
                    raise FormatError(f"{path}:{line}: the row has {len(cells)} cells; expected {len(header)} as in the header. Quote cells with commas.")
                yield Row(path=path, line=line, values=dict(zip(header, cells, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise FormatError(f"{path}:{line}: not valid CSV: {error}. Close the quotes, and double a quote inside a quoted cell.") from error

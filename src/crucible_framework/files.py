"""The only writer of bytes that must survive: atomic files, published folders, append-only logs, locks.

A published folder appears whole or not at all: its files are written into `.tmp-…` beside it and synced, `manifest.json` (name, size and
sha256 of each file, and what the owner adds) is written last and synced, then the folder is renamed and its parent synced. Readers take
a folder only when its manifest parses and the sizes fit; `verify` also compares every sha256. This file does not know what it stores.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import orjson
from filelock import FileLock, Timeout

from .errors import CorruptError, LockedError, NotFoundError, StorageFullError, StoreError
from .records import FileCard, Json, record

__all__ = [
    "FORMAT_VERSION",
    "JsonLines",
    "Manifest",
    "lock",
    "publish",
    "read_json",
    "read_lines",
    "read_manifest",
    "sha256_file",
    "storage_errors",
    "sweep",
    "verify",
    "write_atomic",
    "write_json",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_TMP = ".tmp-"


@record
class Manifest:
    """What a published folder holds. `sha256` is that of the manifest file itself; `meta` is the owner's."""

    files: tuple[FileCard, ...]
    meta: Mapping[str, Json]
    sha256: str

    @property
    def size_bytes(self) -> int:
        """The files together, without the manifest."""
        return sum(card.size_bytes for card in self.files)


@contextmanager
def storage_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Turns what the operating system raises into one sentence with the fix.

    Raises:
        StorageFullError: no space, quota or file-size limit.
        StoreError: no permission or any other I/O error.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(f"Cannot {doing} {str(path)!r}: the disk or quota is full. Free some space and resume; what was saved is intact.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StoreError(f"Cannot {doing} {str(path)!r}: no permission. Choose another folder or change its permissions.") from error
        raise StoreError(f"Cannot {doing} {str(path)!r}: {error.strerror or error}.") from error


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file: readers see the old bytes or the new ones, also after a crash."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_TMP}{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """`write_atomic` of indented JSON (dataclasses and numpy values allowed)."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    write_atomic(path, orjson.dumps(value, default=str, option=options))


def read_json(path: Path) -> Json:
    """The JSON value of a file.

    Raises:
        NotFoundError: there is no such file.
        CorruptError: it is no JSON.
    """
    try:
        return cast("Json", orjson.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file {str(path)!r}.") from error
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"{str(path)!r} is not valid JSON: {error}.") from error


def publish(final: Path, write: Callable[[Path], None], meta: Mapping[str, Json] | None = None) -> Manifest:
    """Makes the folder `final` appear whole with what `write(temporary_folder)` puts into it.

    Args:
        final: the folder's path; it must not exist.
        write: writes plain files (no links, no sub-folders needed) into the folder that it is given.
        meta: put into the manifest.

    Raises:
        StoreError: `final` exists, or an I/O error; StorageFullError where there is no room. Nothing is left behind.
    """
    if final.exists():
        raise StoreError(f"{str(final)!r} exists already. Choose another name.")
    temporary = final.parent / f"{_TMP}{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        with storage_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            write(temporary)
            cards = []
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                _sync(path)
                name = path.relative_to(temporary).as_posix()
                cards.append(FileCard(name=name, sha256=sha256_file(path), size_bytes=path.stat().st_size))
            body = {
                "format_version": FORMAT_VERSION,
                "files": [{"name": c.name, "size_bytes": c.size_bytes, "sha256": c.sha256} for c in cards],
                "meta": dict(meta or {}),
            }
            write_atomic(temporary / MANIFEST, orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
            _sync(temporary)
            temporary.rename(final)
            _sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return read_manifest(final)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a published folder; sizes are checked, contents are not.

    Raises:
        NotFoundError: the folder or its manifest is missing.
        CorruptError: the manifest does not parse, or a file is missing or of another size.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"{str(folder)!r} holds no {MANIFEST}: nothing was published there.") from error
    try:
        body = orjson.loads(raw)
        version = body["format_version"]
        cards = tuple(FileCard(name=f["name"], size_bytes=int(f["size_bytes"]), sha256=f["sha256"]) for f in body["files"])
        meta = dict(body["meta"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{str(path)!r} does not parse: {error}. Use an earlier checkpoint.") from error
    if version > FORMAT_VERSION:
        raise StoreError(f"{str(path)!r} has format version {version}; this Crucible reads up to {FORMAT_VERSION}. Upgrade crucible-framework.")
    for card in cards:
        file = folder / card.name
        if card.name.startswith("/") or ".." in Path(card.name).parts:
            raise CorruptError(f"{str(path)!r} names {card.name!r}, which lies outside its folder.")
        size = file.stat().st_size if file.is_file() else None
        if size != card.size_bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise CorruptError(f"{str(file)!r} is {found}; its manifest says {card.size_bytes} bytes. Use an earlier checkpoint.")
    return Manifest(files=cards, meta=meta, sha256=hashlib.sha256(raw).hexdigest())


def verify(folder: Path) -> Manifest:
    """`read_manifest`, and every file's sha256 compared.

    Raises:
        CorruptError: a byte differs; the message names the file.
    """
    manifest = read_manifest(folder)
    for card in manifest.files:
        if (found := sha256_file(folder / card.name)) != card.sha256:
            raise CorruptError(
                f"{str(folder / card.name)!r} has sha256 {found[:12]}…; its manifest says {card.sha256[:12]}…. "
                "The file changed after it was saved: use an earlier checkpoint."
            )
    return manifest


def sweep(parent: Path) -> int:
    """Removes what crashed writers left behind in a folder that the caller has locked; returns how many entries."""
    count = 0
    for path in parent.glob(f"{_TMP}*") if parent.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        count += 1
    return count


@contextmanager
def lock(path: Path, what: str = "folder") -> Iterator[None]:
    """Holds a lock file for the block, across processes.

    Raises:
        LockedError: another process (or another holder in this one) has it.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, timeout=0)
        try:
            held.acquire()
        except Timeout as error:
            raise LockedError(f"The {what} {str(path.parent)!r} is in use by another process. Wait for it to end, or choose another folder.") from error
    try:
        yield
    finally:
        held.release()


class JsonLines:
    """An append-only file of JSON objects, one a line; each append is one `write`, so a crash tears the last line at the most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Json], *, sync: bool = False) -> None:
        """Adds a row; `sync` waits until it is on disk."""
        with storage_errors(self.path):
            self._file.write(orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE))
            if sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        with contextlib.suppress(ValueError):
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Json]]:
    """The rows of a JSON-lines file; a torn last line is left out, a missing file is empty.

    Raises:
        CorruptError: a line before the last does not parse; the message gives file:line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Json]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if number == len(lines):
                break
            raise CorruptError(f"{path}:{number}: not valid JSON: {error}.") from error
        rows.append(row)
    return rows

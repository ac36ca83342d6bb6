"""The only writer of bytes that must survive: atomic files, published folders, append-only logs, locks.

A published folder appears whole or not at all: its files are written into `.tmp-…` beside it and synced, `manifest.json` (name, size and
sha256 of each file, and what the owner adds) is written last and synced, then the folder is renamed and its parent synced. Readers take
a folder only when its manifest is whole (it holds a sha256 of its own bytes) and the sizes fit; `verify` also compares every sha256.
This file does not know what it stores.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import orjson
from filelock import FileLock, Timeout

from .errors import CorruptError, CrucibleError, LockedError, NotFoundError, StorageFullError, StoreError
from .records import FileCard, Json, record

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "JsonLines",
    "Manifest",
    "discard",
    "held",
    "lock",
    "move",
    "publish",
    "read_json",
    "read_lines",
    "read_manifest",
    "sha256_file",
    "staged",
    "storage_errors",
    "sweep",
    "verify",
    "write_atomic",
    "write_json",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_TMP = ".tmp-"
_NO_SUM = b"0" * 64
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NATIVE_ERRNO = re.compile(r"os error (\d+)\b")  # how libraries in Rust (safetensors, tokenizers) put an errno into their own exceptions


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
    except CrucibleError:
        raise
    except Exception as error:
        native = _NATIVE_ERRNO.search(str(error))
        if not isinstance(error, OSError) and not native:
            raise
        code = error.errno if isinstance(error, OSError) else int(native[1]) if native else None
        if code in _FULL:
            raise StorageFullError(f"Cannot {doing} {str(path)!r}: the disk or quota is full. Free some space and resume; what was saved is intact.") from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StoreError(f"Cannot {doing} {str(path)!r}: no permission. Choose another folder or change its permissions.") from error
        raise StoreError(f"Cannot {doing} {str(path)!r}: {os.strerror(code) if code else error}.") from error


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with storage_errors(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(folder: Path, chunks: Iterable[bytes]) -> Iterator[tuple[Path, str]]:
    """Gives a synced temporary file in `folder` that holds the chunks, and their sha256; at the end of the block it is gone unless moved."""
    temporary = folder / f"{_TMP}{uuid.uuid4().hex}"
    digest = hashlib.sha256()
    try:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        yield temporary, digest.hexdigest()
    finally:
        _remove(temporary)


def move(source: Path, target: Path) -> None:
    """Renames a synced file, over an older one too, and waits until the name is on disk."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        _sync(target.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file: readers see the old bytes or the new ones, also after a crash."""
    with storage_errors(path), staged(path.parent, (data,)) as (temporary, _):
        move(temporary, path)


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
        with storage_errors(path, "read"):
            raw = path.read_bytes() if path.exists() else None
        if raw is None:
            raise NotFoundError(f"There is no file {str(path)!r}.")
        return cast("Json", orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"{str(path)!r} is not valid JSON: {error}.") from error


def _manifest_bytes(folder: Path, meta: Mapping[str, Json]) -> bytes:
    """Syncs every file and sub-folder, and lists the files; the sum covers all other bytes of the manifest itself."""
    cards: list[dict[str, Json]] = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.name == MANIFEST:
            raise StoreError(f"{path.name!r} cannot be published: links and files called {MANIFEST!r} are not taken. Write plain files only.")
        _sync(path)
        if path.is_file():
            cards.append({"name": path.relative_to(folder).as_posix(), "sha256": sha256_file(path), "size_bytes": path.stat().st_size})
    body = {"checksum": _NO_SUM.decode(), "files": cards, "format_version": FORMAT_VERSION, "meta": dict(meta)}
    raw = orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    return raw.replace(_NO_SUM, hashlib.sha256(raw).hexdigest().encode(), 1)


def publish(final: Path, write: Callable[[Path], object], meta: Mapping[str, Json] | None = None) -> Manifest:
    """Makes the folder `final` appear whole with what `write(temporary_folder)` puts into it.

    Args:
        final: the folder's path; it must not exist.
        write: writes plain files (no links, none called manifest.json) into the folder that it is given.
        meta: put into the manifest.

    Raises:
        StoreError: `final` exists, or an I/O error; StorageFullError where there is no room. Nothing is left behind.
    """
    with storage_errors(final):
        if final.exists():
            raise StoreError(f"{str(final)!r} exists already. Choose another name.")
    temporary = final.parent / f"{_TMP}{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        with storage_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            write(temporary)
            raw = _manifest_bytes(temporary, meta or {})
            write_atomic(temporary / MANIFEST, raw)  # syncs the folder, too
            temporary.rename(final)
            try:
                _sync(final.parent)
            except OSError:
                final.rename(temporary)  # not known to be on disk: whoever is told of a failure finds nothing
                raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _parsed_manifest(final / MANIFEST, raw)  # not read back: an error now would deny what is there


def _parsed_manifest(path: Path, raw: bytes) -> Manifest:
    try:
        body = orjson.loads(raw)
        checksum = str(body["checksum"])
        if hashlib.sha256(raw.replace(checksum.encode(), _NO_SUM, 1)).hexdigest() != checksum:
            raise CorruptError(f"{str(path)!r} does not match its own checksum: it changed after it was saved. Use an earlier checkpoint.")
        if (version := int(body["format_version"])) > FORMAT_VERSION:  # after the sum: a damaged digit is no newer format
            raise StoreError(f"{str(path)!r} has format version {version}; this Crucible reads up to {FORMAT_VERSION}. Upgrade crucible-framework.")
        cards = tuple(FileCard(name=str(f["name"]), size_bytes=int(f["size_bytes"]), sha256=str(f["sha256"])) for f in body["files"])
        return Manifest(files=cards, meta=dict(body["meta"]), sha256=hashlib.sha256(raw).hexdigest())
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{str(path)!r} does not parse: {error!r}. Use an earlier checkpoint.") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a published folder; sizes are checked, contents are not.

    Raises:
        NotFoundError: the folder or its manifest is missing.
        CorruptError: the manifest does not parse, or a file is missing or of another size.
    """
    path = folder / MANIFEST
    with storage_errors(path, "read"):
        raw = path.read_bytes() if path.exists() else None
    if raw is None:
        raise NotFoundError(f"{str(folder)!r} holds no {MANIFEST}: nothing was published there.")
    manifest = _parsed_manifest(path, raw)
    for card in manifest.files:
        file = folder / card.name
        if card.name.startswith("/") or ".." in Path(card.name).parts:
            raise CorruptError(f"{str(path)!r} names {card.name!r}, which lies outside its folder.")
        with storage_errors(file, "read"):
            size = file.stat().st_size if file.is_file() else None
        if size != card.size_bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise CorruptError(f"{str(file)!r} is {found}; its manifest says {card.size_bytes} bytes. Use an earlier checkpoint.")
    return manifest


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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(parent: Path) -> int:
    """Removes what crashed writers left behind in a folder that the caller has locked; returns how many entries."""
    entries = list(parent.glob(f"{_TMP}*")) if parent.is_dir() else []
    for path in entries:
        _remove(path)
    return len(entries)


def discard(path: Path) -> None:
    """Removes a file or published folder so that readers see all of it or nothing: it is renamed to `.tmp-…` first.

    Raises:
        StoreError: it cannot be renamed; it is still whole.
    """
    temporary = path.parent / f"{_TMP}{path.name}-{uuid.uuid4().hex[:8]}"
    with storage_errors(path, "remove"):
        path.rename(temporary)
        _sync(path.parent)
    _remove(temporary)


@contextmanager
def lock(path: Path, what: str = "folder", timeout_s: float = 0.0) -> Iterator[None]:
    """Holds a lock file for the block, across processes and threads; the file stays, its lock ends with the process.

    Raises:
        LockedError: another process (or another holder in this one) has it, and still had it after `timeout_s`.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held_lock = FileLock(path, timeout=timeout_s, thread_local=False)
        try:
            held_lock.acquire()
        except Timeout as error:
            raise LockedError(f"The {what} {str(path.parent)!r} is in use by another process. Wait for it to end, or choose another folder.") from error
    try:
        yield
    finally:
        held_lock.release()


def held(path: Path) -> bool:
    """Whether some process holds the lock file now. Takes it shared for a moment, so that readers do not disturb each other."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


class JsonLines:
    """An append-only file of JSON objects, one a line; a crash tears the last line at the most, and the next opening mends it.

    Threads may share it; processes may not (the owner of the folder's lock writes).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            try:
                self._mend()
            except OSError:
                self._file.close()
                raise

    def _mend(self) -> None:
        """Cuts a torn last line off, which never was a row; a row that lacks only its line end gets it."""
        with self.path.open("rb") as file:
            size = end = file.seek(0, os.SEEK_END)
            tail = b""
            while end > 0 and b"\n" not in tail:
                start = max(0, end - 65536)
                file.seek(start)
                tail = file.read(end - start) + tail
                end = start
        torn = tail[tail.rfind(b"\n") + 1 :]
        if torn and _row(torn) is None:
            os.ftruncate(self._file.fileno(), size - len(torn))
        elif torn:
            self._file.write(b"\n")

    def append(self, row: Mapping[str, Json], *, sync: bool = False) -> None:
        """Adds a row, whole or not at all; `sync` waits until it is on disk."""
        data = orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        with self._lock, storage_errors(self.path):
            before = os.fstat(self._file.fileno()).st_size
            try:
                rest = data
                while rest:  # a full disk takes a part of the bytes before it raises
                    rest = rest[self._file.write(rest) :]
                if sync:
                    os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), before)
                raise

    def sync(self) -> None:
        """Waits until all rows are on disk."""
        with self._lock, storage_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        with self._lock:
            self._file.close()


def _row(line: bytes) -> dict[str, Json] | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def read_lines(path: Path) -> list[dict[str, Json]]:
    """The rows of a JSON-lines file; a torn last line is left out, a missing file is empty.

    Raises:
        CorruptError: a line before the last is no JSON object; the message gives file:line.
    """
    with storage_errors(path, "read"):
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows: list[dict[str, Json]] = []
    for number, line in enumerate(lines, start=1):
        row = _row(line) if line else None
        if row is not None:
            rows.append(row)
        elif line and number < len(lines):
            raise CorruptError(f"{path}:{number}: not a JSON object: {line[:60]!r}. Remove the line, or use an earlier copy of the file.")
    return rows

"""A content-addressed cache: bytes go in, their sha256 comes out, and what comes out again is compared with it.

    <folder>/ab/ab12…           the bytes, under their sha256; equal bytes are stored once
    <folder>/refs/<owner>/ab12… says that the owner needs them: they are never removed to make room

Knows nothing of what the bytes are, and unpacks nothing. Any number of threads and processes may use a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path

from .. import events, files
from ..errors import ChecksumError, ConfigError, CorruptError, NotFoundError, StoreError
from ..records import record
from .fetching import Progress, fetch
from .names import safe_name

__all__ = ["Artifact", "Artifacts"]

_KEY = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20
_ABANDONED_S = 86_400.0


@record
class Artifact:
    """A stored artifact; `used_at` is when it was last put or got, in seconds since the epoch."""

    key: str
    size_bytes: int
    used_at: float


class Artifacts:
    """The artifacts in a folder, which need not exist before the first `put`.

    Args:
        folder: where they lie.
        max_bytes: after each `put` the least recently used that nobody owns are removed until no more is stored; None keeps all.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes!r}; expected at least 0, or none.")
        self.folder, self.max_bytes = Path(folder), max_bytes

    def _lock(self) -> AbstractContextManager[None]:
        return files.lock(self.folder / ".lock", "artifact folder", timeout_s=60.0)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{key!r} is no artifact key; expected the 64 hex signs of a sha256, as `put` returned them.")
        return self.folder / key[:2] / key

    def put(self, data: bytes | Path, *, owner: str = "") -> str:
        """Stores bytes, or a copy of a file, and returns the key; what is there already and sound is not written again.

        Args:
            data: the bytes, or a file.
            owner: whoever needs them until `release`; they are not removed before. "" leaves them to the limit.

        Raises:
            ConfigError: the owner's name is no safe file name.
            NotFoundError: there is no such file.
            StoreError: an I/O error; StorageFullError where there is no room. Nothing is left behind.
        """
        if owner:
            safe_name("owner", owner)
        if isinstance(data, Path) and not data.is_file():
            raise NotFoundError(f"There is no file {str(data)!r} to store. Give the path of a file, or bytes.")
        chunks = _read(data) if isinstance(data, Path) else (data,)
        with files.staged(self.folder, chunks) as (temporary, key):
            size_bytes = temporary.stat().st_size
            path = self._path(key)
            with self._lock():  # prune cannot remove between the look and the touch
                new = not (path.is_file() and files.sha256_file(path) == key)
                if new:
                    files.move(temporary, path)
                _touch(path)
                if owner:
                    files.write_atomic(self._refs / owner / key, b"")
                if self.max_bytes is not None:
                    self._make_room(self.max_bytes, spare=key)
        if new:
            events.emit("artifact.stored", key=key, size_bytes=size_bytes)
        return key

    @property
    def _refs(self) -> Path:
        return self.folder / "refs"

    def owned(self) -> dict[str, tuple[str, ...]]:
        """The keys that each owner needs."""
        if not self._refs.is_dir():
            return {}
        return {owner.name: tuple(sorted(p.name for p in owner.iterdir() if _KEY.fullmatch(p.name))) for owner in sorted(self._refs.iterdir())}

    def release(self, owner: str, keys: Iterable[str] | None = None) -> None:
        """Says that an owner needs some keys no longer, or (None) nothing at all; whether they are removed is up to the limit."""
        folder, wanted = self._refs / safe_name("owner", owner), None if keys is None else set(keys)
        with self._lock(), files.storage_errors(folder, "remove"):
            given_up = [path for path in folder.iterdir() if wanted is None or path.name in wanted] if folder.is_dir() else []
            for path in given_up:
                path.unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if given_up:
            events.emit("artifact.released", owner=owner, count=len(given_up))

    def get(self, key: str) -> bytes:
        """The bytes of a key, compared with it.

        Raises:
            NotFoundError: it is not stored (any more).
            CorruptError: the stored bytes are not those that were put; putting them again mends it.
        """
        path = self._path(key)
        with files.storage_errors(path, "read"):
            try:
                data = path.read_bytes()
            except FileNotFoundError as error:
                raise NotFoundError(f"No artifact {key[:12]}… is stored in {str(self.folder)!r}. Put it again.") from error
        if (found := hashlib.sha256(data).hexdigest()) != key:
            raise CorruptError(f"Artifact {key[:12]}… in {str(self.folder)!r} has sha256 {found[:12]}…: it changed after it was stored. Put it again.")
        _touch(path)
        return data

    def contains(self, key: str) -> bool:
        """Whether the key is stored; its bytes are compared only by `get`."""
        return self._path(key).is_file()

    def list(self) -> tuple[Artifact, ...]:
        """All artifacts, the least recently used first."""
        found = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if _KEY.fullmatch(path.name):
                try:
                    stat = path.stat()
                except FileNotFoundError:  # pruned meanwhile
                    continue
                found.append(Artifact(key=path.name, size_bytes=stat.st_size, used_at=stat.st_mtime_ns / 1e9))
        return tuple(sorted(found, key=lambda artifact: (artifact.used_at, artifact.key)))

    def prune(self, max_bytes: int) -> tuple[Artifact, ...]:
        """Removes the least recently used artifacts that nobody owns until at most `max_bytes` are stored, and returns them.

        Raises:
            ConfigError: `max_bytes` is negative.
        """
        if max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes!r}; expected at least 0.")
        if not self.folder.is_dir():
            return ()
        with self._lock():
            self._sweep()
            return self._make_room(max_bytes)

    def _make_room(self, max_bytes: int, spare: str = "") -> tuple[Artifact, ...]:
        kept = {key for keys in self.owned().values() for key in keys} | {spare}
        removed = tuple(_surplus(self.list(), max_bytes, kept))
        for artifact in removed:
            files.discard(self._path(artifact.key))
            events.emit("artifact.removed", key=artifact.key, size_bytes=artifact.size_bytes)
        return removed

    def verify(self) -> tuple[tuple[str, str], ...]:
        """Compares every byte with its key; returns what is not sound, or owned and not there, and what is wrong with it."""
        there = {artifact.key for artifact in self.list()}
        missing = [(key, f"{owner} owns it and it is not there") for owner, keys in self.owned().items() for key in keys if key not in there]
        found = []
        for key in sorted(there):
            try:
                if (seen := files.sha256_file(self._path(key))) != key:
                    found.append((key, f"it has sha256 {seen[:12]}…: it changed after it was stored"))
            except StoreError as error:  # removed meanwhile, or the disk fails
                if self.contains(key):
                    found.append((key, str(error)))
        return (*found, *missing)

    def download(self, url: str, *, sha256: str = "", owner: str = "", progress: Progress | None = None) -> str:
        """Fetches a file by HTTP and stores it; what an earlier try got is not fetched again.

        Args:
            url: http:// or https://.
            sha256: what its bytes must have; where they are stored already nothing is fetched.
            owner: as in `put`.
            progress: called with the bytes so far and in all (None where the server does not say).

        Raises:
            ConfigError: the address or the sha256 has another form.
            ChecksumError: the bytes are others; they are thrown away.
            ServiceError: the server refuses, or the connection ends before the file does; the next try goes on from there.
        """
        if sha256 and self.contains(sha256):
            return self.put(self._path(sha256), owner=owner)
        partial = self.folder / f".tmp-download-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        with files.lock(partial.with_name(f"{partial.name[5:]}.lock"), "download in", timeout_s=3600.0):
            fetch(url, partial, progress)
            found = files.sha256_file(partial)
            if sha256 and found != sha256:
                partial.unlink()
                raise ChecksumError(f"{url!r} has sha256 {found[:12]}…; expected {sha256[:12]}…. Check the address, or where the sha256 comes from.")
            key = self.put(partial, owner=owner)
            partial.unlink(missing_ok=True)
        return key

    def _sweep(self) -> None:
        """Removes what writers left behind that died long ago; younger files may belong to a living one."""
        for path in (*self.folder.glob(".tmp-*"), *self.folder.glob("[0-9a-f][0-9a-f]/.tmp-*")):
            with files.storage_errors(path, "remove"):
                if path.exists() and time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)


def _surplus(found: Iterable[Artifact], max_bytes: int, kept: AbstractSet[str]) -> Iterator[Artifact]:
    found = tuple(found)
    total = sum(artifact.size_bytes for artifact in found)
    for artifact in found:
        if total <= max_bytes:
            return
        if artifact.key in kept:
            continue
        total -= artifact.size_bytes
        yield artifact


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _touch(path: Path) -> None:
    """Marks a use, finer than the kernel's file times; a folder that may only be read keeps its order."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(path, ns=(now, now))

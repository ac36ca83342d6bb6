"""A content-addressed cache: bytes go in, their sha256 comes out, and what comes out again is compared with it.

The key of an artifact is the hex sha256 of its bytes; equal bytes are stored once. Knows nothing of what the bytes are, and unpacks
nothing. Any number of threads and processes may use a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from .. import events, files
from ..errors import ConfigError, CorruptError, NotFoundError
from ..records import record

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
    """The artifacts in a folder, which need not exist before the first `put`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _lock(self) -> AbstractContextManager[None]:
        return files.lock(self.folder / ".lock", "artifact folder", timeout_s=60.0)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{key!r} is no artifact key; expected the 64 hex signs of a sha256, as `put` returned them.")
        return self.folder / key[:2] / key

    def put(self, data: bytes | Path) -> str:
        """Stores bytes, or a copy of a file, and returns the key; what is there already and sound is not written again.

        Raises:
            NotFoundError: there is no such file.
            StoreError: an I/O error; StorageFullError where there is no room. Nothing is left behind.
        """
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
        if new:
            events.emit("artifact.stored", key=key, size_bytes=size_bytes)
        return key

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
        """Removes the least recently used artifacts until at most `max_bytes` are stored, and returns them.

        Raises:
            ConfigError: `max_bytes` is negative.
        """
        if max_bytes < 0:
            raise ConfigError(f"max_bytes is {max_bytes!r}; expected at least 0.")
        if not self.folder.is_dir():
            return ()
        with self._lock():
            self._sweep()
            removed = tuple(_surplus(self.list(), max_bytes))
            for artifact in removed:
                files.discard(self._path(artifact.key))
                events.emit("artifact.removed", key=artifact.key, size_bytes=artifact.size_bytes)
        return removed

    def _sweep(self) -> None:
        """Removes what writers left behind that died long ago; younger files may belong to a living one."""
        for path in (*self.folder.glob(".tmp-*"), *self.folder.glob("[0-9a-f][0-9a-f]/.tmp-*")):
            with files.storage_errors(path, "remove"):
                if path.exists() and time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)


def _surplus(found: Iterable[Artifact], max_bytes: int) -> Iterator[Artifact]:
    found = tuple(found)
    total = sum(artifact.size_bytes for artifact in found)
    for artifact in found:
        if total <= max_bytes:
            return
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

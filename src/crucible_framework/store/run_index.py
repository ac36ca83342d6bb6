"""What was read of each run, kept in SQLite until its files change. It can be deleted at any time: the files are the truth.

A row is valid as long as the stamps of the run's files (inode, size, time) are those it was read at; only other runs are read again. A
database that is busy, damaged or of another layout costs time, never a run and never an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import orjson

from .. import files
from ..config import to_dict
from ..errors import NotFoundError
from .checkpoints import number
from .index import journal_mode
from .run_files import CONFIG, LABELS, LOCK, METRICS, RUN, RunInfo, look_at_run

__all__ = ["SCHEMA", "RunIndex"]

SCHEMA = 1
_BUSY_S = 30.0
_WATCHED = (RUN, CONFIG, METRICS, LABELS)
_log = logging.getLogger("crucible_framework")


class RunIndex:
    """The runs directly under a folder. Any number of threads and processes may use it."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / ".runs.sqlite"

    def infos(self) -> tuple[RunInfo, ...]:
        """All runs as their files are now, oldest first; damaged ones have the status "broken"."""
        names = self._names()
        kept = self._read()
        found, fresh = list[RunInfo](), dict[str, tuple[str, str]]()
        for name in names:
            stamp = _stamp(self.root / name)
            info = _parsed(self.root / name, kept[name][1]) if kept.get(name, ("",))[0] == stamp else None
            if info is None:
                try:
                    info = look_at_run(self.root / name)
                except NotFoundError:  # removed meanwhile
                    continue
                if info.status != "broken":
                    fresh[name] = stamp, _body(info)
            found.append(_alive(info))
        gone = kept.keys() - set(names)
        if fresh or gone:
            self._write(fresh, gone)
        return tuple(sorted(found, key=lambda info: (info.created_at, info.name)))

    def rebuild(self) -> int:
        """Makes the database again from the files; returns how many runs it holds."""
        if not self.root.is_dir():
            return 0
        self._drop()
        self.infos()
        return len(self._read())

    def _names(self) -> list[str]:
        with files.storage_errors(self.root, "read"):
            return sorted(p.parent.name for p in self.root.glob(f"*/{RUN}") if not p.parent.name.startswith("."))

    # --------------------------------------------------------------------------------------------------------- database
    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)) as db:
            db.execute(f"PRAGMA journal_mode = {journal_mode()}")
            db.execute("PRAGMA synchronous = OFF")  # whatever a power cut leaves is checked, or made again
            yield db

    def _read(self) -> dict[str, tuple[str, str]]:
        if not self.path.exists():
            return {}
        try:
            with self._connect() as db:
                if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA:
                    return {}
                return {name: (stamp, body) for name, stamp, body in db.execute("SELECT name, stamp, body FROM runs")}
        except sqlite3.DatabaseError as error:
            _log.info("the index %s cannot be read and is left out: %s", self.path, error)
            return {}

    def _write(self, fresh: Mapping[str, tuple[str, str]], gone: set[str]) -> None:
        try:
            self._store(fresh, gone)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                self._drop()
            _log.info("the index %s was not written: %s", self.path, error)

    def _store(self, fresh: Mapping[str, tuple[str, str]], gone: set[str]) -> None:
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            layout = db.execute("PRAGMA user_version").fetchone()[0]
            if layout > SCHEMA:  # a newer Crucible's: left alone
                return
            if layout < SCHEMA:
                db.execute("DROP TABLE IF EXISTS runs")
                db.execute("CREATE TABLE runs (name TEXT PRIMARY KEY, stamp TEXT NOT NULL, body TEXT NOT NULL) WITHOUT ROWID")
                db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?)", [(name, *row) for name, row in sorted(fresh.items())])
            db.executemany("DELETE FROM runs WHERE name = ?", [(name,) for name in sorted(gone) if not (self.root / name / RUN).exists()])
            db.execute("COMMIT")

    def _drop(self) -> None:
        for side in ("", "-journal", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                Path(f"{self.path}{side}").unlink()


def _stamp(folder: Path) -> str:
    parts = []
    for name in _WATCHED:
        try:
            stat = (folder / name).stat()
            parts.append(f"{stat.st_ino}.{stat.st_size}.{stat.st_mtime_ns}")
        except OSError:
            parts.append("-")
    return " ".join(parts)


def _body(info: RunInfo) -> str:
    """Everything but the folder, which may be moved. "interrupted" is not on file: it is what "running" means without a living writer."""
    body = cast("dict[str, Any]", to_dict(dataclasses.replace(info, status="running" if info.status == "interrupted" else info.status)))
    del body["folder"]
    body["metrics"] = {key: number(value) for key, value in body["metrics"].items()}
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY, default=str).decode()


def _parsed(folder: Path, body: str) -> RunInfo | None:
    try:
        return RunInfo(folder=folder, **orjson.loads(body))
    except (orjson.JSONDecodeError, TypeError):
        return None


def _alive(info: RunInfo) -> RunInfo:
    """A killed process changes no file, so whether a run still runs is asked each time."""
    if info.status not in ("running", "interrupted"):
        return info
    return dataclasses.replace(info, status="running" if files.held(info.folder / LOCK) else "interrupted")

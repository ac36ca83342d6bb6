"""The registry's SQLite index: rows that can be made again from files at any time. Knows names, versions and JSON bodies, and no model.

Before files change the index is marked, and unmarked with the new rows after: a crash between leaves the mark, and whoever comes next
makes the index again. So does a missing, damaged or older index. Writers hold one lock file; readers never wait for a living writer.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .. import events, files
from ..errors import CrucibleError, LockedError, StorageFullError, StoreError

__all__ = ["SCHEMA", "Index", "Row", "journal_mode"]

SCHEMA = 1
SYNCHRONOUS = "FULL"  # the mark must be on disk before the files change
_WAIT_S = 60.0
_BUSY_S = 30.0
_log = logging.getLogger("crucible_framework")
_TABLES = (
    "DROP TABLE IF EXISTS versions",
    "DROP TABLE IF EXISTS state",
    "CREATE TABLE versions (name TEXT, version INTEGER, body TEXT NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY (name, version)) WITHOUT ROWID",
    "CREATE TABLE state (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT INTO state VALUES ('marked', 0), ('rows', 0)",
    f"PRAGMA user_version = {SCHEMA}",
)


class Row(NamedTuple):
    """One version; `body` is JSON that conditions look into."""

    name: str
    version: int
    body: str

    @property
    def checksum(self) -> str:
        """Over all of the row: SQLite itself does not notice a flipped bit in a value."""
        return hashlib.sha256(f"{self.name}:{self.version}\n{self.body}".encode()).hexdigest()[:32]


class _StaleError(Exception):
    """The index must be made again from the files."""


def journal_mode(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> str:
    """WAL where this SQLite has no WAL-reset bug, else TRUNCATE. Source: SQLite 3.51.3 release notes."""
    return "WAL" if version >= (3, 51, 3) else "TRUNCATE"


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours; whatever a new index can heal as `_StaleError`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR))
        kind = code & 0xFF
        if kind == sqlite3.SQLITE_FULL:
            raise StorageFullError(
                f"Cannot write {str(path)!r}: the disk or quota is full. Free some space and try again; what was saved is intact."
            ) from error
        if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LockedError(f"{str(path)!r} was in use for more than {_BUSY_S:.0f} s. Wait for the other process to end.") from error
        missing = kind == sqlite3.SQLITE_CANTOPEN and not path.exists()
        if missing or code == sqlite3.SQLITE_IOERR_SHORT_READ or kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            raise _StaleError(str(error)) from error
        raise StoreError(f"Cannot use {str(path)!r}: {error}. Check the folder's permissions and the disk.") from error


class Index:
    """An index in `path` of what `source` finds in the files.

    Args:
        path: the database; made when first needed.
        source: the rows of one name, or of all (None), read from the files, and whether all could be read; if not, the index stays marked.
    """

    def __init__(self, path: Path, source: Callable[[str | None], tuple[Sequence[Row], bool]]) -> None:
        self.path, self._source = path, source

    @contextmanager
    def _connect(self, path: Path | None = None) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction; only a given path is made anew."""
        target = path or self.path
        uri = f"{target.resolve().as_uri()}?mode={'rw' if path is None else 'rwc'}"
        with _translated(target), contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None)) as db:
            db.execute(f"PRAGMA journal_mode = {journal_mode()}")
            db.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            yield db

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """The one writer's lock, across processes and threads."""
        return files.lock(self.path.parent / ".lock", "model registry", timeout_s=_WAIT_S)

    # ---------------------------------------------------------------------------------------------------------- reading
    def select(self, condition: str = "1", values: Sequence[str | int | float] = ()) -> list[Row]:
        """The rows that fit an SQL condition over name, version and body, by name and version; a stale index is made again first.

        Raises:
            StoreError: a newer Crucible wrote the index, or an I/O error; LockedError where it stays in use.
        """
        if not self.path.parent.is_dir():
            return []
        try:
            return self._rows(condition, values)
        except _StaleError as error:
            return self._healed(error, condition, values)

    def _healed(self, reason: _StaleError, condition: str, values: Sequence[str | int | float]) -> list[Row]:
        try:
            with files.lock(self.path.parent / ".lock", "model registry"):
                return self._retry(condition, values)
        except LockedError:
            if str(reason) == "marked":  # a living writer is at work: what was true before it is still the answer
                with contextlib.suppress(_StaleError):
                    return self._rows(condition, values, marked=True)
        with self.lock():
            return self._retry(condition, values)

    def _retry(self, condition: str, values: Sequence[str | int | float]) -> list[Row]:
        try:
            return self._rows(condition, values)  # another process may have healed it meanwhile
        except _StaleError as error:
            self.rebuild(str(error))
        try:
            return self._rows(condition, values, marked=True)
        except _StaleError as error:
            raise StoreError(f"{str(self.path)!r} cannot be read although it was just made: {error}. Check the disk.") from error

    def _rows(self, condition: str, values: Sequence[str | int | float], *, marked: bool = False) -> list[Row]:
        with self._connect() as db:
            db.execute("BEGIN")
            self._check(db, marked=marked)
            query = f"SELECT name, version, body, checksum FROM versions WHERE {condition} ORDER BY name, version"  # noqa: S608 # our own conditions
            rows: list[Row] = []
            for name, version, body, checksum in db.execute(query, values):
                row = Row(name, version, body)
                if row.checksum != checksum:
                    raise _StaleError(f"row {name}:{version} does not match its checksum")
                rows.append(row)
            db.execute("COMMIT")
        return rows

    def _check(self, db: sqlite3.Connection, *, marked: bool = False) -> None:
        schema = int(db.execute("PRAGMA user_version").fetchone()[0])
        if schema > SCHEMA:
            raise StoreError(f"{str(self.path)!r} has layout {schema}; this Crucible reads up to {SCHEMA}. Upgrade crucible-framework.")
        if schema < SCHEMA:
            raise _StaleError(f"layout {schema} is older than {SCHEMA}")
        state = dict(db.execute("SELECT key, value FROM state").fetchall())
        if state.get("marked") and not marked:
            raise _StaleError("marked")
        if db.execute("SELECT count(*) FROM versions").fetchone()[0] != state.get("rows"):
            raise _StaleError("rows are missing")

    # ---------------------------------------------------------------------------------------------------------- writing
    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Holds the lock for a block that changes the files of one name; the index follows at its end.

        The files are the truth: where the index cannot follow, the mark stays and the next reader makes it again.
        """
        with self.lock():
            try:
                self._mark()
            except _StaleError as error:
                self.rebuild(str(error))
                self._mark(again=True)
            try:
                yield
            finally:
                try:
                    self._follow(name)
                except (_StaleError, CrucibleError) as error:
                    _log.warning("the index %s could not follow a change and will be made again: %s", self.path, error)

    def _mark(self, *, again: bool = False) -> None:
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            self._check(db, marked=again)
            db.execute("UPDATE state SET value = 1 WHERE key = 'marked'")
            db.execute("COMMIT")

    def _follow(self, name: str) -> None:
        rows, complete = self._source(name)
        if not complete:
            raise _StaleError("a version could not be read")
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM versions WHERE name = ?", (name,))
            self._fill(db, rows)

    @staticmethod
    def _fill(db: sqlite3.Connection, rows: Sequence[Row], *, complete: bool = True) -> None:
        """Inserts rows, takes the mark away and ends the transaction; closing without it rolls everything back."""
        db.executemany("INSERT INTO versions VALUES (?, ?, ?, ?)", [(*row, row.checksum) for row in rows])
        db.execute("UPDATE state SET value = ? WHERE key = 'marked'", (int(not complete),))
        db.execute("UPDATE state SET value = (SELECT count(*) FROM versions) WHERE key = 'rows'")
        db.execute("COMMIT")

    def rebuild(self, reason: str) -> int:
        """Makes the index again from the files and returns the number of rows; the caller holds the lock.

        A sound database is refilled in one transaction (an older layout too); any other is replaced by a new file.
        """
        rows, complete = self._source(None)
        try:
            with self._connect() as db:
                db.execute("BEGIN IMMEDIATE")
                self._make(db, rows, complete)
                if db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                    raise _StaleError("damaged")  # noqa: TRY301 # the new file is made below
        except _StaleError:
            self._replace(rows, complete)
        events.emit("model.index_rebuilt", path=str(self.path), versions=len(rows), reason=reason)
        return len(rows)

    def _make(self, db: sqlite3.Connection, rows: Sequence[Row], complete: bool) -> None:
        for statement in _TABLES:
            db.execute(statement)
        self._fill(db, rows, complete=complete)

    def _replace(self, rows: Sequence[Row], complete: bool) -> None:
        """The old file goes first and its journals next, so that no journal is ever played into the new file."""
        new = self.path.parent / f".tmp-index-{uuid.uuid4().hex[:8]}"
        sides = ("-journal", "-wal", "-shm")
        try:
            with self._connect(new) as db:
                db.execute("BEGIN IMMEDIATE")
                self._make(db, rows, complete)
            with files.storage_errors(self.path):
                for old in (self.path, *(Path(f"{self.path}{side}") for side in sides)):
                    old.unlink(missing_ok=True)
            files.move(new, self.path)
        except _StaleError as error:
            raise StoreError(f"Cannot make {str(self.path)!r}: {error}. Check the disk.") from error
        finally:
            for path in (new, *(Path(f"{new}{side}") for side in sides)):
                with contextlib.suppress(OSError):
                    path.unlink()

"""Growing files, read from where the last look ended, and the curves in them.

A cursor is "inode-offset": a file that was replaced (a resumed run takes rows back) or cut is noticed and read anew. A line without its
end is not a row yet. This file knows rows and numbers; it does not know what a loss is.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from ..errors import NotFoundError
from ..files import storage_errors
from ..records import Json, record
from ..reports.charts import thin
from ..store import RunInfo
from ..store.run_files import look_at_run

__all__ = ["Chunk", "Curves", "Tail", "Workspace"]

_MOST_BYTES = 8 << 20
"""Bytes read of one file in one look at the most."""
_KEPT_RUNS = 256
_NUMBERS = frozenset((int, float))
CELL = "::"
_WATCHED = ("run.json", "config.json", "metrics.jsonl", "labels.json")


@record
class Chunk:
    """New rows of a file. `again`: the file is another than before, and these are its first rows. `damaged`: lines that are no JSON object."""

    rows: tuple[dict[str, Json], ...]
    again: bool = False
    damaged: int = 0


class Tail:
    """The rows of one JSON-lines file from a cursor on; "" is its start. With `only`, rows whose line holds none of these texts are passed over."""

    def __init__(self, path: Path, cursor: str = "", only: Sequence[bytes] = ()) -> None:
        self.path, self._only = path, tuple(only)
        inode, _, offset = cursor.partition("-")
        known = inode.isdecimal() and offset.isdecimal()
        self._inode, self._offset = (int(inode), int(offset)) if known else (0, 0)

    @property
    def cursor(self) -> str:
        """Where the next look begins."""
        return f"{self._inode}-{self._offset}" if self._inode else ""

    def read(self) -> Chunk:
        """The rows since the last look; none where the file is missing.

        Raises:
            StoreError: the file cannot be read.
        """
        with storage_errors(self.path, "read"):
            try:
                file = self.path.open("rb")
            except FileNotFoundError:
                return Chunk(rows=())
            with file:
                stat = os.fstat(file.fileno())
                again = bool(self._inode) and (stat.st_ino != self._inode or stat.st_size < self._offset)
                if again:
                    self._offset = 0
                self._inode = stat.st_ino
                if stat.st_size == self._offset:
                    return Chunk(rows=(), again=again)
                file.seek(self._offset)
                data = file.read(_MOST_BYTES)
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        lines = [line for line in data.split(b"\n") if line and (not self._only or any(text in line for text in self._only))]
        rows = _rows(lines)
        return Chunk(rows=rows, again=again, damaged=len(lines) - len(rows))


def _rows(lines: Sequence[bytes]) -> tuple[dict[str, Json], ...]:
    """The JSON objects among the lines, parsed in one call; each alone where a line is damaged."""
    try:
        found = orjson.loads(b"[%b]" % b"\n,".join(lines))
    except orjson.JSONDecodeError:
        found = []
    if len(found) != len(lines) or not {dict}.issuperset(map(type, found)):
        found = [row for row in map(_row, lines) if row is not None]
    return tuple(found)


def _row(line: bytes) -> dict[str, Json] | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


class Curves:
    """All numbers of a rows file by name, over their steps; `update` reads only what is new. Threads may share one."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self._lock = threading.Lock()
        self._columns: dict[str, tuple[array[float], array[float]]] = {}
        self.damaged = self.steps = 0

    def update(self) -> str:
        """Reads what is new; returns the cursor up to which all is in."""
        with self._lock:
            while True:
                chunk = self._tail.read()
                if chunk.again:
                    self._columns.clear()
                    self.damaged = self.steps = 0
                self.damaged += chunk.damaged
                for names, rows in itertools.groupby(chunk.rows, tuple):
                    self._add(names, list(rows))
                if not chunk.rows:
                    return self._tail.cursor

    def _add(self, names: tuple[str, ...], rows: Sequence[dict[str, Json]]) -> None:
        """Takes rows of the same names, a column at a time."""
        columns = dict(zip(names, zip(*(row.values() for row in rows), strict=True), strict=True))
        steps = columns.pop("step", ())
        whole = _NUMBERS.issuperset(map(type, steps))
        self.steps = max([self.steps, *(int(step) for step in steps if type(step) in _NUMBERS)])
        for name, column in columns.items():
            xs, ys = steps, column
            if not (whole and _NUMBERS.issuperset(map(type, column))):
                pairs = [
                    (x, math.nan if y is None else y) for x, y in zip(steps, column, strict=False) if type(x) in _NUMBERS and (y is None or type(y) in _NUMBERS)
                ]
                xs, ys = zip(*pairs, strict=True) if pairs else ((), ())
            if xs:
                kept = self._columns.setdefault(name, (array("d"), array("d")))
                kept[0].extend(xs)
                kept[1].extend(ys)

    def summary(self) -> tuple[int, dict[str, float]]:
        """The highest step, and the last finite value of each name that has one."""
        with self._lock:
            steps = self.steps
            last = {name: _last(ys) for name, (_, ys) in self._columns.items()}
        return steps, {name: value for name, value in last.items() if value is not None}

    def names(self) -> tuple[str, ...]:
        """The names that have a number, in the order in which they appeared."""
        with self._lock:
            return tuple(self._columns)

    def last(self, name: str) -> float | None:
        """The last finite value of a name."""
        with self._lock:
            _, ys = self._columns.get(name, (None, ()))
            return _last(ys)

    def points(self, name: str, most: int = 800, low: float = -math.inf, high: float = math.inf) -> list[tuple[float, float]]:
        """At most `most` points with low <= step <= high; lowest and highest of each stretch stay, so that no peak is lost."""
        with self._lock:
            xs, ys = self._columns.get(name, (array("d"), array("d")))
            sorted_ = all(a <= b for a, b in zip(xs[-2:], xs[-1:], strict=False))
            first, end = (bisect.bisect_left(xs, low), bisect.bisect_right(xs, high)) if sorted_ else (0, len(xs))
            found = [(x, y) for x, y in zip(xs[first:end], ys[first:end], strict=True) if math.isfinite(y) and low <= x <= high]
        return thin(found, most)


def _last(values: Sequence[float]) -> float | None:
    return next((value for value in reversed(values) if math.isfinite(value)), None)


class Workspace:
    """The runs directly under a folder, with what was read of them kept until their files change. Threads may share one."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._lock = threading.Lock()
        self._infos: dict[str, tuple[tuple[object, ...], RunInfo]] = {}
        self._curves: OrderedDict[Path, Curves] = OrderedDict()

    def names(self) -> tuple[str, ...]:
        """The folders that hold a run, sorted."""
        with storage_errors(self.root, "read"):
            return tuple(sorted(p.parent.name for p in self.root.glob("*/run.json") if not p.parent.name.startswith(".")))

    def studies(self) -> tuple[str, ...]:
        """The folders that hold a study, sorted."""
        with storage_errors(self.root, "read"):
            return tuple(sorted(p.parent.name for p in self.root.glob("*/plan.json") if not p.parent.name.startswith(".")))

    def study(self, name: str) -> Path:
        """A study's folder.

        Raises:
            NotFoundError: no study has exactly this name.
        """
        if not _plain(name) or not (self.root / name / "plan.json").is_file():
            raise NotFoundError(f"There is no study {name!r} in {str(self.root)!r}. Open the list of experiments and choose one.")
        return self.root / name

    def folder(self, name: str) -> Path:
        """A run's folder; the run of a study's cell is called "study::cell".

        Raises:
            NotFoundError: no run has exactly this name; a path is no name.
        """
        found = self.root / name
        if _plain(name) and (found / "run.json").is_file():
            return found
        study, _, cell = name.partition(CELL)
        found = self.root / study / "cells" / cell / "run"
        if not (_plain(study) and _plain(cell)) or not (found / "run.json").is_file():
            raise NotFoundError(f"There is no run {name!r} in {str(self.root)!r}. Open the list of runs and choose one.")
        return found

    def signature(self, name: str) -> tuple[object, ...]:
        """Changes whenever the run's state or curves do."""
        folder = self.folder(name)
        return tuple(_stamp(folder / file) for file in _WATCHED)

    def changed_s(self, name: str) -> float:
        """When one of those files last changed, in seconds since the epoch."""
        folder = self.folder(name)
        return max(_stamp(folder / file)[2] for file in _WATCHED) / 1e9

    def info(self, name: str) -> RunInfo:
        """What the run's files say of it; damaged ones give the status "broken"."""
        signature = self.signature(name)
        with self._lock:
            kept = self._infos.get(name)
        # "running" is checked anew: a killed process changes no file
        if kept and kept[0] == signature and kept[1].status != "running":
            return kept[1]
        curves = self.curves(name)
        # damaged rows are read line by line, which says where the damage is
        info = replace(look_at_run(self.folder(name), None if curves.damaged else curves.summary()), name=name)
        with self._lock:
            self._infos[name] = (signature, info)
        return info

    def infos(self) -> tuple[RunInfo, ...]:
        """All runs, newest first."""
        found = []
        for name in self.names():
            try:
                found.append(self.info(name))
            except NotFoundError:  # removed meanwhile
                continue
        return tuple(sorted(found, key=lambda info: (-info.created_at, info.name)))

    def curves(self, name: str, file: str = "metrics.jsonl") -> Curves:
        """The curves of one of the run's files, up to date."""
        path = self.folder(name) / file
        with self._lock:
            curves = self._curves.get(path) or Curves(path)
            self._curves[path] = curves
            self._curves.move_to_end(path)
            while len(self._curves) > _KEPT_RUNS:
                self._curves.popitem(last=False)
        curves.update()
        return curves


def _plain(name: str) -> bool:
    """Whether a name is that of a folder, and no path."""
    return bool(name) and not name.startswith(".") and not any(sign in name for sign in "/\\\0")


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)

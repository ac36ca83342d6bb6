"""Where events go: a checksummed JSON-lines file (a run's own is one), or any slow function. Other programs' formats: see `exporters`.

Each takes an event by appending it to a queue; one thread behind it does the work in batches. So a slow or dead target never slows the
caller and never blocks the exit. A full queue drops the newest events and counts them: the count is written as `events.dropped`.

A line of a file ends in `"seq":…,"crc":"…"`: the number of the event in its process, and the CRC-32 of the line before `,"crc"`. What
a process has handed over is on its way to the file within FLUSH_S, so kill -9 loses no more than that.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from .errors import ConfigError, NotFoundError
from .events import Event, subscribe
from .files import storage_errors
from .records import Json, record

__all__ = ["FLUSH_S", "EventLog", "Queued", "event_file", "read_events", "to_jsonl"]

FLUSH_S = 0.05
_LIMIT = 100_000
_EXIT_S = 2.0
_BATCH = 512
_log = logging.getLogger("crucible_framework")
_open: weakref.WeakSet[Queued] = weakref.WeakSet()


class Queued:
    """A sink that hands batches to `write` in a thread of its own.

    Args:
        write: takes a list of events; where it raises, the batch is lost, counted and logged once.
        limit: events that may wait.
        exit_s: how long `close`, and the end of the process, wait at the most for what is still queued.
        close: called in the same thread after the last batch, within the same `exit_s`.
    """

    def __init__(
        self, write: Callable[[Sequence[Event]], None], *, limit: int = _LIMIT, exit_s: float = _EXIT_S, close: Callable[[], None] | None = None
    ) -> None:
        if limit < 1:
            raise ConfigError(f"limit is {limit!r}; expected at least 1 event.")
        self._write, self._limit, self._exit_s, self._on_close = write, limit, exit_s, close
        self._end: Callable[[], None] | None = None
        self._reset()
        _open.add(self)

    def _reset(self) -> None:
        """Fresh queue and no thread: at the start, and in a forked child, which must not write what is its parent's."""
        self._queue: deque[Event] = deque()
        self._stop, self._closed = threading.Event(), False
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self.dropped = self.failed = 0
        self._told = 0

    def __call__(self, event: Event) -> None:
        """Takes an event; never waits."""
        queue = self._queue
        if len(queue) >= self._limit or self._closed:
            self.dropped += 1
            return
        queue.append(event)
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="crucible-events", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._stop.wait(FLUSH_S):
            self._drain()
        self._drain()
        if self._on_close is not None:
            try:
                self._on_close()
            except Exception:
                _log.exception("an event sink could not be closed")

    def _drain(self) -> None:
        while self._queue or self.dropped > self._told:
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            if self.dropped > self._told:
                lost, self._told = self.dropped - self._told, self.dropped
                batch.append({"ts": time.time(), "name": "events.dropped", "run": "", "span": "", "parent": "", "count": lost})
            try:
                self._write(batch)
            except Exception:
                if not self.failed:
                    _log.exception("an event sink cannot write; further failures are only counted")
                self.failed += len(batch)

    def close(self) -> None:
        """Ends the subscription and writes what is queued, for `exit_s` seconds at the most. A second call does nothing."""
        if self._end is not None:
            self._end()
            self._end = None
        if self._stop.is_set():
            return
        self._closed = True
        self._stop.set()
        if self._thread is None and self._on_close is not None:
            self._start()
        if self._thread is not None:
            self._thread.join(self._exit_s)
        _open.discard(self)

    def listen(self) -> Callable[[], None]:
        """Subscribes to all events; returns `close`."""
        self._end = subscribe(self)
        return self.close


def _close_all() -> None:
    for sink in list(_open):
        sink.close()


def _forked() -> None:
    for sink in list(_open):
        sink._reset()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forked)


# ---------------------------------------------------------------------------------------------------------------- JSONL
def _line(event: Event, seq: int) -> bytes:
    body = orjson.dumps({**event, "seq": seq}, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return b'%b,"crc":"%08x"}\n' % (body[:-1], zlib.crc32(body[:-1]))


def event_file(path: str | Path, *, limit: int = _LIMIT) -> Queued:
    """A sink that appends the events it is called with to a file, one checksummed line each; `close` waits until all is written.

    Any number of processes may append to one file: a batch is one write to its end. A torn last line gets its end, so that it spoils no other.

    Raises:
        StoreError: the file cannot be opened.
    """
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if (size := os.fstat(descriptor).st_size) and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
    counts: dict[int, int] = {}

    def write(batch: Sequence[Event]) -> None:
        seq = counts.get(os.getpid(), 0)
        data = b"".join(_line(event, seq + i) for i, event in enumerate(batch, start=1))
        counts[os.getpid()] = seq + len(batch)
        while data:
            data = data[os.write(descriptor, data) :]

    return Queued(write, limit=limit, close=lambda: os.close(descriptor))


def to_jsonl(path: str | Path, *, limit: int = _LIMIT) -> Callable[[], None]:
    """Every event from now on goes to an `event_file`; returns a function that ends it and waits until all is written.

    Raises:
        StoreError: the file cannot be opened.
    """
    return event_file(path, limit=limit).listen()


@record
class EventLog:
    """What an events file holds. `problems` name each line that was left out, as file:line and what is wrong with it."""

    events: tuple[dict[str, Json], ...]
    problems: tuple[str, ...]


def read_events(path: str | Path) -> EventLog:
    """The events of a file, each compared with its checksum; lines of another writer, without one, are taken as they are.

    Raises:
        NotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"There is no events file {str(path)!r}. Expected one that `to_jsonl` or a run wrote.")
    with storage_errors(path, "read"):
        lines = path.read_bytes().split(b"\n")
    events, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        found = _checked(line)
        if isinstance(found, str):
            torn = number == len(lines)
            problems.append(f"{path.name}:{number}: {'the last line is torn: the writer was stopped in the middle of it' if torn else found}")
        else:
            events.append(found)
    return EventLog(events=tuple(events), problems=tuple(problems))


def _checked(line: bytes) -> dict[str, Json] | str:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "it is no JSON object"
    if not isinstance(row, dict):
        return "it is no JSON object"
    # a line of ours has both keys: with one alone, the other's name was damaged
    if row.pop("crc", row.get("seq")) is not None and not line.endswith(b',"crc":"%08x"}' % zlib.crc32(line[: line.rfind(b',"crc":"')])):
        return "its checksum differs: it changed after it was written"
    return row

"""Requests and their results: each request id is answered once, however often it is asked; and fair turns at the backend.

Everything here runs on one event loop. This file does not know what a request does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable
from dataclasses import dataclass, field

import orjson

from .. import events
from ..errors import CapabilityError, ConfigError, CrucibleError, DataError, ServiceError, StoreError

__all__ = ["Answer", "BusyError", "Entry", "Finished", "Gate", "GoneError", "Ledger", "TooLargeError", "failure"]

KEPT = 8192
"""Answers that a client which asks for all at once may be behind."""
JSON, PROTO = "application/json", "application/x-protobuf"


class GoneError(ServiceError):
    """What was asked for has ended: its session is over, or its result was collected long ago."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=410)


class BusyError(ServiceError):
    """Too much is waiting; try again later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=429, retryable=True)


class TooLargeError(DataError):
    """A body is larger than the server takes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A result as it goes over the wire; `failed` where it is an error."""

    body: bytes
    type: str = JSON
    failed: bool = False


def failure(error: BaseException) -> Answer:
    """An error as a result: its class and sentence, and whose fault it was."""
    user = isinstance(error, (DataError, ConfigError, CapabilityError)) or (
        isinstance(error, CrucibleError) and not isinstance(error, (StoreError, ServiceError))
    )
    text = f"{type(error).__name__}: {error}" if isinstance(error, CrucibleError) else f"InternalError: {type(error).__name__} in the server; see its log."
    return Answer(orjson.dumps({"error": text, "category": "user" if user else "server"}), failed=True)


@dataclass(slots=True, eq=False)
class Entry:
    """A request: whose it is, of which group (a session), and its answer once it is there. `written` is done when it is in a journal.

    `trace` is the span at the client that it goes below, as a `traceparent`.
    """

    id: str
    owner: str
    group: str
    kind: str
    model: str | None = None
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: asyncio.Task[None] | None = None
    started: float = field(default_factory=time.monotonic)
    size_bytes: int = 0
    written: asyncio.Future[None] | None = None
    noted: bool = False
    trace: str = field(default_factory=events.traceparent)

    def resolve(self, answer: Answer) -> None:
        """Sets the answer, where there is none yet."""
        if not self.answer.done():
            self.answer.set_result(answer)

    def cancel(self) -> None:
        """Drops the work; whoever waits learns that it was cancelled."""
        if self.task is not None:
            self.task.cancel()
        self.resolve(Answer(orjson.dumps({"error": "The request was cancelled.", "category": "user"}), failed=True))


class Finished:
    """A sampler's requests in the order in which they were answered, for each of its clones, for a client that asks for all at once."""

    def __init__(self) -> None:
        self._rows: dict[int, deque[tuple[int, str, int | None]]] = {}
        self._count, self._news = 0, asyncio.Event()

    def add(self, clone: int, request: str, answer: asyncio.Future[Answer]) -> None:
        """A request was answered."""
        if not answer.cancelled():
            self._count += 1
            self._rows.setdefault(clone, deque(maxlen=KEPT)).append((self._count, request, None if answer.result().failed else len(answer.result().body)))
            self._news.set()

    async def after(self, clone: int, cursor: int, timeout_s: float) -> tuple[list[tuple[str, int | None]], int]:
        """(request, bytes of its answer or None where it failed) after a cursor, once there is one or the time is over; and the cursor behind them.

        What is before the cursor is forgotten.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            rows = self._rows.setdefault(clone, deque(maxlen=KEPT))
            while rows and rows[0][0] <= cursor:
                rows.popleft()
            left = deadline - time.monotonic()
            if rows or left <= 0:
                return [(request, size) for _, request, size in rows], max(cursor, *(row[0] for row in rows), 0)
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)


class Ledger:
    """All requests by id.

    Args:
        keep_bytes: answers that were retrieved are kept up to this many bytes, so that a lost response can be asked again.
        waiting: unanswered requests that one owner may have.
        waiting_bytes: their bodies together.
    """

    def __init__(self, keep_bytes: int, waiting: int, waiting_bytes: int = 2**30) -> None:
        self._entries: dict[str, Entry] = {}
        self._retrieved: OrderedDict[str, int] = OrderedDict()
        self._kept, self._keep_bytes, self._most = 0, keep_bytes, waiting
        self._waiting: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._most_bytes = waiting_bytes

    def find(self, request: str, owner: str) -> Entry:
        """The request.

        Raises:
            GoneError: there is none of that id, or it is another owner's.
        """
        entry = self._entries.get(request)
        if entry is None or entry.owner != owner:
            raise GoneError(f"There is no request {request[:140]!r} any more; its session is over, or it was collected long ago. Submit it again.")
        return entry

    def known(self, request: str, owner: str) -> Entry | None:
        """The request, where it was submitted before."""
        entry = self._entries.get(request)
        return entry if entry is not None and entry.owner == owner else None

    def _check_room(self, owner: str, size_bytes: int) -> None:
        if self._waiting.get(owner, 0) >= self._most:
            raise BusyError(f"{self._waiting[owner]} of your requests wait already; the limit is {self._most}. Try again when some are answered.")
        if (held := self._bytes.get(owner, 0)) and held + size_bytes > self._most_bytes:
            raise BusyError(f"Your waiting requests hold {held} bytes already; the limit is {self._most_bytes}. Try again when some are answered.")

    def add(self, request: str, owner: str, group: str, kind: str, model: str | None = None, *, size_bytes: int = 0) -> Entry:
        """A new request.

        Raises:
            BusyError: the owner has too many unanswered ones, or too large ones.
        """
        self._check_room(owner, size_bytes)
        entry = Entry(request, owner, group, kind, model, size_bytes=size_bytes)
        self._entries[request] = entry
        self._waiting[owner] = self._waiting.get(owner, 0) + 1
        self._bytes[owner] = self._bytes.get(owner, 0) + size_bytes

        def answered(_: object) -> None:
            self._waiting[owner] -= 1
            self._bytes[owner] -= size_bytes
            if not self._waiting[owner]:
                del self._waiting[owner], self._bytes[owner]

        entry.answer.add_done_callback(answered)
        return entry

    def restore(self, request: str, owner: str, group: str, *, kind: str, answer: Answer, model: str) -> None:
        """A request that was answered before a kill; it may have been collected."""
        entry = Entry(request, owner, group, kind, model)
        entry.resolve(answer)
        self._entries[request] = entry
        self.retrieved(entry)

    def retrieved(self, entry: Entry) -> None:
        """Its answer was sent; the oldest such are dropped when they take too much room."""
        if entry.id in self._retrieved or entry.id not in self._entries:
            return
        size = len(entry.answer.result().body)
        self._retrieved[entry.id] = size
        self._kept += size
        while self._kept > self._keep_bytes and len(self._retrieved) > 1:
            oldest, size = self._retrieved.popitem(last=False)
            self._kept -= size
            self._entries.pop(oldest, None)

    def forget(self, entry: Entry) -> None:
        """Removes an answered request."""
        self._entries.pop(entry.id, None)

    def drop(self, group: str) -> int:
        """Cancels and forgets a group's requests; returns how many had no answer."""
        mine = [entry for entry in self._entries.values() if entry.group == group]
        open_ = [entry for entry in mine if not entry.answer.done()]
        for entry in mine:
            if not entry.answer.done():
                entry.cancel()
            del self._entries[entry.id]
            self._kept -= self._retrieved.pop(entry.id, 0)
        return len(open_)

    @property
    def waiting(self) -> dict[str, int]:
        """Unanswered requests per owner."""
        return dict(self._waiting)

    @property
    def waiting_bytes(self) -> dict[str, int]:
        """The bodies of unanswered requests per owner."""
        return dict(self._bytes)


class Gate:
    """So many requests at the backend at once; free places go to the owners in turn.

    Args:
        places: requests at the backend.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def enter(self, owner: str) -> None:
        """Waits for a place."""
        if self._free and not self._queues:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Gives the place to the next owner's oldest request."""
        while self._queues:
            owner, queue = self._queues.popitem(last=False)
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    if queue:
                        self._queues[owner] = queue  # at the end: the others come first
                    turn.set_result(None)
                    return
        self._free += 1


async def run(gate: Gate, entry: Entry, work: Awaitable[Answer]) -> None:
    """Awaits the work and answers; the place at the gate, which the caller took, is given back."""
    try:
        entry.resolve(await work)
    except asyncio.CancelledError:
        entry.cancel()
        raise
    except Exception as error:
        entry.resolve(failure(error))
    finally:
        gate.leave()

"""A model's requests in the order of their numbers, whatever order they arrive in, each once; with a journal also over a kill.

A request that is sent again gets the first answer. This file does not know what a request does.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from .. import events
from ..errors import BackendError, CrucibleError, DataError, StoreError
from ..protocols import TrainingSession
from ..records import Checkpoint, record
from .journal import Journal
from .ledger import Answer, BusyError, Entry, Gate, GoneError, Ledger, failure, run
from .shelf import Run

if TYPE_CHECKING:
    from .desk import Session

__all__ = ["STATEFUL", "Model", "Start", "Turns"]

Start: TypeAlias = Callable[[], Awaitable[Awaitable[Answer]]]
"""Submits a request in its turn; what comes back resolves to its answer."""
Keep: TypeAlias = Callable[["Model", int, Answer, Checkpoint], Awaitable[None]]
AHEAD = 1024
"""Requests of one model that may wait for an earlier one."""
TRACED = 10_000
"""Requests of a session that its trace shows."""
STATEFUL = ("optim_step", "load_weights")
"""After these a journal keeps the state."""


@dataclass(slots=True, eq=False)
class Model:
    """An adapter being trained. `waiting` holds requests that came before their turn, `before` is set when the last one begun has its answer."""

    run: Run
    session: Session
    model: str
    training: TrainingSession | None = None
    next: int = 0
    waiting: dict[int, tuple[Entry, Start]] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    before: asyncio.Event | None = None
    task: asyncio.Task[None] | None = None
    journal: Journal | None = None

    @property
    def live(self) -> TrainingSession:
        """The session at the backend.

        Raises:
            BackendError: it could not be made.
        """
        if self.training is None:
            raise BackendError(f"The model {self.run.id!r} was never made, because its creation failed. Create another.")
        return self.training


async def _failed(error: Exception) -> Answer:
    raise error


@record
class Traced:
    """A request that was answered: its track is its model, or "samples"."""

    request: str
    kind: str
    track: str
    started_s: float
    duration_s: float


class Turns:
    """Takes requests and sees to it that they run.

    Args:
        ledger: answers.
        gate, samples: places at the backend for requests to models, and for samples.
        spawn: runs in the background.
        count: adds to a counter.
        keep: publishes a model's state with the answer of the request after which it is.
    """

    def __init__(
        self, ledger: Ledger, gate: Gate, samples: Gate, *, spawn: Callable[[Awaitable[None]], asyncio.Task[None]], count: Callable[[str], None], keep: Keep
    ) -> None:
        self._ledger, self._gate, self._samples, self._spawn, self._count, self._keep = ledger, gate, samples, spawn, count, keep
        self.traces: dict[str, deque[Traced]] = {}

    def open(self, model: Model) -> None:
        """From now on the model's requests are served."""
        if model.task is None:
            model.task = self._spawn(self._serve(model))

    async def submit(self, model: Model, seq: int, kind: str, begin: Start, body: bytes) -> Entry:
        """Takes a model's request; one that came before is not run again. With a journal it is on disk when this returns.

        Raises:
            GoneError: it was answered and collected long ago.
            BusyError: too many wait.
            DataError: the number is negative.
            StoreError: it could not be written down; sent again, that is tried again.
        """
        entry = self.take(model, seq, kind, begin, len(body))
        if model.journal is not None:
            if entry.written is None or (entry.written.done() and entry.written.exception() is not None):
                entry.written = asyncio.ensure_future(asyncio.to_thread(model.journal.request, seq, kind, body))
            await asyncio.shield(entry.written)
        return entry

    def take(self, model: Model, seq: int, kind: str, begin: Start, size_bytes: int = 0) -> Entry:
        """`submit` without a journal."""
        request, owner = f"{model.run.id}:{seq}", model.session.owner
        if (entry := self._ledger.known(request, owner)) is not None:
            return entry
        if seq < 0:
            raise DataError(f"seq_id is {seq}; expected a whole number of at least 0.")
        if seq < model.next:
            raise GoneError(f"Request {request!r} was answered and collected long ago.")
        if seq >= model.next + AHEAD:
            raise BusyError(f"Request {request!r} is {seq - model.next} ahead of the next one; the limit is {AHEAD}. Send the earlier ones first.")
        entry = self._ledger.add(request, owner, model.session.id, kind, model.run.id, size_bytes=size_bytes)
        model.run = replace(model.run, last_request_at=time.time())
        model.waiting[seq] = entry, begin
        model.wake.set()
        return entry

    async def _serve(self, model: Model) -> None:
        """Begins a model's requests in order; each then finishes by itself."""
        while True:
            while model.next in model.waiting:
                seq = model.next
                entry, begin = model.waiting.pop(seq)
                model.next += 1
                await self._gate.enter(model.session.owner)
                self._count(f"requests_total:{entry.kind}")
                with events.continued(entry.trace):  # this task serves many requests, each of a span of its own
                    await self._start(model, seq, entry, begin)
            model.wake.clear()
            await model.wake.wait()

    async def _start(self, model: Model, seq: int, entry: Entry, begin: Start) -> None:
        """Submits a request to the backend, and lets it finish by itself."""
        try:
            work, made = await begin(), None
            if model.journal is not None and entry.kind in STATEFUL:
                made = model.live.save("live", "state")  # behind the step and before what is submitted next
        except asyncio.CancelledError:
            self._gate.leave()
            raise
        except Exception as error:
            work, made = _failed(error), None
        before, model.before = model.before, asyncio.Event()
        entry.task = self._spawn(run(self._gate, entry, self._kept(model, seq, entry, work=work, made=made, before=before, done=model.before)))

    async def _kept(
        self, model: Model, seq: int, entry: Entry, *, work: Awaitable[Answer], made: Future[Checkpoint] | None, before: asyncio.Event | None,
        done: asyncio.Event,
    ) -> Answer:  # fmt: skip
        """The answer, written down before anybody gets it where there is a journal; those before it come first."""
        try:
            answer = await self.answered(entry, work)
            if model.journal is None or entry.answer.done():  # done: an answer of before a kill, whose request only had to run again
                if made is not None:
                    await self._keep(model, seq, entry.answer.result(), await asyncio.wrap_future(made))
                return answer
            if before is not None:
                await before.wait()
            try:
                if made is not None:
                    await self._keep(model, seq, answer, await asyncio.wrap_future(made))
                else:
                    await asyncio.to_thread(model.journal.answer, seq, answer)
            except CrucibleError as error:
                self.report(entry, error)
                return failure(StoreError(f"The request was done, but cannot be made to survive a kill of the server: {error}"))
            return answer
        finally:
            done.set()

    async def answered(self, entry: Entry, work: Awaitable[Answer]) -> Answer:
        """The answer; an error is one too."""
        try:
            return await work
        except Exception as error:
            self.report(entry, error)
            return failure(error)
        finally:
            self.traces.setdefault(entry.group, deque(maxlen=TRACED)).append(
                Traced(request=entry.id, kind=entry.kind, track=entry.model or "samples", started_s=entry.started, duration_s=time.monotonic() - entry.started)
            )
            events.emit("server.request", request=entry.id, kind=entry.kind, tenant=entry.owner, duration_s=time.monotonic() - entry.started)

    def report(self, entry: Entry, error: Exception) -> None:
        """Says that a request failed."""
        self._count("failures_total")
        events.emit("server.failed", request=entry.id, kind=entry.kind, tenant=entry.owner, error=f"{type(error).__name__}: {error}")

    # ------------------------------------------------------------------------------------------- requests without order
    def sample(self, request: str, owner: str, group: str, begin: Callable[[], Awaitable[Answer]], size_bytes: int) -> Entry:
        """Takes a sampler's request; one that came before is not run again. Samples need no order."""
        if (entry := self._ledger.known(request, owner)) is not None:
            return entry
        return self._begin(self._ledger.add(request, owner, group, "sample", size_bytes=size_bytes), begin)

    def once(self, owner: str, kind: str, begin: Callable[[], Awaitable[Answer]]) -> Entry:
        """Takes a request that stands for itself; whoever made it waits for its answer and forgets it."""
        return self._begin(self._ledger.add(f"{kind}:{uuid.uuid4().hex}", owner, kind, kind), begin)

    def _begin(self, entry: Entry, begin: Callable[[], Awaitable[Answer]]) -> Entry:
        async def body() -> None:
            await self._samples.enter(entry.owner)
            self._count(f"requests_total:{entry.kind}")
            await run(self._samples, entry, self.answered(entry, begin()))

        entry.task = self._spawn(body())
        return entry

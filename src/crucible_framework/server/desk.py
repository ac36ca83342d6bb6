"""The server's state: sessions, the models they train, their samplers; and what each request does with them.

A model's requests run in the order of their sequence numbers, whatever order they arrive in, and each number runs once. Everything here
runs on one event loop; what may block runs in a thread. This file does not know HTTP or keys.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import orjson

from .. import events
from ..errors import BackendError, ConfigError, DataError, NotFoundError, UnknownNameError
from ..protocols import Backend, Sampler, TrainingSession
from ..records import LoraConfig
from .keeping import Keeper
from .ledger import Answer, BusyError, Entry, Gate, GoneError, Ledger, failure, run
from .passes import start
from .settings import ServeConfig
from .shelf import Run, Shelf, Stored

if TYPE_CHECKING:
    from tinker import types

__all__ = ["Desk", "Model", "SamplerCard", "Session", "Start"]

Start: TypeAlias = Callable[[], Awaitable[Awaitable[Answer]]]
"""Submits a request in its turn; what comes back resolves to its answer."""
AHEAD = 1024
"""Requests of one model that may wait for an earlier one."""


@dataclass(slots=True, eq=False)
class Session:
    """A client."""

    id: str
    owner: str
    created_at: float
    seen: float
    user_metadata: Mapping[str, str] | None = None
    display_name: str | None = None
    models: dict[str, Model] = field(default_factory=dict)
    samplers: dict[str, SamplerCard] = field(default_factory=dict)
    ended: str = ""


@dataclass(slots=True, eq=False)
class Model:
    """An adapter being trained. `waiting` holds requests that came before their turn."""

    run: Run
    session: Session
    model: str
    training: TrainingSession | None = None
    next: int = 0
    waiting: dict[int, tuple[Entry, Start]] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def live(self) -> TrainingSession:
        """The session at the backend.

        Raises:
            BackendError: it could not be made.
        """
        if self.training is None:
            raise BackendError(f"The model {self.run.id!r} was never made, because its creation failed. Create another.")
        return self.training


@dataclass(slots=True, eq=False)
class SamplerCard:
    """A sampler with what clients may know of it."""

    id: str
    sampler: Sampler
    base_model: str
    model: str
    path: str | None = None
    clones: int = 0


def json_answer(**fields: object) -> Answer:
    """A result in JSON."""
    return Answer(orjson.dumps(fields))


class Desk:
    """Takes requests and sees to it that they are done.

    Args:
        backend: what trains and samples.
        config: the server's settings.
        shelf: runs and checkpoints on disk.
    """

    def __init__(self, backend: Backend, config: ServeConfig, shelf: Shelf) -> None:
        self.backend, self.config, self.shelf = backend, config, shelf
        self.ledger = Ledger(config.answers_bytes, config.waiting)
        self.gate = Gate(config.places)
        self.keeper = Keeper(backend, shelf)
        self.sessions: dict[str, Session] = {}
        self.counts: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -------------------------------------------------------------------------------------------------------- running
    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Runs in the background until `close`."""

        async def body() -> None:
            await work

        task = asyncio.create_task(body())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def watch(self) -> None:
        """Ends silent sessions and removes expired checkpoints, for ever."""
        while True:
            await asyncio.sleep(min(5.0, self.config.session_s / 4))
            for session in [each for each in self.sessions.values() if time.monotonic() - each.seen > self.config.session_s]:
                self.end(session, "silent")
            await asyncio.to_thread(self.shelf.expire)

    async def close(self) -> None:
        """Drops all work."""
        for session in list(self.sessions.values()):
            self.end(session, "closed")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def gauges(self) -> dict[str, float]:
        """Counters, and how many there are of what lives now. Nothing names a tenant."""
        live = list(self.sessions.values())
        now = {"sessions": len(live), "models": sum(len(one.models) for one in live), "samplers": sum(len(one.samplers) for one in live)}
        return {**self.counts, **now, "waiting": sum(self.ledger.waiting.values())}

    # ------------------------------------------------------------------------------------------------------- sessions
    def open(self, owner: str, user_metadata: Mapping[str, str] | None, display_name: str | None) -> Session:
        """A new session."""
        session = Session(f"s-{uuid.uuid4().hex[:12]}", owner, time.time(), time.monotonic(), user_metadata, display_name)
        self.sessions[session.id] = session
        self.count("sessions_total")
        events.emit("server.session", session=session.id, tenant=owner, state="open")
        return session

    def session(self, session: str, owner: str) -> Session:
        """A tenant's live session; the client is known to be alive.

        Raises:
            GoneError: it has ended, was never there, or is another tenant's.
        """
        found = self.sessions.get(session)
        if found is None or found.owner != owner or found.ended:
            raise GoneError(
                f"There is no session {session[:140]!r}; it has ended, or the server was restarted. Start a new client; checkpoints are still there."
            )
        found.seen = time.monotonic()
        return found

    def end(self, session: Session, why: str) -> None:
        """Drops a session's work and frees what it holds; its checkpoints stay."""
        session.ended = why
        self.sessions.pop(session.id, None)
        dropped = self.ledger.drop(session.id)
        for model in session.models.values():
            if model.task is not None:
                model.task.cancel()
            if model.training is not None:
                model.training.close()
        session.samplers.clear()
        events.emit("server.session", session=session.id, tenant=session.owner, state=why, dropped=dropped)

    def model(self, model: str, owner: str) -> Model:
        """A tenant's model.

        Raises:
            GoneError: there is none.
        """
        session = self.session(model.partition(":")[0], owner)
        if model not in session.models:
            raise GoneError(f"There is no model {model[:140]!r} in its session. Create one.")
        return session.models[model]

    def sampler(self, sampler: str, owner: str) -> SamplerCard:
        """A tenant's sampler.

        Raises:
            GoneError: there is none.
        """
        session = self.session(sampler.partition(":")[0], owner)
        if sampler not in session.samplers:
            raise GoneError(f"There is no sampler {sampler[:140]!r} in its session. Create one.")
        return session.samplers[sampler]

    # ---------------------------------------------------------------------------------------------------------- order
    def submit(self, model: Model, seq: int, kind: str, begin: Start) -> Entry:
        """Takes a model's request; one that came before is not run again.

        Raises:
            GoneError: it was answered and collected long ago.
            BusyError: too many wait.
            DataError: the number is negative.
        """
        request, owner = f"{model.run.id}:{seq}", model.session.owner
        if (entry := self.ledger.known(request, owner)) is not None:
            return entry
        if seq < 0:
            raise DataError(f"seq_id is {seq}; expected a whole number of at least 0.")
        if seq < model.next:
            raise GoneError(f"Request {request!r} was answered and collected long ago.")
        if seq >= model.next + AHEAD:
            raise BusyError(f"Request {request!r} is {seq - model.next} ahead of the next one; the limit is {AHEAD}. Send the earlier ones first.")
        entry = self.ledger.add(request, owner, model.session.id, kind, model.run.id)
        model.run = replace(model.run, last_request_at=time.time())
        model.waiting[seq] = entry, begin
        model.wake.set()
        return entry

    async def _serve(self, model: Model) -> None:
        """Begins a model's requests in order; each then finishes by itself."""
        while True:
            while model.next in model.waiting:
                entry, begin = model.waiting.pop(model.next)
                model.next += 1
                await self.gate.enter(model.session.owner)
                self.count(f"requests_total:{entry.kind}")
                try:
                    work = await begin()
                except asyncio.CancelledError:
                    self.gate.leave()
                    raise
                except Exception as error:
                    self._report(entry, error)
                    entry.resolve(failure(error))
                    self.gate.leave()
                    continue
                entry.task = self.spawn(run(self.gate, entry, self._timed(entry, work)))
            model.wake.clear()
            await model.wake.wait()

    async def _timed(self, entry: Entry, work: Awaitable[Answer]) -> Answer:
        try:
            return await work
        except Exception as error:
            self._report(entry, error)
            raise
        finally:
            events.emit("server.request", request=entry.id, kind=entry.kind, tenant=entry.owner, duration_s=time.monotonic() - entry.started)

    def _report(self, entry: Entry, error: Exception) -> None:
        self.count("failures_total")
        events.emit("server.failed", request=entry.id, kind=entry.kind, tenant=entry.owner, error=f"{type(error).__name__}: {error}")

    # --------------------------------------------------------------------------------------------------------- models
    def check_model(self, name: str) -> str:
        """The backend's name of a base model.

        Raises:
            UnknownNameError: it is not listed, and only listed ones are served.
        """
        if self.config.only_listed and name not in self.config.listed:
            raise UnknownNameError("base model", name, self.config.listed)
        return self.config.backend_name(name)

    def _new(self, session: Session, seq: int, base: str, *, lora: LoraConfig, train: Mapping[str, bool], meta: Mapping[str, object] | None) -> Model:
        now = time.time()
        card = Run(
            id=f"{session.id}:train:{seq}",
            owner=session.owner,
            base_model=base,
            lora=lora,
            train=train,
            created_at=now,
            last_request_at=now,
            user_metadata={str(key): str(value) for key, value in meta.items()} if meta else None,
        )
        model = Model(card, session, self.config.backend_name(base))
        session.models[card.id] = model
        model.task = self.spawn(self._serve(model))
        return model

    def create(self, session: Session, request: types.CreateModelRequest) -> Entry:
        """A fresh adapter."""
        if request.model_seq_id < 0:
            raise DataError(f"model_seq_id is {request.model_seq_id}; expected a whole number of at least 0.")
        known = session.models.get(f"{session.id}:train:{request.model_seq_id}")
        asked = request.lora_config
        rank, seed = (asked.rank, asked.seed) if asked is not None else (32, None)
        train = {part: bool(getattr(asked, f"train_{part}", True)) for part in ("attn", "mlp", "unembed")}
        name = self.check_model(request.base_model)
        if request.optimizer_config.type != "adamw":
            raise ConfigError(f"The optimizer {request.optimizer_config.type!r} is not here; expected 'adamw'.")
        fresh_seed = uuid.uuid4().int % 2**31 if seed is None else seed % 2**31
        planned = LoraConfig(rank=rank, seed=fresh_seed)
        model = known or self._new(session, request.model_seq_id, request.base_model, lora=planned, train=train, meta=request.user_metadata)

        async def begin() -> Awaitable[Answer]:
            model.training, lora = await asyncio.to_thread(start, self.backend, name, rank=rank, seed=fresh_seed, train=train)
            model.run = replace(model.run, lora=lora)
            await asyncio.to_thread(self.shelf.put_run, model.run)
            return _now(json_answer(type="create_model", model_id=model.run.id))

        return self.submit(model, 0, "create_model", begin)

    def load(self, owner: str, request: types.LoadWeightsRequest) -> Entry:
        """Puts a checkpoint's weights into a model, or into a new one; with its optimizer where that is asked.

        Raises:
            NotFoundError: there is no such checkpoint, or it is another tenant's.
        """
        stored = self.readable(request.path, owner)
        if request.session_id is not None and request.model_seq_id is not None:
            session = self.session(request.session_id, owner)
            seq = 0
            known = session.models.get(f"{session.id}:train:{request.model_seq_id}")
            base = request.base_model or stored.run.base_model
            model = known or self._new(session, request.model_seq_id, base, lora=stored.run.lora, train=stored.run.train, meta=request.user_metadata)
        elif request.model_id is not None and request.seq_id is not None:
            model, seq = self.model(request.model_id, owner), request.seq_id
        else:
            raise DataError("load_weights names no model; expected model_id and seq_id, or session_id and model_seq_id.")

        async def begin() -> Awaitable[Answer]:
            old = model.training
            training = await asyncio.to_thread(self.keeper.resume, stored, model.model, optimizer=request.optimizer)
            if old is not None:
                old.close()
            model.training = training
            model.run = replace(model.run, lora=stored.run.lora)
            await asyncio.to_thread(self.shelf.put_run, model.run)
            return _now(json_answer(type="load_weights", path=request.path, model_id=model.run.id))

        return self.submit(model, seq, "load_weights", begin)

    def readable(self, path: str, owner: str) -> Stored:
        """A checkpoint that the tenant may read: its own, or a public one.

        Raises:
            DataError: the path has another form.
            NotFoundError: there is none, or it is another tenant's.
        """
        stored = self.shelf.at(path)
        if stored.run.owner != owner and not stored.public:
            raise NotFoundError(f"There is no checkpoint {path!r}; it was never saved, deleted, or has expired. List them with `tinker checkpoint list`.")
        return stored

    # ------------------------------------------------------------------------------------------------------- samplers
    def add_sampler(self, session: Session, seq: int, card: Callable[[str], SamplerCard]) -> SamplerCard:
        """Gives a session a sampler; the same number gives the same one."""
        name = f"{session.id}:sample:{seq}"
        if name not in session.samplers:
            session.samplers[name] = card(name)
        return session.samplers[name]

    async def open_sampler(self, owner: str, *, base_model: str | None, path: str | None) -> tuple[Sampler, str, str]:
        """(sampler, the client's name of its base model, the backend's) of a base model or a checkpoint.

        Raises:
            NotFoundError, UnknownNameError, ConfigError: there is no such thing.
        """
        if path is not None:
            stored = self.readable(path, owner)
            return await asyncio.to_thread(self.backend.sampler, stored.checkpoint), stored.run.base_model, stored.model
        if base_model is None:
            raise DataError("A sampler needs a model_path or a base_model; got neither.")
        name = self.check_model(base_model)
        return await asyncio.to_thread(self.backend.sampler, name), base_model, name

    def submit_sample(self, card: SamplerCard, owner: str, seq: int, begin: Callable[[], Awaitable[Answer]]) -> Entry:
        """Takes a sampler's request; one that came before is not run again. Samples need no order."""
        request = f"{card.id}:{seq}"
        if (entry := self.ledger.known(request, owner)) is not None:
            return entry
        return self._begin(self.ledger.add(request, owner, card.id.partition(":")[0], "sample"), begin)

    def once(self, owner: str, kind: str, begin: Callable[[], Awaitable[Answer]]) -> Entry:
        """Takes a request that stands for itself; whoever made it waits for its answer and forgets it."""
        return self._begin(self.ledger.add(f"{kind}:{uuid.uuid4().hex}", owner, kind, kind), begin)

    def _begin(self, entry: Entry, begin: Callable[[], Awaitable[Answer]]) -> Entry:
        async def body() -> None:
            await self.gate.enter(entry.owner)
            self.count(f"requests_total:{entry.kind}")
            await run(self.gate, entry, self._timed(entry, begin()))

        entry.task = self.spawn(body())
        return entry

    async def tokenizer_id(self, name: str, *, near: bool) -> str | None:
        """What a client loads the tokenizer of a model from: a folder where it runs on this machine, else a name."""
        if name in self.config.tokenizers:
            return self.config.tokenizers[name]
        if not near:
            return None
        return await asyncio.to_thread(self.keeper.tokenizer_folder, self.config.backend_name(name), self.config.folder)


async def _now(answer: Answer) -> Answer:
    return answer

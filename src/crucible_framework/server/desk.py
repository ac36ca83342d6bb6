"""The server's state: sessions, the models they train and their samplers, and who may reach which.

Everything here runs on one event loop; what may block runs in a thread. This file does not know HTTP, keys, or what a request asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import orjson

from .. import events
from ..config import from_dict
from ..errors import DataError, NotFoundError, UnknownNameError
from ..files import JsonLines, discard, write_json
from ..protocols import Backend, Sampler
from ..records import Json, LoraConfig
from .journal import Journal
from .keeping import Keeper
from .ledger import Answer, Entry, Finished, Gate, GoneError, Ledger
from .settings import ServeConfig
from .shelf import Run, Shelf, Stored
from .tally import Tally
from .turns import Model, Turns
from .usage import Usage, What

__all__ = ["Desk", "SamplerCard", "Session", "json_answer"]


CLONE = 10**9
"""A clone of a sampler numbers its requests from its own number times this."""


@dataclass(slots=True, eq=False)
class Session:
    """A client."""

    id: str
    owner: str
    created_at: float
    seen: float
    user_metadata: Mapping[str, str] | None = None
    display_name: str | None = None
    project: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    samplers: dict[str, SamplerCard] = field(default_factory=dict)
    ended: str = ""


@dataclass(slots=True, eq=False)
class SamplerCard:
    """A sampler with what clients may know of it; `own`: its weights have no name, and go with it."""

    id: str
    sampler: Sampler
    base_model: str
    model: str
    path: str | None = None
    clones: int = 0
    own: bool = False
    finished: Finished = field(default_factory=Finished)


def json_answer(**fields: object) -> Answer:
    """A result in JSON."""
    return Answer(orjson.dumps(fields))


class Desk:
    """Who is there, and what they hold.

    Args:
        backend: what trains and samples.
        config: the server's settings.
        shelf: runs and checkpoints on disk.
        now: seconds, monotonic.
    """

    def __init__(self, backend: Backend, config: ServeConfig, shelf: Shelf, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.backend, self.config, self.shelf = backend, config, shelf
        self.ledger = Ledger(config.answers_bytes, config.waiting, config.waiting_bytes)
        self.keeper = Keeper(backend, shelf)
        self.tally, self.usage = Tally(), Usage(config.folder / "usage.jsonl")
        self.turns = Turns(self.ledger, Gate(config.training_places), Gate(config.places), spawn=self.spawn, count=self.tally.add, keep=self.keeper.keep_state)
        self.sessions: dict[str, Session] = {}
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
            self.drop_silent()
            await asyncio.to_thread(self.shelf.expire)
            await asyncio.to_thread(self.usage.flush)

    def drop_silent(self) -> None:
        """Ends sessions whose clients were not heard of for too long."""
        for session in [each for each in self.sessions.values() if self._now() - each.seen > self.config.session_s]:
            self.end(session, "silent")

    async def close(self) -> None:
        """Drops all work. What is durable per step stays on disk and comes back with the next server."""
        for session in list(self.sessions.values()):
            self.end(session, "closed")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.usage.flush()

    def count(self, name: str, owner: str = "", amount: float = 1) -> None:
        """Adds to a counter, and to a tenant's share of it."""
        self.tally.add(name, amount, owner)

    def used(self, session: Session, base_model: str, what: What, amount: int) -> None:
        """Adds to a tenant's use, and to the counters of tokens."""
        self.usage.add(session.owner, session.id, base_model, what, amount)
        self.count("checkpoints_total" if what == "checkpoint" else f"tokens_total:{what}", session.owner, amount)

    def audit(self, owner: str, event: str, *, path: str | None = None, details: Mapping[str, Json] | None = None) -> None:
        """Writes down what a tenant did to what others may see."""
        with contextlib.closing(JsonLines(self.config.folder / "audit.jsonl")) as rows:
            row: dict[str, Json] = {"at": datetime.now(UTC).isoformat(), "owner": owner, "event": event, "path": path, "details": dict(details or {})}
            rows.append(row, sync=True)

    def gauges(self) -> dict[str, float]:
        """Counters, and how many there are of what lives now. Nothing names a tenant."""
        live = list(self.sessions.values())
        now = {"sessions": len(live), "models": sum(len(one.models) for one in live), "samplers": sum(len(one.samplers) for one in live)}
        return {**self.tally.counts, **now, "waiting": sum(self.ledger.waiting.values()), "waiting_bytes": sum(self.ledger.waiting_bytes.values())}

    def tenants(self) -> dict[str, dict[str, float]]:
        """Per tenant who is there now: sessions, models, samplers, waiting requests, tokens so far."""
        found = dict[str, dict[str, float]]()
        for session in list(self.sessions.values()):
            mine = found.setdefault(session.owner, dict.fromkeys(("sessions", "models", "samplers", "waiting"), 0.0))
            mine["sessions"] += 1
            mine["models"] += len(session.models)
            mine["samplers"] += len(session.samplers)
        for owner, waiting in self.ledger.waiting.items():
            found.setdefault(owner, {})["waiting"] = waiting
        return {owner: {**shares, **self.tally.shares(owner)} for owner, shares in found.items()}

    # ------------------------------------------------------------------------------------------------------- sessions
    @property
    def durable(self) -> bool:
        """Whether live sessions survive a kill."""
        return self.config.durable == "step"

    def live_folder(self, session: Session) -> Path:
        """Where a session that survives a kill is kept."""
        return self.config.folder / "live" / session.id

    def open(self, owner: str, user_metadata: Mapping[str, str] | None, display_name: str | None, project: str = "") -> Session:
        """A new session."""
        session = Session(f"s-{uuid.uuid4().hex[:12]}", owner, time.time(), self._now(), user_metadata, display_name, project)
        if self.durable:
            card = {"owner": owner, "created_at": session.created_at, "user_metadata": user_metadata, "display_name": display_name, "project": project}
            write_json(self.live_folder(session) / "session.json", card)
        self.sessions[session.id] = session
        self.count("sessions_total", owner)
        events.emit("server.session", session=session.id, tenant=owner, state="open")
        return session

    def restore(self, name: str, card: Mapping[str, Json]) -> Session:
        """A session that outlived its server; its client has a minute to be heard of."""
        metadata = card["user_metadata"]
        display, known = card["display_name"], {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else None
        session = Session(name, str(card["owner"]), float(str(card["created_at"])), self._now(), known, None if display is None else str(display))
        session.project = str(card["project"])
        self.sessions[name] = session
        events.emit("server.session", session=name, tenant=session.owner, state="revived")
        return session

    def session(self, session: str, owner: str) -> Session:
        """A tenant's live session; the client is known to be alive.

        Raises:
            GoneError: it has ended, was never there, or is another tenant's.
        """
        found = self.sessions.get(session)
        if found is None or found.owner != owner or found.ended:
            raise GoneError(
                f"There is no session {session[:140]!r}; it has ended, or the server was restarted, and this server is durable per {self.config.durable}. "
                "Start a new client from the last checkpoint; checkpoints are still there."
            )
        found.seen = self._now()
        return found

    def end(self, session: Session, why: str) -> None:
        """Drops a session's work and frees what it holds; its checkpoints stay."""
        session.ended = why
        self.sessions.pop(session.id, None)
        dropped = self.ledger.drop(session.id)
        self.turns.traces.pop(session.id, None)
        for model in session.models.values():
            if model.task is not None:
                model.task.cancel()
            if model.training is not None:
                model.training.close()
            if model.journal is not None:
                model.journal.close()
        session.samplers.clear()
        if self.durable and why != "closed":
            with contextlib.suppress(FileNotFoundError):
                discard(self.live_folder(session))
        events.emit("server.session", session=session.id, tenant=session.owner, state=why, dropped=dropped)

    # --------------------------------------------------------------------------------------------------------- models
    def check_model(self, name: str) -> str:
        """The backend's name of a base model.

        Raises:
            UnknownNameError: it is not listed, and only listed ones are served.
        """
        if self.config.only_listed and name not in self.config.listed:
            raise UnknownNameError("base model", name, self.config.listed)
        return self.config.backend_name(name)

    def add_model(
        self, session: Session, seq: int, base: str, *, lora: LoraConfig, train: Mapping[str, bool], meta: Mapping[str, object] | None
    ) -> Model:  # fmt: skip
        """Gives a session a model; the same number gives the same one."""
        name = f"{session.id}:train:{seq}"
        if name not in session.models:
            now = time.time()
            metadata = {str(key): str(value) for key, value in meta.items()} if meta else None
            card = Run(id=name, owner=session.owner, base_model=base, lora=lora, train=train, created_at=now, last_request_at=now,
                       project=session.project, user_metadata=metadata)  # fmt: skip
            model = session.models[name] = Model(card, session, self.config.backend_name(base))
            if self.durable:
                model.journal = Journal(self.live_folder(session) / f"train-{seq}")
            self.turns.open(model)
        return session.models[name]

    def revived(self, session: Session, folder: str, card: Mapping[str, Json]) -> Model:
        """A model that outlived its server; its requests are not served yet."""
        run = from_dict(Run, dict(card))
        model = session.models[f"{session.id}:train:{folder.partition('-')[2]}"] = Model(run, session, self.config.backend_name(run.base_model))
        return model

    def model(self, model: str, owner: str) -> Model:
        """A tenant's model.

        Raises:
            GoneError: there is none.
        """
        session = self.session(model.partition(":")[0], owner)
        if model not in session.models:
            raise GoneError(f"There is no model {model[:140]!r} in its session. Create one.")
        return session.models[model]

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
    def sampler(self, sampler: str, owner: str) -> SamplerCard:
        """A tenant's sampler.

        Raises:
            GoneError: there is none.
        """
        session = self.session(sampler.partition(":")[0], owner)
        if sampler not in session.samplers:
            raise GoneError(
                f"There is no sampler {sampler[:140]!r} in its session; a session keeps its last {self.config.samplers} samplers without a name. Create one."
            )
        card = session.samplers.pop(sampler)
        session.samplers[sampler] = card  # the last used is the last to go
        return card

    def add_sampler(self, session: Session, seq: int, card: Callable[[str], SamplerCard]) -> SamplerCard:
        """Gives a session a sampler; the same number gives the same one. Weights without a name that were not used for long are freed."""
        name = f"{session.id}:sample:{seq}"
        if name not in session.samplers:
            session.samplers[name] = card(name)
            own = [each.id for each in session.samplers.values() if each.own]
            for oldest in own[: max(0, len(own) - self.config.samplers)]:
                del session.samplers[oldest]
                if self.durable:
                    folder = self.live_folder(session) / f"sampler-{oldest.rpartition(':')[2]}"
                    if folder.is_dir():
                        discard(folder)
        return session.samplers[name]

    def note_sampler(self, session: Session, seq: int, *, base_model: str | None, path: str | None) -> None:
        """Writes down that a session has a sampler of a name, where sessions survive a kill."""
        if self.durable:
            with contextlib.closing(JsonLines(self.live_folder(session) / "samplers.jsonl")) as rows:
                rows.append({"seq": seq, "base_model": base_model, "model_path": path}, sync=True)

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

    def submit_sample(self, card: SamplerCard, owner: str, seq: int, begin: Callable[[], Awaitable[Answer]], size_bytes: int) -> Entry:
        """Takes a sampler's request; one that came before is not run again. Samples need no order."""
        entry = self.turns.sample(f"{card.id}:{seq}", owner, card.id.partition(":")[0], begin, size_bytes)
        if not entry.noted:
            entry.noted = True
            entry.answer.add_done_callback(lambda future: card.finished.add(seq // CLONE, entry.id, future))
        return entry

    async def tokenizer_id(self, name: str, *, near: bool) -> str | None:
        """What a client loads the tokenizer of a model from: a folder where it runs on this machine, else a name."""
        if name in self.config.tokenizers:
            return self.config.tokenizers[name]
        if not near:
            return None
        return await asyncio.to_thread(self.keeper.tokenizer_folder, self.config.backend_name(name), self.config.folder)

"""The pool on Ray: one actor a place, with the processors that it asks for, on any machine that sees the study's folder.

Asking for more than the cluster has is an error at once; an actor that does not start in time is one too. Connect to a cluster with
`ray.init(address=…)` or `RAY_ADDRESS` before; without either, Ray starts on this machine. Ray is imported when the pool is made.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from typing import Protocol, cast

import orjson

from .. import events
from ..errors import ConfigError, ExperimentError
from .pool import Message
from .work import Engines, Job
from .worker import attempt

__all__ = ["RayWorkers", "Remote"]

START_S = 300.0
"""Loading the libraries takes seconds on a free machine and minutes on a crowded one."""


class _Method(Protocol):
    def remote(self, *arguments: object) -> object: ...


class _Actor(Protocol):
    @property
    def ready(self) -> _Method: ...
    @property
    def perform(self) -> _Method: ...
    @property
    def progress(self) -> _Method: ...
    @property
    def stop(self) -> _Method: ...


class _ActorClass(Protocol):
    def remote(self) -> _Actor: ...


class _Decorator(Protocol):
    def __call__(self, cls: type, /) -> _ActorClass: ...


class _Ray(Protocol):
    """What is used of the module `ray`, which need not be installed."""

    def is_initialized(self) -> bool: ...
    def init(self, *, include_dashboard: bool, log_to_driver: bool) -> object: ...
    def shutdown(self) -> None: ...
    def cluster_resources(self) -> Mapping[str, float]: ...
    def remote(self, *, num_cpus: int, max_restarts: int, max_concurrency: int) -> _Decorator: ...
    def get(self, ref: object, *, timeout: float | None = None) -> object: ...
    def wait(self, refs: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]: ...
    def kill(self, actor: _Actor) -> None: ...


class Remote:
    """What runs inside an actor: jobs in, the last message of each out, as JSON."""

    def __init__(self) -> None:
        self._engines, self._stop = Engines(), threading.Event()
        self._progress: dict[str, Message] = {}

    def ready(self) -> bool:
        """Says that the actor has started."""
        return True

    def perform(self, job: bytes, trace: str = "") -> bytes:
        """Does a job below the span that `trace` (a `traceparent`) names; gives "done", "stopped" or "failed"."""
        said: list[Message] = []

        def say(message: Message) -> None:
            if message["kind"] == "progress":
                self._progress[str(message["id"])] = message
            else:
                self._progress.pop(str(message["id"]), None)
                said.append(message)

        with events.continued(trace):
            attempt(Job.of(cast("dict[str, object]", orjson.loads(job))), self._engines, say, self._stop.is_set)
        return orjson.dumps(said[-1])

    def progress(self, job: str) -> bytes:
        """How far a running job is."""
        return orjson.dumps(self._progress.get(job))

    def stop(self) -> None:
        """Asks the running job to end."""
        self._stop.set()


class RayWorkers:
    """Actors, made when they are needed and again when they have died.

    Args:
        actors: how many at the most; `size` is the number of jobs that they can have.
        threads: processors of each actor.
        together: jobs of one actor at a time.

    Raises:
        ConfigError: Ray is not installed, or the cluster can never give an actor its processors.
    """

    def __init__(self, actors: int, threads: int, together: int = 1) -> None:
        try:
            ray, errors = importlib.import_module("ray"), importlib.import_module("ray.exceptions")
        except ImportError as error:
            raise ConfigError("The executor 'ray' needs Ray. Install it: pip install 'crucible-framework[ray]'.") from error
        self._ray = cast("_Ray", ray)
        self._timeout, self._error = cast("type[Exception]", errors.GetTimeoutError), cast("type[Exception]", errors.RayError)
        self._actors: list[tuple[_Actor, list[str]]] = []
        self._busy: dict[object, tuple[Job, _Actor]] = {}
        self._own = not self._ray.is_initialized()
        if self._own:
            self._ray.init(include_dashboard=False, log_to_driver=False)
        have = float(self._ray.cluster_resources().get("CPU", 0.0))
        if have < threads * actors:
            self.close()
            raise ConfigError(
                f"{actors} jobs of {threads} threads need {threads * actors} processors; the Ray cluster has {have:g}. "
                "Ask for fewer jobs (--jobs) or threads, or add nodes."
            )
        self.size, self.separate = actors * together, True
        self._most, self._threads, self._together = actors, threads, together

    def _actor(self) -> _Actor:
        found = min(self._actors, key=lambda one: len(one[1]), default=None)
        if found is not None and not (found[1] and len(self._actors) < self._most):
            return found[0]
        # one call more than jobs at a time: `stop` or `progress` beside them
        actor = self._ray.remote(num_cpus=self._threads, max_restarts=0, max_concurrency=self._together + 1)(Remote).remote()
        try:
            self._ray.get(actor.ready.remote(), timeout=START_S)
        except self._timeout as error:
            self._ray.kill(actor)
            raise ExperimentError(f"Ray started no worker within {START_S:g} s. Look at `ray status`; finished cells are kept.") from error
        self._actors.append((actor, []))
        return actor

    def _jobs(self, actor: _Actor) -> list[str]:
        return next((jobs for one, jobs in self._actors if one is actor), [])

    def submit(self, job: Job) -> None:
        """Gives the job to an idle actor, or to a new one."""
        actor = self._actor()
        self._jobs(actor).append(job.id)
        self._busy[actor.perform.remote(orjson.dumps(job.plain()), events.traceparent())] = (job, actor)

    def messages(self, timeout_s: float) -> list[Message]:
        """What has ended within the time, and how far the others are."""
        ready, running = self._ray.wait(list(self._busy), num_returns=1, timeout=timeout_s) if self._busy else ([], [])
        found: list[Message] = []
        for future in ready:
            job, actor = self._busy.pop(future)
            try:
                found.append(cast("Message", orjson.loads(cast("bytes", self._ray.get(future)))))
                self._jobs(actor).remove(job.id)
            except self._error as error:
                if any(one is actor for one, _ in self._actors):
                    self._actors = [pair for pair in self._actors if pair[0] is not actor]
                    self._ray.kill(actor)
                found.append({"kind": "died", "id": job.id, "code": type(error).__name__})
        for future in running:
            try:
                told = orjson.loads(cast("bytes", self._ray.get(self._busy[future][1].progress.remote(self._busy[future][0].id), timeout=timeout_s + 1)))
            except self._error:
                continue  # it is too busy to answer, or dead: then its job says so
            if told is not None and told["id"] == self._busy[future][0].id:
                found.append(told)
        return found

    def stop(self) -> None:
        """Asks every actor."""
        for actor, _ in self._actors:
            actor.stop.remote()

    def close(self) -> None:
        """Ends the actors, and Ray where this pool has started it."""
        for actor, _ in self._actors:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()

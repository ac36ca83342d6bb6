"""Where jobs run: in this process, or in worker processes that may die at any moment. Both say what happens as plain messages.

A message is {"kind": "progress" | "done" | "stopped" | "failed" | "died", "id": …} with "spent", "times" or "failure". A pool does not know
what jobs are for, and never starts one again by itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol, TypeAlias, cast

import orjson

from .. import events
from ..records import Json
from .work import Engines, Job
from .worker import attempt

__all__ = ["InProcess", "Message", "Pool", "Workers"]

Message: TypeAlias = dict[str, Json]
GRACE_S = 20.0


class Pool(Protocol):
    """A number of places where a job can run."""

    size: int
    separate: bool
    """Whether jobs run outside the runner's process, so that a signal to one is none to the other."""

    def submit(self, job: Job) -> None:
        """Starts a job; there must be a free place."""
        ...

    def messages(self, timeout_s: float) -> list[Message]:
        """What has happened, waiting at most that long for something to happen."""
        ...

    def stop(self) -> None:
        """Asks all running jobs to end where they can be resumed."""
        ...

    def close(self) -> None:
        """Ends the pool; what still runs is cut off."""
        ...


class InProcess:
    """One place, in the caller's thread: `messages` runs the job. Components made in this process can be used.

    Args:
        tell: gets the progress of the job while it runs.
    """

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self.size, self.separate = 1, False
        self._tell, self._engines, self._stopping = tell, Engines(), False
        self._waiting: list[Job] = []

    def submit(self, job: Job) -> None:
        """Keeps the job for `messages`."""
        self._waiting.append(job)

    def messages(self, timeout_s: float) -> list[Message]:  # noqa: ARG002 - it never waits
        """Runs what was submitted."""
        said: list[Message] = []
        while self._waiting:
            attempt(self._waiting.pop(0), self._engines, lambda m: self._tell(m) if m["kind"] == "progress" else said.append(m), lambda: self._stopping)
        return said

    def stop(self) -> None:
        """The running job ends after its step or answer."""
        self._stopping = True

    def close(self) -> None:
        """Closes the backends."""
        self._engines.close()


class _Worker:
    """A worker process and the jobs that it has."""

    def __init__(self, log: IO[bytes], threads: int, together: int, said: queue.SimpleQueue[tuple[_Worker, Message | None]]) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own words
            [sys.executable, "-c", f"from {__package__}.worker import main; main({together})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            start_new_session=True,
        )
        self.jobs: dict[str, Job] = {}
        self._said = said
        self._reader = threading.Thread(target=self._read, name="crucible-worker-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with contextlib.suppress(orjson.JSONDecodeError):  # the last line of a killed process may be torn
                self._said.put((self, cast("Message", orjson.loads(line))))
        self._said.put((self, None))

    def send(self, message: dict[str, Json]) -> None:
        """Writes to the worker; one that is gone says so through its output."""
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
            self.process.stdin.flush()

    def end(self, grace_s: float) -> None:
        """Closes its input, which ends it, and waits."""
        with contextlib.suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        if self.process.stdout:
            self.process.stdout.close()


class Workers:
    """Processes, started when they are needed and again when they have died.

    Args:
        processes: how many; `size` is the number of jobs that they can have.
        together: jobs of one process at a time.
        threads: inside one operation, for libraries that read it from the environment.
        log: where their standard error goes.
    """

    def __init__(self, processes: int, threads: int, log: Path, together: int = 1) -> None:
        self.size, self.separate = processes * together, True
        self._processes, self._threads, self._together = processes, threads, together
        self._log = log.open("ab")
        self._workers: list[_Worker] = []
        self._said: queue.SimpleQueue[tuple[_Worker, Message | None]] = queue.SimpleQueue()

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes' numbers."""
        return tuple(worker.process.pid for worker in self._workers)

    def submit(self, job: Job) -> None:
        """Gives the job to the worker with the fewest, or to a new one while there may be more."""
        worker = min(self._workers, key=lambda one: len(one.jobs), default=None)
        if worker is None or (worker.jobs and len(self._workers) < self._processes):
            worker = _Worker(self._log, self._threads, self._together, self._said)
            self._workers.append(worker)
        worker.jobs[job.id] = job
        worker.send({"job": job.plain(), "trace": events.traceparent()})

    def messages(self, timeout_s: float) -> list[Message]:
        """What the workers said; a dead one says "died" of its job."""
        found: list[Message] = []
        with contextlib.suppress(queue.Empty):
            found += self._heard(*self._said.get(timeout=timeout_s))
            while True:
                found += self._heard(*self._said.get_nowait())
        return found

    def _heard(self, worker: _Worker, message: Message | None) -> list[Message]:
        if message is None:
            self._workers.remove(worker)
            worker.end(GRACE_S)
            return [{"kind": "died", "id": lost, "code": worker.process.returncode} for lost in worker.jobs]
        if message["kind"] != "progress":
            worker.jobs.pop(str(message["id"]), None)
        return [message]

    def stop(self) -> None:
        """Tells every worker."""
        for worker in self._workers:
            worker.send({"stop": True})

    def close(self) -> None:
        """Ends every worker."""
        for worker in self._workers:
            worker.end(GRACE_S)
        self._workers.clear()
        self._log.close()

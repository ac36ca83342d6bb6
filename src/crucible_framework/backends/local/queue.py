"""One thread that runs requests in the order of their submission; neighbouring requests that can share a pass are handed over together.

This file does not know what a request does.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, ParamSpec, TypeVar

import torch

from ...errors import SessionClosedError

__all__ = ["Job", "Queue", "Waiting"]

I = TypeVar("I")  # noqa: E741 - what a request asks
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Job(Generic[I, T]):
    """A request that may share a pass: what it asks, and the future that its answer goes to. `key` says with whom it can share."""

    key: Hashable
    item: I
    future: Future[T] = field(default_factory=Future)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class Waiting(Generic[I, T]):
    """Neighbouring requests that nothing has begun to serve; open at its end until a request of another kind is submitted."""

    def __init__(self) -> None:
        self._jobs: deque[Job[I, T]] = deque()
        self._lock = threading.Lock()

    def add(self, job: Job[I, T]) -> None:
        """Puts a job at the end."""
        with self._lock:
            self._jobs.append(job)

    def take(self, key: Hashable = None) -> Job[I, T] | None:
        """The oldest job that was not cancelled, where its key is `key` or none is given; else None."""
        with self._lock:
            while self._jobs and (key is None or self._jobs[0].key == key):
                job = self._jobs.popleft()
                if job.future.set_running_or_notify_cancel():
                    return job
        return None


class Queue(Generic[I, T]):
    """The engine's thread and its requests.

    Args:
        serve: called with neighbouring requests; takes from them what it serves, at least one, and resolves their futures.
        threads: that torch may use inside one operation.
    """

    def __init__(self, serve: Callable[[Waiting[I, T]], None], threads: int) -> None:
        self._serve = serve
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="crucible-local", initializer=torch.set_num_threads, initargs=(threads,))
        self._lock = threading.Lock()
        self._open: Waiting[I, T] | None = None
        self._closed = False

    def submit(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Runs a request after those before it, in its caller's context.

        Raises:
            SessionClosedError: the queue is closed.
        """
        with self._lock:
            self.check_open()
            self._open = None
            context = contextvars.copy_context()
            return self._executor.submit(lambda: context.run(fn, *args, **kwargs))

    def share(self, key: Hashable, item: I) -> Future[T]:
        """A request that may be served together with its neighbours of the same key.

        Raises:
            SessionClosedError: the queue is closed.
        """
        job: Job[I, T] = Job(key, item)
        with self._lock:
            self.check_open()
            self._open = self._open or Waiting()
            self._open.add(job)
            self._executor.submit(self._serve, self._open)
        return job.future

    def check_open(self) -> None:
        """Raises SessionClosedError where the queue is closed."""
        if self._closed:
            raise SessionClosedError("The local backend is closed. Open another with connect('local').")

    def close(self) -> None:
        """Finishes what was submitted; later requests raise SessionClosedError."""
        with self._lock:
            self._closed = True
        self._executor.shutdown(wait=True)

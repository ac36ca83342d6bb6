"""One thread that runs requests in the order of their submission, in turns with work that goes on in small steps.

A request runs whole. Steps (of sampling, say) run while no request waits; while both wait, `TURN` steps are followed by one request, so that
a request that comes while steps run waits for the step under way, one behind another request for `TURN` steps, and the steps for one request
at a time. This file does not know what a request or a step does.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, ParamSpec, Protocol, TypeVar

import torch

from ...errors import SessionClosedError

__all__ = ["TURN", "Job", "Queue", "Stepwise"]

I = TypeVar("I")  # noqa: E741 - what is asked
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

TURN = 16
"""Steps between two requests, where both wait."""


@dataclass(slots=True, eq=False)
class Job(Generic[I, T]):
    """What is asked of the stepwise work, and the future that its answer goes to."""

    item: I
    future: Future[T] = field(default_factory=Future)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class Stepwise(Protocol[I, T]):
    """Work that goes on in steps; all but `add` is called on the queue's thread."""

    def add(self, job: Job[I, T]) -> None:
        """Takes a job, from any thread."""
        ...

    def busy(self) -> bool:
        """Whether a step could do anything."""
        ...

    def step(self) -> None:
        """Does a little, and resolves futures of jobs that are done; what goes wrong is told to them."""
        ...


class Queue(Generic[I, T]):
    """The engine's thread and its requests.

    Args:
        stepwise: work in steps.
        threads: that torch may use inside one operation.
    """

    def __init__(self, stepwise: Stepwise[I, T], threads: int) -> None:
        self._stepwise = stepwise
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="crucible-local", initializer=torch.set_num_threads, initargs=(threads,))
        self._lock = threading.Lock()
        self._requests: deque[Callable[[], None]] = deque()
        self._steps = TURN
        self._closed = False

    def submit(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Runs a request after those before it, in its caller's context.

        Raises:
            SessionClosedError: the queue is closed.
        """
        future: Future[R] = Future()
        context = contextvars.copy_context()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = context.run(fn, *args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            self.check_open()
            self._requests.append(run)
            self._executor.submit(self._work)
        return future

    def share(self, item: I) -> Future[T]:
        """Adds to the stepwise work.

        Raises:
            SessionClosedError: the queue is closed.
        """
        job: Job[I, T] = Job(item)
        with self._lock:
            self.check_open()
            self._stepwise.add(job)
            self._executor.submit(self._work)
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

    def _work(self) -> None:
        """Works until nothing is left; what was submitted meanwhile is done too."""
        while True:
            busy = self._stepwise.busy()
            request = None
            with self._lock:
                if self._requests and (not busy or self._steps >= TURN):
                    request = self._requests.popleft()
            if request is not None:
                request()
                self._steps = 0
            elif busy:
                self._stepwise.step()
                self._steps += 1
            else:
                return

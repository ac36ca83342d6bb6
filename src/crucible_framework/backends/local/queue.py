"""One thread that runs requests in the order of their submission, in turns with work that goes on in small steps.

A request runs whole. Steps (of sampling, say) run while no request waits; while both wait, `TURN` steps are followed by one request, so that
a request that comes while steps run waits for the step under way, one behind another request for `TURN` steps, and the steps for one request
at a time. Requests of several owners that can run together do so where they wait together; those of one owner keep their order. This file
does not know what a request or a step does.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch

from ...errors import SessionClosedError
from ...promise import Promise

__all__ = ["TURN", "Job", "Mix", "Queue", "Stepwise"]

I = TypeVar("I")  # noqa: E741 - what is asked
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

TURN = 16
"""Steps between two requests, where both wait."""
MOST = 16
"""Requests that run together."""


@dataclass(slots=True, eq=False)
class Job(Generic[I, T]):
    """What is asked of the stepwise work, and the promise of an answer. Who asked can cancel at any time, also while it is worked on."""

    item: I
    promise: Promise[T] = field(default_factory=Promise)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def future(self) -> Future[T]:
        """The receiver's side."""
        return self.promise.future


@dataclass(slots=True, frozen=True, eq=False)
class Mix(Generic[R]):
    """How a request may run together with others of its kind, each of another owner.

    Attributes:
        kind: those of one kind can.
        item: what it asks.
        together: does what several ask; gives for each a function that its own context runs, and whose result or error is its answer.
    """

    kind: Hashable
    item: object
    together: Callable[[Sequence[object]], Sequence[Callable[[], R]]]


@dataclass(slots=True, eq=False)
class _Request(Generic[R]):
    """What waits; an owner's requests keep their order, one without an owner keeps it to all."""

    fn: Callable[[], R]
    owner: object
    mix: Mix[R] | None
    future: Future[R] = field(default_factory=Future)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def answer(self, fn: Callable[[], R]) -> None:
        """The future gets what the function gives in the caller's context."""
        try:
            result = self.context.run(fn)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


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
        self._requests: deque[_Request[Any]] = deque()
        self._steps = TURN
        self._closed = False

    def submit(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Runs a request after those before it, in its caller's context.

        Raises:
            SessionClosedError: the queue is closed.
        """
        return self.submit_for(None, partial(fn, *args, **kwargs))

    def submit_for(self, owner: object, fn: Callable[[], R], mix: Mix[R] | None = None) -> Future[R]:
        """Runs a request after those of its owner before it, in its caller's context; with `mix`, maybe together with those of others.

        Raises:
            SessionClosedError: the queue is closed.
        """
        request = _Request(fn, owner, mix)
        with self._lock:
            self.check_open()
            self._requests.append(request)
            self._executor.submit(self._work)
        return request.future

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
            requests = list[_Request[Any]]()
            with self._lock:
                if self._requests and (not busy or self._steps >= TURN):
                    requests = self._next()
            if requests:
                _run(requests)
                self._steps = 0
            elif busy:
                self._stepwise.step()
                self._steps += 1
            else:
                return

    def _next(self) -> list[_Request[Any]]:
        """Takes the oldest request, and others that can run with it and wait for nothing of their owner's."""
        first = self._requests.popleft()
        found, waiting = [first], {id(first.owner)}
        for request in list(self._requests) if first.mix is not None else []:
            if request.owner is None or len(found) == MOST:
                break
            if first.mix is not None and request.mix is not None and request.mix.kind == first.mix.kind and id(request.owner) not in waiting:
                found.append(request)
            waiting.add(id(request.owner))
        for request in found[1:]:
            self._requests.remove(request)
        return found


def _run(requests: Sequence[_Request[Any]]) -> None:
    live = [request for request in requests if request.future.set_running_or_notify_cancel()]
    mix = live[0].mix if len(live) > 1 else None
    if mix is None:
        for request in live:
            request.answer(request.fn)
        return
    try:
        answers = mix.together([request.mix.item for request in live if request.mix is not None])
    except BaseException as error:
        for request in live:
            request.future.set_exception(error)
        return
    for request, answer in zip(live, answers, strict=True):
        request.answer(answer)

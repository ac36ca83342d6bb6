"""Requests to a service in order, submitted ahead. This file does not know what a request does."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .wire import explain

__all__ = ["Line", "Pending", "fail"]

T = TypeVar("T")
R = TypeVar("R")
Pending = set[Future[Any]]
"""Futures that are not resolved yet."""


class Line:
    """Requests in order: `begin` runs on one thread and submits, `finish` on another takes the result. Both see them in the same order.

    Args:
        name: for messages and threads.
        pending: all futures that are not resolved yet.
    """

    def __init__(self, name: str, pending: Pending) -> None:
        self._begin = ThreadPoolExecutor(1, thread_name_prefix=f"crucible-{name}-begin")
        self._finish = ThreadPoolExecutor(1, thread_name_prefix=f"crucible-{name}-finish")
        self._pending = pending

    def submit(self, doing: str, begin: Callable[[], Future[R]], finish: Callable[[R], T], examples: Sequence[str] = ()) -> Future[T]:
        """What `finish` makes of what `begin` submitted."""
        outer: Future[T] = Future()
        context = contextvars.copy_context()
        self._pending.add(outer)
        outer.add_done_callback(self._pending.discard)

        def settle(inner: Future[R]) -> None:
            try:
                outer.set_result(context.run(finish, inner.result()))
            except BaseException as error:
                fail(outer, error, doing, examples)

        def turn() -> None:
            try:
                inner = context.run(begin)
            except BaseException as error:
                self._finish.submit(fail, outer, error, doing, examples)
            else:
                self._finish.submit(settle, inner)

        self._begin.submit(turn)
        return outer

    def close(self) -> None:
        """Finishes what was submitted."""
        self._begin.shutdown(wait=True)
        self._finish.shutdown(wait=True)


def fail(outer: Future[T], error: BaseException, doing: str, examples: Sequence[str]) -> None:
    """The future raises the error as one of ours, with the SDK's as its cause."""
    ours = explain(error, doing, examples)
    if ours is not error:
        ours.__cause__ = error
    outer.set_exception(ours)

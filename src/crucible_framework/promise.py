"""A future that is kept exactly once and says when its receiver gives up. Knows no models and no clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Promise", "failure_of"]

T = TypeVar("T")


class Promise(Generic[T]):
    """The giving side of a `Future`: of value, error and cancellation by the receiver only the first counts, on whatever thread.

    Args:
        on_cancel: called once if the receiver cancels before anything was given.
    """

    __slots__ = ("_closed", "_lock", "_on_cancel", "future")

    def __init__(self, on_cancel: Callable[[], None] | None = None) -> None:
        self.future: Future[T] = Future()
        self._lock = threading.Lock()
        self._closed = False
        self._on_cancel = on_cancel
        self.future.add_done_callback(self._seen_done)

    def _close(self) -> bool:
        with self._lock:
            first, self._closed = not self._closed, True
        # False as well where the receiver's cancellation came first: then this call tells those who wait for it
        return first and self.future.set_running_or_notify_cancel()

    def _seen_done(self, future: Future[T]) -> None:
        if future.cancelled():
            self._close()
            if self._on_cancel is not None:
                self._on_cancel()
        self._on_cancel = None  # breaks the circle between a request and its promise

    def give(self, value: T) -> bool:
        """Keeps the promise; False where something else came first."""
        given = self._close()
        if given:
            self.future.set_result(value)
        return given

    def fail(self, error: BaseException) -> bool:
        """Breaks the promise with an error; False where something else came first."""
        failed = self._close()
        if failed:
            self.future.set_exception(error)
        return failed


def failure_of(future: Future[T]) -> str:
    """Why a future that is done has no value, in one sentence; "" where it has one."""
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    return "" if error is None else f"{type(error).__name__}: {error}"

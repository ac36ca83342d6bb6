"""Real time behind the `Clock` contract: one daemon thread serves every timer of the process. Knows nothing of what it calls."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

__all__ = ["SystemClock", "Timer", "system_clock"]

_log = logging.getLogger(__name__)


class Timer:
    """A call to come; `fn` is None once it was made or cancelled. Ordered by due time, then by number."""

    __slots__ = ("due_s", "fn", "number")

    def __init__(self, due_s: float, number: int, fn: Callable[[], None]) -> None:
        self.due_s, self.number = due_s, number
        self.fn: Callable[[], None] | None = fn

    def __lt__(self, other: Timer) -> bool:
        return (self.due_s, self.number) < (other.due_s, other.number)


class SystemClock:
    """Monotonic seconds and timers. Callbacks run on the timer thread, so they must be short; what they raise is logged."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._dead = 0
        self._ids = itertools.count()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def now(self) -> float:
        """Seconds, monotonic."""
        return time.monotonic()

    def call_later(self, delay_s: float, fn: Callable[[], None]) -> Callable[[], None]:
        """Calls `fn` once after `delay_s` seconds, in the order of due times; returns a function that cancels it.

        A cancelled timer lets go of `fn` at once, so that what `fn` refers to does not live until the timer would have been due.
        """
        timer = Timer(self.now() + max(0.0, delay_s), next(self._ids), fn)
        with self._wake:
            heapq.heappush(self._heap, timer)
            if self._thread is None or not self._thread.is_alive():  # a forked child has the object but not the thread
                self._thread = threading.Thread(target=self._run, name="crucible-clock", daemon=True)
                self._thread.start()
            if self._heap[0] is timer:  # else the thread wakes early enough as it is
                self._wake.notify()

        def cancel() -> None:
            with self._wake:
                if timer.fn is not None:
                    timer.fn = None
                    self._dead += 1
                    if self._dead > 32 and self._dead > len(self._heap) // 2:
                        self._heap = [one for one in self._heap if one.fn is not None]
                        heapq.heapify(self._heap)
                        self._dead = 0

        return cancel

    def _next(self) -> Callable[[], None]:
        with self._wake:
            while True:
                wait_s = self._heap[0].due_s - self.now() if self._heap else None
                if wait_s is not None and wait_s <= 0:
                    timer = heapq.heappop(self._heap)
                    fn, timer.fn = timer.fn, None
                    if fn is not None:
                        return fn
                    self._dead -= 1
                    continue
                self._wake.wait(None if wait_s is None else min(wait_s, threading.TIMEOUT_MAX))

    def _run(self) -> None:
        while True:
            fn = self._next()
            try:
                fn()
            except BaseException:  # SystemExit too: it would end every timer of the process
                _log.exception("a timer callback failed")


system_clock = SystemClock()
"""The process's clock; its thread starts with the first timer."""

"""Real time behind the `Clock` contract: one daemon thread serves every timer of the process. Knows nothing of what it calls."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

__all__ = ["SystemClock", "system_clock"]

_log = logging.getLogger(__name__)


class SystemClock:
    """Monotonic seconds and timers. Callbacks run on the timer thread, so they must be short; what they raise is logged."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._pending: set[int] = set()
        self._ids = itertools.count()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def now(self) -> float:
        """Seconds, monotonic."""
        return time.monotonic()

    def call_later(self, delay_s: float, fn: Callable[[], None]) -> Callable[[], None]:
        """Calls `fn` once after `delay_s` seconds, in the order of due times; returns a function that cancels it."""
        with self._wake:
            number = next(self._ids)
            heapq.heappush(self._heap, (self.now() + max(0.0, delay_s), number, fn))
            self._pending.add(number)
            if self._thread is None or not self._thread.is_alive():  # a forked child has the object but not the thread
                self._thread = threading.Thread(target=self._run, name="crucible-clock", daemon=True)
                self._thread.start()
            self._wake.notify()

        def cancel() -> None:
            with self._wake:
                if number in self._pending:
                    self._pending.discard(number)
                    self._cancelled.add(number)
                    self._wake.notify()

        return cancel

    def _next(self) -> Callable[[], None]:
        with self._wake:
            while True:
                while self._heap and self._heap[0][1] in self._cancelled:
                    self._cancelled.discard(heapq.heappop(self._heap)[1])
                wait_s = self._heap[0][0] - self.now() if self._heap else None
                if wait_s is not None and wait_s <= 0:
                    _, number, fn = heapq.heappop(self._heap)
                    self._pending.discard(number)
                    return fn
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

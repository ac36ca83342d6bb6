"""A clock that stands still until a test moves it; callbacks run on the thread that moves it. Knows nothing of what it calls."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable

from ..clock import Timer
from ..errors import ConfigError

__all__ = ["VirtualClock"]


class VirtualClock:
    """The `Clock` contract without waiting: time passes only in `advance`.

    Args:
        start_s: the first `now()`.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._heap: list[Timer] = []
        self._ids = itertools.count()
        self._lock = threading.RLock()

    def now(self) -> float:
        """Seconds, as far as the clock was moved."""
        with self._lock:
            return self._now_s

    @property
    def pending(self) -> int:
        """How many calls are still to come."""
        with self._lock:
            return sum(timer.fn is not None for timer in self._heap)

    def call_later(self, delay_s: float, fn: Callable[[], None]) -> Callable[[], None]:
        """Calls `fn` once when the clock has moved by `delay_s`, in the order of due times and then of calls; returns what cancels it."""
        with self._lock:
            timer = Timer(self._now_s + max(0.0, delay_s), next(self._ids), fn)
            heapq.heappush(self._heap, timer)

        def cancel() -> None:
            timer.fn = None

        return cancel

    def advance(self, seconds_s: float) -> int:
        """Moves the clock and makes the calls that fall due on the way, each at its own time; those that they add count too.

        Returns:
            How many calls were made. What a call raises stops the clock at its time and comes out here.

        Raises:
            ConfigError: a negative or non-finite time.
        """
        if not (math.isfinite(seconds_s) and seconds_s >= 0):
            raise ConfigError(f"The clock was moved by {seconds_s!r} s; expected a finite number of at least 0. Time does not go back.")
        with self._lock:
            end_s = self._now_s + seconds_s
        calls = 0
        while (fn := self._due(end_s)) is not None:
            calls += 1
            fn()
        return calls

    def _due(self, end_s: float) -> Callable[[], None] | None:
        with self._lock:
            while self._heap and self._heap[0].due_s <= end_s:
                timer = heapq.heappop(self._heap)
                fn, timer.fn = timer.fn, None
                if fn is not None:
                    self._now_s = max(self._now_s, timer.due_s)
                    return fn
            self._now_s = max(self._now_s, end_s)
            return None

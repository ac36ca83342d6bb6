"""Ctrl-C and SIGTERM as a polite wish: the first asks the loop to stop and save, the second acts as usual."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["received_signal", "stop_on_signal"]

_received: list[int] = []


def received_signal() -> int | None:
    """The number of the signal that the latest `stop_on_signal` block got, if any."""
    return _received[-1] if _received else None


@contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on the first SIGINT or SIGTERM of the block; handlers are put back at the end. Only the main thread can do it."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is the standard library's
        _received.append(number)
        stop()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

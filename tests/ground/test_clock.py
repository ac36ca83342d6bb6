"""Timers fire once, in order, unless cancelled; nothing that a callback does stops the others. Waits are on events, not on sleeps."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from functools import partial

import pytest

from crucible_framework.clock import SystemClock, system_clock
from crucible_framework.protocols import Clock

PATIENCE_S = 20.0  # only a failing test waits this long
SOON_S = 0.02


@pytest.fixture
def clock() -> SystemClock:
    return SystemClock()


def settle(clock: SystemClock, delay_s: float = 0.0) -> None:
    """Returns when every timer due by then has run: one thread serves them in order."""
    done = threading.Event()
    clock.call_later(delay_s, done.set)
    assert done.wait(PATIENCE_S)


def test_the_process_clock_is_a_clock() -> None:
    contract: Clock = system_clock
    first = contract.now()
    assert contract.now() >= first


def test_callbacks_run_in_the_order_of_their_due_times() -> None:
    class Stopped(SystemClock):
        """Its time can stand still, so that a busy machine does not come between two calls."""

        at_s: float | None = None

        def now(self) -> float:
            return super().now() if self.at_s is None else self.at_s

    clock, fired = Stopped(), list[str]()
    clock.at_s = clock.now()
    clock.call_later(SOON_S, lambda: fired.append("late"))
    clock.call_later(0.0, lambda: fired.append("now"))
    clock.call_later(SOON_S / 2, lambda: fired.append("soon"))
    clock.at_s = None
    settle(clock, SOON_S * 1.5)
    assert fired == ["now", "soon", "late"]


def test_callback_is_not_early_and_runs_on_the_timer_thread(clock: SystemClock) -> None:
    done, seen = threading.Event(), list[tuple[float, str]]()

    def callback() -> None:
        seen.append((time.monotonic(), threading.current_thread().name))
        done.set()

    start = time.monotonic()
    clock.call_later(SOON_S, callback)
    assert done.wait(PATIENCE_S)
    fired, thread = seen[0]
    assert fired - start >= SOON_S
    assert thread == "crucible-clock"


def test_negative_delay_means_now(clock: SystemClock) -> None:
    settle(clock, -5.0)


def test_cancelled_timer_never_fires(clock: SystemClock) -> None:
    fired: list[str] = []
    cancel = clock.call_later(SOON_S, lambda: fired.append("cancelled"))
    clock.call_later(SOON_S, lambda: fired.append("kept"))
    cancel()
    cancel()
    settle(clock, SOON_S * 1.5)
    assert fired == ["kept"]


def test_cancel_after_firing_does_nothing_and_leaves_nothing(clock: SystemClock) -> None:
    fired: list[int] = []
    cancels = [clock.call_later(0.0, lambda: fired.append(1)) for _ in range(10)]
    settle(clock)
    for cancel in cancels:
        cancel()
    settle(clock)
    assert fired == [1] * 10
    assert clock._heap == []


def test_a_cancelled_timer_lets_go_of_its_callback_at_once(clock: SystemClock) -> None:
    class Request:
        def end(self) -> None: ...

    waiting = [Request() for _ in range(200)]
    alive = [weakref.ref(one) for one in waiting]
    cancels = [clock.call_later(3600.0, one.end) for one in waiting]
    waiting.clear()
    for cancel in cancels[:150]:
        cancel()
    assert sum(one() is not None for one in alive) == 50
    assert len(clock._heap) < 100  # not kept until they would have been due
    for cancel in cancels[150:]:
        cancel()
    assert not any(one() is not None for one in alive)


def test_cancel_from_within_a_callback(clock: SystemClock) -> None:
    fired: list[str] = []

    def first() -> None:
        cancel = clock.call_later(0.0, lambda: fired.append("second"))
        cancel()  # on the timer thread, so it cannot have run yet

    clock.call_later(0.0, first)
    settle(clock, SOON_S)
    assert fired == []


def test_callback_may_set_the_next_timer(clock: SystemClock) -> None:
    done, rounds = threading.Event(), list[int]()

    def again() -> None:
        rounds.append(1)
        if len(rounds) == 5:
            done.set()
        else:
            clock.call_later(0.0, again)

    clock.call_later(0.0, again)
    assert done.wait(PATIENCE_S)
    assert len(rounds) == 5


@pytest.mark.parametrize("error", [ValueError("callback is broken"), SystemExit("callback is broken")])
def test_callback_that_raises_is_logged_and_the_next_fires(clock: SystemClock, caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    def broken() -> None:
        raise error

    with caplog.at_level(logging.ERROR):
        clock.call_later(0.0, broken)
        settle(clock)
    assert "a timer callback failed" in caplog.text
    assert "callback is broken" in caplog.text


@pytest.mark.parametrize("delay_s", [float("inf"), 1e30])
def test_a_timer_for_never_does_not_stop_the_others(clock: SystemClock, delay_s: float) -> None:
    cancel = clock.call_later(delay_s, lambda: None)
    settle(clock)
    settle(clock, SOON_S)  # the thread has waited on the far timer meanwhile
    cancel()


def test_many_threads_every_timer_fires_once(clock: SystemClock) -> None:
    fired: list[int] = []
    cancelled: list[int] = []
    start = threading.Barrier(8)

    def work(base: int) -> None:
        start.wait()
        for number in range(base, base + 50):
            cancel = clock.call_later(0.001 * (number % 5), partial(fired.append, number))
            if number % 10 == 0:
                cancel()
                cancelled.append(number)

    threads = [threading.Thread(target=work, args=(base,)) for base in range(0, 400, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle(clock, SOON_S)
    assert len(fired) == len(set(fired))
    # A timer that was due at once may fire before its own cancel; every other one fires exactly once.
    assert set(range(400)) - set(cancelled) <= set(fired)


def test_timers_work_again_when_their_thread_has_gone(clock: SystemClock) -> None:
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()
    clock._thread = gone
    settle(clock)
    assert clock._thread is not gone


@pytest.mark.skipif(not hasattr(os, "fork") or sys.version_info >= (3, 12), reason="forking with threads warns from Python 3.12 on")
def test_timers_fire_in_a_forked_child(clock: SystemClock) -> None:
    settle(clock)
    child = os.fork()
    if child == 0:
        done = threading.Event()
        clock.call_later(0.0, done.set)
        os._exit(0 if done.wait(PATIENCE_S) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0

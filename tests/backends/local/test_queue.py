"""The engine's thread: order of requests, turns with stepwise work, and that neither side starves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from crucible_framework.backends.local.queue import TURN, Job, Queue
from crucible_framework.errors import SessionClosedError


class Counting:
    """Stepwise work: each job asks for a number of steps; `log` holds what ran, in order."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.jobs, self.left = log, list[Job[int, str]](), dict[int, int]()
        self.at: dict[int, Callable[[], None]] = {}
        self.steps = 0

    def add(self, job: Job[int, str]) -> None:
        self.jobs.append(job)

    def busy(self) -> bool:
        return bool(self.jobs)

    def step(self) -> None:
        self.steps += 1
        self.at.get(self.steps, lambda: None)()
        self.log.append("step")
        job = self.jobs[0]
        left = self.left.setdefault(id(job), job.item) - 1
        self.left[id(job)] = left
        if left == 0:
            self.jobs.pop(0)
            job.future.set_result("done")


@pytest.fixture
def made() -> tuple[Queue[int, str], Counting, list[str]]:
    log: list[str] = []
    counting = Counting(log)
    return Queue(counting, 1), counting, log


def test_requests_keep_their_order(made: tuple[Queue[int, str], Counting, list[str]]) -> None:
    queue, _, log = made
    futures = [queue.submit(log.append, str(i)) for i in range(20)]
    for future in futures:
        future.result(10)
    assert log == [str(i) for i in range(20)]
    queue.close()


def test_a_request_waits_for_one_step_only(made: tuple[Queue[int, str], Counting, list[str]]) -> None:
    queue, counting, log = made
    submitted: list[Future[None]] = []
    counting.at[40] = lambda: submitted.append(queue.submit(log.append, "request"))
    queue.share(100).result(10)
    submitted[0].result(10)
    assert log.index("request") == 40  # behind the step in which it came
    queue.close()


def test_turns_while_both_wait(made: tuple[Queue[int, str], Counting, list[str]]) -> None:
    """Requests that are submitted ahead and steps alternate: neither waits for the other's end."""
    queue, _, log = made
    gate = threading.Event()
    held = queue.submit(gate.wait, 10)
    futures = [queue.submit(log.append, f"request {i}") for i in range(5)]
    shared = queue.share(10 * TURN)
    gate.set()
    assert held.result(10)
    assert shared.result(10) == "done"
    for future in futures:
        future.result(10)
    places = [log.index(f"request {i}") for i in range(5)]
    assert places == [(TURN + 1) * i + TURN for i in range(5)]
    queue.close()


def test_a_failure_stays_with_its_request(made: tuple[Queue[int, str], Counting, list[str]]) -> None:
    queue, _, log = made

    def fail() -> None:
        raise KeyError("x")

    bad, good = queue.submit(fail), queue.submit(log.append, "good")
    with pytest.raises(KeyError):
        bad.result(10)
    good.result(10)
    assert log == ["good"]
    queue.close()


def test_close_finishes_what_was_submitted(made: tuple[Queue[int, str], Counting, list[str]]) -> None:
    queue, _, log = made
    gate = threading.Event()
    queue.submit(gate.wait, 10)
    cancelled, kept, shared = queue.submit(log.append, "cancelled"), queue.submit(log.append, "kept"), queue.share(3)
    assert cancelled.cancel()
    gate.set()
    queue.close()
    assert kept.done()
    assert shared.result() == "done"
    assert sorted(log) == ["kept", "step", "step", "step"]
    for refused in (lambda: queue.submit(log.append, "late"), lambda: queue.share(1)):
        with pytest.raises(SessionClosedError):
            refused()

"""A process of the pool: jobs come in on standard input, what becomes of them goes out, one JSON object a line.

It ends when its input ends, also in the middle of a job: then the runner is gone, and what is on disk can be resumed. Whatever
libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, cast

import orjson

from .. import events
from ..records import Json
from .work import Engines, Job, Spent, Stopped, Watch, described, perform

__all__ = ["main", "serve"]

EVERY_S = 0.1


def attempt(job: Job, engines: Engines, say: Callable[[dict[str, Json]], None], stopping: Callable[[], bool]) -> None:
    """Does a job and says how it went: "progress" on the way, then "done", "stopped" or "failed". Its spans hang below the caller's."""
    last = 0.0

    def tell(spent: Spent) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_S:
            last = now if spent != Spent() else 0.0  # the first step or answer is told at once
            say({"kind": "progress", "id": job.id, "spent": _plain(spent), "begun": True})

    watch = Watch(tell, stopping)
    started = time.monotonic()
    say({"kind": "progress", "id": job.id, "spent": _plain(watch.spent)})  # it has taken the job up
    try:
        say({"kind": "done", "id": job.id, "times": perform(job, engines, watch), "spent": _plain(watch.spent)})
    except Stopped:
        say({"kind": "stopped", "id": job.id, "spent": _plain(watch.spent), "times": _times(started, watch)})
    except Exception as error:
        say({"kind": "failed", "id": job.id, "failure": described(error), "spent": _plain(watch.spent), "times": _times(started, watch)})


def _times(started: float, watch: Watch) -> Json:
    seconds = time.monotonic() - started
    return {"train_s": seconds, "eval_s": 0.0, "train_tokens": watch.spent.train_tokens, "asked_tokens": watch.spent.asked_tokens}


def _plain(spent: Spent) -> Json:
    return {"train_tokens": spent.train_tokens, "asked_tokens": spent.asked_tokens, "steps": spent.steps, "rows": spent.rows}


def serve(source: BinaryIO, sink: BinaryIO, cut_off: Callable[[], object], together: int = 1) -> None:
    """Takes jobs from `source` until it ends; where it ends in the middle of a job, `cut_off` is called.

    Args:
        together: jobs that run side by side in this process on the same backends, so that a base model is in memory once.
    """
    jobs: queue.SimpleQueue[tuple[Job, str] | None] = queue.SimpleQueue()
    stop, guard, busy = threading.Event(), threading.Lock(), list[str]()

    def say(message: dict[str, Json]) -> None:
        with contextlib.suppress(BrokenPipeError), guard:
            sink.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
            sink.flush()

    def listen() -> None:
        for line in source:
            told = cast("dict[str, object]", orjson.loads(line))
            if told.get("stop"):
                stop.set()
                continue
            job = Job.of(cast("dict[str, object]", told["job"]))
            busy.append(job.id)
            jobs.put((job, str(told.get("trace", ""))))
        if busy and not stop.is_set():
            cut_off()
        for _ in range(together):
            jobs.put(None)

    def work() -> None:
        while (taken := jobs.get()) is not None:
            job, trace = taken
            with events.continued(trace):
                attempt(job, engines, say, stop.is_set)
            busy.remove(job.id)

    threading.Thread(target=listen, name="crucible-worker-input", daemon=True).start()
    engines = Engines()
    helpers = [threading.Thread(target=work, name=f"crucible-worker-{index}") for index in range(1, together)]
    try:
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()
    finally:
        engines.close()


def main(together: int = 1) -> None:
    """The process's way in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the runner, which tells its workers
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, out, lambda: os._exit(0), together)  # nobody waits for what is being done; it is safe to be cut off anywhere

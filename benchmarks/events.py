"""What an event costs the one who emits it: with no sink, with a checksummed file, with a dead exporter; and how fast a file is read.

Events come in bursts with pauses, as training makes them; "sustained" has no pauses, so that the writer's thread competes for the
interpreter. usage: python benchmarks/events.py [bursts]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from crucible_framework import events
from crucible_framework.sinks import Queued, read_events, to_jsonl

BURST = 500


def emit(step: int) -> None:
    events.emit("training.step", step=step, loss=0.5, grad_norm=1.25, lr=1e-4, tokens=400)


def burst(call: Callable[[int], None], size: int = BURST) -> float:
    """Microseconds an event."""
    start = time.perf_counter()
    for step in range(size):
        call(step)
    return (time.perf_counter() - start) / size * 1e6


def measure(name: str, bursts: int, pause_s: float) -> None:
    found = []
    for _ in range(bursts):
        found.append(burst(emit))
        time.sleep(pause_s)
    print(f"{statistics.median(found):7.2f} µs an event, {max(found):7.2f} at most  {name}")


def span_cost(bursts: int) -> None:
    def one(step: int) -> None:
        with events.span("work", step=step):
            pass

    print(f"{statistics.median(burst(one) for _ in range(bursts)):7.2f} µs a span                       no sink")


def dead(_: object) -> None:
    time.sleep(3600)


def main(bursts: int) -> None:
    """Prints a line a case."""
    measure("no sink", bursts, 0.0)
    span_cost(bursts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        end = to_jsonl(path)
        measure("to_jsonl", bursts, 0.02)
        print(f"{burst(emit, 40_000):7.2f} µs an event                     to_jsonl, sustained")
        end()
        start = time.perf_counter()
        log = read_events(path)
        each = (time.perf_counter() - start) / len(log.events) * 1e6
        print(f"{each:7.2f} µs an event                     read_events ({len(log.events):,}, {len(log.problems)} problems)")
    end = Queued(dead, exit_s=0.1).listen()
    measure("an exporter that never answers", bursts, 0.0)
    start = time.perf_counter()
    end()
    print(f"{time.perf_counter() - start:7.2f} s                               to give it up at the end")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)

"""What an event costs the one who emits it, what sinks cost a training step, and how fast files are read back.

Events come in bursts with pauses, as training makes them; "sustained" has no pauses, so that the writer's thread competes for the
interpreter. A step is one of the `fake` backend's, a few milliseconds and so a hundredth of a real one. `*_step_share` is the processor
time, of all threads, of what a step emits over that of the step. `*_step_ratio` is that of whole steps with a sink over those without, the
median of blocks that alternate; it says the same with the noise of a busy machine.

usage: python benchmarks/events.py [bursts] [--limits]   (--limits: exit code 1 where a promise is not kept)
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import crucible_framework as cf
from crucible_framework import events
from crucible_framework.sinks import Queued, read_events, to_jsonl

BURST = 500
PAIRS, STEPS = 60, 8
LIMITS = {"none_us": 1.0, "jsonl_us": 2.0, "dead_us": 2.0, "dead_exit_s": 0.5, "jsonl_step_share": 0.02, "slow_step_share": 0.02, "dead_step_share": 0.02}
RESULTS = Path(__file__).parent / "results" / "events.json"


def emit(step: int) -> None:
    events.emit("training.step", step=step, loss=0.5, grad_norm=1.25, lr=1e-4, tokens=400)


def burst(call: Callable[[int], None], size: int = BURST) -> float:
    """Microseconds an event."""
    start = time.perf_counter()
    for step in range(size):
        call(step)
    return (time.perf_counter() - start) / size * 1e6


def median_burst(call: Callable[[int], None], bursts: int, pause_s: float) -> float:
    found = []
    for _ in range(bursts):
        found.append(burst(call))
        time.sleep(pause_s)
    return statistics.median(found)


def span(step: int) -> None:
    with events.span("work", step=step):
        pass


def dead(_: object) -> None:
    time.sleep(3600)


def slow(_: object) -> None:
    time.sleep(0.2)


class Steps:
    """Blocks of training steps with and without a sink, in one run."""

    def __init__(self, start_sink: Callable[[], Callable[[], None]]) -> None:
        self.start_sink, self.end = start_sink, None
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        self.since, self.count = time.process_time(), 0

    def __call__(self, _: object) -> None:
        self.count += 1
        if self.count % STEPS:
            return
        now = time.process_time()
        on = self.end is not None
        self.seconds[on].append(now - self.since)
        if self.end is not None:
            self.end()
            self.end = None
        else:
            self.end = self.start_sink()
        self.since = time.process_time()


def share(start_sink: Callable[[], Callable[[], None]], step_s: float) -> float:
    """Of a step: what it emits (two spans and an event), paced as steps are, and all that the sink's thread does."""
    end = start_sink()
    seconds, count = 0.0, 400
    for step in range(count):
        start = time.process_time()
        with events.span("training.forward_backward", examples=8, tokens=400) as inner:
            inner.set(loss=0.5)
        with events.span("training.optim_step", lr=1e-4) as inner:
            inner.set(step=step, grad_norm=1.0)
        emit(step)
        seconds += time.process_time() - start
        time.sleep(step_s / 10)
    start = time.process_time()
    end()
    return (seconds + time.process_time() - start) / count / step_s


def steps_with(start_sink: Callable[[], Callable[[], None]]) -> tuple[float, float]:
    """(the median ratio of steps with a sink to those without, processor seconds of a step without)."""
    config = cf.TrainConfig(base_model="tiny", max_steps=2 * PAIRS * STEPS + 1, checkpoint_interval=0, batch_size=8)
    data = cf.load_dataset("minifact", split="train", limit=64)
    steps = Steps(start_sink)
    with cf.connect("fake") as backend, cf.Trainer(backend, config, callbacks=[steps]) as trainer:
        trainer.train(data)
    if steps.end is not None:
        steps.end()
    off, on = steps.seconds[False][2:], steps.seconds[True][2:]
    return statistics.median(b / a for a, b in zip(off, on, strict=False)), statistics.median(off) / STEPS


def costs(bursts: int, folder: Path) -> dict[str, float]:
    found = {"none_us": median_burst(emit, bursts, 0.0), "span_none_us": median_burst(span, bursts, 0.0)}
    path = folder / "events.jsonl"
    end = to_jsonl(path)
    found["jsonl_us"] = median_burst(emit, bursts, 0.02)
    found["span_jsonl_us"] = median_burst(span, bursts, 0.02)
    found["jsonl_sustained_us"] = burst(emit, 40_000)
    end()
    start = time.perf_counter()
    log = read_events(path)
    found["read_us"] = (time.perf_counter() - start) / len(log.events) * 1e6
    if log.problems:
        raise SystemExit(f"{len(log.problems)} lines were damaged: {log.problems[0]}")
    end = Queued(dead, exit_s=0.1).listen()
    found["dead_us"] = median_burst(emit, bursts, 0.0)
    start = time.perf_counter()
    end()
    return found | {"dead_exit_s": time.perf_counter() - start}


def main(bursts: int, check: bool) -> int:
    """Prints a line a figure, and writes all of them to benchmarks/results/events.json."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        found = costs(bursts, folder)
        sinks: dict[str, Callable[[], Callable[[], None]]] = {
            "jsonl": lambda: to_jsonl(folder / "steps.jsonl"),
            "slow": lambda: Queued(slow, exit_s=0.0).listen(),
            "dead": lambda: Queued(dead, exit_s=0.0).listen(),
        }
        for name, start_sink in sinks.items():
            found[f"{name}_step_ratio"], step_s = steps_with(start_sink)
            found[f"{name}_step_share"] = share(start_sink, step_s)
    found["step_ms"] = step_s * 1e3
    missed = [name for name, limit in LIMITS.items() if found[name] > limit]
    for name, value in found.items():
        print(f"{value:9.3f}  {name}" + (f"  (at most {LIMITS[name]:g}{', MISSED' if name in missed else ''})" if name in LIMITS else ""))
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    RESULTS.write_text(json.dumps({"figures": {k: round(v, 4) for k, v in found.items()}, "limits": LIMITS, "on": machine}, indent=2) + "\n", encoding="utf-8")
    return int(check and bool(missed))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--limits"]
    sys.exit(main(int(words[0]) if words else 40, "--limits" in sys.argv))

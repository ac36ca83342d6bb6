"""What gradient hooks cost, as a share of a training step of the local engine. `--base-model tiny` needs no download.

The hook's time is measured inside the steps, so that the share is of the same work. Expected: the hook `norms` takes at most 3 % of a step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator

import crucible_framework as cf
from crucible_framework.protocols import GradientHook, Gradients, Report
from crucible_framework.training import add_noise, chain, clip_layers, noise_scale

HOOKS = {"norms": ("norms",), "health": ("health",), "flow": ("flow",), "cosine": ("cosine",), "distribution": ("distribution",)}


def timed(hook: GradientHook, spent: list[float]) -> GradientHook:
    def run(gradients: Gradients, report: Report) -> Gradients:
        start = time.perf_counter()
        changed = hook(gradients, report)
        spent.append(time.perf_counter() - start)
        return changed

    return run


def hooks() -> Iterator[tuple[str, GradientHook]]:
    for name, parts in HOOKS.items():
        yield name, chain(*parts)
    yield "noise_scale", noise_scale(4)
    yield "clip_layers", clip_layers(1.0)
    yield "add_noise", add_noise(1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="tiny")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    dataset = cf.load_dataset("minifact", split="train", limit=64)
    spent: dict[str, list[float]] = {}
    made = [timed(hook, spent.setdefault(name, [])) for name, hook in hooks()]
    times: list[float] = []

    def watch(progress: object) -> None:
        if getattr(progress, "kind", "") == "step":
            times.append(time.perf_counter())

    config = cf.TrainConfig(base_model=args.base_model, max_steps=args.steps, checkpoint_interval=0)
    with cf.connect("local") as backend, cf.Trainer(backend, config, hook=chain(*made), callbacks=[watch]) as trainer:
        trainer.train(dataset)
    whole = statistics.median(b - a for a, b in itertools.pairwise(times))
    step = whole - sum(statistics.median(found) for found in spent.values())
    print(f"{args.base_model}: a step without hooks takes {1000 * step:.1f} ms (median of {len(times) - 1}, batch size {config.batch_size})")
    for name, found in spent.items():
        middle = statistics.median(found)
        print(f"{name:14} {1000 * middle:8.2f} ms  {100 * middle / step:6.2f} % of a step")


if __name__ == "__main__":
    main()

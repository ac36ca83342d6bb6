"""How cost grows: a training step with the tokens of one sequence, and a batch of samples with the adapters in it.

usage: python benchmarks/growth.py [--model NAME] [--rounds N] [--save]

One thread, CPU seconds, medians; the sizes take turns. Every size is put beside the straight line through the smallest one and zero. --save
writes benchmarks/results/growth.json and the two pictures of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from engine import datum, ours
from sampling import adapter
from sampling import ours as drawn

from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.bases import load_base
from crucible_framework.config import places
from crucible_framework.dashboard.figures import plot_svg
from crucible_framework.records import Batch
from crucible_framework.reports.parts import LineChart, Series, Table

LENGTHS = (256, 512, 1024, 2048, 4096)
ADAPTERS = (1, 2, 4, 8)
ROOT = Path(__file__).parent


def medians(work: Mapping[int, Callable[[], object]], rounds: int) -> dict[int, float]:
    """CPU seconds by size."""
    took: dict[int, list[float]] = {size: [] for size in work}
    for turn in range(rounds + 1):
        for size, one in work.items():
            start = time.process_time()
            one()
            if turn:  # the first one warms up
                took[size].append(time.process_time() - start)
    return {size: statistics.median(times) for size, times in took.items()}


def chart(title: str, what: str, found: Mapping[int, float]) -> LineChart:
    """The measured curve and the straight one."""
    sizes, first = tuple(map(float, found)), next(iter(found.items()))
    straight = tuple(first[1] * size / first[0] for size in found) if what == "tokens" else tuple(first[1] for _ in found)
    name = "in proportion to tokens" if what == "tokens" else "as with one"
    series = (Series(name="measured", x=sizes, y=tuple(found.values()), role="hue0"), Series(name=name, x=sizes, y=straight, role="hue1"))
    rows = tuple((f"{size:,}", f"{value:.2f}") for size, value in found.items())
    table = Table(title=title, columns=(what, "CPU seconds"), rows=rows, source="", numeric=(0, 1))
    return LineChart(title=title, x_label=what, y_label="CPU seconds", series=series, source="benchmarks/growth.py", values=table)


def main() -> None:
    """Measures, prints, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    base = load_base(given.model, cache=places().cache, dtype=None, device=torch.device("cpu"))
    batches = {length: Batch(data=(datum(0, rng.integers(0, base.vocab_size, length), length // 4),)) for length in LENGTHS}
    training = medians({length: ours(base, batch) for length, batch in batches.items()}, given.rounds)
    backend = LocalBackend(threads=1)
    samplers = [adapter(backend, given.model, seed) for seed in range(max(ADAPTERS))]
    prompts = [tuple(rng.integers(0, base.vocab_size, 48).tolist()) for _ in range(32)]
    sampling = medians({many: drawn(samplers[:many], prompts, [32] * 32) for many in ADAPTERS}, given.rounds)
    charts = {
        "growth-tokens": chart("A training step on one sequence", "tokens", training),
        "growth-adapters": chart("32 samples of 32 tokens, adapters mixed in one batch", "adapters", sampling),
    }
    for one in charts.values():
        print(one.title, *(f"{' '.join(row)} s" for row in one.values.rows), sep="\n  ")
    if given.save:
        results = {
            "torch": torch.__version__,
            "dtype": str(base.model.get_submodule("lm_head.linear").weight.dtype),
            "training": training,
            "sampling": sampling,
        }
        (ROOT / "results" / "growth.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        for name, one in charts.items():
            (ROOT.parent / "docs" / "pictures").mkdir(exist_ok=True)
            (ROOT.parent / "docs" / "pictures" / f"{name}.svg").write_text(plot_svg(one, name), encoding="utf-8")


if __name__ == "__main__":
    main()

"""How cost grows: a training step with the tokens of one sequence, and a batch of samples with the adapters in it.

usage: python benchmarks/growth.py [--longest] [--model NAME] [--rounds N] [--save]      or: [--model NAME] --step TOKENS

One thread, CPU seconds, medians; the sizes take turns. Every size is put beside the straight line through the smallest one and zero. The peak memory
is that of a fresh process which loads the model and trains a step on 64 tokens and one on so many (`--step TOKENS`, which prints what it took as JSON).
--longest adds 8,192 tokens to the table, in such a process only: its seconds are those of the one step. --save writes
benchmarks/results/growth.json and the two pictures of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from engine import datum, ours
from sampling import adapter
from sampling import ours as drawn

from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.bases import Base, load_base
from crucible_framework.config import places
from crucible_framework.dashboard.figures import plot_svg
from crucible_framework.records import Batch
from crucible_framework.reports.parts import LineChart, Series, Table

LENGTHS = (256, 512, 1024, 2048, 4096)
LONGEST = 8192
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


def sequence(base: Base, tokens: int) -> Batch:
    """One random sequence, of which the last quarter counts."""
    return Batch(data=(datum(0, np.random.default_rng(tokens).integers(0, base.vocab_size, tokens), tokens // 4),))


def peak_bytes() -> int | None:
    """The most memory that this process has had, or None where the system does not tell. Not `ru_maxrss`, which begins with that of the parent."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def one_step(model: str, tokens: int) -> dict[str, float | int | None]:
    """CPU seconds of a step on one sequence, after one on 64 tokens, and the peak memory of this process with all that it has loaded."""
    base = load(model)
    ours(base, sequence(base, 64))()
    step = ours(base, sequence(base, tokens))
    start = time.process_time()
    step()
    return {"seconds": time.process_time() - start, "peak_bytes": peak_bytes()}


def fresh_process(model: str, tokens: int) -> dict[str, float | int | None]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--step", str(tokens)]
    found: dict[str, float | int | None] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)  # noqa: S603 - ours
    return found


def load(model: str) -> Base:
    """The model in the dtype that is usual on this processor."""
    return load_base(model, cache=places().cache, dtype=None, device=torch.device("cpu"))


def table(seconds: Mapping[int, float], peaks: Mapping[int, float | int | None]) -> str:
    """Markdown."""
    lines = ["| tokens | CPU seconds | ms per token | peak memory, GB |", "|---:|---:|---:|---:|"]
    for tokens, value in seconds.items():
        peak = peaks[tokens]
        lines.append(f"| {tokens:,} | {value:.2f} | {1000 * value / tokens:.2f} | {'' if peak is None else f'{peak / 1e9:.2f}'} |")
    return "\n".join(lines)


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
    parser.add_argument("--longest", action="store_true", help=f"also a sequence of {LONGEST:,} tokens")
    parser.add_argument("--step", type=int, metavar="TOKENS", help="only one step in this process")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.step:
        print(json.dumps(one_step(given.model, given.step)))
        return
    base = load(given.model)  # first, because it prepares weights where that was never done, which takes memory of its own
    lengths = [length for length in (*LENGTHS, LONGEST) if length <= base.context and (given.longest or length < LONGEST)]
    alone = {length: fresh_process(given.model, length) for length in lengths}
    rng = np.random.default_rng(0)
    training = medians({length: ours(base, sequence(base, length)) for length in lengths if length < LONGEST}, given.rounds)
    backend = LocalBackend(threads=1)
    samplers = [adapter(backend, given.model, seed) for seed in range(max(ADAPTERS))]
    prompts = [tuple(rng.integers(0, base.vocab_size, 48).tolist()) for _ in range(32)]
    sampling = medians({many: drawn(samplers[:many], prompts, [32] * 32) for many in ADAPTERS}, given.rounds)
    charts = {
        "growth-tokens": chart("A training step on one sequence", "tokens", training),
        "growth-adapters": chart("32 samples of 32 tokens, adapters mixed in one batch", "adapters", sampling),
    }
    seconds = {tokens: found["seconds"] for tokens, found in alone.items()} | training
    print(table(seconds, {tokens: found["peak_bytes"] for tokens, found in alone.items()}))
    few = charts["growth-adapters"]
    print(f"\n{few.title}", *(f"{' '.join(row)} s" for row in few.values.rows), sep="\n  ")
    if given.save:
        results = {
            "torch": torch.__version__,
            "dtype": str(base.model.get_submodule("lm_head.linear").weight.dtype),
            "training": training,
            "fresh_process": alone,
            "sampling": sampling,
        }
        (ROOT / "results" / "growth.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        for name, one in charts.items():
            (ROOT.parent / "docs" / "pictures").mkdir(exist_ok=True)
            (ROOT.parent / "docs" / "pictures" / f"{name}.svg").write_text(plot_svg(one, name), encoding="utf-8")


if __name__ == "__main__":
    main()

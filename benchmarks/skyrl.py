"""A LoRA training step of the local engine beside the same step of SkyRL's JAX backend, which speaks Tinker's protocol too.

usage: python benchmarks/skyrl.py [--sequences 4] [--length 256] [--pairs 5] [--core N] [--save NAME]

SkyRL wants another Python environment than Crucible does; it needs no GPU:

    python -m venv ~/.cache/crucible/skyrl && ~/.cache/crucible/skyrl/bin/pip install 'skyrl-tx==0.3.0' jax

--skyrl PYTHON names another. Both train adapters of rank 16 on all linear layers but the head, without dropout, in fp32 on one thread, on the same
random tokens; AdamW follows every pass. After one step each that does not count (SkyRL compiles in it) the two take turns. Counted are the CPU seconds
of each process, so that other work on the machine counts little; figures are medians over the steps, ratios medians over pairs of neighbours.
An adapter's B starts at zero, so the first losses are those of the base model and must agree: otherwise nothing is printed but that.
Later losses part, because SkyRL draws A from He's uniform distribution, which is wider than PEFT's; the work of a step is the same.
SkyRL is held to one core, because XLA takes all it sees, and its padding is none here. --save NAME writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import crucible_framework as cf
from crucible_framework.backends.local.bases import locate
from crucible_framework.config import places
from crucible_framework.losses import resolve
from crucible_framework.records import AdamConfig, Batch, Datum

HERE = Path(__file__).parent
LORA = cf.LoraConfig(rank=16, alpha=32.0, dropout=0.0, target_modules=("all-linear",))
ADAM = AdamConfig(max_grad_norm=None)
AGREE = 1e-3
"""How far the first losses may be apart, as a share."""

Step = Callable[[], tuple[float, float]]
"""Makes a step; gives its loss in nats per token and its CPU seconds."""


def has_skyrl(python: Path) -> bool:
    """Whether that Python is there and has SkyRL and JAX."""
    try:
        return subprocess.run([str(python), "-c", "import tx.tinker, jax"], capture_output=True, check=False).returncode == 0  # noqa: S603  # the user's choice
    except OSError:
        return False


class SkyRL:
    """The worker under SkyRL's own Python."""

    def __init__(self, python: Path, folder: Path, core: int) -> None:
        given = {"folder": str(folder), "dtype": "float32", "rank": LORA.rank, "alpha": LORA.alpha, "core": core}
        self._worker = subprocess.Popen(  # noqa: S603  # the program is the user's choice, the script ours
            [str(python), str(HERE / "workers" / "skyrl.py"), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._worker.stdout is not None
        line = self._worker.stdout.readline()
        if not line:
            raise SystemExit(f"SkyRL's worker ended with code {self._worker.wait()}; the reason stands above.")
        return dict(json.loads(line))

    def ask(self, **request: object) -> dict[str, Any]:
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        return self._answer()

    def step(self, batch: Batch) -> Step:
        """Steps on the batch, as SkyRL's engine would ask for them."""
        data = [{"tokens": d.tokens.tolist(), "targets": d.targets.tolist(), "weights": d.weights.tolist()} for d in batch.data]
        adam = {"learning_rate": ADAM.lr, "beta1": ADAM.beta1, "beta2": ADAM.beta2, "eps": ADAM.eps, "weight_decay": ADAM.weight_decay}

        def step() -> tuple[float, float]:
            found = self.ask(do="step", data=data, adam=adam)
            return found["loss"], found["cpu_s"]

        return step

    def close(self) -> None:
        """Its input ends, and so does it."""
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait()


def ours(session: Any, batch: Batch) -> Step:
    """Steps of the local engine on the batch."""
    loss = resolve("cross_entropy")

    def step() -> tuple[float, float]:
        start = time.process_time()
        found = session.forward_backward(batch, loss).result()
        session.optim_step(ADAM).result()
        return found.loss, time.process_time() - start

    return step


def random_batch(sequences: int, length: int) -> Batch:
    """Random tokens, all of which count; no two sequences start alike."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(10, 40000, length + 1) for _ in range(sequences)]
    weights = np.ones(length, np.float32)
    return Batch(data=tuple(Datum(id=str(i), tokens=t[:-1].astype(np.int32), targets=t[1:].astype(np.int64), weights=weights) for i, t in enumerate(rows)))


def compare(mine: Step, theirs: Step, pairs: int) -> dict[str, Any]:
    """First losses, then CPU seconds in turns."""
    first = {"crucible": mine(), "skyrl": theirs()}
    losses = {name: loss for name, (loss, _) in first.items()}
    apart = abs(losses["crucible"] / losses["skyrl"] - 1)
    print(f"first losses {losses['crucible']:.6f} and {losses['skyrl']:.6f} nats per token, {apart:.1e} apart", flush=True)
    if not apart <= AGREE:
        raise SystemExit(f"The first losses are {apart:.1e} apart, more than {AGREE:.0e}: the two do not compute the same, so their times say nothing.")
    found: dict[str, list[tuple[float, float]]] = {"crucible": [], "skyrl": []}
    for i in range(pairs):
        found["crucible"].append(mine())
        found["skyrl"].append(theirs())
        print(f"pair {i + 1}: crucible {found['crucible'][-1][1]:.2f} s, SkyRL {found['skyrl'][-1][1]:.2f} s", flush=True)
    return {
        "first_losses": losses,
        "first_cpu_s": {name: cpu_s for name, (_, cpu_s) in first.items()},
        "losses": {name: [loss for loss, _ in steps] for name, steps in found.items()},
        "cpu_s": {name: [cpu_s for _, cpu_s in steps] for name, steps in found.items()},
    }


def summary(cpu_s: dict[str, Sequence[float]], tokens: int) -> dict[str, Any]:
    """Tokens per CPU second of each, and how many times faster Crucible is."""
    ratios = [theirs / own for own, theirs in zip(cpu_s["crucible"], cpu_s["skyrl"], strict=True)]
    return {
        "tokens_per_s": {name: tokens / statistics.median(seconds) for name, seconds in cpu_s.items()},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="that SkyRL is held to")
    parser.add_argument("--skyrl", type=Path, default=places().cache / "skyrl" / "bin" / "python", metavar="PYTHON", help="that has skyrl-tx")
    parser.add_argument("--save", metavar="NAME")
    given = parser.parse_args()
    if not has_skyrl(given.skyrl):
        venv = places().cache / "skyrl"
        print(f"There is no SkyRL under {given.skyrl}. Make it: python -m venv {venv} && {venv}/bin/pip install 'skyrl-tx==0.3.0' jax", file=sys.stderr)
        raise SystemExit(2)
    batch = random_batch(given.sequences, given.length)
    with cf.connect("local", dtype="float32", threads=1) as backend:
        session = backend.train(given.model, LORA)
        skyrl = SkyRL(given.skyrl, locate(given.model, places().cache, None), given.core)
        try:
            found = compare(ours(session, batch), skyrl.step(batch), given.pairs)
        finally:
            skyrl.close()
    found |= summary(found["cpu_s"], batch.tokens)
    rates, ratios = found["tokens_per_s"], found["ratios"]
    print(f"\n{given.model}, {given.sequences} x {given.length} tokens, fp32, one thread, {given.pairs} pairs, torch {torch.__version__}, {skyrl.about}")
    print(f"tokens per CPU second: crucible {rates['crucible']:.0f}, SkyRL {rates['skyrl']:.0f}")
    print(f"crucible is {found['ratio']:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    if given.save:
        target = HERE / "results" / f"{given.save}.json"
        setting = {"model": given.model, "sequences": given.sequences, "length": given.length, "pairs": given.pairs, "dtype": "float32", "threads": 1}
        target.write_text(json.dumps({"setting": setting, "torch": torch.__version__, "skyrl": skyrl.about, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

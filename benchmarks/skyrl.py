"""LoRA training steps of the local engine beside the same steps of SkyRL's JAX backend, which speaks Tinker's protocol too.

usage: python benchmarks/skyrl.py [--rounds 5] [--dtypes float32 bfloat16] [--core N] [--save NAME]      15 minutes, 16 GB

SkyRL wants another Python environment than Crucible does; it needs no GPU:

    python -m venv ~/.cache/crucible/skyrl && ~/.cache/crucible/skyrl/bin/pip install 'skyrl-tx[tinker]==0.3.0' jax flax optax

--skyrl PYTHON names another. Both train adapters of rank 16 on all linear layers but the head, without dropout, on one thread; AdamW follows every
pass. Two batches: 4 x 256 random tokens that all count, where SkyRL has nothing to pad, and eight sequences of 32 to 300 tokens of which the last third
counts, as in training on answers. After one step each that does not count (SkyRL compiles in it) the contenders take turns. Counted are the CPU seconds
of each process, so that other work on the machine counts little; figures are medians over the steps, ratios medians over neighbours, against the
dtype in which SkyRL is the faster one.
An adapter's B starts at zero, so the first losses are those of the base model and must agree: otherwise nothing is printed but that.
Later losses part, because SkyRL draws A from He's uniform distribution, which is wider than PEFT's; the work of a step is the same.
SkyRL is held to one core, because XLA takes all it sees. --save NAME writes benchmarks/results/NAME.json.
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
AGREE = {"float32": 1e-3, "bfloat16": 1e-2}
"""How far the first losses of SkyRL may be from ours, as a share."""
LENGTHS = (32, 60, 95, 120, 150, 186, 230, 300)

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

    def __init__(self, python: Path, folder: Path, core: int, dtype: str) -> None:
        given = {"folder": str(folder), "dtype": dtype, "rank": LORA.rank, "alpha": LORA.alpha, "core": core}
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


def batches() -> dict[str, Batch]:
    """Random tokens; no two sequences start alike."""
    rng = np.random.default_rng(0)

    def datum(name: int, length: int, counted: int) -> Datum:
        tokens = rng.integers(10, 40000, length + 1)
        weights = np.zeros(length, np.float32)
        weights[-counted:] = 1.0
        return Datum(id=str(name), tokens=tokens[:-1].astype(np.int32), targets=tokens[1:].astype(np.int64), weights=weights)

    return {
        "4 x 256 tokens": Batch(data=tuple(datum(i, 256, 256) for i in range(4))),
        "8 x 32 to 300 tokens, a third counts": Batch(data=tuple(datum(i, length, length // 3) for i, length in enumerate(LENGTHS))),
    }


def compare(steps: dict[str, Step], rounds: int) -> dict[str, Any]:
    """First losses, then CPU seconds in turns, per contender."""
    first = {name: step() for name, step in steps.items()}
    for name, (loss, _) in first.items():
        dtype = name.split()[-1]
        apart = abs(loss / first[f"crucible {dtype}"][0] - 1)
        print(f"{name}: first loss {loss:.6f} nats per token, {apart:.1e} from ours", flush=True)
        if not apart <= AGREE[dtype]:
            raise SystemExit(f"The first losses are {apart:.1e} apart: the two do not compute the same, so their times say nothing.")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for i in range(rounds):
        for name, step in steps.items():
            found[name].append(step())
        print(f"round {i + 1}: " + ", ".join(f"{name} {runs[-1][1]:.2f} s" for name, runs in found.items()), flush=True)
    return {
        "first_losses": {name: loss for name, (loss, _) in first.items()},
        "first_cpu_s": {name: cpu_s for name, (_, cpu_s) in first.items()},
        "losses": {name: [loss for loss, _ in runs] for name, runs in found.items()},
        "cpu_s": {name: [cpu_s for _, cpu_s in runs] for name, runs in found.items()},
    }


def summary(found: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Tokens per CPU second of each, and how many times faster ours is than the better SkyRL, in the rounds that they shared."""
    rates = [{name: tokens / statistics.median(seconds) for name, seconds in one["cpu_s"].items()} for one in found]
    speeds = [next(rate for name, rate in one.items() if name.startswith("skyrl")) for one in rates]
    there = speeds.index(max(speeds))
    best = next(name for name in rates[there] if name.startswith("skyrl"))
    cpu_s = found[there]["cpu_s"]
    ratios = {name: [theirs / own for own, theirs in zip(seconds, cpu_s[best], strict=True)] for name, seconds in cpu_s.items() if name.startswith("crucible")}
    return {"tokens_per_s": rates, "best": best, "ratios": ratios, "ratio": {name: statistics.median(some) for name, some in ratios.items()}}


def measure(given: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Per batch what `compare` finds beside SkyRL in each dtype, with the summary, and what SkyRL says of itself."""
    folder, found, about = locate(given.model, places().cache, None), dict[str, Any](), list[dict[str, Any]]()
    backends = {dtype: cf.connect("local", dtype=dtype, threads=1) for dtype in AGREE}
    for name, batch in batches().items():
        runs = list[dict[str, Any]]()
        for dtype in given.dtypes:  # one SkyRL at a time: the second batch takes one of them 14 GB
            print(f"\n{name}, SkyRL in {dtype}", flush=True)
            worker = SkyRL(given.skyrl, folder, given.core, dtype)
            try:
                steps = {f"crucible {own}": ours(backend.train(given.model, LORA), batch) for own, backend in backends.items()}
                runs.append(compare({**steps, f"skyrl {dtype}": worker.step(batch)}, given.rounds))
            finally:
                worker.close()
            about.append(worker.about)
        found[name] = {"runs": runs, **summary(runs, batch.tokens)}
    for backend in backends.values():
        backend.close()
    return found, about


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=list(AGREE), default=list(AGREE), help="of SkyRL; ours runs in both")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="that SkyRL is held to")
    parser.add_argument("--skyrl", type=Path, default=places().cache / "skyrl" / "bin" / "python", metavar="PYTHON", help="that has skyrl-tx")
    parser.add_argument("--save", metavar="NAME")
    given = parser.parse_args()
    if not has_skyrl(given.skyrl):
        venv = places().cache / "skyrl"
        print(
            f"There is no SkyRL under {given.skyrl}. Make it: python -m venv {venv} && {venv}/bin/pip install 'skyrl-tx[tinker]==0.3.0' jax flax optax",
            file=sys.stderr,
        )
        raise SystemExit(2)
    found, skyrl = measure(given)
    print(f"\n{given.model}, one thread, {given.rounds} rounds, torch {torch.__version__}, {skyrl}")
    for batch, one in found.items():
        for rates in one["tokens_per_s"]:
            print(f"\n{batch}: tokens per CPU second " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
        for name, ratios in one["ratios"].items():
            print(f"{name} is {one['ratio'][name]:.2f} times as fast as {one['best']} ({min(ratios):.2f} to {max(ratios):.2f})")
    if given.save:
        target = HERE / "results" / f"{given.save}.json"
        setting = {"model": given.model, "rounds": given.rounds, "threads": 1, "torch": torch.__version__, "skyrl": skyrl}
        target.write_text(json.dumps({"setting": setting, "batches": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

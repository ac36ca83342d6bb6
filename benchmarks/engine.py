"""The local engine beside the plain PEFT + transformers loop and beside what this machine's matmul allows.

usage: python benchmarks/engine.py [--full] [--alone] [--only CONTENDER] [--without FEATURE] [--model NAME] [--threads N] [--save NAME]

All contenders take turns in one process, so that a busy machine slows all alike; every figure is a median, every ratio the median over
pairs of neighbours, against the best of the plain loops (fp32, bf16, autocast). "of the GEMM limit" is the time that the products LoRA needs
would take at the contender's own dtype's rate, measured between the rounds. Each case stops after seven rounds, or after a minute (four with
--full) and the round it is in. With one thread CPU seconds are counted, not those of the wall.

--alone measures the local engine's training steps only, and loads no peer. --only chooses among its contenders; those in bf16, and such peers, take part
only where the processor is fast at it. Small batches of several sessions are those of the first one chosen. --without switches instructions off, see
instructions.py.
--save NAME writes benchmarks/results/NAME.json and NAME.md; nothing is written without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import instructions  # before torch
import numpy as np
import torch

from crucible_framework.backends.local import engine
from crucible_framework.backends.local.bases import Base, load_base, locate
from crucible_framework.backends.local.lora import Active, init_adapter, layer_names, tensor_shapes
from crucible_framework.backends.local.optim import adamw, fresh, global_norm
from crucible_framework.backends.local.sizes import fast_bf16
from crucible_framework.config import places
from crucible_framework.losses import resolve
from crucible_framework.records import AdamConfig, Batch, Datum, LoraConfig

LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",))
ADAM = AdamConfig(lr=1e-4)
SCIFACT_LIKE = (32, 60, 95, 120, 150, 186, 230, 300)
"""Tokens of the eight sequences of a batch."""
ROUNDS = 7
BF16, FP32 = torch.bfloat16, torch.float32
CONTENDERS: dict[str, tuple[Literal["fast", "torch"], torch.dtype]]
CONTENDERS = {"fast bf16": ("fast", BF16), "torch bf16": ("torch", BF16), "fast fp32": ("fast", FP32), "torch fp32": ("torch", FP32)}
"""Ways through the local engine."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Step = Callable[[], object]


def datum(name: int, tokens: Any, weighted: int) -> Datum:
    """A sequence whose last `weighted` positions are trained on."""
    weights = np.zeros(len(tokens), np.float32)
    weights[-weighted:] = 1.0
    return Datum(id=str(name), tokens=tokens.astype(np.int32), targets=np.roll(tokens, -1).astype(np.int64), weights=weights)


def batches(vocab: int) -> dict[str, Batch]:
    """What is trained: claims about one passage as the demo has them, and sequences of many lengths."""
    rng = np.random.default_rng(0)
    passage = rng.integers(0, vocab, 200)
    claims = tuple(datum(i, np.concatenate([passage, rng.integers(0, vocab, 15)]), 3) for i in range(9))
    mixed = tuple(datum(i, rng.integers(0, vocab, length), max(4, length // 3)) for i, length in enumerate(SCIFACT_LIKE))
    return {"9 claims about one passage": Batch(data=claims), "lengths 32-300": Batch(data=mixed)}


def ours(base: Base, batch: Batch) -> Step:
    """One training step of the local engine: forward, backward, clipped AdamW."""
    names = layer_names(base.layers, LORA, base.head)
    adapter = init_adapter(tensor_shapes(base.layers, names, LORA.rank), 0, base.device)
    state, loss = fresh(adapter), resolve("cross_entropy")
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        nonlocal adapter, state
        active = Active(adapter, LORA.alpha / LORA.rank, LORA.dropout, generator)
        _, gradients = engine.evaluate(base, batch, loss, active, train=True)
        adapter, state = adamw(adapter, gradients, state, ADAM, global_norm(gradients))

    return step


def peft_loop(folder: str, batch: Batch, dtype: torch.dtype, *, autocast: bool = False) -> Step:
    """The same step as a plain loop: padded to the longest, labels −100 where nothing is trained, the model's own loss."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), lora_dropout=LORA.dropout, target_modules=list(LINEAR), task_type="CAUSAL_LM")
    tuned: Any = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=ADAM.lr)
    longest = max(len(d) for d in batch.data)
    ids, labels = torch.zeros(len(batch.data), longest, dtype=torch.long), torch.full((len(batch.data), longest), -100)
    mask = torch.zeros_like(ids)
    for row, d in enumerate(batch.data):
        ids[row, : len(d)], mask[row, : len(d)] = torch.from_numpy(d.tokens), 1
        trained = np.flatnonzero(d.weights)
        labels[row, trained] = torch.from_numpy(d.tokens[trained]).long()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of square products, now."""
    a = torch.randn(1024, 1024).to(dtype)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(8):
        torch.mm(a, a)
    return 8 * 2 * 1024**3 / (clock() - start)


def needed(base: Base, batch: Batch) -> float:
    """FLOPs of the products of one step: forward, gradients of inputs, adapters, the head's trained rows; each common start once."""
    from crucible_framework.backends.local.layout import lay_out

    tokens = sum(one.tokens for one in lay_out([d.tokens for d in batch.data], base.device, share=base.takes_masks, pack=True))
    rows = sum(int((d.weights != 0).sum()) for d in batch.data)
    shapes = [shape for name, shape in base.layers.items() if name != base.head]
    matrices = sum(out * into for out, into in shapes)
    adapters = sum(LORA.rank * (out + into) for out, into in shapes)
    out, into = base.layers[base.head]
    return 4.0 * tokens * matrices + 6.0 * tokens * adapters + 4.0 * rows * out * into


def in_turns(steps: Mapping[str, Step], budget_s: float, between: Callable[[], float] = lambda: 0.0) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every contender in every round, and what was measured between the rounds; up to `ROUNDS` rounds, at least one.

    CPU seconds of the process where it has one thread: what others do on the machine then counts for little.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + budget_s
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = list[float]()
    while not rates or (len(rates) < ROUNDS and time.perf_counter() < end):
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)
        rates.append(between())
    return times, rates


def lines_of(case: str, times: Mapping[str, Sequence[float]], tokens: int, limits: Mapping[str, Sequence[float]], peers: Sequence[str]) -> list[dict[str, Any]]:
    """The table's lines of one case; without peers nothing says how many times faster one is."""
    peer = times[min(peers, key=lambda name: statistics.median(times[name]))] if peers else None
    lines = []
    for name, mine in times.items():
        speed = None if peer is None else statistics.median(other / own for other, own in zip(peer, mine, strict=True))
        share = statistics.median(least / own for least, own in zip(limits[name], mine, strict=True)) if name in limits else None
        lines.append(
            {
                "case": case,
                "contender": name,
                "rounds": len(mine),
                "seconds": {"median": statistics.median(mine), "least": min(mine), "most": max(mine)},
                "tokens_per_s": tokens / statistics.median(mine),
                "times_peer": speed,
                "of_gemm_limit": share,
            }
        )
    return lines


def peft_loops(folder: str, batch: Batch) -> dict[str, tuple[Step, torch.dtype]]:
    """The plain loops that the local engine is held against, and the dtype that each multiplies in: in bf16 where the processor is fast at it."""
    loops = {"PEFT fp32": (peft_loop(folder, batch, FP32), FP32)}
    if fast_bf16():
        loops["PEFT bf16"] = peft_loop(folder, batch, BF16), BF16
        loops["PEFT autocast"] = peft_loop(folder, batch, FP32, autocast=True), BF16
    return loops


def training(bases: Mapping[str, tuple[Base, torch.dtype]], folder: str | None, *, budget_s: float) -> list[dict[str, Any]]:
    """Tokens are the batch's real ones: no padding, and a common start counts for every sequence that has it. Without a folder there are no peers."""
    rows, some = [], next(iter(bases.values()))[0]
    for case, batch in batches(some.vocab_size).items():
        peers = peft_loops(folder, batch) if folder else {}
        runs = {**peers, **{f"crucible {name}": (ours(base, batch), dtype) for name, (base, dtype) in bases.items()}}
        found: dict[torch.dtype, list[float]] = {dtype: [] for _, dtype in runs.values()}

        def rates(found: dict[torch.dtype, list[float]] = found) -> float:
            for dtype, so_far in found.items():
                so_far.append(gemm_rate(dtype))
            return 0.0

        times, _ = in_turns({name: step for name, (step, _) in runs.items()}, budget_s, rates)
        flops = needed(some, batch)
        limits = {name: [flops / rate for rate in found[dtype]] for name, (_, dtype) in runs.items()}
        rows += lines_of(case, times, batch.tokens, limits, list(peers))
    return rows


def sessions(base: Base, *, budget_s: float) -> list[dict[str, Any]]:
    """Small batches of several adapters one after another, and in one pass."""
    rng, loss, rows = np.random.default_rng(0), resolve("cross_entropy"), []
    names = layer_names(base.layers, LORA, base.head)
    for count, tokens in ((8, 64), (8, 32), (4, 100)):
        asked = []
        for number in range(count):
            adapter = init_adapter(tensor_shapes(base.layers, names, LORA.rank), number, base.device)
            given = Batch(data=(datum(number, rng.integers(0, base.vocab_size, tokens), tokens // 2),))
            asked.append(engine.Asked(given, loss, Active(adapter, LORA.alpha / LORA.rank, LORA.dropout, torch.Generator().manual_seed(number))))

        def in_a_row(asked: Sequence[engine.Asked] = tuple(asked)) -> None:
            for one in asked:
                engine.evaluate(base, one.batch, one.loss, one.active, train=True)

        steps: dict[str, Step] = {"one after another": in_a_row, "in one pass": lambda asked=tuple(asked): engine.evaluate_together(base, asked)}
        times, _ = in_turns(steps, budget_s)
        rows += lines_of(f"{count} sessions of {tokens} tokens", times, count * tokens, {}, ["one after another"])
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; a column that nobody fills is left out."""
    peers = any(found["times_peer"] is not None for found in rows)
    lines = [
        f"| work | engine | rounds | seconds (least to most) | tokens/s |{' × peer |' if peers else ''} of the GEMM limit |",
        f"|---|---|---:|---:|---:|{'---:|' if peers else ''}---:|",
    ]
    for found in rows:
        share = "" if found["of_gemm_limit"] is None else f"{found['of_gemm_limit']:.0%}"
        seconds = "{median:.3g} ({least:.3g} to {most:.3g})".format_map(found["seconds"])
        speed = f" {found['times_peer']:.2f} |" if peers else ""
        lines.append(f"| {found['case']} | {found['contender']} | {found['rounds']} | {seconds} | {found['tokens_per_s']:.0f} |{speed} {share} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more time per case")
    parser.add_argument("--alone", action="store_true", help="the local engine's training steps without peers")
    parser.add_argument("--only", metavar="CONTENDER", action="append", choices=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}; may be repeated")
    instructions.add_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", metavar="NAME")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    given = options()
    torch.set_num_threads(given.threads)
    cache, cpu = places().cache, torch.device("cpu")
    usual = [name for name, (_, dtype) in CONTENDERS.items() if fast_bf16() or dtype == FP32]
    chosen = {name: CONTENDERS[name] for name in given.only or usual}
    bases = {name: (load_base(given.model, cache=cache, dtype=dtype, device=cpu, engine=kind), dtype) for name, (kind, dtype) in chosen.items()}
    budget_s = 240.0 if given.full else 60.0
    rows = training(bases, None if given.alone else str(locate(given.model, cache, None)), budget_s=budget_s)
    if not given.alone:
        rows += sessions(next(iter(bases.values()))[0], budget_s=budget_s / 4)
    used = {name: dtype for name, dtype in (("fp32", FP32), ("bf16", BF16)) if dtype in {one for _, one in chosen.values()}}
    rates = ", ".join(f"{name} {gemm_rate(dtype) / 1e9:.0f}" for name, dtype in used.items())
    about = f"{given.model}, LoRA rank {LORA.rank} on all linear layers, {given.threads} threads, torch {torch.__version__}"
    about += f", without {' and '.join(given.without)}" if given.without else ""
    text = f"{about}; GFLOP/s at the end: {rates}\n\n{table(rows)}\n"
    print(text)
    if given.save:
        target = Path(__file__).parent / "results" / f"{given.save}.json"
        target.parent.mkdir(exist_ok=True)
        setting = {"torch": torch.__version__, "threads": given.threads, "without": given.without, "rates": rates}
        target.write_text(json.dumps({**setting, "rows": rows}, indent=1), encoding="utf-8")
        target.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

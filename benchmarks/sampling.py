"""Sampling by the local engine beside transformers' `generate`, beside llama.cpp, and beside what this machine's memory allows.

usage: python benchmarks/sampling.py [--full] [--model NAME] [--threads N] [--only CASE] [--without FEATURE] [--save NAME]

All contenders take turns in one process; every figure is a median over rounds, every ratio the median over pairs of neighbours. Five rounds,
or one minute per case (four with --full) and the round it is in. `generate` runs in fp32 and, where the processor is fast at it, bf16; ratios
are to the better one. "of the memory limit" is the rate at which the weights are read, by that at which two threads read memory, measured between
the rounds. Rows of the batch want 16 to 128 new tokens; `generate` pads and draws until the longest is done. llama.cpp takes part where
`xllamacpp` is installed, with the same weights as Q8_0. With one thread CPU seconds are counted, not those of the wall. --without switches
instructions off, see instructions.py; llama.cpp keeps them. --save NAME writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import instructions  # before torch
import numpy as np
import torch

from crucible_framework.backends.local import LocalBackend, engine
from crucible_framework.backends.local.bases import locate
from crucible_framework.backends.local.export import export_checkpoint
from crucible_framework.backends.local.lora import Active, init_adapter, layer_names, tensor_shapes
from crucible_framework.backends.local.sampling import Frozen, LocalSampler
from crucible_framework.backends.local.short import GROUP, GROUP_BYTES
from crucible_framework.backends.local.sizes import fast_bf16
from crucible_framework.config import places
from crucible_framework.losses import resolve
from crucible_framework.records import Batch, Datum, LoraConfig, SamplingParams

ROUNDS = 5
ALL = ("all-linear",)
Run = Callable[[], float]
"""Does the work once; gives how many tokens it made."""


def in_turns(runs: Mapping[str, Run], budget_s: float) -> tuple[dict[str, list[float]], list[float]]:
    """Tokens per second of every contender in every round, and bytes per second that memory gave between them."""
    end = time.perf_counter() + budget_s
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    memory = list[float]()
    while not memory or (len(memory) < ROUNDS and time.perf_counter() < end):
        for name, run in runs.items():
            start = clock()
            tokens = run()
            found[name].append(tokens / (clock() - start))
        memory.append(read_rate())
    return found, memory


@cache
def block() -> torch.Tensor:
    """Half a gigabyte, made when it is first read: growth.py imports this file and measures memory."""
    return torch.zeros(2**27)


def read_rate() -> float:
    """Bytes per second of reading `block`, the best of three."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    much, best = block(), 0.0
    for _ in range(3):
        start = clock()
        much.sum()
        best = max(best, 4 * much.numel() / (clock() - start))
    return best


def lines_of(
    case: str, found: Mapping[str, Sequence[float]], memory: Sequence[float], *, peers: Sequence[str], read: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The table's lines of one case. `read` is how many bytes a contender reads for one token."""
    best = max(peers, key=lambda name: statistics.median(found[name]))
    return [
        {
            "case": case,
            "contender": name,
            "rounds": len(rates),
            "tokens_per_s": statistics.median(rates),
            "times_best_peer": statistics.median(own / other for own, other in zip(rates, found[best], strict=True)),
            "of_memory_limit": statistics.median(rate * read[name] / limit for rate, limit in zip(rates, memory, strict=True)) if name in read else None,
        }
        for name, rates in found.items()
    ]


def prompts(count: int, length: int = 48) -> list[tuple[int, ...]]:
    """Random tokens of different lengths."""
    rng = np.random.default_rng(1)
    return [tuple(rng.integers(10, 40000, length + 5 * (i % 8)).tolist()) for i in range(count)]


def ours(samplers: Sequence[LocalSampler], asked: Sequence[tuple[int, ...]], new: Sequence[int], n: int = 1) -> Run:
    """Greedy completions of all prompts at once, the samplers in turn."""

    def run() -> float:
        futures = [
            samplers[i % len(samplers)].sample(prompt, SamplingParams(temperature=0, max_tokens=many), n=n)
            for i, (prompt, many) in enumerate(zip(asked, new, strict=True))
        ]
        return sum(len(completion.tokens) for future in futures for completion in future.result())

    return run


def generate(model: Any, asked: Sequence[tuple[int, ...]], new: Sequence[int]) -> Run:
    """The same with `generate`: padded on the left, until the longest is done; only what was asked counts."""
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])

    def run() -> float:
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(new), min_new_tokens=max(new), pad_token_id=0)
        return float(sum(new))

    return run


def adapter(backend: LocalBackend, model: str, seed: int) -> LocalSampler:
    """A sampler of random weights of rank 16 on all linear layers."""
    base = backend._base(model)
    shapes = tensor_shapes(base.layers, layer_names(base.layers, LoraConfig(target_modules=ALL), base.head), 16)
    source = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape, generator=source) * 0.01 for name, tensor in init_adapter(shapes, seed, base.device).items()}
    frozen: Future[Frozen] = Future()
    frozen.set_result(Frozen(base, Active(tensors, 2.0)))
    return backend.sampler_of(f"adapter {seed}", frozen)


def weight_bytes(backend: LocalBackend, model: str, item: float) -> float:
    """Bytes of the matrices that a token needs, of which fp32 ones may have a short form."""
    base = backend._base(model)
    if item == 4 and base.short is not None:
        item = 2 if base.short.numbers.dtype == torch.bfloat16 else GROUP_BYTES / GROUP
    return float(item * sum(out * into for out, into in base.layers.values()))


# ---------------------------------------------------------------------------------------------------------------- cases
def decoding(backends: Mapping[str, LocalBackend], model: str, peers: Mapping[str, Any], budget_s: float) -> list[dict[str, Any]]:
    """One sample, and 32 of 16 to 128 tokens."""
    rows = []
    lengths = np.random.default_rng(2).integers(16, 129, 32).tolist()
    sizes = {"float32": 4, "bfloat16": 2, "int8": 1}
    for case, asked, new in (("1 sample, 64 tokens", prompts(1), [64]), ("32 samples, 16-128 tokens", prompts(32), lengths)):
        runs: dict[str, Run] = {name: generate(peer, asked, new) for name, peer in peers.items()}
        runs |= {f"crucible {name}": ours([backend.sampler(model)], asked, new) for name, backend in backends.items()}
        read = {f"crucible {name}": weight_bytes(backend, model, sizes[name]) for name, backend in backends.items()} if len(asked) == 1 else {}
        found, memory = in_turns(runs, budget_s)
        rows += lines_of(case, found, memory, peers=list(peers), read=read)
    return rows


def adapters(backend: LocalBackend, model: str, budget_s: float) -> list[dict[str, Any]]:
    """One adapter and eight, and three members of an ensemble."""
    tuned = [adapter(backend, model, seed) for seed in range(8)]
    many: dict[str, Run] = {
        "one adapter": ours(tuned[:1], prompts(32), [32] * 32),
        "8 adapters": ours(tuned, prompts(32), [32] * 32),
        "no adapter": ours([backend.sampler(model)], prompts(32), [32] * 32),
    }
    rows = lines_of("32 samples, 32 tokens", *in_turns(many, budget_s), peers=["one adapter"], read={})
    question = prompts(1) * 3
    few: dict[str, Run] = {"one member": ours(tuned[:1], question[:1], [48]), "3 members": ours(tuned[:3], question, [48] * 3)}
    return rows + lines_of("1 prompt, 48 tokens each", *in_turns(few, budget_s), peers=["one member"], read={})


def prompts_and_scores(backend: LocalBackend, model: str, budget_s: float) -> list[dict[str, Any]]:
    """Reading prompts, sharing them, and log-probs beside the forward pass of training; tokens are those of all prompts."""
    fresh = np.random.default_rng(3)
    sampler, base = backend.sampler(model), backend._base(model)

    def reading(count: int, n: int) -> Run:
        def run() -> float:
            asked = [tuple(fresh.integers(10, 40000, 512).tolist()) for _ in range(count)]  # new ones, so that nothing is found again
            return ours([sampler], asked * (1 if n > 1 else 16 // count), [1] * (count if n > 1 else 16), n)() * 512

        return run

    rows = lines_of(
        "16 samples of a 512-token prompt", *in_turns({"16 prompts": reading(16, 1), "n=16": reading(1, 16)}, budget_s), peers=["16 prompts"], read={}
    )
    some = [np.random.default_rng(i).integers(10, 40000, 200) for i in range(64)]
    data = tuple(
        Datum(id=str(i), tokens=t[:-1].astype(np.int32), targets=t[1:].astype(np.int64), weights=np.r_[np.zeros(99), np.ones(100)].astype(np.float32))
        for i, t in enumerate(some)
    )

    def forward() -> float:
        zero = init_adapter(tensor_shapes(base.layers, layer_names(base.layers, LoraConfig(target_modules=ALL), base.head), 16), 0, base.device)
        backend.submit(engine.evaluate, base, Batch(data=data), resolve("cross_entropy"), Active(zero, 2.0), train=False).result()
        return 64.0 * 200

    def scores() -> float:
        for future in [sampler.compute_logprobs(tuple(t[:100].tolist()), tuple(t[100:].tolist())) for t in some]:
            future.result()
        return 64.0 * 200

    found = in_turns({"training forward": forward, "compute_logprobs": scores}, budget_s)
    return rows + lines_of("64 x 200 tokens", *found, peers=["training forward"], read={})


def against_llama(backends: Mapping[str, LocalBackend], model: str, threads: int, budget_s: float) -> list[dict[str, Any]]:
    """int8 beside llama.cpp's Q8_0 of the same weights: drawing one sample, and reading a prompt."""
    import xllamacpp

    with TemporaryDirectory() as folder:
        session = backends["float32"].train(model, LoraConfig(rank=1, target_modules=("q_proj",)))  # B is zero: it changes nothing
        plain = backends["float32"].download(session.save("plain", "sampler").result(), Path(folder) / "plain")
        session.close()
        params = xllamacpp.CommonParams()
        params.model.path = str(export_checkpoint(plain, Path(folder) / "model.gguf", "gguf", precision="q8_0"))
        params.n_ctx, params.n_parallel = 2048, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        server = xllamacpp.Server(params)
    asked, fresh = list(prompts(1)[0]), np.random.default_rng(4)

    def theirs(prompt: list[int], length: int) -> None:
        request = {"prompt": prompt, "n_predict": length, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        found = server.handle_completions(request)
        assert found["usage"]["completion_tokens"] == length, found

    def drawing() -> float:
        theirs(asked, 64)
        return 64.0

    def reading() -> float:
        theirs(fresh.integers(10, 40000, 512).tolist(), 1)
        return 512.0

    def mine(backend: LocalBackend) -> Run:
        return lambda: 512.0 * ours([backend.sampler(model)], [tuple(fresh.integers(10, 40000, 512).tolist())], [1])()

    draws: dict[str, Run] = {"llama.cpp Q8_0": drawing, **{f"crucible {n}": ours([b.sampler(model)], [tuple(asked)], [64]) for n, b in backends.items()}}
    rows = lines_of("1 sample, 64 tokens, beside llama.cpp", *in_turns(draws, budget_s), peers=["llama.cpp Q8_0"], read={})
    reads: dict[str, Run] = {"llama.cpp Q8_0": reading, **{f"crucible {n}": mine(b) for n, b in backends.items()}}
    return rows + lines_of("reading 512 tokens, beside llama.cpp", *in_turns(reads, budget_s), peers=["llama.cpp Q8_0"], read={})


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = ["| work | engine | rounds | tokens/s | × best peer | of the memory limit |", "|---|---|---:|---:|---:|---:|"]
    for found in rows:
        share = "" if found["of_memory_limit"] is None else f"{found['of_memory_limit']:.0%}"
        lines.append(f"| {found['case']} | {found['contender']} | {found['rounds']} | {found['tokens_per_s']:.0f} | {found['times_best_peer']:.2f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more time per case")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--only", choices=("decoding", "adapters", "prompts", "llama"))
    instructions.add_option(parser)
    parser.add_argument("--save", metavar="NAME")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    budget_s, rows = 240.0 if given.full else 60.0, list[dict[str, Any]]()
    dtypes: tuple[Any, ...] = ("float32", "bfloat16", "int8")
    backends = {dtype: LocalBackend(dtype=dtype, threads=given.threads) for dtype in dtypes}
    usual = "bfloat16" if fast_bf16() else "float32"
    if given.only in (None, "decoding"):
        from transformers import AutoModelForCausalLM

        folder = str(locate(given.model, places().cache, None))
        kinds = {"generate float32": torch.float32, **({"generate bfloat16": torch.bfloat16} if fast_bf16() else {})}
        peers = {name: AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True).eval() for name, kind in kinds.items()}
        rows += decoding(backends, given.model, peers, budget_s)
    if given.only in (None, "adapters"):
        rows += adapters(backends[usual], given.model, budget_s)
    if given.only in (None, "prompts"):
        rows += prompts_and_scores(backends[usual], given.model, budget_s)
    if importlib.util.find_spec("xllamacpp") and given.only in (None, "llama"):
        rows += against_llama(backends, given.model, given.threads, budget_s)
    without = f", without {' and '.join(given.without)}" if given.without else ""
    print(f"{given.model}, {given.threads} threads, torch {torch.__version__}{without}, memory {read_rate() / 1e9:.1f} GB/s at the end\n")
    print(table(rows))
    if given.save:
        target = Path(__file__).parent / "results" / f"{given.save}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"command": sys.argv, "torch": torch.__version__, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

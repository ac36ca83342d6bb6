"""Do `topological` and `citation_validity` lower what they name, where penalties without a gradient do not?

One adapter is taught claim graphs, 60 % of which argue in a circle (or citations, 40 % of which are invented). From that one start training goes on in
several ways, the same number of steps each, once per seed; a seed decides the order of the examples and the samples. Everything runs through the local
backend, as training does: texts are annotated by the losses' own `prepare`, learned with the registered losses, and sampled.

Graphs are SciFact's stars (claim c1 with the relations of two to four evidence claims, with their labels), filled up with two relations between random
claims and shuffled. SciFact is read where it is; else stars are drawn with its sizes and its share of supports. For citations a prompt names two documents
and each of four claims cites one of them; in 40 % of the texts one digit of one citation is wrong, as in data with noise, so plain training goes on inventing.

    python benchmarks/studies/loss_effects.py                                    # both tasks, 5 seeds, on a small model: about an hour of one core
    python benchmarks/studies/loss_effects.py --seeds 1 --task cycles            # a look
    python benchmarks/studies/loss_effects.py --base smollm2-135m --lr 5e-4      # on a real model: hours

What was declared before any seed was run, and is checked at the end: with `topological` (`citation_validity`), at most a third of the faulty texts of
plain continued training; by the upper ends of the 95 % intervals of the paired differences over seeds, no more than 0.02 fewer of the texts keep the
layout, and texts without fault that were held out cost no more than 0.01 nats per token more. Settings (a task's own, in `tasks`) were looked for with
seed 900 alone. For circles that was done twice: with the first (150 steps at 5e-4, factor 3, valid 1, 400 samples) seeds 0 to 4 missed layout narrowly;
the present ones are of a second look with seed 900, at ten settings, the margins unchanged; seeds 0 to 4 were run once more with them, and seeds 5 to 9
(`--task cycles --first-seed 5`), on which nothing had been looked at, once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from crucible_framework.backends.local import LocalBackend
from crucible_framework.data import completion_tokens, load_dataset, normalise
from crucible_framework.errors import NotFoundError
from crucible_framework.evaluation import parse_claims, topology
from crucible_framework.losses import resolve
from crucible_framework.losses.tokenwise import cross_entropy
from crucible_framework.protocols import Loss, Tokenizer, TrainingSession
from crucible_framework.records import AdamConfig, Batch, Checkpoint, Datum, LoraConfig, SamplingParams

STAR_SIZES, STAR_SHARES = (2, 3, 4), (151 / 237, 59 / 237, 27 / 237)
"""How many evidence claims the 237 of SciFact's 505 training graphs have that have two to four."""
SUPPORTS = 0.63
"""The share of "supports" among their relations."""
EXTRA_LINES = 2
CITING = 4
VALID_MARGIN, NATS_MARGIN = 0.02, 0.01
BATCH = 32
PROMPT = "Claims and relations:\n"


class Text(NamedTuple):
    """An example: what is given, what is learned, and whether it has the fault that the task is about."""

    prompt: str
    text: str
    bad: bool


# ---------------------------------------------------------------------------------------------------------------- texts
def stars() -> list[tuple[str, ...]]:
    """The labels of SciFact's graphs with two to four evidence claims; drawn with its shares where it is not there."""
    try:
        rows = load_dataset("scifact", task="extract", split="train")
    except NotFoundError:
        rng = np.random.default_rng(0)
        sizes = rng.choice(STAR_SIZES, 237, p=STAR_SHARES)
        return [tuple("supports" if rng.random() < SUPPORTS else "refutes" for _ in range(size)) for size in sizes]
    found = [tuple(relation.kind for relation in parse_claims(row.target).relations) for row in rows]
    return [labels for labels in found if len(labels) in STAR_SIZES]


def circular(text: str) -> bool:
    return topology(parse_claims(text)).support_rank > 0


def graph(rng: np.random.Generator, pool: Sequence[tuple[str, ...]], *, bad: bool) -> Text:
    """A star and `EXTRA_LINES` more relations; drawn until it has a circle, or none, as asked."""
    while True:
        labels = pool[int(rng.integers(len(pool)))]
        names = [f"c{i}" for i in range(1, len(labels) + 2)]
        lines = {(name, "c1"): kind for name, kind in zip(names[1:], labels, strict=True)}
        while len(lines) < len(labels) + EXTRA_LINES:
            source, target = (str(name) for name in rng.choice(names, 2, replace=False))
            lines.setdefault((source, target), "supports" if rng.random() < 0.8 else "refutes")
        shown = [f"RELATION: {source} {kind} {target}" for (source, target), kind in lines.items()]
        text = "\n".join([*(f"CLAIM[{name}]: x" for name in names), *(shown[i] for i in rng.permutation(len(shown)))])
        if circular(text) == bad:
            return Text(PROMPT, text, bad)


def cited(rng: np.random.Generator, *, bad: bool) -> Text:
    """Two documents, `CITING` claims that cite one of them each; where `bad`, one citation has a wrong digit and names neither."""
    documents = [f"{number:02d}" for number in rng.choice(100, 2, replace=False)]
    cites = [documents[int(rng.integers(2))] for _ in range(CITING)]
    if bad:
        which, digit = int(rng.integers(CITING)), int(rng.integers(2))
        right = cites[which]
        others = [right[:digit] + wrong + right[digit + 1 :] for wrong in "0123456789"]
        cites[which] = str(rng.choice([other for other in others if other not in documents]))
    prompt = "".join(f"Document {document}: x\n" for document in documents)
    return Text(prompt, "\n".join(f"CLAIM[c{i}] (Document {cite}): x" for i, cite in enumerate(cites, 1)), bad)


def valid(text: str) -> bool:
    """Whether the text ended and every line of it keeps the layout, with known ids."""
    claims = parse_claims(text)
    return bool(text) and not claims.faults and bool(claims.claims)


def like_taught_graph(text: str) -> bool:
    """Whether it is one of those that are taught: claims c1 to c3, c4 or c5, then each pair once, as many relations as belong to them."""
    claims = parse_claims(text)
    names, pairs = [claim.id for claim in claims.claims], [(relation.source, relation.target) for relation in claims.relations]
    right = valid(text) and names == [f"c{i}" for i in range(1, len(names) + 1)] and len(set(pairs)) == len(pairs)
    return right and len(pairs) == len(names) - 1 + EXTRA_LINES and all(source != target for source, target in pairs)


def like_taught_citations(text: str) -> bool:
    return bool(re.fullmatch(r"(CLAIM\[c\d\] \(Document \d{2}\): x(\n|$)){4}", text))


def invented(prompt: str, text: str) -> bool:
    return any(f"Document {document}:" not in prompt for document in re.findall(r"\(Document (\d+)\)", text))


# ---------------------------------------------------------------------------------------------------------------- model
def small_model(folder: Path) -> None:
    """A fresh Llama of 2 layers and width 64, whose tokens are the words of these texts."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Words
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ids = [f"c{i}" for i in range(1, 10)]
    words = [
        "<end>",
        "\n",
        PROMPT.strip(),
        "RELATION:",
        " supports",
        " refutes",
        " contrasts",
        *(f" {name}" for name in ids),
        *(f"CLAIM[{name}]" for name in ids),
    ]
    words += [": x", " (Document ", ")", "Document ", *"0123456789"]
    made = Words(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))  # noqa: S106 - no password
    longest = sorted(words, key=len, reverse=True)
    made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest))), "isolated")
    made.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)  # noqa: S106 - no password
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, eos_token_id=0, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def datum_of(example: Text, name: str, tokenizer: Tokenizer) -> Datum:
    before, after = tokenizer.encode(example.prompt), completion_tokens(example.text, tokenizer)
    full = [*before, *after]
    weights = np.zeros(len(full) - 1, dtype=np.float32)
    weights[len(before) - 1 :] = 1.0
    return Datum(id=name, tokens=np.array(full[:-1], dtype=np.int32), targets=np.array(full[1:], dtype=np.int64), weights=weights)


def penalised(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy and 5 nats for every text with the fault: what a penalty is that was computed from parsed text."""
    value, metrics = cross_entropy(data, logprobs)
    return value + 5.0 * sum(datum.id.startswith("bad") for datum in data), metrics


def train(session: TrainingSession, data: Sequence[Datum], loss: Loss, *, steps: int, seed: int, lr: float) -> None:
    rng = np.random.default_rng(seed)
    pending = []
    for step in range(steps):
        (batch,) = normalise([Batch(data=tuple(data[i] for i in rng.integers(0, len(data), BATCH)))])
        session.forward_backward(batch, loss)
        factor = min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        pending.append(session.optim_step(AdamConfig(lr=lr * factor)))
        if len(pending) > 4:
            pending.pop(0).result()
    for future in pending:
        future.result()


@dataclass
class Task:
    """What is taught, how a sample is judged, which loss is against it, and how long and with what factor training goes on."""

    name: str
    loss: str
    soft: str | None
    bad_share: float
    start_steps: int
    steps: int
    lr: float
    factor: float
    valid: float
    samples: int
    make: Callable[[np.random.Generator, bool], Text]
    like_taught: Callable[[str], bool]
    faulty: Callable[[str, str], bool]


def tasks() -> dict[str, Task]:
    pool = stars()
    return {
        "cycles": Task(
            "cycles", "topological", "topological(variant=expm)", 0.6, 2000, steps=400, lr=1e-3, factor=1.0, valid=4.0, samples=1000,
            make=lambda rng, bad: graph(rng, pool, bad=bad), like_taught=like_taught_graph, faulty=lambda _, text: circular(text),
        ),
        "citations": Task(
            "citations", "citation_validity", None, 0.4, 2500, steps=150, lr=5e-4, factor=3.0, valid=1.0, samples=400,
            make=lambda rng, bad: cited(rng, bad=bad), like_taught=like_taught_citations, faulty=invented,
        ),
    }  # fmt: skip


def ways(task: Task, data: Sequence[Datum], tokenizer: Tokenizer) -> dict[str, Callable[[], tuple[Loss, Sequence[Datum]]]]:
    """How training goes on: a loss and data each, made when asked for."""
    ce = resolve("cross_entropy")

    def against(name: str, weight: float) -> Callable[[], tuple[Loss, Sequence[Datum]]]:
        def made() -> tuple[Loss, Sequence[Datum]]:
            loss = resolve({"cross_entropy": 1.0, name: weight})
            return loss, [loss.prepare(datum, tokenizer) if loss.prepare else datum for datum in data]

        return made

    return {
        "continued": lambda: (ce, data),
        "constant penalty": lambda: (resolve(penalised), data),
        "bad texts with weight 6": lambda: (ce, [replace(d, weights=6 * d.weights) if d.id.startswith("bad") else d for d in data]),
        "without bad texts": lambda: (ce, [d for d in data if not d.id.startswith("bad")]),
        task.loss: against(task.loss, task.factor),
        f"{task.loss}(valid={task.valid})": against(f"{task.loss}(valid={task.valid})", task.factor),
        **({task.soft: against(task.soft, 0.2)} if task.soft else {}),
    }


def measure(
    session: TrainingSession, task: Task, prompts: Mapping[str, int], held_out: Sequence[Datum], *, tokenizer: Tokenizer, seed: int
) -> dict[str, float]:
    """Shares of whole and faulty texts among samples, and nats per token of held-out texts without fault."""
    sampler = session.sampler()
    longest = max(len(datum) for datum in held_out) + 8
    asked = [
        (prompt, sampler.sample(tuple(tokenizer.encode(prompt)), SamplingParams(max_tokens=longest, seed=1000 * seed + i), n=n))
        for i, (prompt, n) in enumerate(prompts.items())
    ]
    drawn = [(prompt, sample.text if sample.stop_reason == "stop" else "") for prompt, future in asked for sample in future.result()]
    output = [session.forward(Batch(data=tuple(held_out[i : i + BATCH])), resolve("cross_entropy")) for i in range(0, len(held_out), BATCH)]
    total = [future.result() for future in output]
    return {
        "valid": float(np.mean([valid(text) for _, text in drawn])),
        "like taught": float(np.mean([task.like_taught(text) for _, text in drawn])),
        "faulty": float(np.mean([task.faulty(prompt, text) for prompt, text in drawn])),
        "distinct": len({text for _, text in drawn}) / len(drawn),
        "nats": sum(one.loss * one.weight for one in total) / sum(one.weight for one in total),
    }


def begin(backend: LocalBackend, base: str, lora: LoraConfig, task: Task, data: Sequence[Datum], options: argparse.Namespace) -> Checkpoint:  # noqa: PLR0917
    """The adapter that was taught the texts as they are; kept in a folder where one was named."""
    kept = options.start / task.name if options.start else None
    known = Checkpoint(name="start", uri="", kind="state", step=options.start_steps or task.start_steps, base_model=base, lora=lora, local_path=kept)
    if kept and kept.is_dir():
        return known
    session = backend.train(base, lora)
    train(session, data, resolve("cross_entropy"), steps=known.step, seed=0, lr=options.start_lr)
    made: Checkpoint = session.save("start").result()
    session.close()
    if kept:
        part = kept.with_suffix(".part")
        backend.download(made, part)
        part.rename(kept)
    return made


def study(backend: LocalBackend, base: str, task: Task, options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(way, seed, measures); the start is the way "start"."""
    tokenizer = backend.tokenizer(base)
    rng = np.random.default_rng(0)
    texts = [task.make(rng, bool(i < task.bad_share * options.rows)) for i in range(options.rows)]
    data = [datum_of(text, f"{'bad' if text.bad else 'good'}-{i}", tokenizer) for i, text in enumerate(texts)]
    held_out = [datum_of(task.make(rng, False), f"held-{i}", tokenizer) for i in range(200)]
    prompts: dict[str, int] = {}
    for _ in range(task.samples):
        prompt = task.make(rng, False).prompt
        prompts[prompt] = prompts.get(prompt, 0) + 1
    lora = LoraConfig(rank=64, alpha=64.0, dropout=0.0, target_modules=("all-linear", "lm_head")) if options.base == "small" else LoraConfig(dropout=0.0)
    start = begin(backend, base, lora, task, data, options)
    session = backend.resume(start)
    yield "start", 0, measure(session, task, prompts, held_out, tokenizer=tokenizer, seed=0)
    session.close()
    for way, make in ways(task, data, tokenizer).items():
        if options.only and way not in options.only:
            continue
        loss, rows = make()
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            session = backend.resume(start)
            train(session, rows, loss, steps=task.steps, seed=seed + 1, lr=task.lr)
            yield way, seed, measure(session, task, prompts, held_out, tokenizer=tokenizer, seed=seed + 1)
            session.close()


# -------------------------------------------------------------------------------------------------------------- results
def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % t-interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def show(task: Task, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    print("| after the start | faulty | valid | like taught | distinct | nats per token, held out |\n|---|---|---|---|---|---|")
    for way, runs in found.items():
        cells = ["{:.3f} ± {:.3f}".format(*interval([run[key] for run in runs])) for key in ("faulty", "valid", "like taught", "distinct", "nats")]
        print(f"| {way} | {' | '.join(cells).replace(' ± nan', '')} |")
    plain = found.get("continued", ())
    for way in (task.loss, f"{task.loss}(valid={task.valid})"):
        if len(plain) > 1 and len(found.get(way, ())) == len(plain):
            print(f"{way}: {judged(plain, found[way])}")


def judged(plain: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]]) -> str:
    """Whether what was declared holds of a way, against plain continued training with the same seeds."""
    ratio = np.mean([run["faulty"] for run in ours]) / np.mean([run["faulty"] for run in plain])
    valid, nats = ([b[key] - a[key] for a, b in zip(plain, ours, strict=True)] for key in ("valid", "nats"))
    (fewer, fewer_half), (dearer, dearer_half) = interval([-difference for difference in valid]), interval(nats)
    kept = ratio <= 1 / 3 and fewer + fewer_half <= VALID_MARGIN and dearer + dearer_half <= NATS_MARGIN
    numbers = f"faulty {ratio:.2f} of continued, valid {-fewer:+.3f} ± {fewer_half:.3f}, nats {dearer:+.4f} ± {dearer_half:.4f} (paired)"
    return f"{numbers}. What was declared {'holds' if kept else 'DOES NOT HOLD'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="small", help='"small" or any base model of the local backend')
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--task", choices=("cycles", "citations", "both"), default="both")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--start-steps", type=int, default=0, help="0: 2000 for circles, 2500 for citations")
    parser.add_argument("--start-lr", type=float, default=2e-3)
    for name, kind in (("steps", int), ("lr", float), ("factor", float), ("valid", float), ("samples", int)):
        parser.add_argument(f"--{name}", type=kind, help="in place of the task's own")
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--only", nargs="*", default=(), help="these ways of going on")
    parser.add_argument("--json", action="store_true", help="a line per run")
    parser.add_argument("--start", type=Path, help="a folder where the start is kept and found again, so that ways can run in several processes")
    parser.add_argument("--read", type=Path, nargs="+", help="show what --json wrote instead")
    options = parser.parse_args()
    if options.read:
        lines = [json.loads(line) for file in options.read for line in file.read_text().splitlines() if line.startswith("{")]
        for name, task in tasks().items():
            found: dict[str, list[dict[str, float]]] = {}
            for line in sorted((line for line in lines if line["task"] == name), key=lambda line: line["seed"]):
                found.setdefault(line["way"], []).append({key: value for key, value in line.items() if key not in ("task", "way", "seed")})
            if found:
                print(f"\n{name}")
                show(task, found)
        return
    with tempfile.TemporaryDirectory() as folder, LocalBackend(dtype=options.dtype, threads=1) as backend:
        model = (options.start or Path(folder)) / "model"
        if options.base == "small" and not model.is_dir():
            small_model(model)
        base = str(model) if options.base == "small" else options.base
        given = {name: getattr(options, name) for name in ("steps", "lr", "factor", "valid", "samples") if getattr(options, name) is not None}
        for task in (replace(one, **given) for one in tasks().values()):
            if options.task not in ("both", task.name):
                continue
            began, found = time.process_time(), {}
            print(f"\n{task.name}: {options.seeds} seeds, {options.start_steps or task.start_steps} + {task.steps} steps")
            for way, seed, run in study(backend, base, task, options):
                found.setdefault(way, []).append(run)
                if options.json:
                    print(json.dumps({"task": task.name, "way": way, "seed": seed, **run}))
                    sys.stdout.flush()
            show(task, found)
            print(f"{time.process_time() - began:.0f} seconds of processor time")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

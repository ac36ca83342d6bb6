"""Do `topological` and `citation_validity` lower what they name, where penalties without a gradient do not?

A small transformer (2 layers, width 64) is trained on claim graphs, 60 % of which argue in a circle (or on citations, 40 % of which are invented), and
from that one start continued in several ways, the same number of steps each. Graphs are stars of SciFact's sizes into c1, filled up with relations
between random claims. Texts are annotated by `annotate_claims` and learned with the registered losses, as any backend does.

    python benchmarks/studies/loss_effects.py                          # 5 seeds, both tasks, 15 to 30 minutes on one core
    python benchmarks/studies/loss_effects.py --seeds 1 --task cycles  # a look
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from crucible_framework.losses import resolve
from crucible_framework.losses.apply import apply_loss, total_weight
from crucible_framework.losses.claims import annotate_claims, closing_targets
from crucible_framework.protocols import Loss
from crucible_framework.records import Datum

IDS = 6
LINES = 5
STAR_SIZES = (1, 2, 3, 4)
STAR_SHARES = (250 / 487, 151 / 487, 59 / 487, 27 / 487)
"""How many evidence claims a claim has in SciFact's 505 training graphs; the 18 with five and more are left out."""
RELATION = re.compile(r"RELATION: (c\d) (supports|refutes) (c\d)")


class Words:
    """A tokenizer of the few words of this language."""

    name, bos_id, eos_ids, chat_template = "words", None, (0,), None
    special_tokens: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        ids = [f"c{i}" for i in range(1, IDS + 1)]
        self.words = ["<end>", "\n", "RELATION:", " supports", " refutes", *(f" {name}" for name in ids), *(f"CLAIM[{name}]" for name in ids)]
        self.words += [": x", " (Document ", ")", "Document ", *"0123456789"]
        self.pattern = re.compile("|".join(re.escape(word) for word in sorted(self.words, key=len, reverse=True)))
        self.index = {word: i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        return [self.index[word] for word in self.pattern.findall(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.words[token] for token in tokens if token)


WORDS = Words()


class Model(nn.Module):
    """A causal transformer."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(WORDS.vocab_size, 64), nn.Embedding(length, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, WORDS.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probs [B, T, V]."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.layers(self.embed(tokens) + self.place(torch.arange(length)), mask=mask, is_causal=True)
        return torch.log_softmax(self.head(hidden), -1)


# ---------------------------------------------------------------------------------------------------------------- texts
def cyclic(text: str) -> bool:
    edges: list[tuple[str, str]] = []
    for source, kind, target in RELATION.findall(text):
        if kind == "supports":
            if target in closing_targets(edges, source, [target]):
                return True
            edges.append((source, target))
    return False


def graph(rng: np.random.Generator, *, circular: bool) -> tuple[str, str]:
    """Prompt and completion: the claims, then LINES relations."""
    names = [f"c{i}" for i in range(1, IDS + 1)]
    claims = "".join(f"CLAIM[{name}]: x\n" for name in names)
    while True:
        size = int(rng.choice(STAR_SIZES, p=STAR_SHARES))
        lines = [f"RELATION: c{i} {'supports' if rng.random() < 0.7 else 'refutes'} c1" for i in 2 + rng.permutation(IDS - 1)[:size]]
        while len(lines) < LINES:
            source, target = rng.choice(names, 2, replace=False)
            lines.append(f"RELATION: {source} {'supports' if rng.random() < 0.8 else 'refutes'} {target}")
        text = claims + "\n".join(lines)
        if cyclic(text) == circular and len(set(lines)) == LINES:
            return "\n", text


def cited(rng: np.random.Generator, *, invented: bool) -> tuple[str, str]:
    """Prompt with two documents, completion that cites them; with `invented` one citation has a wrong digit."""
    documents = ["".join(rng.choice(list("0123456789"), 3)) for _ in range(2)]
    order = [documents[i] for i in rng.integers(0, 2, 3)]
    if invented:
        which, digit = int(rng.integers(3)), int(rng.integers(3))
        wrong = str(rng.choice([d for d in "0123456789" if all(d != document[digit] for document in documents)]))
        order[which] = order[which][:digit] + wrong + order[which][digit + 1 :]
    prompt = "".join(f"Document {document}: x\n" for document in documents)
    return prompt, "\n".join(f"CLAIM[c{i}] (Document {document}): x" for i, document in enumerate(order, 1))


def datum_of(prompt: str, text: str, name: str) -> Datum:
    before, after = WORDS.encode(prompt), [*WORDS.encode(text), 0]
    full = [*before, *after]
    weights = np.zeros(len(full) - 1, dtype=np.float32)
    weights[len(before) - 1 :] = 1.0
    return Datum(id=name, tokens=np.array(full[:-1], dtype=np.int32), targets=np.array(full[1:], dtype=np.int64), weights=weights)


# ------------------------------------------------------------------------------------------------------------- training
def loss_step(model: Model, optimizer: torch.optim.Optimizer, data: Sequence[Datum], loss: Loss, constant: float = 0.0) -> None:
    """One step on the loss per weight, through the loss's gradient with respect to the log-probs, as backends do it."""
    width = max(map(len, data))
    tokens = torch.zeros(len(data), width, dtype=torch.int64)
    for i, datum in enumerate(data):
        tokens[i, : len(datum)] = torch.from_numpy(datum.tokens.astype(np.int64))
    logp = model(tokens)
    picked = []
    for i, datum in enumerate(data):
        targets = torch.from_numpy(datum.targets)
        picked.append(logp[i, : len(datum)].gather(1, targets.reshape(len(datum), -1)).reshape(targets.shape))
    applied = apply_loss(loss, data, picked, grad=True)
    scale = total_weight(data)
    surrogate = torch.stack([(values * gradient).sum() for values, gradient in zip(picked, applied.gradients, strict=True)]).sum() / scale
    optimizer.zero_grad()
    (surrogate + constant).backward()  # a constant in the loss: its gradient is 0, and so is its effect
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(model: Model, data: Sequence[Datum], loss: Loss, steps: int, seed: int, *, lr: float, constant: float = 0.0) -> Model:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        loss_step(model, optimizer, [data[i] for i in rng.integers(0, len(data), 32)], loss, constant)
    return model


@torch.no_grad()
def sample(model: Model, prompts: Sequence[str], length: int, seed: int) -> list[str]:
    """A completion for each prompt; all prompts have the same number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([WORDS.encode(prompt) for prompt in prompts])
    start, done = tokens.shape[1], torch.zeros(len(prompts), dtype=torch.bool)
    while tokens.shape[1] < length and not bool(done.all()):
        drawn = torch.multinomial(model(tokens)[:, -1].exp(), 1, generator=generator)[:, 0]
        drawn[done] = 0
        done |= drawn == 0
        tokens = torch.cat([tokens, drawn[:, None]], 1)
    return [WORDS.decode(row) if bool(end) else "" for row, end in zip(tokens[:, start:].tolist(), done, strict=True)]


def whole_graph(text: str) -> bool:
    lines = text.split("\n")
    relations = [line for line in lines if RELATION.fullmatch(line)]
    return len(relations) == LINES and lines[:IDS] == [f"CLAIM[c{i}]: x" for i in range(1, IDS + 1)] and len(lines) == IDS + LINES


def whole_citations(text: str) -> bool:
    return bool(re.fullmatch(r"(CLAIM\[c\d\] \(Document \d{3}\): x\n?){3}", text))


def violations(task: str, prompt: str, text: str) -> bool:
    if task == "cycles":
        return cyclic(text)
    return any(document not in prompt for document in re.findall(r"\(Document (\d+)\)", text))


@torch.no_grad()
def nll(model: Model, data: Sequence[Datum]) -> float:
    """Nats per token of held-out texts without violations."""
    total = sum(
        -float(model(torch.from_numpy(d.tokens.astype(np.int64))[None])[0].gather(1, torch.from_numpy(d.targets)[:, None])[:, 0] @ torch.tensor(d.weights))
        for d in data
    )
    return total / sum(float(d.weights.sum()) for d in data)


def run(task: str, seed: int, *, start_steps: int, steps: int, rows: int, weight: float, only: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per method what its samples are like."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    bad_share, name, soft = (0.6, "topological", "topological(variant=expm)") if task == "cycles" else (0.4, "citation_validity", "")
    make: Callable[..., tuple[str, str]] = (lambda bad: graph(rng, circular=bad)) if task == "cycles" else (lambda bad: cited(rng, invented=bad))
    texts = [(*make(i < bad_share * rows), i < bad_share * rows) for i in range(rows)]
    plain = [datum_of(prompt, text, str(i)) for i, (prompt, text, _) in enumerate(texts)]
    held_out = [datum_of(*make(False), f"held-{i}") for i in range(200)]
    prompts = [make(False)[0] for _ in range(400)]
    length = max(map(len, plain)) + 2
    annotated = [annotate_claims(datum, WORDS) for datum in plain]
    heavy = [replace(d, weights=6 * d.weights) if bad else d for d, (*_, bad) in zip(plain, texts, strict=True)]
    clean = [d for d, (*_, bad) in zip(plain, texts, strict=True) if not bad]
    ce = resolve("cross_entropy")
    start = train(Model(length), plain, ce, start_steps, seed, lr=2e-3)
    ways: dict[str, Callable[[Model], Model]] = {
        "start": lambda model: model,
        "continued": lambda model: train(model, plain, ce, steps, seed + 1, lr=5e-4),
        "constant": lambda model: train(model, plain, ce, steps, seed + 1, lr=5e-4, constant=5.0),
        "reweighted": lambda model: train(model, heavy, ce, steps, seed + 1, lr=5e-4),
        "filtered": lambda model: train(model, clean, ce, steps, seed + 1, lr=5e-4),
        name: lambda model: train(model, annotated, resolve({"cross_entropy": 1.0, name: weight}), steps, seed + 1, lr=5e-4),
    }
    if soft:
        ways[soft] = lambda model: train(model, annotated, resolve({"cross_entropy": 1.0, soft: 0.2}), steps, seed + 1, lr=5e-4)
    found = {}
    for way, go in ways.items():
        if only and way not in only:
            continue
        model = go(copy.deepcopy(start)).eval()
        drawn = sample(model, prompts, length, seed + 2)
        whole = whole_graph if task == "cycles" else whole_citations
        found[way] = {
            "valid": float(np.mean([whole(text) for text in drawn])),
            "violation": float(np.mean([violations(task, prompt, text) for prompt, text in zip(prompts, drawn, strict=True)])),
            "distinct": len(set(drawn)) / len(drawn),
            "nll": nll(model, held_out),
        }
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % t-interval over seeds."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--task", choices=("cycles", "citations", "both"), default="both")
    parser.add_argument("--start-steps", type=int, default=0, help="0: 700 for cycles, 2500 for citations")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--weight", type=float, default=5.0, help="factor of the structure loss beside cross-entropy")
    parser.add_argument("--only", nargs="*", default=(), help="these ways of going on")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task in ("cycles", "citations") if arguments.task == "both" else (arguments.task,):
        began = time.monotonic()
        start_steps = arguments.start_steps or {"cycles": 700, "citations": 2500}[task]
        settings = {"start_steps": start_steps, "steps": arguments.steps, "rows": arguments.rows, "weight": arguments.weight, "only": arguments.only}
        runs = [run(task, 100 * seed, **settings) for seed in range(arguments.seeds)]
        if arguments.json:
            print(json.dumps({"task": task, "runs": runs}))
            continue
        print(
            f"\n{task}: {arguments.seeds} seeds, {start_steps} + {arguments.steps} steps, {time.monotonic() - began:.0f} s; mean and 95 % t-interval over seeds"
        )
        print(f"| {'after the start, continued with':32} | valid | {'violations':15} | distinct | nats per token, held out |\n|---|---|---|---|---|")
        for way in runs[0]:
            cells = [interval([one[way][metric] for one in runs]) for metric in ("valid", "violation", "distinct", "nll")]
            print(f"| {way:32} | {' | '.join(cells)} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

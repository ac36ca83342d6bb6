"""What a model of entailment is worth as a judge of claims, beside word counts and the commonest answer.

usage: python benchmarks/studies/judges.py MODEL [--limit N]      MODEL: a hub name or folder, as for `crucible eval --nli`

Three sets of labelled pairs, read where CRUCIBLE_DATA or the data folder has them: SciFact's rationale sentences of dev and test with their claims, and two
sentences of each abstract that says nothing of its claim; the whole abstracts; and FeverSymmetric's test split. Each verdict is the share that is greatest.
One thread; --limit takes the first pairs of each set.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from crucible_framework.data import load_dataset
from crucible_framework.evaluation import BySentence, Entailment, Inference, LexicalEntailment, NliModel, parse_claims

Labelled = tuple[str, str, str]
"""Premise, hypothesis, and which of the three shares ought to be the greatest."""

LABELS = {"SUPPORT": "entailment", "CONTRADICT": "contradiction", "NOT_ENOUGH_INFO": "neutral"}


def abstracts(name: str, *splits: str) -> Iterator[Labelled]:
    """Passages with their claims."""
    for split in splits:
        for row in load_dataset(name, split=split):
            yield str(row.meta["passage"]), str(row.meta["claim"]), LABELS[row.target]


def sentences() -> Iterator[Labelled]:
    """Single sentences of SciFact's abstracts."""
    rng = np.random.default_rng(0)
    for split in ("test", "dev"):
        for row in load_dataset("scifact", task="extract", split=split):
            claims = parse_claims(row.target)
            for relation in claims.relations:
                label = "entailment" if relation.kind == "supports" else "contradiction"
                yield claims.by_id[relation.source].text, claims.by_id[relation.target].text, label
    for passage, claim, label in abstracts("scifact", "test", "dev"):
        if label == "neutral":
            parts = [part for part in passage.replace("? ", ". ").split(". ") if part.strip()]
            for i in rng.permutation(len(parts))[:2]:
                yield parts[int(i)], claim, label


def verdict(found: Inference) -> str:
    return max(("entailment", "neutral", "contradiction"), key=lambda name: float(getattr(found, name)))


def line(set_name: str, judge: Entailment, rows: list[Labelled]) -> str:
    """A row of the table."""
    start = time.process_time()
    found = [verdict(one) for one in judge([(premise, hypothesis) for premise, hypothesis, _ in rows])]
    rate = len(rows) / (time.process_time() - start)
    right = float(np.mean([one == label for one, (_, _, label) in zip(found, rows, strict=True)]))
    common = max(Counter(label for _, _, label in rows).values()) / len(rows)
    return f"| {set_name} | {len(rows)} | {judge.name} | {right:.3f} | {common:.3f} | {rate:,.1f} |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, words = NliModel(given.model), LexicalEntailment()
    sets = {
        "SciFact sentences": sentences(),
        "SciFact abstracts": abstracts("scifact", "test", "dev"),
        "FeverSymmetric test": abstracts("fever_symmetric", "test"),
    }
    print("| pairs | how many | judge | right | the commonest answer | pairs per CPU second |\n|---|---:|---|---:|---:|---:|")
    for name, found in sets.items():
        rows = list(found)[: given.limit]
        judges: tuple[Entailment, ...] = (words, model, BySentence(model)) if name == "SciFact abstracts" else (words, model)
        for judge in judges:
            print(line(name, judge, rows), flush=True)


if __name__ == "__main__":
    main()

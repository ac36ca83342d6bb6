"""Cutting and cleaning data sets: splits by document, folds, samples, duplicates, few-shot prompts, and what a test set shares with training.

Everything is decided by a seed or by the texts alone, never by the order of files. Knows no tokens, models or scores.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ..config import fingerprint
from ..errors import ConfigError, DataError
from ..records import Dataset, Example, Message, record

__all__ = ["Leak", "deduplicate", "k_fold", "leaks", "sample_examples", "split_dataset", "with_shots"]

_WORD = re.compile(r"\w+", re.UNICODE)
SHINGLE = 13
"""Words in a row that two texts must share to count as overlapping; that of Brown et al. 2020 (GPT-3, appendix C)."""


def _whole(dataset: Dataset, examples: Iterable[Example], told: str, split: str | None = None) -> Dataset:
    kept = tuple(examples)
    if not kept:
        raise DataError(f"{told} of {dataset.card.name!r} would have no example, of {len(dataset)}; expected at least one. Use more data or fewer parts.")
    card = replace(dataset.card, rows=len(kept), sha256=fingerprint(kept), source=f"{dataset.card.source} {told}.", split=split or dataset.card.split)
    return Dataset(examples=kept, card=card)


def document_of(example: Example) -> str:
    """The document that an example is from; an example without one is its own."""
    document = example.meta.get("document")
    return f"id:{example.id}" if document is None or document == "" else str(document)


def _groups(dataset: Dataset) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for example in dataset:
        found.setdefault(document_of(example), []).append(example)
    return found


def _label(example: Example) -> str:
    return str(example.meta.get("label", example.target))


def _shuffled(documents: Iterable[str], seed: int) -> list[str]:
    return sorted(documents, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())


def _deal(dataset: Dataset, shares: Sequence[float], seed: int, *, stratify: bool) -> list[list[Example]]:
    """Whole documents to parts: each goes where most is missing, of its labels where stratified, else of its examples."""
    groups, total = _groups(dataset), Counter(_label(example) if stratify else "" for example in dataset)
    held = [Counter[str]() for _ in shares]
    parts: list[list[str]] = [[] for _ in shares]
    order = _shuffled(groups, seed)
    order = sorted(order, key=lambda name: -len(groups[name])) if stratify else order
    for name in order:
        own = Counter(_label(example) if stratify else "" for example in groups[name])

        def missing(part: int, own: Counter[str] = own) -> float:
            return sum(count * (shares[part] - held[part][label] / total[label]) / total[label] for label, count in own.items())

        chosen = max(range(len(shares)), key=missing)
        parts[chosen].append(name)
        held[chosen].update(own)
    home = {name: index for index, part in enumerate(parts) for name in part}
    return [[example for example in dataset if home[document_of(example)] == index] for index in range(len(shares))]


def split_dataset(dataset: Dataset, shares: Mapping[str, float], *, seed: int = 0, stratify: bool = False) -> dict[str, Dataset]:
    """Parts that share no document, of about the sizes asked for, in the data set's order.

    Args:
        shares: name of a part → its share; they add up to 1.
        stratify: keep the shares of the labels too (`meta["label"]`, else the target), as far as whole documents allow.

    Raises:
        ConfigError: shares that are not positive or do not add up to 1.
        DataError: a part would be empty.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise ConfigError(f"shares is {dict(shares)!r}; expected positive shares that add up to 1, for example {{'train': 0.8, 'test': 0.2}}.")
    parts = _deal(dataset, list(shares.values()), seed, stratify=stratify)
    how = f"by document, seed {seed}{', stratified by label' if stratify else ''}"
    return {name: _whole(dataset, part, f"Part {name!r} ({share:g}) {how}", name) for (name, share), part in zip(shares.items(), parts, strict=True)}


def k_fold(dataset: Dataset, k: int, *, seed: int = 0, stratify: bool = False) -> tuple[tuple[Dataset, Dataset], ...]:
    """k pairs (train, test): each example is in one test part, and no document is on both sides of a pair.

    Raises:
        ConfigError: k < 2.
        DataError: fewer documents than folds.
    """
    if k < 2:
        raise ConfigError(f"k is {k!r}; expected at least 2 folds. Usual: 5.")
    documents = len(_groups(dataset))
    if documents < k:
        raise DataError(f"{dataset.card.name!r} has {documents} documents for {k} folds; expected at least one for each. Use fewer folds.")
    parts = _deal(dataset, [1 / k] * k, seed, stratify=stratify)
    found = []
    for index, part in enumerate(parts):
        inside = {example.id for example in part}
        told = f"fold {index + 1} of {k} by document, seed {seed}"
        train = _whole(dataset, (example for example in dataset if example.id not in inside), f"All but {told}", "train")
        found.append((train, _whole(dataset, part, told.capitalize(), "test")))
    return tuple(found)


def sample_examples(dataset: Dataset, n: int, *, seed: int = 0, by: Literal["example", "label", "document"] = "example") -> Dataset:
    """n examples drawn without replacement, in the data set's order.

    Args:
        by: "label" draws the labels in proportion (largest remainders); "document" draws whole documents until at least n examples are there.

    Raises:
        ConfigError: n below 1 or above the number of examples, or another `by`.
    """
    if not 1 <= n <= len(dataset) or by not in ("example", "label", "document"):
        raise ConfigError(f"n is {n!r} of {len(dataset)} and by is {by!r}; expected 1 to {len(dataset)}, and 'example', 'label' or 'document'.")
    random, chosen = np.random.default_rng(seed), set[str]()
    if by == "document":
        groups = _groups(dataset)
        for name in _shuffled(groups, seed):
            if len(chosen) >= n:
                break
            chosen |= {example.id for example in groups[name]}
    elif by == "label":
        strata: dict[str, list[str]] = {}
        for example in dataset:
            strata.setdefault(_label(example), []).append(example.id)
        exact = {label: n * len(ids) / len(dataset) for label, ids in strata.items()}
        sizes = {label: int(value) for label, value in exact.items()}
        for label in sorted(exact, key=lambda one: (sizes[one] - exact[one], one))[: n - sum(sizes.values())]:
            sizes[label] += 1
        for label in sorted(strata):
            chosen |= {strata[label][int(i)] for i in random.permutation(len(strata[label]))[: sizes[label]]}
    else:
        chosen = {dataset.examples[int(i)].id for i in random.permutation(len(dataset))[:n]}
    return _whole(dataset, (example for example in dataset if example.id in chosen), f"{len(chosen)} of {len(dataset)} examples by {by}, seed {seed}")


# ----------------------------------------------------------------------------------------------------------- duplicates
def _text(prompt: str | tuple[Message, ...]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _asked(example: Example) -> str:
    """What is particular to an example: its claim or question where it has one, else its whole prompt."""
    for key in ("claim", "question"):
        if isinstance(example.meta.get(key), str):
            return str(example.meta[key])
    return _text(example.prompt)


def deduplicate(dataset: Dataset, *, on: Literal["prompt", "both"] = "prompt") -> tuple[Dataset, tuple[tuple[str, str], ...]]:
    """Without examples that say what an earlier one says, up to case, punctuation and white space; and the pairs (kept id, dropped id).

    Args:
        on: "prompt": the same prompt is a duplicate, whatever the target; "both": prompt and target.
    """
    seen: dict[tuple[str, ...], str] = {}
    kept, dropped = list[Example](), list[tuple[str, str]]()
    for example in dataset:
        key = (" ".join(_words(_text(example.prompt))), " ".join(_words(example.target)) if on == "both" else "")
        if key in seen:
            dropped.append((seen[key], example.id))
            continue
        seen[key] = example.id
        kept.append(example)
    return (dataset if not dropped else _whole(dataset, kept, f"Without {len(dropped)} duplicates")), tuple(dropped)


@record
class Leak:
    """A test example that training data already hold.

    Attributes:
        share: of the test example's n-grams that occur in training data; 1 for the same text.
        why: "document" (its source document is in training), "same" (the same words), or "overlap" (n-grams).
    """

    test: str
    train: str
    share: float
    why: Literal["document", "same", "overlap"]


def leaks(train: Dataset, test: Dataset, *, n: int = SHINGLE, least: float = 0.5) -> tuple[Leak, ...]:
    """Test examples that share a document, their words, or at least `least` of their n-grams of words with training examples, worst first.

    Compared is what is particular to an example (its claim or question, else its prompt); texts of fewer than n words are compared whole.

    Raises:
        ConfigError: n < 1, or `least` outside (0, 1].

    Source: Brown et al. 2020, arXiv 2005.14165, appendix C (13-grams); Lee et al. 2022, arXiv 2107.06499.
    """
    if n < 1 or not 0 < least <= 1:
        raise ConfigError(f"n is {n!r} and least is {least!r}; expected at least 1 word, and a share above 0 and up to 1. Usual: 13 and 0.5.")
    documents: dict[str, str] = {}
    whole: dict[tuple[str, ...], str] = {}
    grams: dict[tuple[str, ...], str] = {}
    for example in train:
        if example.meta.get("document"):
            documents.setdefault(document_of(example), example.id)
        words = _words(_asked(example))
        whole.setdefault(tuple(words), example.id)
        for start in range(len(words) - n + 1):
            grams.setdefault(tuple(words[start : start + n]), example.id)
    found = [leak for example in test if (leak := _leak(example, documents, whole, grams, n=n, least=least)) is not None]
    return tuple(sorted(found, key=lambda leak: (-leak.share, leak.test)))


def _leak(
    example: Example, documents: Mapping[str, str], whole: Mapping[tuple[str, ...], str], grams: Mapping[tuple[str, ...], str], *, n: int, least: float
) -> Leak | None:  # fmt: skip
    words = _words(_asked(example))
    if tuple(words) in whole:
        return Leak(test=example.id, train=whole[tuple(words)], share=1.0, why="same")
    own = {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}
    shared = sorted(gram for gram in own if gram in grams)
    share = len(shared) / len(own) if own else 0.0
    if own and share >= least:
        return Leak(test=example.id, train=Counter(grams[gram] for gram in shared).most_common(1)[0][0], share=share, why="overlap")
    if example.meta.get("document") and document_of(example) in documents:
        return Leak(test=example.id, train=documents[document_of(example)], share=share, why="document")
    return None


# ------------------------------------------------------------------------------------------------------------- few-shot
def with_shots(dataset: Dataset, pool: Dataset, n: int, *, seed: int = 0) -> Dataset:
    """The same examples with n solved ones of `pool` before each, the same for all, as turns of a chat (or blank-line blocks before raw text).

    No shot comes from a document of `dataset` or is one of its examples.

    Raises:
        ConfigError: n < 1, or the pool has too few examples of other documents.

    Source: Brown et al. 2020, arXiv 2005.14165 (few-shot); as chat turns like Gao et al., lm-evaluation-harness (`fewshot_as_multiturn`).
    """
    taken = {document_of(example) for example in dataset} | {f"id:{example.id}" for example in dataset}
    free = [example for example in pool if document_of(example) not in taken and f"id:{example.id}" not in taken]
    if not 1 <= n <= len(free):
        raise ConfigError(f"n is {n!r}; the pool {pool.card.name!r} has {len(free)} examples of other documents. Expected 1 to {len(free)}.")
    shots = [free[int(i)] for i in np.random.default_rng(seed).permutation(len(free))[:n]]
    told = f"{n} shots of {pool.card.name} ({pool.card.split}), seed {seed}: {', '.join(shot.id for shot in shots)}"
    return _whole(dataset, (replace(example, prompt=_shown(example, shots)) for example in dataset), told)


def _shown(example: Example, shots: Sequence[Example]) -> str | tuple[Message, ...]:
    if isinstance(example.prompt, str) and all(isinstance(shot.prompt, str) for shot in shots):
        return "\n\n".join([*(f"{shot.prompt}{_gap(str(shot.prompt))}{shot.target}" for shot in shots), example.prompt])
    turns = (Message(role="user", content=example.prompt),) if isinstance(example.prompt, str) else example.prompt
    head = tuple(message for message in turns if message.role == "system")
    before: list[Message] = []
    for shot in shots:
        asked = (Message(role="user", content=shot.prompt),) if isinstance(shot.prompt, str) else shot.prompt
        before += [*(message for message in asked if message.role != "system"), Message(role="assistant", content=shot.target)]
    return (*head, *before, *(message for message in turns if message.role != "system"))


def _gap(prompt: str) -> str:
    return "" if prompt.endswith((" ", "\n")) else " "

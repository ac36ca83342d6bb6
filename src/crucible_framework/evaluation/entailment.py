"""Does one text follow from another, and how alike are two: what validation asks, as two contracts and word counts.

The word counts are baselines: they see which words are shared, not what is said. The models are in `encoders.py`. This file does not know claims.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeAlias

from ..records import record

__all__ = ["BySentence", "Entailment", "Inference", "LexicalEntailment", "LexicalSimilarity", "Pair", "Similarity"]

Pair: TypeAlias = tuple[str, str]


@record
class Inference:
    """What a premise says of a hypothesis: three shares that sum to 1."""

    entailment: float
    neutral: float
    contradiction: float


class Entailment(Protocol):
    """Judges (premise, hypothesis) pairs."""

    @property
    def name(self) -> str:
        """What results are labelled with."""
        ...

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[Inference]:
        """One inference per pair, in order."""
        ...


class Similarity(Protocol):
    """How alike two texts are."""

    @property
    def name(self) -> str:
        """What results are labelled with."""
        ...

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[float]:
        """At most 1 per pair, where 1 is the same; in order. The scale below 1 is the model's own, so thresholds go with a model."""
        ...


# ------------------------------------------------------------------------------------------------------------ baselines
_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "being",
        "by",
        "for",
        "from",
        "had",
        "has",
        "have",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "that",
        "the",
        "their",
        "these",
        "they",
        "this",
        "those",
        "to",
        "was",
        "were",
        "which",
        "with",
    ]
)
_NEGATIONS = frozenset({"cannot", "fail", "failed", "fails", "neither", "never", "no", "none", "nor", "not", "without"})


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("n't", " not"))


# Not after "vs." and its like, and not after a single letter where a small one follows ("S. cerevisiae").
_BREAK = re.compile(r"(?<=[.!?])(?<!\b(?:vs|al|cf)\.)(?<!\b(?:e\.g|i\.e|fig)\.)(?:(?<!\b[a-z]\.)\s+|\s+(?!(?-i:[a-z])))|\n+", re.IGNORECASE)


def _sentences(text: str) -> list[str]:
    """Its sentences, split at . ! ? and line ends; the whole text where there is nothing to split."""
    return [part for part in _BREAK.split(text) if part.strip()] or [text]


class LexicalEntailment:
    """A baseline from words, labelled as such: shared content words count, and an odd number of negations between both flips the verdict.

    With c the share of the hypothesis's content words that the best sentence of the premise holds: entailment c where sentence and hypothesis
    both have an even or both an odd number of negations, else contradiction c; neutral 1 − c. It knows no synonyms, no numbers and no word
    order, so "A causes B" follows from "B causes A".
    """

    name = "lexical-baseline"

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[Inference]:
        """One inference per (premise, hypothesis)."""
        return [self._judge(*pair) for pair in pairs]

    @staticmethod
    def _judge(premise: str, hypothesis: str) -> Inference:
        asked = {word for word in _words(hypothesis) if word not in _STOP and word not in _NEGATIONS}
        best, flips = 0.0, False
        odd = sum(word in _NEGATIONS for word in _words(hypothesis)) % 2
        for sentence in _sentences(premise):
            words = _words(sentence)
            share = len(asked.intersection(words)) / len(asked) if asked else 0.0
            if share > best:
                best, flips = share, sum(word in _NEGATIONS for word in words) % 2 != odd
        return Inference(entailment=0.0 if flips else best, neutral=1 - best, contradiction=best if flips else 0.0)


class BySentence:
    """Asks a judge sentence by sentence, as NLI models are trained; what needs two sentences of the premise together is missed.

    Each sentence of the hypothesis gets the verdict of the premise's sentence that says most of it, the one with the least neutral share. Of several
    sentences all must follow and one suffices to contradict: the hypothesis is as entailed as the least entailed of them, as contradicted as the most
    contradicted, and the rest is neutral. (min e + max c ≤ 1, since each sentence has e + c ≤ 1.)

    Source: after Laban et al. 2022, arXiv 2111.09525 (SummaC-ZS), which takes the greatest entailment per sentence, and the mean over sentences.
    """

    def __init__(self, inner: Entailment) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """The judge's name, with how it was asked."""
        return f"{self.inner.name}, by sentence"

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[Inference]:
        """One inference per (premise, hypothesis)."""
        asked = [(_sentences(premise), _sentences(hypothesis)) for premise, hypothesis in pairs]
        answers = iter(self.inner([(given, said) for premise, hypothesis in asked for said in hypothesis for given in premise]))
        found: list[Inference] = []
        for premise, hypothesis in asked:
            each = [min((next(answers) for _ in premise), key=lambda one: one.neutral) for _ in hypothesis]
            entailed, contradicted = min(one.entailment for one in each), max(one.contradiction for one in each)
            rest = max(0.0, 1 - entailed - contradicted)  # rounding alone goes below 0
            found.append(each[0] if len(each) == 1 else Inference(entailment=entailed, neutral=rest, contradiction=contradicted))
        return found


class LexicalSimilarity:
    """A baseline from words, labelled as such: the F1 of the words of both texts, in [0, 1]. It knows neither synonyms nor word order."""

    name = "lexical-baseline"

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[float]:
        """F1 per pair; two empty texts are the same."""
        return [self._f1(Counter(_words(a)), Counter(_words(b))) for a, b in pairs]

    @staticmethod
    def _f1(a: Counter[str], b: Counter[str]) -> float:
        total = sum(a.values()) + sum(b.values())
        return 2 * sum((a & b).values()) / total if total else 1.0

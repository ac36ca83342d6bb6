"""Does one text follow from another, and how alike are two: what validation asks, as two contracts, word counts, and models by name.

The word counts are baselines: they see which words are shared, not what is said. The models are Hugging Face ones, on the processor, and need
`crucible-framework[local]`; torch and transformers are imported when a model is made. This file does not know claims.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config import places
from ..errors import ConfigError, DataError, NotFoundError
from ..records import record

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BySentence", "EmbeddingSimilarity", "Entailment", "Inference", "LexicalEntailment", "LexicalSimilarity", "NliModel", "Similarity", "label_order"]

Pair: TypeAlias = tuple[str, str]
_BATCH = 16


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


def _sentences(text: str) -> list[str]:
    """Its sentences, split at . ! ? and line ends; the whole text where there is nothing to split."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()] or [text]


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
    """Asks a judge about every sentence of the premise and takes the one that says most, the one with the least neutral share.

    NLI models are trained on single sentences and cut long premises; a verdict that needs two sentences together is missed.

    Source: after Laban et al. 2022, arXiv 2111.09525 (SummaC-ZS), which takes the greatest entailment.
    """

    def __init__(self, inner: Entailment) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """The judge's name, with how it was asked."""
        return f"{self.inner.name}, by sentence"

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[Inference]:
        """One inference per (premise, hypothesis)."""
        asked = [[(sentence, hypothesis) for sentence in _sentences(premise)] for premise, hypothesis in pairs]
        answers = iter(self.inner([pair for some in asked for pair in some]))
        return [min((next(answers) for _ in some), key=lambda found: found.neutral) for some in asked]


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


# --------------------------------------------------------------------------------------------------------------- models
def label_order(id2label: dict[int, str], name: str = "model") -> tuple[int, int, int]:
    """Where (entailment, neutral, contradiction) stand among a model's outputs, by the labels of its configuration, never by position.

    Raises:
        ConfigError: the labels do not name the three, each once (LABEL_0 says nothing, and two-way models cannot tell refutation from silence).
    """
    found: list[int] = []
    for wanted in ("entail", "neutral", "contradict"):
        hits = [index for index, label in id2label.items() if label.lower().startswith(wanted)]
        if len(hits) != 1 or len(id2label) != 3:
            raise ConfigError(
                f"The model {name!r} has the labels {list(id2label.values())}; expected entailment, neutral and contradiction, each once. "
                "Take a natural-language-inference model, or correct id2label in its config.json."
            )
        found.append(int(hits[0]))
    return found[0], found[1], found[2]


class _Model:
    """A Hugging Face encoder with its tokenizer, by hub name or folder."""

    def __init__(self, name: str | Path, head: str, max_length: int) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(f"The model {str(name)!r} needs transformers and torch. Install crucible-framework[local].") from error
        from ..backends.local.loading import quiet  # an encoder without its head is what is wanted here: no report of it

        self.name, self.max_length = str(name), max_length
        local = places().offline or Path(name).is_dir()
        try:
            with quiet():
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.name, local_files_only=local)
                self.model = getattr(transformers, head).from_pretrained(self.name, local_files_only=local, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NotFoundError(f"The model {self.name!r} cannot be loaded: {why} Expected a hub name in the cache or a folder with safetensors.") from error

    def encode(self, *texts: list[str]) -> Mapping[str, Tensor]:
        """Token tensors, the first text cut where a pair is too long."""
        truncation = "only_first" if len(texts) > 1 else True
        encoded: Mapping[str, Tensor] = self.tokenizer(*texts, padding=True, truncation=truncation, max_length=self.max_length, return_tensors="pt")
        return encoded


class NliModel:
    """A natural-language-inference cross-encoder, for example "cross-encoder/nli-deberta-v3-base".

    A premise that is too long is cut at its end, so put what matters first, or give sentences.

    Args:
        name: hub name or folder with config.json, safetensors and tokenizer.
        max_length: tokens of premise and hypothesis together.

    Raises:
        ConfigError: no transformers, or the labels are not the three (see `label_order`).
        NotFoundError: there is no such model here.
        DataError (when it is asked): a hypothesis alone is longer than max_length.
    """

    def __init__(self, name: str | Path, *, max_length: int = 512) -> None:
        self._loaded = _Model(name, "AutoModelForSequenceClassification", max_length)
        self.order = label_order(dict(self._loaded.model.config.id2label), self._loaded.name)

    @property
    def name(self) -> str:
        """The hub name or folder."""
        return self._loaded.name

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[Inference]:
        """One inference per (premise, hypothesis)."""
        import torch

        found: list[Inference] = []
        for start in range(0, len(pairs), _BATCH):
            some = pairs[start : start + _BATCH]
            for _, hypothesis in some:
                length = len(self._loaded.tokenizer(hypothesis)["input_ids"])
                if length + 2 > self._loaded.max_length:
                    raise DataError(
                        f"A claim has {length} tokens; {self.name!r} reads {self._loaded.max_length} with its premise. Shorten {hypothesis[:40]!r}."
                    )
            with torch.no_grad():
                logits = self._loaded.model(**self._loaded.encode([a for a, _ in some], [b for _, b in some])).logits
            rows = torch.softmax(logits.double(), dim=-1)[:, list(self.order)].tolist()
            found += [Inference(entailment=row[0], neutral=row[1], contradiction=row[2]) for row in rows]
        return found


class EmbeddingSimilarity:
    """Cosine of mean-pooled embeddings, for example of "sentence-transformers/all-MiniLM-L6-v2"; each different text goes through once.

    Args:
        name: hub name or folder with config.json, safetensors and tokenizer.
        max_length: tokens per text; the rest is cut.

    Raises:
        ConfigError: no transformers.
        NotFoundError: there is no such model here.

    Source: Reimers & Gurevych 2019, arXiv 1908.10084 (mean pooling, the model's own default).
    """

    def __init__(self, name: str | Path, *, max_length: int = 256) -> None:
        self._loaded = _Model(name, "AutoModel", max_length)

    @property
    def name(self) -> str:
        """The hub name or folder."""
        return self._loaded.name

    def _embed(self, texts: list[str]) -> NDArray[np.float64]:
        import torch

        inputs = self._loaded.encode(texts)
        with torch.no_grad():
            states = self._loaded.model(**inputs).last_hidden_state
        keep = inputs["attention_mask"].unsqueeze(-1).to(states)
        pooled = (states * keep).sum(1) / keep.sum(1).clamp(min=1)
        unit: NDArray[np.float64] = torch.nn.functional.normalize(pooled.double(), dim=-1).numpy()
        return unit

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[float]:
        """Cosine in [−1, 1] per pair."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors: dict[str, NDArray[np.float64]] = {}
        for start in range(0, len(texts), _BATCH):
            some = texts[start : start + _BATCH]
            vectors.update(zip(some, self._embed(some), strict=True))
        return [float(np.clip(vectors[a] @ vectors[b], -1.0, 1.0)) for a, b in pairs]

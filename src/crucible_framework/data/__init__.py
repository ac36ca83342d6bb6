"""Data: rows → `Example` → `Datum` → `Batch`. Importing it loads no tokenizer, template or network library."""

from __future__ import annotations

from .batches import Batches, normalise
from .benchmarks import DATASETS, Listing, datasets, load_dataset
from .examples import LABELS, Loader, Source
from .pairs import load_preferences, preference_examples
from .rendering import Rendered, render, render_all
from .sources import Row, read_rows
from .splits import Leak, deduplicate, k_fold, leaks, sample_examples, split_dataset, with_shots
from .tokens import ByteTokenizer, HuggingFaceTokenizer, completion_tokens, render_prompt
from .unfolding import Unfolding

__all__ = [
    "DATASETS",
    "LABELS",
    "Batches",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "Leak",
    "Listing",
    "Loader",
    "Rendered",
    "Row",
    "Source",
    "Unfolding",
    "completion_tokens",
    "datasets",
    "deduplicate",
    "k_fold",
    "leaks",
    "load_dataset",
    "load_preferences",
    "normalise",
    "preference_examples",
    "read_rows",
    "render",
    "render_all",
    "render_prompt",
    "sample_examples",
    "split_dataset",
    "with_shots",
]

"""Splits, folds, samples, duplicates, leaks and few-shot prompts: nothing lost, no document on two sides, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.data import deduplicate, k_fold, leaks, load_dataset, sample_examples, split_dataset, with_shots
from crucible_framework.errors import ConfigError, DataError
from crucible_framework.records import Dataset, DatasetCard, Example, Message


def made(rows: list[tuple[str, str, str]], split: str = "train") -> Dataset:
    """Rows of (prompt, target, document)."""
    examples = tuple(
        Example(id=f"{split}{i}", prompt=prompt, target=target, meta={"document": document} if document else {})
        for i, (prompt, target, document) in enumerate(rows)
    )
    return Dataset(examples=examples, card=DatasetCard(name="own", split=split, task="", rows=len(rows), sha256="", licence="", source="Made."))


def documents(dataset: Dataset) -> set[object]:
    return {example.meta["document"] for example in dataset}


Sizes = st.lists(st.integers(1, 6), min_size=6, max_size=30)


@given(sizes=Sizes, seed=st.integers(0, 99), stratify=st.booleans())
def test_parts_hold_everything_once_and_share_no_document(sizes: list[int], seed: int, stratify: bool) -> None:
    rows = [(f"{d} {i}", "ab"[(d + i) % 2], f"d{d}") for d, size in enumerate(sizes) for i in range(size)]
    whole = made(rows)
    parts = split_dataset(whole, {"train": 0.6, "test": 0.4}, seed=seed, stratify=stratify)
    assert sorted(example.id for part in parts.values() for example in part) == sorted(example.id for example in whole)
    assert not documents(parts["train"]) & documents(parts["test"])
    assert abs(len(parts["train"]) - 0.6 * len(whole)) <= max(sizes) + 1
    again = split_dataset(Dataset(examples=whole.examples[::-1], card=whole.card), {"train": 0.6, "test": 0.4}, seed=seed)
    if not stratify:
        assert documents(again["train"]) == documents(parts["train"]) or max(sizes) > 1
    assert parts["train"].card.split == "train"
    assert parts["train"].card.rows == len(parts["train"])


@given(sizes=Sizes, k=st.integers(2, 5))
def test_each_example_is_in_one_fold(sizes: list[int], k: int) -> None:
    whole = made([(f"{d} {i}", "a", f"d{d}") for d, size in enumerate(sizes) for i in range(size)])
    folds = k_fold(whole, k)
    assert Counter(example.id for _, test in folds for example in test) == Counter(example.id for example in whole)
    assert all(not documents(train) & documents(test) and len(train) + len(test) == len(whole) for train, test in folds)


def test_stratified_parts_keep_the_shares_of_labels() -> None:
    train = load_dataset("minifact")
    for _, test in k_fold(train, 5, stratify=True):
        assert set(Counter(example.target for example in test).values()) == {24}
    drawn = sample_examples(train, 30, by="label", seed=1)
    assert set(Counter(example.target for example in drawn).values()) == {10}
    assert len(sample_examples(train, 7, seed=2)) == 7
    whole = sample_examples(train, 10, by="document")
    assert len(whole) == 18
    assert len(documents(whole)) == 2


def test_what_does_not_fit_is_refused() -> None:
    small = made([("a", "x", "d"), ("b", "y", "d")])
    with pytest.raises(ConfigError, match="add up to 1"):
        split_dataset(small, {"train": 0.5, "test": 0.4})
    with pytest.raises(DataError, match="no example"):
        split_dataset(small, {"train": 0.5, "test": 0.5})
    with pytest.raises(DataError, match="1 documents for 2 folds"):
        k_fold(small, 2)
    with pytest.raises(ConfigError, match="folds"):
        k_fold(small, 1)
    with pytest.raises(ConfigError, match="n is 3 of 2"):
        sample_examples(small, 3)


def test_duplicates_differ_in_case_and_punctuation_only() -> None:
    whole = made([("What falls?", "a", ""), ("what  FALLS", "a", ""), ("What falls?", "b", ""), ("What rises?", "a", "")])
    kept, dropped = deduplicate(whole)
    assert ([example.id for example in kept], dropped) == (["train0", "train3"], (("train0", "train1"), ("train0", "train2")))
    kept, dropped = deduplicate(whole, on="both")
    assert dropped == (("train0", "train1"),)
    assert deduplicate(kept, on="both") == (kept, ())


def test_leaks_are_the_same_words_shared_ngrams_and_shared_documents() -> None:
    long = "the quick brown fox jumps over the lazy dog while nine other foxes sleep under an old oak tree"
    train = made([(long, "a", "p1"), ("A short one", "b", "p2")])
    test = made([("a SHORT one!", "b", "p9"), (f"{long} and so on", "a", "p8"), ("nothing alike", "c", "p1"), ("fresh words only", "c", "p7")], "test")
    found = {leak.test: (leak.why, leak.train) for leak in leaks(train, test)}
    assert found == {"test0": ("same", "train1"), "test1": ("overlap", "train0"), "test2": ("document", "train0")}
    assert leaks(train, test)[0].share == 1.0
    assert not leaks(load_dataset("minifact"), load_dataset("minifact", split="test")), "the shipped data are clean"
    with pytest.raises(ConfigError, match=r"13 and 0\.5"):
        leaks(train, test, n=0)


def test_shots_come_from_other_documents_and_before_the_question() -> None:
    train, test = load_dataset("minifact"), load_dataset("minifact", split="test")
    shown = with_shots(test, train, 3, seed=5)
    prompt = shown.examples[0].prompt
    assert isinstance(prompt, tuple)
    assert [message.role for message in prompt] == ["system", *["user", "assistant"] * 3, "user"]
    assert prompt[-1] == test.examples[0].prompt[-1]
    assert shown == with_shots(test, train, 3, seed=5)
    assert shown.card.sha256 != test.card.sha256
    own = with_shots(train, train, 1) if len({e.meta["document"] for e in train}) < 2 else None
    assert own is None
    with pytest.raises(ConfigError, match="0 examples of other documents"):
        with_shots(train, train, 1)
    raw = with_shots(made([("Q: 2+2? A:", "4", "")], "test"), made([("Q: 1+1? A:", "2", "")]), 1)
    assert raw.examples[0].prompt == "Q: 1+1? A: 2\n\nQ: 2+2? A:"
    mixed = with_shots(made([("Q: 2+2?", "4", "")], "test"), load_dataset("minifact"), 1).examples[0].prompt
    assert mixed[-1] == Message(role="user", content="Q: 2+2?")

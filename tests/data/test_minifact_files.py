"""The shipped minifact files keep the promises of their README."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "src" / "crucible_framework" / "data" / "minifact"
LABELS = ("SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO")
PASSAGES_PER_SPLIT = {"train": 40, "dev": 6, "test": 18}
NEGATION = re.compile(r"\b(?:not|never|no|none|nor|neither|nothing|nobody|nowhere|cannot|without|\w+n't)\b", re.IGNORECASE)

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    text = (FOLDER / name).read_bytes().decode("utf-8", errors="strict")
    return [json.loads(line) for line in text.splitlines()]


PASSAGES = read("passages.jsonl")
CLAIMS = read("claims.jsonl")
TEXT = {row["id"]: row["text"] for row in PASSAGES}
SPLIT = {row["id"]: row["split"] for row in PASSAGES}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def plain(text: str) -> str:
    return " ".join(words(text))


def claims_of(*, split: str | None = None, label: str | None = None) -> list[Row]:
    return [row for row in CLAIMS if (split is None or SPLIT[row["passage_id"]] == split) and (label is None or row["label"] == label)]


def length(row: Row) -> int:
    return len(row["claim"].split())


def negation_rate(rows: list[Row]) -> float:
    return float(np.mean([bool(NEGATION.search(row["claim"])) for row in rows]))


def test_rows_have_exactly_the_documented_fields() -> None:
    assert {tuple(row) for row in PASSAGES} == {("id", "title", "text", "split")}
    assert {tuple(row) for row in CLAIMS} == {("id", "passage_id", "claim", "label")}
    assert all(isinstance(value, str) and value == value.strip() and value for row in PASSAGES + CLAIMS for value in row.values())


@pytest.mark.parametrize("name", ["passages.jsonl", "claims.jsonl", "README.md", "LICENSE"])
def test_files_are_clean_utf8_with_one_final_newline(name: str) -> None:
    text = (FOLDER / name).read_bytes().decode("utf-8", errors="strict")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\ufeff" not in text
    assert "\ufffd" not in text
    assert all(char == "\n" or char.isprintable() for char in text)


def test_licence_is_cc0() -> None:
    assert "CC0-1.0" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "CC0-1.0" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_passage_counts_per_split() -> None:
    assert Counter(SPLIT.values()) == PASSAGES_PER_SPLIT
    assert len(PASSAGES) == 64


def test_claim_counts_per_split_and_label() -> None:
    counts = Counter((SPLIT[row["passage_id"]], row["label"]) for row in CLAIMS)
    assert counts == {(split, label): 3 * n for split, n in PASSAGES_PER_SPLIT.items() for label in LABELS}
    assert len(CLAIMS) == 576


def test_each_passage_has_three_claims_of_each_label() -> None:
    counts = Counter((row["passage_id"], row["label"]) for row in CLAIMS)
    assert counts == {(passage, label): 3 for passage in TEXT for label in LABELS}


def test_ids_are_unique_and_claims_point_to_passages() -> None:
    assert len({row["id"] for row in PASSAGES}) == len(PASSAGES)
    assert len({row["id"] for row in CLAIMS}) == len(CLAIMS)
    assert {row["passage_id"] for row in CLAIMS} == set(TEXT)
    assert {row["id"] for row in CLAIMS} == {f"{passage}-{number}" for passage in TEXT for number in range(1, 10)}
    assert all(row["id"].rpartition("-")[0] == row["passage_id"] for row in CLAIMS)


def test_splits_are_disjoint_by_passage() -> None:
    groups = [{row["passage_id"] for row in claims_of(split=split)} for split in PASSAGES_PER_SPLIT]
    assert all(not left & right for left, right in itertools.combinations(groups, 2))
    assert sum(map(len, groups)) == len(PASSAGES)


def test_no_duplicate_passages_or_claims() -> None:
    for values in ([row["text"] for row in PASSAGES], [row["title"] for row in PASSAGES], [row["claim"] for row in CLAIMS]):
        assert [value for value, n in Counter(map(plain, values)).items() if n > 1] == []


def test_no_passage_sentence_is_shared() -> None:
    sentences = [plain(sentence) for row in PASSAGES for sentence in re.split(r"(?<=[.!?])\s+", row["text"])]
    assert max(Counter(sentences).values()) == 1


@pytest.mark.parametrize("row", PASSAGES, ids=[row["id"] for row in PASSAGES])
def test_passage_length(row: Row) -> None:
    assert 45 <= len(row["text"].split()) <= 85
    assert 3 <= len(re.split(r"(?<=[.!?])\s+", row["text"])) <= 5
    assert row["text"].endswith(".")


def test_claims_are_single_short_sentences() -> None:
    assert [row["id"] for row in CLAIMS if not 4 <= length(row) <= 25] == []
    assert [row["id"] for row in CLAIMS if not re.fullmatch(r"[A-Z].*[^.]\.", row["claim"])] == []
    assert [row["id"] for row in CLAIMS if re.search(r"[.!?]\s", row["claim"])] == []


def test_no_claim_is_copied_from_its_passage() -> None:
    assert [row["id"] for row in CLAIMS if f" {plain(row['claim'])} " in f" {plain(TEXT[row['passage_id']])} "] == []


def test_label_order_varies() -> None:
    orders = [tuple(row["label"] for row in group) for _, group in itertools.groupby(CLAIMS, key=lambda row: row["passage_id"])]
    assert len(orders) == len(PASSAGES)
    assert len(set(orders)) >= 50
    by_place = Counter((number, label) for order in orders for number, label in enumerate(order))
    assert all(10 <= by_place[number, label] <= 34 for number in range(9) for label in LABELS)


def test_lengths_are_alike_across_labels() -> None:
    means = [float(np.mean([length(row) for row in claims_of(label=label)])) for label in LABELS]
    assert max(means) - min(means) < 1.0


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_negation_is_alike_across_labels(split: str | None) -> None:
    rates = [negation_rate(claims_of(split=split, label=label)) for label in LABELS]
    assert min(rates) > 0.05
    assert max(rates) < 0.20
    assert max(rates) - min(rates) < 0.05


@pytest.mark.parametrize("pattern", [r"\babout\b", r"\bthan\b", r"\bmost\b", r"\bmore\b", r"\bcan\b", r"\balways\b", r"\bonly\b", r"\d"])
def test_stock_words_do_not_mark_a_label(pattern: str) -> None:
    rates = [float(np.mean([bool(re.search(pattern, row["claim"], re.IGNORECASE)) for row in claims_of(label=label)])) for label in LABELS]
    assert max(rates) - min(rates) < 0.08


def naive_bayes_accuracy(train: list[Row], test: list[Row]) -> float:
    """Multinomial naive Bayes over the words of the claim alone, with add-one smoothing and equal priors."""
    vocabulary: dict[str, int] = {}
    for row in train:
        for word in words(row["claim"]):
            vocabulary.setdefault(word, len(vocabulary))

    def counts(row: Row) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = np.zeros(len(vocabulary))
        for word in words(row["claim"]):
            if word in vocabulary:
                found[vocabulary[word]] += 1
        return found

    totals = np.stack([1.0 + np.sum([counts(row) for row in train if row["label"] == label], axis=0) for label in LABELS])
    log_likelihood = np.log(totals / totals.sum(axis=1, keepdims=True))
    guesses = [LABELS[int(np.argmax(log_likelihood @ counts(row)))] for row in test]
    return float(np.mean([guess == row["label"] for guess, row in zip(guesses, test, strict=True)]))


def test_naive_bayes_learns_a_planted_leak() -> None:
    marker = dict(zip(LABELS, ("alpha", "beta", "gamma"), strict=True))
    leaky = [row | {"claim": " ".join([row["claim"], *[marker[row["label"]]] * 3])} for row in CLAIMS]
    train = [row for row in leaky if SPLIT[row["passage_id"]] == "train"]
    test = [row for row in leaky if SPLIT[row["passage_id"]] == "test"]
    assert naive_bayes_accuracy(train, test) > 0.95


def test_labels_do_not_leak_from_the_claim_alone() -> None:
    assert naive_bayes_accuracy(claims_of(split="train"), claims_of(split="test")) < 0.50


def test_labels_do_not_leak_across_passage_folds() -> None:
    place = {row["id"]: index for index, row in enumerate(PASSAGES)}
    scores = []
    for fold in range(8):
        inside = [row for row in CLAIMS if place[row["passage_id"]] % 8 == fold]
        outside = [row for row in CLAIMS if place[row["passage_id"]] % 8 != fold]
        scores.append(naive_bayes_accuracy(outside, inside))
    assert float(np.mean(scores)) < 0.45

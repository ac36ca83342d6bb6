"""FEVER with its gold evidence: rows as copenlu/fever_gold_evidence has them, and what malformed ones say; FeverSymmetric's real files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.test_questions import documents, write

from crucible_framework.data import datasets, load_dataset
from crucible_framework.errors import FormatError, NotFoundError, UnknownNameError
from crucible_framework.evaluation import baselines
from crucible_framework.records import Json

SUPPORTED: dict[str, Json] = {
    "claim": "Nikolaj Coster-Waldau worked with the Fox Broadcasting Company.",
    "evidence": [[
        "Nikolaj_Coster-Waldau", 7,
        ("He then played Detective John Amsterdam in the short-lived Fox television series New Amsterdam -LRB- 2008 -RRB- , as well as appearing as Frank Pike "
        "in the 2009 Fox television film Virtuality , originally intended as a pilot ."),
    ]],
    "id": 75397, "label": "SUPPORTS", "original_id": 75397, "verifiable": "VERIFIABLE",
}  # fmt: skip
REFUTED: dict[str, Json] = {
    "claim": "Adrienne Bailon is an accountant.",
    "evidence": [[
        "Adrienne_Bailon", 0,
        ("Adrienne Eliza Houghton -LRB- née Bailon ; born October 24 , 1983 -RRB- is an American singer , songwriter , recording artist , actress , dancer "
        "and television personality ."),
    ]],
    "id": 156709, "label": "REFUTES", "original_id": 156709, "verifiable": "VERIFIABLE",
}  # fmt: skip
OPEN: dict[str, Json] = {
    "claim": "System of a Down briefly disbanded in limbo.",
    "evidence": [
        ["System_of_a_Down", 9, "The group briefly disbanded in 2006 ."],
        ["System_of_a_Down", 10, " It reunited in November 2010 , followed by a tour for the next three years . "],
    ],
    "id": 33078, "label": "NOT ENOUGH INFO", "original_id": 33078, "verifiable": "NOT VERIFIABLE",
}  # fmt: skip


def folder(tmp_path: Path, **parts: list[dict[str, Json]]) -> Path:
    for name in ("train", "valid", "test"):
        write(tmp_path / "fever" / f"{name}.jsonl", parts.get(name, [SUPPORTED, REFUTED, OPEN]))
    return tmp_path


def test_a_row_is_a_passage_a_claim_and_one_of_three_labels(tmp_path: Path) -> None:
    dataset = load_dataset("fever", split="train", data=folder(tmp_path))
    assert [example.target for example in dataset] == ["SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO"]
    assert [example.id for example in dataset] == ["train-1", "train-2", "train-3"]
    assert documents(dataset) == {"Nikolaj_Coster-Waldau", "Adrienne_Bailon", "System_of_a_Down"}
    last = dataset.examples[2]
    assert last.meta["passage"] == "The group briefly disbanded in 2006 . It reunited in November 2010 , followed by a tour for the next three years ."
    for words in (last.meta["passage"], last.meta["claim"]):
        assert str(words) in str(last.prompt)
    card = dataset.card
    assert (card.name, card.task, card.split, card.rows, card.licence) == ("fever", "verify", "train", 3, "CC BY-SA 3.0")
    assert card.labels == ("SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO")
    assert [one.name for one in card.files] == ["train.jsonl"]
    assert "train.jsonl" in card.source
    assert baselines(dataset)[1].value == pytest.approx(1 / 3), "a guess knows three labels"


def test_dev_is_the_file_called_valid_and_files_may_be_packed(tmp_path: Path) -> None:
    data = folder(tmp_path, valid=[REFUTED], test=[OPEN, SUPPORTED])
    assert [example.id for example in load_dataset("fever", split="dev", data=data)] == ["dev-1"]
    assert load_dataset("fever", split="dev", data=data).card.files[0].name == "valid.jsonl"
    (data / "fever" / "test.jsonl").unlink()
    write(data / "fever" / "test.jsonl.gz", [OPEN, SUPPORTED])
    assert [example.target for example in load_dataset("fever", split="test", data=data)] == ["NOT_ENOUGH_INFO", "SUPPORT"]
    with pytest.raises(UnknownNameError, match="dev"):
        load_dataset("fever", split="valid", data=data)
    with pytest.raises(UnknownNameError, match="verify"):
        load_dataset("fever", split="dev", task="extract", data=data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": "MAYBE"}, "SUPPORTS, REFUTES, NOT ENOUGH INFO"),
        ({"evidence": []}, "page, number, sentence"),
        ({"evidence": "the text"}, "page, number, sentence"),
        ({"evidence": [["Page", 1]]}, "page, number, sentence"),
        ({"evidence": [["Page", 1, "so ."], "so ."]}, "page, number, sentence"),
        ({"evidence": [["Page", 1, 2]]}, "page, number, sentence"),
        ({"claim": 3}, "claim"),
        ({"label": None}, "label"),
    ],
)
def test_a_malformed_row_names_its_line(tmp_path: Path, change: dict[str, Json], told: str) -> None:
    with pytest.raises(FormatError, match=rf"test\.jsonl:2.*{told}"):
        load_dataset("fever", split="test", data=folder(tmp_path, test=[SUPPORTED, {**REFUTED, **change}]))


def test_missing_files_say_where_to_put_them(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="copenlu/fever_gold_evidence"):
        load_dataset("fever", split="train", data=tmp_path)
    assert next(one for one in datasets(tmp_path) if one.name == "fever").missing
    assert not next(one for one in datasets(folder(tmp_path)) if one.name == "fever").missing


def test_the_real_symmetric_pairs_say_nothing_by_the_claim_alone(real_data: Path) -> None:
    for split in ("dev", "test"):
        dataset = load_dataset("fever_symmetric", split=split, data=real_data)
        by_claim: dict[str, set[str]] = {}
        for example in dataset:
            by_claim.setdefault(str(example.meta["claim"]), set()).add(example.target)
        both = sum(len(labels) == 2 for labels in by_claim.values())
        assert both / len(by_claim) > 0.9, "each claim is true beside one passage and false beside another"
        assert all(str(example.meta["passage"]) in str(example.prompt) for example in dataset)
        counts = [sum(example.target == label for example in dataset) for label in ("SUPPORT", "CONTRADICT")]
        assert sum(counts) == len(dataset)
        assert min(counts) / max(counts) > 0.9

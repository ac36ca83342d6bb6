"""Data sets by name: minifact, SciFact in both tasks, and one's own; what is where; and the real files where CRUCIBLE_DATA has them."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.config import places
from crucible_framework.data import DATASETS, LABELS, Listing, Source, datasets, load_dataset
from crucible_framework.data import benchmarks as names
from crucible_framework.data.scifact import DEV_SHARE, load
from crucible_framework.errors import DataError, FormatError, NotFoundError, UnknownNameError
from crucible_framework.plugins import Registry
from crucible_framework.records import Dataset, DatasetCard, Example, Message

REAL = Path(os.environ["CRUCIBLE_DATA"]) if os.environ.get("CRUCIBLE_DATA") else None
"""Read before a fixture takes the variable away from every test."""
real = pytest.mark.skipif(REAL is None or not (REAL / "scifact").is_dir(), reason="CRUCIBLE_DATA holds no 'scifact'")
SPLITS = ("train", "dev", "test")
Row = dict[str, Any]


def documents(dataset: Dataset) -> set[str]:
    return {str(document) for example in dataset for document in cast("list[str]", example.meta.get("documents", [example.meta["document"]]))}


def text(example: Example) -> str:
    assert isinstance(example.prompt, tuple)
    return example.prompt[-1].content


# ------------------------------------------------------------------------------------------------------------ minifact
def test_minifact_holds_every_shipped_claim_once() -> None:
    folder = Path(names.__file__).parent / "minifact"
    claims = {row["id"]: row for row in map(json.loads, (folder / "claims.jsonl").read_text().splitlines())}
    passages = {row["id"]: row for row in map(json.loads, (folder / "passages.jsonl").read_text().splitlines())}
    sets = {split: load_dataset("minifact", split=split) for split in SPLITS}
    assert [len(sets[split]) for split in SPLITS] == [360, 54, 162]
    for split, dataset in sets.items():
        for example in dataset:
            row = claims.pop(example.id)
            passage = passages[row["passage_id"]]
            assert passage["split"] == split
            assert text(example) == f"{passage['text']}\nClaim: {row['claim']}"
            assert (example.target, example.meta["label"], example.meta["document"]) == (row["label"], row["label"], row["passage_id"])
    assert claims == {}


def test_minifact_splits_are_disjoint_by_document() -> None:
    parts = [documents(load_dataset("minifact", split=split)) for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 64


def test_minifact_card() -> None:
    card = load_dataset("minifact").card
    assert (card.name, card.split, card.task, card.rows, card.licence, card.labels) == ("minifact", "train", "verify", 360, "CC0-1.0", LABELS)
    assert [file.name for file in card.files] == ["passages.jsonl", "claims.jsonl"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in (card.sha256, *(file.sha256 for file in card.files)))


def test_verification_prompts_are_short_and_name_the_labels() -> None:
    for example in load_dataset("minifact", split="test"):
        system, user = cast("tuple[Message, ...]", example.prompt)
        assert (system.role, user.role) == ("system", "user")
        assert all(re.search(rf"\b{label}\b", system.content) for label in LABELS)
        own = len(str(example.meta["passage"])) + len(str(example.meta["claim"]))
        assert len(system.content) + len(user.content) - own <= 60, "characters that every example pays for"


def test_minifact_of_ones_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "minifact"
    folder.mkdir()
    write(folder / "passages.jsonl", [{"id": "p", "title": "T", "text": "Water is wet.", "split": "train"}])
    write(folder / "claims.jsonl", [{"id": "p-1", "passage_id": "p", "claim": "It is.", "label": "SUPPORT"}])
    (example,) = load_dataset("minifact", data=tmp_path)
    assert text(example) == "Water is wet.\nClaim: It is."
    with pytest.raises(DataError, match="'test' part of data set 'minifact' has 0 examples"):
        load_dataset("minifact", split="test", data=tmp_path)
    write(folder / "claims.jsonl", [{"id": "p-1", "passage_id": "q", "claim": "It is.", "label": "SUPPORT"}])
    with pytest.raises(FormatError, match=r"claims\.jsonl:1: there is no passage 'q'"):
        load_dataset("minifact", data=tmp_path)
    write(folder / "claims.jsonl", [{"id": "p-1", "passage_id": "p", "claim": "It is.", "label": "MAYBE"}])
    with pytest.raises(FormatError, match=r"claims\.jsonl:1: the label is 'MAYBE'; expected one of SUPPORT, CONTRADICT, NOT_ENOUGH_INFO"):
        load_dataset("minifact", data=tmp_path)
    with pytest.raises(NotFoundError, match=r"passages\.jsonl"):
        load_dataset("minifact", data=tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["minifact", "scifact"])
def test_unknown_splits_and_tasks_name_the_nearest(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"No split of '{name}' is called 'trian'. Did you mean 'train'"):
        load_dataset(name, split="trian")
    with pytest.raises(UnknownNameError, match=f"No task of '{name}' is called 'verfy'. Did you mean 'verify'"):
        load_dataset(name, task="verfy")


# ------------------------------------------------------------------------------------------------------------- scifact
def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def document(number: int, sentences: int = 3) -> Row:
    return {"doc_id": number, "title": f"Title {number}", "abstract": [f"Sentence {i} of {number}. " for i in range(sentences)], "structured": False}


def claim(number: int, cited: list[int], evidence: dict[str, list[Row]] | None = None) -> Row:
    return {"id": number, "claim": f"Claim {number}.", "evidence": evidence or {}, "cited_doc_ids": cited}


def evidence(label: str, *sentences: int) -> Row:
    return {"sentences": list(sentences), "label": label}


def make(folder: Path, train: Sequence[Row], test: Sequence[Row], corpus: Sequence[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "claims_train.jsonl", train)
    write(folder / "claims_dev.jsonl", test)
    write(folder / "corpus.jsonl", corpus)
    return folder


def test_verify_has_an_example_for_each_claim_and_cited_abstract(tmp_path: Path) -> None:
    found = {"7": [evidence("CONTRADICT", 0, 2), evidence("CONTRADICT", 1)]}
    make(tmp_path, [claim(9, [2])], [claim(1, [7, 8], found)], [document(n) for n in (2, 7, 8)])
    one, two = load_dataset("scifact", split="test", data=tmp_path)
    assert (one.id, one.target, one.meta["document"], one.meta["claim_id"]) == ("1-7", "CONTRADICT", "7", "1")
    assert (two.id, two.target, two.meta["document"]) == ("1-8", "NOT_ENOUGH_INFO", "8")
    assert text(one) == "Title 7. Sentence 0 of 7. Sentence 1 of 7. Sentence 2 of 7.\nClaim: Claim 1."
    assert len(text(one)) == len(text(two)), "the passage does not tell the label by its length: it is the whole abstract for each"


def test_extract_writes_claims_and_relations(tmp_path: Path) -> None:
    found = {"7": [evidence("SUPPORT", 0, 2)], "8": [evidence("CONTRADICT", 1)]}
    make(tmp_path, [claim(9, [2])], [claim(1, [7, 8], found), claim(2, [8])], [document(n) for n in (2, 7, 8)])
    (example,) = load_dataset("scifact", split="test", task="extract", data=tmp_path)
    assert example.target.splitlines() == [
        "CLAIM[c1]: Claim 1.",
        "CLAIM[c2] (Document 7): Sentence 0 of 7. Sentence 2 of 7.",
        "RELATION: c2 supports c1",
        "CLAIM[c3] (Document 8): Sentence 1 of 8.",
        "RELATION: c3 refutes c1",
    ]
    assert "Document 7: Title 7\n\nSentence 0 of 7. Sentence 1 of 7. Sentence 2 of 7.\n\nDocument 8: Title 8" in str(example.prompt)
    assert example.meta == {"document": "7", "documents": ["7", "8"], "claim": "Claim 1.", "claim_id": "1"}


@given(
    train=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=40),
    test=st.lists(st.lists(st.integers(30, 50), min_size=1, max_size=3), min_size=1, max_size=8),
)
def test_no_document_and_no_claim_is_in_two_splits(tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], test: list[list[int]]) -> None:
    folder = make(
        tmp_path_factory.mktemp("scifact"),
        [claim(n, cited) for n, cited in enumerate(train)],
        [claim(1000 + n, cited) for n, cited in enumerate(test)],
        [document(n, 1) for n in range(51)],
    )
    found: dict[str, Dataset] = {}
    for split in SPLITS:
        try:
            found[split] = load_dataset("scifact", split=split, data=folder)
        except DataError as error:
            assert "has 0 examples" in str(error)  # noqa: PT017 - a split may be empty with so few rows
    for key in ("document", "claim_id"):
        parts = [{str(example.meta[key]) for example in dataset} for dataset in found.values()]
        assert sum(map(len, parts)) == len(set().union(*parts))
    held_out = {str(n) for cited in test for n in cited}
    kept = {(example.meta["claim_id"], example.meta["document"]) for split in ("train", "dev") if split in found for example in found[split]}
    assert kept == {(str(n), str(d)) for n, cited in enumerate(train) for d in cited if str(d) not in held_out}, "nothing else is lost"


def test_the_smallest_document_of_a_group_decides_its_split(tmp_path: Path) -> None:
    """The rule of the file head, worked out apart: sha256 of "scifact/<smallest id>" as a fraction of 2^256 is below 0.1 in dev."""
    groups = [[n + 2, n, n + 1000] for n in range(8, 900, 3)]
    numbers = {n for group in groups for n in group}
    make(tmp_path, [claim(group[1], group) for group in groups], [claim(5000, [5000])], [document(n, 1) for n in (*numbers, 5000)])
    expected = {str(group[1]) for group in groups if int(hashlib.sha256(f"scifact/{group[1]}".encode()).hexdigest(), 16) / 2**256 < 0.1}
    assert {example.meta["claim_id"] for example in load("dev", None, tmp_path)} == expected
    assert 10 < len(expected) < 60


def test_about_a_tenth_of_many_documents_is_dev(tmp_path: Path) -> None:
    make(tmp_path, [claim(n, [n]) for n in range(2000)], [claim(5000, [5000])], [document(n, 1) for n in (*range(2000), 5000)])
    assert len(load("dev", None, tmp_path)) / 2000 == pytest.approx(DEV_SHARE, abs=0.02)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({**claim(1, [7]), "cited_doc_ids": "7"}, "'cited_doc_ids' is '7'; expected a list of document ids"),
        ({**claim(1, [7]), "evidence": []}, r"'evidence' is \[\]; expected an object"),
        (claim(1, [99]), "a cited document is '99'; expected one that the corpus file holds"),
        (claim(1, [7], {"7": [evidence("REFUTES", 0)]}), "the evidence in document 7 is .*expected a label SUPPORT or CONTRADICT"),
        (claim(1, [7], {"7": [evidence("SUPPORT", 3)]}), "sentence numbers below 3"),
        (claim(1, [7], {"7": [evidence("SUPPORT", 0), evidence("CONTRADICT", 1)]}), "rationales that share a label"),
        (claim(1, [7], {"7": []}), "one or more rationales"),
        (claim(1, [7], cast("Any", {"7": ["x"]})), "the evidence in document 7 is 'x'"),
        ({**claim(1, [7]), "claim": ""}, "'claim' is ''; expected text"),
        ({"claim": "a"}, "there is no 'id'"),
        ({**claim(1, [7]), "id": None}, "'id' is None; expected text or a whole number"),
    ],
)
def test_rows_of_another_layout_give_file_and_line(tmp_path: Path, row: Row, match: str) -> None:
    make(tmp_path, [claim(9, [7])], [claim(5, [7]), row], [document(7)])
    with pytest.raises(FormatError, match=rf"claims_dev\.jsonl:2: .*{match}"):
        load_dataset("scifact", split="test", data=tmp_path)


def test_a_corpus_row_of_another_layout(tmp_path: Path) -> None:
    make(tmp_path, [claim(9, [7])], [claim(5, [7])], [document(7), {**document(8), "abstract": "text"}])
    with pytest.raises(FormatError, match=r"corpus\.jsonl:2: 'abstract' is 'text'; expected a list of sentences"):
        load_dataset("scifact", data=tmp_path)


def test_duplicate_claims_give_both_lines(tmp_path: Path) -> None:
    make(tmp_path, [claim(9, [7]), claim(9, [7])], [claim(5, [7])], [document(7)])
    with pytest.raises(DataError, match=r"id '9' stands at .*claims_train\.jsonl:1 and again at .*claims_train\.jsonl:2"):
        load_dataset("scifact", split="test", data=tmp_path)


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"'scifact' is not here.*claims_train\.jsonl.*CRUCIBLE_DATA.*crucible-framework\[hf\]"):
        load_dataset("scifact", data=tmp_path)
    with pytest.raises(NotFoundError, match="'scifact' is not here"):
        load_dataset("scifact")


# ---------------------------------------------------------------------------------------------------------- what is where
def test_datasets_say_what_is_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(name: str, data: Path | None = None) -> Listing:
        return next(listing for listing in datasets(data) if listing.name == name)

    minifact, scifact = listed("minifact"), listed("scifact")
    assert (minifact.name, minifact.tasks, minifact.splits, minifact.missing) == ("minifact", ("verify",), SPLITS, "")
    assert [path.name for path in minifact.where] == ["passages.jsonl", "claims.jsonl"]
    assert all(path.is_file() for path in minifact.where)
    assert (scifact.name, scifact.tasks, scifact.where) == ("scifact", ("verify", "extract"), ())
    assert "CRUCIBLE_DATA" in scifact.missing
    cached = make(places().cache / "data" / "scifact", [], [], [])
    assert listed("scifact").where[0].parent == cached
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path))
    mine = make(tmp_path / "scifact", [], [], [])
    assert listed("scifact").where[0].parent == mine
    assert listed("scifact", tmp_path / "elsewhere").where == listed("minifact", tmp_path / "elsewhere").where == ()


def own(split: str, task: str | None, data: Path | None) -> Dataset:
    """A loader as a user writes it."""
    card = DatasetCard(name="own", split=split, task=task or "a", rows=1, sha256="0", licence="mine", source=f"{data}")
    return Dataset(examples=(Example(id="1", prompt="p", target="t"),), card=card)


def test_a_loader_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("own_data")
    module.own = own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_data", module)
    assert load_dataset("own_data:own", split="x", task="b", data=tmp_path).card.source == str(tmp_path)
    registry: Registry[Any] = Registry("data set", {"broken": "no_such_module:load", "plain": "own_data:own"})
    source = Source(load=own, find=lambda data: (tmp_path,), tasks=("a",), licence="mine", splits=("x",))
    registry.add("whole", source)
    monkeypatch.setattr(names, "DATASETS", registry)
    broken, plain, whole = datasets()
    assert "no_such_module" in broken.missing
    assert "Only loading it" in plain.missing
    assert whole == Listing(name="whole", splits=("x",), tasks=("a",), licence="mine", where=(tmp_path,))
    assert load_dataset("whole").card.name == load_dataset("plain").card.name == "own"


def test_the_names_are_registered() -> None:
    assert DATASETS.names() == ("fever", "fever_symmetric", "gsm8k", "humaneval", "minifact", "mmlu", "scifact")


# -------------------------------------------------------------------------------------------------------- the real files
@real
@pytest.mark.parametrize(
    ("task", "sizes"),
    [("verify", {"train": 584, "dev": 40, "test": 339}), ("extract", {"train": 294, "dev": 27, "test": 188})],
)
def test_real_scifact(task: str, sizes: dict[str, int]) -> None:
    assert REAL is not None
    sets = {split: load_dataset("scifact", split=split, task=task, data=REAL) for split in SPLITS}
    assert {split: len(dataset) for split, dataset in sets.items()} == sizes
    parts = [documents(dataset) for dataset in sets.values()]
    assert sum(map(len, parts)) == len(set.union(*parts))
    if task == "verify":
        assert all(set(Counter(example.target for example in dataset)) == set(LABELS) for dataset in sets.values())


@real
def test_real_scifact_whole_corpus_gives_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REAL is not None
    for name in ("claims_train.jsonl", "claims_dev.jsonl", "corpus.jsonl.gz"):
        shutil.copy(REAL / "scifact" / name, tmp_path / name)
    cited = load_dataset("scifact", data=REAL)
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path))
    whole = load_dataset("scifact")
    assert whole.examples == cited.examples
    assert whole.card.sha256 == cited.card.sha256
    assert [file.name for file in whole.card.files] == ["claims_train.jsonl", "claims_dev.jsonl", "corpus.jsonl.gz"]


@real
def test_extract_gives_the_published_prompts_and_completions() -> None:
    """Published is one row for each claim of the train file with evidence; abstracts of several stand there in no order that can be told."""
    assert REAL is not None
    rows = load_dataset(REAL / "scifact" / "scifact_claim_extractor_clean.jsonl")
    published = {str(cast("Row", example.meta["metadata"])["claim_id"]): example for example in rows}
    ours = [example for split in ("train", "dev") for example in load_dataset("scifact", split=split, task="extract", data=REAL)]
    assert len(ours) == 321
    for example in ours:
        assert example.target == published[example.id].target
        if len(cast("list[str]", example.meta["documents"])) == 1:
            assert example.prompt == published[example.id].prompt


@real
@pytest.mark.parametrize(("name", "rows"), [("gsm8k/test.jsonl", 1319), ("gsm8k", 7473)])
def test_real_files_of_questions_and_answers(name: str, rows: int) -> None:
    assert REAL is not None
    if not (REAL / name).exists():
        pytest.skip(f"CRUCIBLE_DATA holds no {name}")
    dataset = load_dataset(REAL / name)
    assert len(dataset) == rows
    assert all("####" in example.target for example in dataset)

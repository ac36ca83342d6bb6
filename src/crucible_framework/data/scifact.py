"""SciFact in its official JSON-lines layout, as two tasks: `verify` and `extract`.

`verify` has one example per claim and cited abstract, labelled by the evidence in that abstract (none: NOT_ENOUGH_INFO). `extract` has one
per claim with evidence: its abstracts as the passage; claim, rationales and relations as the completion, in the layout of
`scifact_claim_extractor_clean.jsonl`.

Splits: `test` is the official dev file (the official test file has no labels). The official train file gives `train` and `dev`: abstracts
that also occur in `test` are left out; abstracts that a claim joins stay together, and such a group is in `dev` where the sha256 of
"scifact/" and its smallest document id, as a fraction of 2^256, is below 0.1. So no abstract and no claim is in two splits.

This file does not know how prompts become tokens. Source: Wadden et al. 2020, arXiv 2004.14974.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from ..config import places
from ..errors import FormatError, NotFoundError
from ..records import Dataset, DatasetCard, Example, Json, record
from . import hub
from .examples import LABELS, SPLITS, Source, check_known, make_dataset, unique, verify_prompt
from .sources import Row, file_card, find_files, read_rows

__all__ = ["DEV_SHARE", "SOURCE", "TASKS", "load"]

TASKS = ("verify", "extract")
DEV_SHARE = 0.1
_FILES = (("claims_train.jsonl",), ("claims_dev.jsonl",), ("corpus.jsonl", "corpus_cited.jsonl", "corpus.jsonl.gz"))
_FIX = (
    "Unpack the archive that github.com/allenai/scifact links to into a folder 'scifact' and set CRUCIBLE_DATA "
    "to the folder that holds it; or install crucible-framework[hf], so that the hub is asked."
)
_LICENCE = "claims CC BY 4.0; abstracts (S2ORC) ODC-By 1.0"
_CITATION = "Wadden et al. 2020, Fact or Fiction: Verifying Scientific Claims, EMNLP 2020, arXiv 2004.14974"
_HEAD = "You are extracting atomic claims and their logical relations from scientific abstracts.\n\nPassage:\n"
_TASK = (
    "\n\nTask:\n"
    "1. Restate the passage's central hypothesis verbatim (or with minimal edits) as CLAIM[c1].\n"
    "2. Continue listing distinct factual claims as CLAIM[c#] (Document <doc_id>): <text> using precise language from the passage.\n"
    "3. Use RELATION: <source_id> <supports|refutes> <target_id> to link evidence claims to the main hypothesis.\n\n"
)
_RELATIONS = {"SUPPORT": "supports", "CONTRADICT": "refutes"}


@record
class _Claim:
    """One claim: `cited` abstracts; per abstract with evidence its label and rationales (sentence numbers)."""

    row: Row
    id: str
    text: str
    cited: tuple[str, ...]
    evidence: Mapping[str, tuple[str, tuple[tuple[int, ...], ...]]]


@record
class _Document:
    title: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def _bad(row: Row, key: str, value: object, expected: str) -> FormatError:
    return FormatError(f"{row.where}: {key} is {value!r}; expected {expected}. Use SciFact's official files as they are.")


def _document(row: Row) -> _Document:
    sentences = row.get("abstract")
    if not isinstance(sentences, list) or not sentences or not all(isinstance(sentence, str) for sentence in sentences):
        raise _bad(row, "'abstract'", sentences, "a list of sentences")
    return _Document(title=row.text("title").strip(), sentences=tuple(sentence.strip() for sentence in cast("list[str]", sentences)))


def _claim(identity: str, row: Row, corpus: Mapping[str, _Document]) -> _Claim:
    cited = row.get("cited_doc_ids")
    evidence = row.get("evidence")
    if not isinstance(cited, list) or not all(isinstance(document, int) for document in cited):
        raise _bad(row, "'cited_doc_ids'", cited, "a list of document ids")
    if not isinstance(evidence, dict):
        raise _bad(row, "'evidence'", evidence, "an object of document ids")
    names = tuple(dict.fromkeys([*map(str, cited), *evidence]))
    for name in names:
        if name not in corpus:
            raise _bad(row, "a cited document", name, "one that the corpus file holds")
    found = {name: _rationales(row, name, sets, len(corpus[name].sentences)) for name, sets in evidence.items()}
    return _Claim(row=row, id=identity, text=row.text("claim").strip(), cited=names, evidence=found)


def _rationales(row: Row, document: str, sets: Json, sentences: int) -> tuple[str, tuple[tuple[int, ...], ...]]:
    labels: set[str] = set()
    rationales: list[tuple[int, ...]] = []
    for item in sets if isinstance(sets, list) else ():
        label, numbers = (item.get("label"), item.get("sentences")) if isinstance(item, dict) else (None, None)
        if label not in _RELATIONS or not isinstance(numbers, list) or not all(isinstance(n, int) and 0 <= n < sentences for n in numbers):
            raise _bad(row, f"the evidence in document {document}", item, f"a label SUPPORT or CONTRADICT, and sentence numbers below {sentences}")
        labels.add(label)
        rationales.append(cast("tuple[int, ...]", tuple(numbers)))
    if len(labels) != 1:
        raise _bad(row, f"the evidence in document {document}", sets, "one or more rationales that share a label")
    return labels.pop(), tuple(rationales)


def _in_dev(document: str) -> bool:
    digest = hashlib.sha256(f"scifact/{document}".encode()).digest()
    return int.from_bytes(digest) < DEV_SHARE * 2**256


def _groups(claims: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Document id → the smallest id among the documents that claims join it to."""
    parents: dict[str, str] = {}

    def root(document: str) -> str:
        while parents.setdefault(document, document) != document:
            document = parents[document]
        return document

    for documents in claims:
        roots = {root(document) for document in documents}
        for other in roots:
            parents[other] = min(roots, key=lambda name: (len(name), name))
    return {document: root(document) for document in parents}


def _select(split: str, train: list[_Claim], test: list[_Claim]) -> tuple[list[tuple[_Claim, tuple[str, ...]]], int]:
    """Claims of the split, each with those of its documents that belong to it; and how many training documents are in the test split."""
    if split == "test":
        return [(claim, claim.cited) for claim in test], 0
    held_out = {document for claim in test for document in claim.cited}
    shared = {document for claim in train for document in claim.cited if document in held_out}
    kept = [(claim, tuple(document for document in claim.cited if document not in held_out)) for claim in train]
    groups = _groups(documents for _, documents in kept)
    return [(claim, documents) for claim, documents in kept if documents and _in_dev(groups[documents[0]]) == (split == "dev")], len(shared)


def _verify(claim: _Claim, documents: tuple[str, ...], corpus: Mapping[str, _Document]) -> list[Example]:
    examples = []
    for name in documents:
        document = corpus[name]
        title = document.title if document.title.endswith((".", "?", "!")) else f"{document.title}."
        passage = f"{title} {document.text}"
        label = claim.evidence[name][0] if name in claim.evidence else "NOT_ENOUGH_INFO"
        meta: dict[str, Json] = {"document": name, "label": label, "claim": claim.text, "passage": passage, "claim_id": claim.id}
        examples.append(Example(id=f"{claim.id}-{name}", prompt=verify_prompt(passage, claim.text), target=label, meta=meta))
    return examples


def _extract(claim: _Claim, documents: tuple[str, ...], corpus: Mapping[str, _Document]) -> list[Example]:
    if not claim.evidence or not set(claim.evidence) <= set(documents):
        return []
    names = list(claim.evidence)
    passage = "\n\n".join(f"Document {name}: {corpus[name].title}\n\n{corpus[name].text}" for name in names)
    lines = [f"CLAIM[c1]: {claim.text}"]
    number = 2
    for name, (label, rationales) in claim.evidence.items():
        for rationale in rationales:
            quoted = " ".join(corpus[name].sentences[n] for n in rationale)
            lines += [f"CLAIM[c{number}] (Document {name}): {quoted}", f"RELATION: c{number} {_RELATIONS[label]} c1"]
            number += 1
    meta: dict[str, Json] = {"document": names[0], "documents": [*names], "claim": claim.text, "claim_id": claim.id}
    return [Example(id=claim.id, prompt=f"{_HEAD}{passage}{_TASK}", target="\n".join(lines), meta=meta)]


def _find(data: Path | None) -> tuple[Path, ...]:
    return find_files("scifact", _FILES, data=data, fix=_FIX)


def _files(data: Path | None) -> tuple[Path, ...]:
    """The three files; from the hub into the cache where they are nowhere else and the hub may be asked."""
    try:
        return _find(data)
    except NotFoundError:
        if data is not None or places().offline or find_spec("datasets") is None:
            raise
    hub.fetch_scifact(places().cache / "data" / "scifact")
    return _find(data)


def load(split: str, task: str | None, data: Path | None) -> Dataset:
    """SciFact's `verify` (default) or `extract`.

    Raises:
        UnknownNameError: another split or task.
        NotFoundError: the files are nowhere.
        ServiceError: they are not on this machine, and the hub cannot be reached.
        FormatError: a row is not in the official layout, or cites a document that the corpus file lacks.
    """
    check_known("split of 'scifact'", split, SPLITS)
    task = check_known("task of 'scifact'", task or TASKS[0], TASKS)
    paths = _files(data)
    train_rows, test_rows, corpus_rows = (read_rows(path) for path in paths)
    corpus = {name: _document(row) for name, row in unique(corpus_rows, "doc_id").items()}
    train, test = ([_claim(name, row, corpus) for name, row in unique(rows, "id").items()] for rows in (train_rows, test_rows))
    selected, shared = _select(split, train, test)
    make = _verify if task == "verify" else _extract
    source = (
        "SciFact, official dev file."
        if split == "test"
        else (
            f"SciFact, official train file, split by document (dev: {DEV_SHARE:.0%} of the groups of documents by sha256); "
            f"{shared} of its documents, which the test split has too, were left out."
        )
    )
    card = DatasetCard(
        name="scifact",
        split=split,
        task=task,
        rows=0,
        sha256="",
        licence=_LICENCE,
        source=source,
        citation=_CITATION,
        labels=LABELS if task == "verify" else (),
        files=tuple(map(file_card, paths)),
    )
    return make_dataset([(claim.row, example) for claim, documents in selected for example in make(claim, documents, corpus)], card)


SOURCE = Source(load=load, find=_find, tasks=TASKS, licence=_LICENCE)

"""FEVER with its gold evidence, and FeverSymmetric.

`fever` reads the files of Atanasova et al. 2020 (`train.jsonl`, `valid.jsonl`, `test.jsonl` of copenlu/fever_gold_evidence): each row has a claim, its
label, and the evidence sentences as [page, number, sentence]. The page of the first sentence is the document. `valid` is `dev`.

`fever_symmetric` has claims with one sentence of evidence, made so that the claim alone says nothing about the label.
Each original pair has up to three rewritten ones (`id`, then `id` and 0000002 to 0000004); such a family is one document. `dev` is the
file of version 0.2. `test` is the file of version 0.1 without the families, claims and evidence that `dev` has too. Texts keep the
tokenisation of the files (`-LRB-`). There is no third label and no train split.

Source: Thorne et al. 2018, arXiv 1803.05355; Atanasova, Wright & Augenstein 2020, arXiv 2009.08205; Schuster et al. 2019, arXiv 1908.05267.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import FormatError
from ..records import Dataset, DatasetCard, Example, Json, record
from .examples import Source, check_known, make_dataset, verify_prompt
from .sources import Row, file_card, find_files, read_rows

__all__ = ["FEVER", "SOURCE", "load"]

_FILES = (("symmetric_v0.2_fever_symmetric_dev.jsonl",), ("symmetric_v0.1_fever_symmetric_full.jsonl",))
_FIX = "Put both files of github.com/TalSchuster/FeverSymmetric into a folder 'fever_symmetric' and set CRUCIBLE_DATA to the folder that holds it."
_LICENCE = "CC BY-SA 3.0"
_LABELS = {"SUPPORTS": "SUPPORT", "REFUTES": "CONTRADICT"}
_REWRITTEN = re.compile(r"(\d+)000000\d")


@record
class _Pair:
    """One claim and its evidence."""

    row: Row
    id: str
    family: str
    claim: str
    evidence: str
    label: str


def _pair(row: Row, evidence: str) -> _Pair:
    name, label = row.text("id"), row.text("label")
    if label not in _LABELS:
        raise FormatError(f"{row.where}: the label is {label!r}; expected {' or '.join(_LABELS)}. Use the authors' file.")
    match = _REWRITTEN.fullmatch(name)
    return _Pair(
        row=row, id=name, family=match[1] if match else name, claim=row.text("claim"), evidence=row.text(evidence), label=_LABELS[label]
    )  # fmt: skip


def _find(data: Path | None) -> tuple[Path, ...]:
    return find_files("fever_symmetric", _FILES, data=data, fix=_FIX)


def load(split: str, task: str | None, data: Path | None) -> Dataset:
    """The pairs of a split.

    Raises:
        UnknownNameError: another split or task. NotFoundError: the files are nowhere. FormatError: a row is not as the authors wrote it.
    """
    check_known("split of 'fever_symmetric'", split, SOURCE.splits)
    check_known("task of 'fever_symmetric'", task or "verify", SOURCE.tasks)
    paths = _find(data)
    dev = [_pair(row, "evidence") for row in read_rows(paths[0])]
    pairs = dev
    if split == "test":
        families, claims, evidence = ({getattr(pair, key) for pair in dev} for key in ("family", "claim", "evidence"))
        everything = [_pair(row, "evidence_sentence") for row in read_rows(paths[1])]
        shared = {pair.family for pair in everything if pair.family in families or pair.claim in claims or pair.evidence in evidence}
        pairs = [pair for pair in everything if pair.family not in shared]
    version = "0.2, dev file" if split == "dev" else "0.1, without what the dev file of 0.2 has too"
    card = DatasetCard(
        name="fever_symmetric", split=split, task="verify", rows=0, sha256="", licence=_LICENCE, source=f"FeverSymmetric {version}.",
        citation="Schuster et al. 2019, Towards Debiasing Fact Verification Models, EMNLP 2019, arXiv 1908.05267",
        labels=tuple(_LABELS.values()), files=tuple(map(file_card, paths if split == "test" else paths[:1])),
    )  # fmt: skip
    return make_dataset([(pair.row, _example(pair)) for pair in pairs], card)


def _example(pair: _Pair) -> Example:
    meta: dict[str, Json] = {"document": pair.family, "label": pair.label, "claim": pair.claim, "passage": pair.evidence}
    return Example(id=pair.id, prompt=verify_prompt(pair.evidence, pair.claim), target=pair.label, meta=meta)


SOURCE = Source(load=load, find=_find, tasks=("verify",), licence=_LICENCE, splits=("dev", "test"))


# --------------------------------------------------------------------------------------------------------------- fever
_ALL_LABELS = {**_LABELS, "NOT ENOUGH INFO": "NOT_ENOUGH_INFO"}
_PARTS = {"train": "train", "dev": "valid", "test": "test"}


def _find_fever(data: Path | None) -> tuple[Path, ...]:
    wanted = tuple((f"{name}.jsonl", f"{name}.jsonl.gz") for name in _PARTS.values())
    fix = "Put train.jsonl, valid.jsonl and test.jsonl of the data set copenlu/fever_gold_evidence into a folder 'fever'"
    return find_files("fever", wanted, data=data, fix=f"{fix} and set CRUCIBLE_DATA to the folder that holds it.")


def _evidence(row: Row) -> tuple[str, str]:
    """(the page of the first sentence, all sentences in order)."""
    given = row.get("evidence")
    sentences = [part for part in given if isinstance(part, list) and len(part) >= 3] if isinstance(given, list) else []
    if not sentences or not isinstance(given, list) or len(sentences) != len(given) or not all(isinstance(part[2], str) for part in sentences):
        raise FormatError(f"{row.where}: 'evidence' is {str(given)[:60]!r}; expected a list of [page, number, sentence]. Use the authors' file.")
    return str(sentences[0][0]), " ".join(str(part[2]).strip() for part in sentences)


def _load_fever(split: str, task: str | None, data: Path | None) -> Dataset:
    check_known("split of 'fever'", split, FEVER.splits)
    check_known("task of 'fever'", task or "verify", FEVER.tasks)
    path = dict(zip(_PARTS, _find_fever(data), strict=True))[split]
    pairs: list[tuple[Row, Example]] = []
    for number, row in enumerate(read_rows(path), start=1):
        label = row.text("label")
        if label not in _ALL_LABELS:
            raise FormatError(f"{row.where}: the label is {label!r}; expected {', '.join(_ALL_LABELS)}. Use the authors' file.")
        (page, passage), claim = _evidence(row), row.text("claim")
        meta: dict[str, Json] = {"document": page, "label": _ALL_LABELS[label], "claim": claim, "passage": passage}
        pairs.append((row, Example(id=f"{split}-{number}", prompt=verify_prompt(passage, claim), target=_ALL_LABELS[label], meta=meta)))
    card = DatasetCard(
        name="fever", split=split, task="verify", rows=0, sha256="", licence=_LICENCE, source=f"FEVER with gold evidence, file {path.name}.",
        citation="Thorne et al. 2018, FEVER, NAACL 2018, arXiv 1803.05355; evidence: Atanasova et al. 2020, arXiv 2009.08205",
        labels=tuple(_ALL_LABELS.values()), files=(file_card(path),),
    )  # fmt: skip
    return make_dataset(pairs, card)


FEVER = Source(load=_load_fever, find=_find_fever, tasks=("verify",), licence=_LICENCE)

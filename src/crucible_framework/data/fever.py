"""FeverSymmetric: claims with one sentence of evidence, made so that the claim alone says nothing about the label.

Each original pair has up to three rewritten ones (`id`, then `id` and 0000002 to 0000004); such a family is one document. `dev` is the
file of version 0.2. `test` is the file of version 0.1 without the families, claims and evidence that `dev` has too. Texts keep the
tokenisation of the files (`-LRB-`). There is no third label and no train split. Source: Schuster et al. 2019, arXiv 1908.05267.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import FormatError
from ..records import Dataset, DatasetCard, Example, Json, record
from .examples import Source, check_known, make_dataset, verify_prompt
from .sources import Row, file_card, find_files, read_rows

__all__ = ["SOURCE", "load"]

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

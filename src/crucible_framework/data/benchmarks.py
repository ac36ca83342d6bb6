"""`load_dataset`: data sets by name or path, and the small `minifact` set that the package ships.

A data set of your own is a `Source`, registered in `DATASETS` or as an entry point `crucible.data_set`, or one function with the signature of
`Loader` named as "module:function".
This file does not know tokens or batches.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, FormatError, NotFoundError, UnknownNameError
from ..events import emit
from ..plugins import Registry
from ..records import Dataset, DatasetCard, Example, FileCard, Json, record
from .examples import LABELS, SPLITS, Loader, Source, check_known, first, make_dataset, unique, verify_prompt
from .sources import SUFFIXES, Row, file_card, find_path, read_rows
from .tables import is_path, load_table

__all__ = ["DATASETS", "MINIFACT", "Listing", "datasets", "load_dataset", "load_minifact"]

_SHIPPED = Path(__file__).parent / "minifact"
_LICENCE = "CC0-1.0"

DATASETS: Registry[Source | Loader] = Registry(
    "data set",
    {
        "fever": "crucible_framework.data.fever:FEVER",
        "fever_symmetric": "crucible_framework.data.fever:SOURCE",
        "gsm8k": "crucible_framework.data.questions:GSM8K",
        "humaneval": "crucible_framework.data.questions:HUMANEVAL",
        "minifact": "crucible_framework.data.benchmarks:MINIFACT",
        "mmlu": "crucible_framework.data.questions:MMLU",
        "scifact": "crucible_framework.data.scifact:SOURCE",
    },
)


@record
class Listing:
    """A data set that has a name, and whether its files are on this machine.

    Attributes:
        where: the files that would be read; empty where they are not here.
        missing: why not, and how to get them; "" where they are here.
    """

    name: str
    splits: tuple[str, ...]
    tasks: tuple[str, ...]
    licence: str
    where: tuple[Path, ...] = ()
    missing: str = ""


def datasets(data: Path | None = None) -> tuple[Listing, ...]:
    """Every data set that has a name, sorted, with what is available where. No network is asked.

    Args:
        data: the only folder to look in; without it those that `load_dataset` uses.
    """
    return tuple(_listing(name, data) for name in DATASETS.names())


def _listing(name: str, data: Path | None) -> Listing:
    try:
        source = DATASETS.get(name)
    except ConfigError as error:  # another distribution's entry point that does not import
        return Listing(name=name, splits=(), tasks=(), licence="", missing=str(error))
    if not isinstance(source, Source):
        return Listing(name=name, splits=(), tasks=(), licence="", missing="Only loading it shows where its files are.")
    try:
        where, missing = source.find(data), ""
    except NotFoundError as error:
        where, missing = (), str(error)
    return Listing(name=name, splits=source.splits, tasks=source.tasks, licence=source.licence, where=where, missing=missing)


def load_dataset(name_or_path: str | Path, *, split: str = "train", task: str | None = None, limit: int | None = None, data: Path | None = None) -> Dataset:
    """Examples with a card that says where they come from.

    Args:
        name_or_path: a registered name ("scifact", "minifact"), a `.jsonl` or `.csv` file (also gzipped), a folder with one such file per
            split, or `hf://datasets/owner/name/file.jsonl`.
        split: "train", "dev" or "test"; of a file, a value of its `split` column, and without that column the file is given whole.
        task: "verify" or "extract" of scifact; None is the data set's first.
        limit: only the first examples.
        data: the only folder to look in; without it `CRUCIBLE_DATA`, then the cache, then (`hf://`) the hub.

    Raises:
        UnknownNameError: no such data set, split or task; the nearest names are given.
        NotFoundError: the files are nowhere.
        FormatError: a malformed row (`file:line`).
        DataError: no examples, or duplicate ids (both lines).
        ServiceError: the hub was to be asked and cannot be reached.
        ConfigError: a limit below 1.

    Emits:
        `data.loaded` with dataset, split, task, rows, sha256.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and (name in DATASETS.names() or (":" in name and not is_path(name))):
        source = DATASETS.get(name)
        whole = (source.load if isinstance(source, Source) else source)(split, task, data)
    elif isinstance(name_or_path, Path) or is_path(name) or Path(name).is_dir():
        whole = load_table(name_or_path, split, task, data)
    else:
        raise UnknownNameError("data set", name, DATASETS.names(), fix=f"Your own: a path that ends in {', '.join(SUFFIXES)}, or 'module:attribute'.")
    dataset = first(whole, limit)
    card = dataset.card
    emit("data.loaded", dataset=card.name, split=card.split, task=card.task, rows=card.rows, sha256=card.sha256)
    return dataset


def _find_minifact(data: Path | None) -> tuple[Path, ...]:
    folder = _SHIPPED if data is None else data / "minifact"
    return find_path(folder / "passages.jsonl", data=data), find_path(folder / "claims.jsonl", data=data)


def load_minifact(split: str, task: str | None, data: Path | None) -> Dataset:
    """The shipped claims over short passages; split by passage.

    Raises:
        UnknownNameError: another split or task than "verify".
        FormatError: a claim with another label, or about a passage that is not there.
    """
    check_known("split of 'minifact'", split, SPLITS)
    check_known("task of 'minifact'", task or "verify", ("verify",))
    paths = _find_minifact(data)
    passages, claims = (unique(read_rows(path), "id") for path in paths)
    cards = tuple(map(file_card, paths))
    pairs = [(row, _minifact_example(name, row, passages)) for name, row in claims.items() if _passage(row, passages).text("split") == split]
    return make_dataset(pairs, _minifact_card(split, cards))


def _passage(row: Row, passages: dict[str, Row]) -> Row:
    name = row.text("passage_id")
    if name not in passages:
        raise FormatError(f"{row.where}: there is no passage {name!r}. Expected an id of passages.jsonl: correct the row.")
    return passages[name]


def _minifact_example(name: str, row: Row, passages: dict[str, Row]) -> Example:
    passage, claim, label = _passage(row, passages).text("text"), row.text("claim"), row.text("label")
    if label not in LABELS:
        raise FormatError(f"{row.where}: the label is {label!r}; expected one of {', '.join(LABELS)}. Correct the row.")
    meta: dict[str, Json] = {"document": row.text("passage_id"), "label": label, "claim": claim, "passage": passage}
    return Example(id=name, prompt=verify_prompt(passage, claim), target=label, meta=meta)


def _minifact_card(split: str, cards: tuple[FileCard, ...]) -> DatasetCard:
    return DatasetCard(
        name="minifact",
        split=split,
        task="verify",
        rows=0,
        sha256="",
        licence=_LICENCE,
        labels=LABELS,
        files=cards,
        source="minifact, written for Crucible Framework and shipped with it; split by passage.",
    )


MINIFACT = Source(load=load_minifact, find=_find_minifact, tasks=("verify",), licence=_LICENCE)

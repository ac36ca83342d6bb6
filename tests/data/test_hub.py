"""The hub: what is asked of its client, what its failures become, and SciFact's layout there. The network is never used."""

import sys
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
from huggingface_hub import errors

from crucible_framework.config import places
from crucible_framework.data import hub, load_dataset, read_rows
from crucible_framework.errors import ConfigError, FormatError, NotFoundError, ServiceError

NAME = "hf://datasets/owner/name/folder/a.jsonl"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("CRUCIBLE_OFFLINE", raising=False)


@pytest.mark.parametrize(
    ("name", "repo", "revision", "file"),
    [
        (NAME, "owner/name", None, "folder/a.jsonl"),
        ("hf://datasets/owner/name@v1/a.csv", "owner/name", "v1", "a.csv"),
        ("hf://datasets/owner/name@refs/convert/parquet/part/a.parquet", "owner/name", "refs/convert/parquet", "part/a.parquet"),
        ("hf://datasets/owner/name@refs/pr/3/a.csv", "owner/name", "refs/pr/3", "a.csv"),
    ],
)
@pytest.mark.parametrize("offline", ["1", ""])
def test_the_client_is_asked_for_one_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, repo: str, revision: str | None, file: str, offline: str
) -> None:
    asked: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def download(*args: object, **kwargs: object) -> str:
        asked.append((args, kwargs))
        return str(tmp_path / "a")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert hub.fetch(name) == tmp_path / "a"
    assert asked == [((repo, file), {"repo_type": "dataset", "revision": revision, "cache_dir": places().cache / "hub", "local_files_only": bool(offline)})]


@pytest.mark.parametrize("name", ["hf://datasets/owner/a.jsonl", "hf://datasets/owner/name", "hf://models/owner/name/a"])
def test_names_that_are_no_files_of_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match=r"names no file of the hub\. Expected 'hf://datasets/owner/name"):
        hub.fetch(name)


def test_offline_only_the_hubs_cache_is_read() -> None:
    with pytest.raises(NotFoundError, match="not in the cache and the hub is switched off"):
        hub.fetch(NAME)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("failure", "becomes", "match"),
    [
        (errors.LocalEntryNotFoundError("no"), ServiceError, "cannot be reached"),
        (errors.EntryNotFoundError("no"), NotFoundError, "hub has no"),
        (ConnectionError("reset"), ServiceError, "failed on .*reset"),
    ],
)
def test_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, failure: Exception, becomes: type[Exception], match: str) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(becomes, match=match):
        hub.fetch(NAME)


@pytest.mark.parametrize("module", ["huggingface_hub", "datasets"])
def test_without_the_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module == "datasets":
        monkeypatch.setattr(hub, "fetch", lambda name: tmp_path / name.rpartition("/")[2])
    with pytest.raises(ConfigError, match=r"Install crucible-framework\[hf\]"):
        hub.fetch_scifact(tmp_path)


# ------------------------------------------------------------------------------------------------------------- scifact
CORPUS: list[dict[str, object]] = [
    {"doc_id": 11, "title": "Water", "abstract": ["Water boils.", "It is wet."], "structured": False},
    {"doc_id": 12, "title": "Fire", "abstract": ["Fire is hot."], "structured": False},
    {"doc_id": 13, "title": "Air", "abstract": ["Air is thin."], "structured": False},
]


def flat(identity: int, claim: str, document: str, label: str, sentences: list[int], cited: list[int]) -> dict[str, object]:
    return {
        "id": identity, "claim": claim, "evidence_doc_id": document, "evidence_label": label, "evidence_sentences": sentences, "cited_doc_ids": cited,
    }  # fmt: skip


TRAIN = [
    flat(1, "Water is wet and boils.", "11", "SUPPORT", [0], [11]),
    flat(1, "Water is wet and boils.", "11", "SUPPORT", [1], [11]),
    flat(2, "Fire is cold.", "12", "CONTRADICT", [0], [12]),
]
DEV = [flat(3, "Air is blue.", "", "", [], [13])]


class Parquet:
    """The part of the `datasets` library that is used, over the rows above."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows

    @classmethod
    def from_parquet(cls, path: str, *, cache_dir: str) -> "Parquet":
        assert cache_dir.startswith(str(places().cache))
        return cls({"train": TRAIN, "validation": DEV, "corpus": CORPUS}[Path(path).stem])

    def to_list(self) -> list[dict[str, object]]:
        return self.rows


@pytest.mark.usefixtures("online")
def test_scifact_comes_from_the_hub_once_where_it_is_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("datasets")
    library.Dataset = Parquet  # type: ignore[attr-defined]
    library.__spec__ = huggingface_hub.__spec__
    monkeypatch.setitem(sys.modules, "datasets", library)
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name.removeprefix("hf://datasets/allenai/scifact@refs/convert/parquet/"))
        return Path("corpus" if "/corpus/" in name else name.split("/")[-2])

    monkeypatch.setattr(hub, "fetch", fetch)
    test = load_dataset("scifact", split="test")
    assert [(example.id, example.target) for example in test] == [("3-13", "NOT_ENOUGH_INFO")]
    train = {example.id: example.target for split in ("train", "dev") for example in load_dataset("scifact", split=split)}
    assert train == {"1-11": "SUPPORT", "2-12": "CONTRADICT"}
    assert asked == ["claims/train/0000.parquet", "claims/validation/0000.parquet", "corpus/train/0000.parquet"], "the cache is read the second time"
    claim = read_rows(places().cache / "data" / "scifact" / "claims_train.jsonl")[0]
    assert claim.values == {
        "id": 1,
        "claim": "Water is wet and boils.",
        "evidence": {"11": [{"sentences": [0], "label": "SUPPORT"}, {"sentences": [1], "label": "SUPPORT"}]},
        "cited_doc_ids": [11],
    }


def test_another_layout_on_the_hub_is_refused() -> None:
    with pytest.raises(FormatError, match="row 1 has no 'evidence_doc_id'; it has id, claim, cited_doc_ids"):
        hub.official_claims([{"id": 1, "claim": "a", "cited_doc_ids": []}])

"""Files from the Hugging Face hub: any data file by its `hf://` name, and SciFact in its official layout from the hub's parquet export.

huggingface_hub and datasets are optional and imported when a file is really asked for; offline, only the hub's cache is read. This file
does not know what rows mean, but for the columns of that one export.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias, cast

import orjson

from ..config import places
from ..errors import ConfigError, FormatError, NotFoundError, ServiceError
from ..files import write_atomic
from ..records import Json

__all__ = ["PREFIX", "fetch", "fetch_scifact", "official_claims"]

PREFIX = "hf://datasets/"
_NAME = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/\w+|[^/]+))?/(?P<file>.+)")
_SCIFACT = f"{PREFIX}allenai/scifact@refs/convert/parquet"
_Rows: TypeAlias = Iterable[Mapping[str, Json]]


def fetch(name: str) -> Path:
    """A data file of the hub, from its cache where it is there already.

    Args:
        name: `hf://datasets/owner/name/file.jsonl`, or `owner/name@revision`.

    Raises:
        ConfigError: the name has another form, or huggingface_hub is not installed.
        NotFoundError: the hub has no such file, or offline and not in the cache.
        ServiceError: the hub cannot be reached.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name!r} names no file of the hub. Expected 'hf://datasets/owner/name/file.jsonl'.")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ConfigError(f"{name!r} needs huggingface_hub. Install crucible-framework[hf], or give a local file.") from error
    here = places()
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        path = cast("str", hf_hub_download(repo, file, repo_type="dataset", revision=revision, cache_dir=here.cache / "hub", local_files_only=here.offline))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if here.offline:
            raise NotFoundError(f"{name!r} is not in the cache and the hub is switched off. Unset HF_HUB_OFFLINE and CRUCIBLE_OFFLINE.") from error
        raise ServiceError(f"The hub cannot be reached for {name!r}. Try again later, or give a local file.", retryable=True) from error
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFoundError(f"The hub has no {name!r} that is open to you. Check owner, name, revision and file; a gated set needs HF_TOKEN.") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ServiceError(f"The hub failed on {name!r}: {error}. Try again later, or give a local file.", retryable=True) from error
    return Path(path)


def _parquet(path: Path) -> _Rows:
    try:
        from datasets import Dataset  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ConfigError(f"{path.name!r} is a parquet file, which needs datasets. Install crucible-framework[hf], or give local files.") from error
    return cast("_Rows", Dataset.from_parquet(str(path), cache_dir=str(places().cache / "hub")).to_list())


def official_claims(rows: _Rows) -> tuple[dict[str, Json], ...]:
    """SciFact's claims in the official layout, from the hub's, which has a row for each rationale.

    Raises:
        FormatError: a row lacks a column.
    """
    claims: dict[Json, dict[str, Json]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            new: dict[str, Json] = {"id": row["id"], "claim": row["claim"], "evidence": {}, "cited_doc_ids": row["cited_doc_ids"]}
            document, sentences, label = row["evidence_doc_id"], row["evidence_sentences"], row["evidence_label"]
        except KeyError as error:
            raise FormatError(f"{_SCIFACT}: row {number} has no {error}; it has {', '.join(row)}. Use the official files instead.") from error
        claim = claims.setdefault(row["id"], new)
        if document:
            evidence = cast("dict[str, list[Json]]", claim["evidence"])
            evidence.setdefault(str(document), []).append({"sentences": sentences, "label": label})
    return tuple(claims.values())


def fetch_scifact(folder: Path) -> None:
    """Writes SciFact's three files, in the official layout, into `folder`.

    Raises:
        ConfigError: huggingface_hub or datasets is not installed.
        NotFoundError, ServiceError: as `fetch`.
    """
    parts = {"claims_train": "claims/train", "claims_dev": "claims/validation", "corpus": "corpus/train"}
    rows = {name: _parquet(fetch(f"{_SCIFACT}/{part}/0000.parquet")) for name, part in parts.items()}
    for name, found in rows.items():
        lines = found if name == "corpus" else official_claims(found)
        write_atomic(folder / f"{name}.jsonl", b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))

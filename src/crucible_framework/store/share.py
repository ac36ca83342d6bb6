"""A registered version handed on: to a folder, or to a repository of the Hugging Face hub, and back into a registry.

What is pushed is the version's own files (PEFT's layout, so that other programs load it as it lies), `crucible.json` with everything that
the registry knows and the sha256 of every file, and a README.md where one is given. What is pulled is compared with it byte for byte, and
only files that it names are taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from .. import events, files
from ..config import places, to_dict
from ..errors import AuthError, ConfigError, CorruptError, CrucibleError, NotFoundError, ServiceError
from ..records import Checkpoint, FileCard, Json, ModelVersion
from .checkpoints import checkpoint_meta, from_manifest, number
from .models import Models
from .query import Direction
from .versions import copy_files

__all__ = ["ABOUT", "pull", "push"]

ABOUT = "crucible.json"
_HUB = "hf://"
_FORMAT = 1


def push(models: Models, reference: str, to: str | Path, *, card: str = "", private: bool = True) -> str:
    """Copies a version to a folder or the hub, and returns where it is.

    Args:
        models: the registry.
        reference: "name:2", "name@champion", "name".
        to: a folder that does not exist yet, or "hf://owner/name", which is made if need be.
        card: the README.md (`reports.cards.model_card` writes one).
        private: of a new repository.

    Raises:
        ConfigError: the folder exists, or huggingface_hub is not installed or switched off.
        NotFoundError, CorruptError: there is no such version, or its bytes changed.
        AuthError, ServiceError: the hub refuses, or cannot be reached.
    """
    version = models.get(reference)
    source = cast("Path", version.checkpoint.local_path)
    cards = files.read_manifest(source).files
    about = _about(version, cards)

    def write(folder: Path) -> None:
        copy_files(source, cards, folder)
        files.write_json(folder / ABOUT, about)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")

    name = f"{version.name}:{version.version}"
    if str(to).startswith(_HUB):
        with tempfile.TemporaryDirectory(prefix="crucible-push-") as made:
            write(Path(made))
            _upload(Path(made), _repository(str(to)), name, private=private)
    else:
        if Path(to).exists():
            raise ConfigError(f"{str(to)!r} exists already. Choose another folder.")
        files.publish(Path(to), write, {"pushed": name})
    events.emit("model.pushed", model=version.name, version=version.version, to=str(to), size_bytes=version.checkpoint.size_bytes)
    return str(to)


def _about(version: ModelVersion, cards: tuple[FileCard, ...]) -> dict[str, Json]:
    checkpoint = version.checkpoint
    meta = checkpoint_meta(checkpoint, checkpoint.metrics, fingerprint="", parent="")
    scores: dict[str, Json] = {key: number(value) for key, value in version.metrics.items()}
    kept: dict[str, Json] = {
        "format_version": _FORMAT, "name": version.name, "version": version.version, "tags": dict(version.tags), "metrics": scores,
        "description": version.description, "directions": dict(version.directions), "checkpoint": meta, "files": to_dict(cards),
    }  # fmt: skip
    return kept


def pull(models: Models, source: str | Path, name: str = "", *, revision: str | None = None) -> ModelVersion:
    """Registers what `push` wrote as the next version of a model; where it came from becomes its parent.

    Args:
        models: the registry.
        source: a folder, or "hf://owner/name".
        name: of the model here; the name that it had where none is given.
        revision: of the repository.

    Raises:
        NotFoundError: there is no such folder or repository, or nothing was pushed there.
        CorruptError: a byte differs from what was pushed. ConfigError, AuthError, ServiceError: as `push`.
    """
    with tempfile.TemporaryDirectory(prefix="crucible-pull-") as made:
        folder = _download(_repository(str(source)), Path(made) / "hub", revision) if str(source).startswith(_HUB) else Path(source)
        if not (folder / ABOUT).is_file():
            raise NotFoundError(f"{str(source)!r} holds no {ABOUT}: nothing was pushed there. Register a checkpoint folder instead.")
        cards, known = _parsed(folder, files.read_json(folder / ABOUT), str(source))
        clean = Path(made) / "taken"  # what the list names and nothing else
        copy_files(folder, cards, clean)
        checkpoint = _checkpoint(clean, cards, known, str(source))
        return models.register(
            checkpoint,
            name or str(known["name"]),
            tags=cast("dict[str, str]", known["tags"]),
            metrics={key: float(value) for key, value in cast("dict[str, float]", known["metrics"]).items()},
            parents=[str(source) if str(source).startswith(_HUB) else f"file:{folder.resolve()}"],
            description=str(known["description"]),
            directions=cast("dict[str, Direction]", known["directions"]),
        )


def _parsed(folder: Path, about: Json, source: str) -> tuple[tuple[FileCard, ...], Mapping[str, Json]]:
    """The files that were pushed, all of them there and inside the folder, and what else is known."""
    try:
        known = cast("dict[str, Json]", about)
        version = int(cast("int", known["format_version"]))
        rows = [cast("dict[str, Json]", row) for row in cast("list[Json]", known["files"])]
        cards = tuple(FileCard(name=str(row["name"]), sha256=str(row["sha256"]), size_bytes=int(cast("int", row["size_bytes"]))) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{ABOUT!r} of {source!r} does not parse: {error!r}. Push it anew.") from error
    if version > _FORMAT:
        raise ConfigError(f"{source!r} was pushed by a newer Crucible (format {version}). Upgrade crucible-framework.")
    for card in cards:
        path = Path(card.name)
        if path.is_absolute() or ".." in path.parts or (folder / path).is_symlink():
            raise CorruptError(f"{source!r} names {card.name!r}, which lies outside its folder. Do not use it.")
        if not (folder / path).is_file() or files.sha256_file(folder / path) != card.sha256:
            raise CorruptError(f"{source!r} has another {card.name!r} than was pushed, or none. Pull it again, or push it anew.")
    return cards, known


def _checkpoint(folder: Path, cards: tuple[FileCard, ...], known: Mapping[str, Json], source: str) -> Checkpoint:
    try:
        meta = cast("dict[str, Json]", known["checkpoint"])
        found = from_manifest(folder, files.Manifest(files=cards, meta=meta, sha256=""))
        _ = known["name"], dict(cast("dict[str, Json]", known["tags"])), known["metrics"], known["description"], known["directions"]
    except (KeyError, TypeError, ValueError, CorruptError) as error:
        raise CorruptError(f"{ABOUT!r} of {source!r} does not parse: {error!r}. Push it anew.") from error
    return found


# ------------------------------------------------------------------------------------------------------------------ hub
def _repository(to: str) -> str:
    name = to.removeprefix(_HUB).strip("/")
    if name.count("/") != 1:
        raise ConfigError(f"{to!r} names no repository; expected 'hf://owner/name'.")
    return name


def _hub() -> tuple[object, object]:
    if places().offline:
        raise ConfigError("The hub is switched off. Unset HF_HUB_OFFLINE and CRUCIBLE_OFFLINE.")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ConfigError("The hub needs huggingface_hub. Install it: pip install 'crucible-framework[hf]'") from error
    return huggingface_hub.HfApi(), errors


def _refused(error: Exception, name: str) -> CrucibleError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return AuthError(f"The hub refuses {name!r} ({status}). Set HF_TOKEN to a token that may read or write it.")
    if status == 404:
        return NotFoundError(f"The hub has no {name!r} that is open to you. Check owner, name and revision, and HF_TOKEN.")
    return ServiceError(f"The hub failed on {name!r}: {error}. Try again later.", status=status, retryable=True)


def _upload(folder: Path, repository: str, what: str, *, private: bool) -> None:
    import httpx

    api, errors = _hub()
    try:
        api.create_repo(repository, private=private, exist_ok=True)  # type: ignore[attr-defined] # HfApi
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Push {what}")  # type: ignore[attr-defined]
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise _refused(error, repository) from error


def _download(repository: str, to: Path, revision: str | None) -> Path:
    import httpx

    api, errors = _hub()
    try:
        return Path(api.snapshot_download(repository, revision=revision, local_dir=to))  # type: ignore[attr-defined]
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise _refused(error, repository) from error

"""The files of the model registry, which are its truth: reading, checking and copying versions. Takes no lock and knows no index.

<registry>/<name>/3/        the version's files, copied from the checkpoint and published with a manifest; never changed
<registry>/<name>/3.json    what may change: its stage and tags (absent until one of them does)
<registry>/<name>/aliases.json  which versions its aliases point at
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import orjson

from .. import files
from ..config import to_dict
from ..errors import CorruptError, NotFoundError, StoreError
from ..records import Checkpoint, FileCard, Json, ModelVersion
from .checkpoints import from_manifest, number
from .index import Row

__all__ = ["Stage", "State", "VersionFiles", "assembled", "copy_files", "counting_stage", "first_state", "source_files", "version_of"]

Stage = Literal["none", "staging", "production", "archived"]
_ALIASES = "aliases.json"
_VERSION = re.compile(r"[1-9]\d{0,8}")


class State(NamedTuple):
    """What may change of a version; of several in production, only that with the highest serial is."""

    stage: Stage
    tags: dict[str, str]
    serial: int = 0


class VersionFiles:
    """The versions in a registry's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, version: int) -> Path:
        """The folder of a version."""
        return self.folder / name / str(version)

    def versions(self, name: str | None) -> Iterator[tuple[str, int]]:
        """All versions whose folder is there, whole or damaged, in order."""
        with files.storage_errors(self.folder, "read"):
            names = [name] if name is not None else sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))
            found = [(n, int(p.name)) for n in names if (self.folder / n).is_dir() for p in (self.folder / n).iterdir() if _VERSION.fullmatch(p.name)]
        yield from sorted(found)

    def next_version(self, name: str) -> int:
        """One more than any number that was given, also to a version whose folder somebody took away since."""
        with files.storage_errors(self.folder, "read"):
            names = [p.name.removesuffix(".json") for p in (self.folder / name).iterdir()] if (self.folder / name).is_dir() else []
        return max((int(n) for n in names if _VERSION.fullmatch(n)), default=0) + 1

    def load(self, name: str, version: int, *, deep: bool = False) -> tuple[ModelVersion, State]:
        """A version as its own files tell it; `deep` compares every byte."""
        folder = self.path(name, version)
        manifest = files.verify(folder) if deep else files.read_manifest(folder)
        state = self.state(name, version)
        found = assembled(folder, manifest, state)
        if (found.name, found.version) != (name, version):
            raise CorruptError(f"{str(folder)!r} does not hold {name}:{version}: it was renamed or copied. Move it back, or register it anew.")
        return found, state

    def scan(self, name: str | None) -> Iterator[tuple[Path, ModelVersion, State] | tuple[Path, StoreError]]:
        """Each version as its files tell it, or what is wrong with it."""
        for of, version in self.versions(name) if self.folder.is_dir() else ():
            try:
                yield (self.path(of, version), *self.load(of, version))
            except StoreError as error:
                yield self.path(of, version), error

    def rows(self, name: str | None) -> tuple[list[Row], bool]:
        """The index's rows, as the files tell them; and whether all could be read, damage aside (an I/O error may pass)."""
        entries = list(self.scan(name))
        complete = all(len(entry) == 3 or isinstance(entry[1], (CorruptError, NotFoundError)) for entry in entries)
        return list(self._made_rows([entry[1:] for entry in entries if len(entry) == 3])), complete

    @staticmethod
    def _made_rows(good: Sequence[tuple[ModelVersion, State]]) -> Iterator[Row]:
        last: dict[str, int] = {}
        for found, state in good:
            if state.stage == "production":
                last[found.name] = max(state.serial, last.get(found.name, 0))
        for found, state in good:
            body = cast("dict[str, Json]", to_dict(dataclasses.replace(found, stage=counting_stage(state, last.get(found.name, 0)))))
            checkpoint = cast("dict[str, Json]", body["checkpoint"])
            for part in (body, checkpoint):
                part["metrics"] = {key: number(value) for key, value in cast("dict[str, float]", part["metrics"]).items()}
            del checkpoint["local_path"], checkpoint["uri"]  # the registry may be moved
            yield Row(found.name, found.version, orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode())

    def states(self, name: str) -> dict[int, State]:
        """The states of all versions that have changed since they were registered."""
        return {v: self.state(name, v) for _, v in self.versions(name) if self._state_path(name, v).exists()}

    def _state_path(self, name: str, version: int) -> Path:
        return self.folder / name / f"{version}.json"

    def state(self, name: str, version: int) -> State:
        """What may change of a version, as it is now.

        Raises:
            CorruptError: its file is damaged.
        """
        path = self._state_path(name, version)
        try:
            value = files.read_json(path)
        except NotFoundError:
            return first_state(files.read_manifest(self.path(name, version)))
        try:
            body = dict(cast("dict[str, Json]", value))
            checksum = body.pop("checksum")
            if checksum != _sum(body):
                raise ValueError("its checksum differs")  # noqa: TRY301 # one message for all that can be wrong
            return State(cast("Stage", body["stage"]), cast("dict[str, str]", body["tags"]), int(cast("int", body["serial"])))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{str(path)!r} is damaged: {error}. Delete it and set the stage and tags of {name}:{version} again.") from error

    def write_state(self, name: str, version: int, state: State) -> None:
        """Replaces what may change of a version."""
        body = cast("dict[str, Json]", state._asdict())
        files.write_json(self._state_path(name, version), body | {"checksum": _sum(body)})

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a model.

        Raises:
            CorruptError: their file is damaged.
        """
        path = self.folder / name / _ALIASES
        try:
            value = files.read_json(path)
        except NotFoundError:
            return {}
        try:
            body = dict(cast("dict[str, Json]", value))
            if body.pop("checksum") != _sum(body):
                raise ValueError("its checksum differs")  # noqa: TRY301 # one message for all that can be wrong
            return {key: int(cast("int", version)) for key, version in cast("dict[str, Json]", body["aliases"]).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(f"{str(path)!r} is damaged: {error}. Delete it and set the aliases of {name!r} again.") from error

    def write_aliases(self, name: str, aliases: Mapping[str, int]) -> None:
        """Replaces the aliases of a model."""
        body: dict[str, Json] = {"aliases": dict(sorted(aliases.items()))}
        files.write_json(self.folder / name / _ALIASES, body | {"checksum": _sum(body)})

    def archive_surplus(self, name: str) -> int | None:
        """Archives all but the last promoted version in production, which it returns; also what a crash between two writes left."""
        inside = sorted((state.serial, version) for version, state in self.states(name).items() if state.stage == "production")
        for _, version in inside[:-1]:
            self.write_state(name, version, self.state(name, version)._replace(stage="archived"))
        return inside[-1][1] if inside else None


def _about(manifest: files.Manifest) -> dict[str, Json]:
    about = manifest.meta.get("model")
    if not isinstance(about, dict) or not isinstance(about.get("tags"), dict):
        raise CorruptError("It is a checkpoint but no registered model. Register it with `register`.")
    return about


def first_state(manifest: files.Manifest) -> State:
    """The state of a version that nobody has changed since it was registered."""
    return State("none", cast("dict[str, str]", _about(manifest)["tags"]))


def assembled(folder: Path, manifest: files.Manifest, state: State) -> ModelVersion:
    """A version from its manifest and its state.

    Raises:
        CorruptError: the manifest describes no model version.
    """
    return version_of(_about(manifest), from_manifest(folder, manifest), state.stage, state.tags)


def version_of(about: Mapping[str, Json], checkpoint: Checkpoint, stage: Stage, tags: Mapping[str, str]) -> ModelVersion:
    """A version from what its manifest, or a row of the index, says of it."""
    try:
        return ModelVersion(
            name=str(about["name"]),
            version=int(cast("int", about["version"])),
            stage=stage,
            checkpoint=checkpoint,
            tags=dict(tags),
            metrics={key: float(value) for key, value in cast("dict[str, float]", about["metrics"]).items()},
            parents=tuple(cast("list[str]", about["parents"])),
            created_at=float(cast("float", about["created_at"])),
            description=str(about["description"]),
            directions=dict(cast("dict[str, str]", about.get("directions") or {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{str(checkpoint.local_path)!r} is no model version of this Crucible: {error!r}. Register it anew.") from error


def counting_stage(state: State, last: int) -> Stage:
    """The stage that counts, where a crash left two versions in production; `last` is the serial of the last promotion to it."""
    return "archived" if state.stage == "production" and state.serial != last else state.stage


def _sum(body: Mapping[str, Json]) -> str:
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def source_files(checkpoint: Checkpoint) -> tuple[Path, tuple[FileCard, ...]]:
    """The checkpoint's folder and what it must hold; one that was never published is taken as it is."""
    folder = checkpoint.local_path
    if folder is None:
        raise StoreError(f"Checkpoint {checkpoint.name!r} ({checkpoint.uri}) has no files here. Download it with `backend.download` first.")
    if checkpoint.sha256 or (folder / files.MANIFEST).exists():
        manifest = files.read_manifest(folder)
        if checkpoint.sha256 and manifest.sha256 != checkpoint.sha256:
            raise CorruptError(f"{str(folder)!r} holds another checkpoint than {checkpoint.name!r} now: its manifest differs. List the checkpoints again.")
        return folder, manifest.files
    with files.storage_errors(folder, "read"):
        found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if not found:
        raise NotFoundError(f"{str(folder)!r} holds no files of checkpoint {checkpoint.name!r}. Save it again.")
    return folder, tuple(FileCard(name=p.relative_to(folder).as_posix(), sha256=files.sha256_file(p), size_bytes=p.stat().st_size) for p in found)


def copy_files(source: Path, cards: Iterable[FileCard], to: Path) -> None:
    """Copies the listed files and compares the copies with the list, so that damage never spreads."""
    for card in cards:
        target = to / card.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / card.name, target)
        if (found := files.sha256_file(target)) != card.sha256:
            raise CorruptError(
                f"{str(source / card.name)!r} has sha256 {found[:12]}…; its manifest says {card.sha256[:12]}…. It changed after it was saved: "
                "register another checkpoint."
            )

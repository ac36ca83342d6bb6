"""What the server keeps on disk: training runs, their checkpoints, and what may be done with them.

    <folder>/runs/<run>/run.json                        whose it is, its base model, when it was last used
    <folder>/runs/<run>/weights|sampler_weights|external_weights/<name>/   published folders
    <folder>/runs/<run>/<kind>/<name>.settings.json     public or not, when it expires

A checkpoint appears whole or not at all. This file does not know sessions, HTTP or what weights are.
"""

from __future__ import annotations

import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias, cast

from ..config import from_dict, to_dict
from ..errors import ConfigError, CorruptError, DataError, NotFoundError, StoreError
from ..files import discard, publish, read_json, read_manifest, sweep, write_json
from ..records import Checkpoint, Json, LoraConfig, record

__all__ = ["KINDS", "Kind", "Run", "Shelf", "Stored", "own_run", "path_parts", "tinker_path"]

Kind: TypeAlias = Literal["weights", "sampler_weights", "external_weights"]
KINDS: Mapping[Kind, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""Folder and path part → the protocol's word."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=@+-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
_SETTINGS = ".settings.json"


@record
class Run:
    """A training run. `owner` is the tenant; `train` says which layers it adapts; times are seconds since the epoch."""

    id: str
    owner: str
    base_model: str
    lora: LoraConfig
    train: Mapping[str, bool]
    created_at: float
    last_request_at: float
    corrupted: bool = False
    user_metadata: Mapping[str, str] | None = None
    project: str = ""


@record
class Stored:
    """A checkpoint on the shelf. `model` is the backend's name of the base model, the run's may be an alias of it."""

    run: Run
    kind: Kind
    name: str
    model: str
    step: int
    folder: Path
    size_bytes: int
    created_at: float
    sha256: str
    user_metadata: Mapping[str, str] | None = None
    public: bool = False
    expires_at: float | None = None

    @property
    def path(self) -> str:
        """`tinker://run/kind/name`."""
        return tinker_path(self.run.id, self.kind, self.name)

    @property
    def checkpoint(self) -> Checkpoint:
        """As a backend takes it."""
        return Checkpoint(
            name=self.name,
            uri=self.path,
            kind="state" if self.kind == "weights" else "sampler",
            step=self.step,
            base_model=self.model,
            lora=self.run.lora,
            sha256=self.sha256,
            local_path=self.folder,
            size_bytes=self.size_bytes,
            created_at=self.created_at,
        )


def tinker_path(run: str, kind: Kind, name: str) -> str:
    """A checkpoint's address."""
    return f"tinker://{run}/{kind}/{name}"


def path_parts(path: str) -> tuple[str, Kind, str]:
    """(run, kind, name) of `tinker://run/kind/name`.

    Raises:
        DataError: it has another form.
    """
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in KINDS:
        raise DataError(f"{path!r} is no checkpoint's path; expected 'tinker://<run>/weights/<name>' or …/sampler_weights/… or …/external_weights/….")
    return parts[0], cast("Kind", parts[1]), parts[2]


class Shelf:
    """Runs and checkpoints below one folder, which the caller has locked.

    Args:
        folder: made where it is missing.
        now: seconds since the epoch.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._root, self._now = folder / "runs", now
        self._root.mkdir(parents=True, exist_ok=True)
        for kind in self._root.glob("*/*"):
            if kind.is_dir():
                sweep(kind)

    # ---------------------------------------------------------------------------------------------------------- runs
    def _run_folder(self, run: str) -> Path:
        if not _RUN.fullmatch(run):
            raise NotFoundError(f"There is no training run {run[:140]!r}.")
        return self._root / urllib.parse.quote(run, safe="")

    def put_run(self, run: Run) -> None:
        """Writes or replaces a run's card."""
        write_json(self._run_folder(run.id) / "run.json", to_dict(run))

    def run(self, run: str) -> Run:
        """A run's card.

        Raises:
            NotFoundError: there is none.
            CorruptError: it does not parse.
        """
        try:
            card = read_json(self._run_folder(run) / "run.json")
        except NotFoundError:
            raise NotFoundError(f"There is no training run {run[:140]!r}.") from None
        try:
            return from_dict(Run, cast("dict[str, object]", card))
        except ConfigError as error:
            raise CorruptError(f"The card of the training run {run!r} does not parse: {error}") from error

    def runs(self, owner: str | None = None) -> list[Run]:
        """All runs, or a tenant's, the last used first."""
        found = [self.run(urllib.parse.unquote(path.parent.name)) for path in self._root.glob("*/run.json")]
        return sorted((run for run in found if owner in (None, run.owner)), key=lambda run: (-run.last_request_at, run.id))

    # --------------------------------------------------------------------------------------------------- checkpoints
    def _folder(self, run: str, kind: Kind, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.endswith(_SETTINGS):
            raise DataError(f"A checkpoint cannot be called {name[:140]!r}; expected up to 128 letters, digits and _ . = @ + -, no dot first.")
        return self._run_folder(run) / kind / name

    def check_free(self, run: str, kind: Kind, name: str, *, overwrite: bool = False, request: str = "") -> None:
        """Raises DataError where the name cannot be used or, without `overwrite`, is taken by another request than this one."""
        folder = self._folder(run, kind, name)
        if folder.exists() and not overwrite and not (request and read_manifest(folder).meta.get("request") == request):
            raise DataError(f"{tinker_path(run, kind, name)!r} exists already. Choose another name, or overwrite it.")

    def put(
        self, run: Run, kind: Kind, name: str, write: Callable[[Path], object], *, model: str, step: int,
        ttl_s: float | None = None, user_metadata: Mapping[str, str] | None = None, overwrite: bool = False, request: str = "",
    ) -> Stored:  # fmt: skip
        """Publishes what `write` puts into a folder. The same `request` may do so again: it was not told that it had done so before a kill.

        Raises:
            DataError: the name cannot be used, or is taken.
            StorageFullError, StoreError: the disk; nothing is left behind.
        """
        self.check_free(run.id, kind, name, overwrite=overwrite, request=request)
        folder = self._folder(run.id, kind, name)
        if folder.exists():
            self.delete(run.id, kind, name)
        meta: dict[str, Json] = {
            "model": model,
            "step": step,
            "created_at": self._now(),
            "user_metadata": dict(user_metadata) if user_metadata else None,
            "request": request,
        }
        publish(folder, write, meta)
        self._settle(run.id, kind, name, public=False, expires_at=None if ttl_s is None else self._now() + ttl_s)
        return self.get(run.id, kind, name)

    def _settle(self, run: str, kind: Kind, name: str, *, public: bool, expires_at: float | None) -> None:
        folder = self._folder(run, kind, name)
        write_json(folder.with_name(folder.name + _SETTINGS), {"public": public, "expires_at": expires_at})

    def get(self, run: str, kind: Kind, name: str) -> Stored:
        """A checkpoint that has not expired.

        Raises:
            NotFoundError: there is none.
            CorruptError: its manifest does not parse, or a file is missing.
        """
        gone = f"There is no checkpoint {tinker_path(run, kind, name)!r}; it was never saved, deleted, or has expired. List them with `tinker checkpoint list`."
        try:
            folder, card = self._folder(run, kind, name), self.run(run)
            manifest = read_manifest(folder)
        except (NotFoundError, DataError):
            raise NotFoundError(gone) from None
        settings = cast("dict[str, Json]", self._settings(folder))
        expires = cast("float | None", settings.get("expires_at"))
        if expires is not None and expires <= self._now():
            raise NotFoundError(gone)
        meta = manifest.meta
        return Stored(
            run=card,
            kind=kind,
            name=name,
            model=str(meta["model"]),
            step=int(cast("int", meta["step"])),
            folder=folder,
            size_bytes=manifest.size_bytes,
            created_at=float(cast("float", meta["created_at"])),
            sha256=manifest.sha256,
            user_metadata=cast("dict[str, str] | None", meta.get("user_metadata")),
            public=bool(settings.get("public")),
            expires_at=expires,
        )

    def _settings(self, folder: Path) -> Json:
        try:
            return read_json(folder.with_name(folder.name + _SETTINGS))
        except NotFoundError:
            return {}

    def at(self, path: str) -> Stored:
        """The checkpoint at a `tinker://` path; raises as `get` and `path_parts`."""
        return self.get(*path_parts(path))

    def checkpoints(self, run: str) -> list[Stored]:
        """A run's checkpoints that have not expired, the newest first. A damaged one is left out."""
        found = list[Stored]()
        for kind in KINDS:
            for manifest in (self._run_folder(run) / kind).glob("[!.]*/manifest.json"):
                try:
                    found.append(self.get(run, kind, manifest.parent.name))
                except StoreError:
                    continue
        return sorted(found, key=lambda stored: (-stored.created_at, stored.path))

    def change(self, stored: Stored, *, public: bool, expires_at: float | None) -> None:
        """Sets whether everyone may read it, and when it expires."""
        self._settle(stored.run.id, stored.kind, stored.name, public=public, expires_at=expires_at)

    def delete(self, run: str, kind: Kind, name: str) -> None:
        """Removes a checkpoint.

        Raises:
            NotFoundError: there is none.
        """
        folder = self._folder(run, kind, name)
        if not folder.is_dir():
            raise NotFoundError(f"There is no checkpoint {tinker_path(run, kind, name)!r} to delete.")
        discard(folder)
        folder.with_name(folder.name + _SETTINGS).unlink(missing_ok=True)

    def expire(self) -> int:
        """Removes what has expired; returns how many."""
        count = 0
        for path in list(self._root.glob(f"*/*/*{_SETTINGS}")):
            settings = cast("dict[str, Json]", read_json(path))
            expires, folder = cast("float | None", settings.get("expires_at")), path.with_name(path.name.removesuffix(_SETTINGS))
            if expires is not None and expires <= self._now() and folder.is_dir():
                discard(folder)
                path.unlink(missing_ok=True)
                count += 1
        return count


def own_run(shelf: Shelf, run: str, owner: str) -> Run:
    """A tenant's run.

    Raises:
        NotFoundError: there is none, or it is another tenant's.
    """
    card = shelf.run(run)
    if card.owner != owner:
        raise NotFoundError(f"There is no training run {run[:140]!r}.")
    return card

"""The checkpoints of one run: published folders that are there whole or not at all, listed, verified, compared and pruned.

A checkpoint's folder is `<step>` or `<step>-<name>` with a `manifest.json` (see `files`). What the folder holds is the writer's business:
this file knows no tensors. It takes no lock on the run: one process publishes and prunes (the holder of the run), any number read.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

from .. import events, files
from ..config import to_dict
from ..errors import ConfigError, CorruptError, CrucibleError, NotFoundError, StoreError
from ..records import Checkpoint, Json, LoraConfig
from .names import not_found, safe_name

__all__ = ["Checkpoints", "checkpoint_meta", "from_manifest", "load_checkpoint", "number", "step_name"]

Direction = Literal["min", "max"]
_FOLDER = re.compile(r"\d{8,}(-[A-Za-z0-9._-]{1,80})?")
_PINS = "pins.json"


def step_name(step: int) -> str:
    """The default name of the checkpoint of a step, and the name of its folder."""
    return f"{step:08d}"


def number(value: float) -> Json:
    """The value for JSON, which has no NaN: `float()` reads "nan" and "inf" back."""
    return float(value) if math.isfinite(value) else str(float(value))


def checkpoint_meta(checkpoint: Checkpoint, metrics: Mapping[str, float], *, fingerprint: str, parent: str) -> dict[str, Json]:
    """What the manifest says of a checkpoint besides its files; `from_manifest` reads it back."""
    return {
        "name": checkpoint.name,
        "kind": checkpoint.kind,
        "step": checkpoint.step,
        "base_model": checkpoint.base_model,
        "lora": to_dict(checkpoint.lora),
        "metrics": {key: number(value) for key, value in metrics.items()},
        "parent": parent,
        "fingerprint": fingerprint,
        "created_at": checkpoint.created_at or time.time(),
    }


def from_manifest(folder: Path, manifest: files.Manifest, *, pinned: bool = False) -> Checkpoint:
    """The checkpoint that a manifest describes.

    Raises:
        CorruptError: it describes something else.
    """
    meta = manifest.meta
    try:
        return Checkpoint(
            name=str(meta["name"]),
            uri=f"file:{folder}",
            kind=cast("Literal['state', 'sampler']", meta["kind"]),
            step=int(cast("int", meta["step"])),
            base_model=str(meta["base_model"]),
            lora=_lora(meta["lora"]),
            sha256=manifest.sha256,
            local_path=folder,
            size_bytes=manifest.size_bytes,
            created_at=float(cast("float", meta["created_at"])),
            metrics={name: float(value) for name, value in cast("dict[str, float]", meta["metrics"]).items()},
            pinned=pinned,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{str(folder)!r} is published but is no checkpoint of this version: {error!r}. Use another checkpoint.") from error


def _lora(value: Json) -> LoraConfig:
    fields = dict(cast("Mapping[str, object]", value))
    return LoraConfig(**cast("dict[str, Any]", fields | {"target_modules": tuple(cast("Iterable[str]", fields["target_modules"]))}))


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a published folder, wherever it lies, after comparing every sha256.

    Raises:
        NotFoundError: nothing was published there.
        CorruptError: a byte differs from what was saved.
    """
    path = Path(path)
    return from_manifest(path, files.verify(path))


class Checkpoints:
    """The checkpoints in a folder, usually `<run>/checkpoints`.

    Args:
        folder: need not exist before the first `publish`.
        before_publish: called before each publication; a run makes its metrics durable here, so that no checkpoint is newer than they.
    """

    def __init__(self, folder: str | Path, before_publish: Callable[[], None] | None = None) -> None:
        self.folder = Path(folder)
        self._before_publish = before_publish

    def publish(
        self,
        checkpoint: Checkpoint,
        write: Callable[[Path], object],
        *,
        metrics: Mapping[str, float],
        fingerprint: str,
        parent: str = "",
    ) -> Checkpoint:
        """Saves a checkpoint so that it is there whole or not at all.

        Args:
            checkpoint: its name, kind, step, base model and adapter; `created_at` 0 becomes the present time.
            write: writes the files into the temporary folder that it is given.
            metrics: what is known of it, by name; `best` compares them.
            fingerprint: that of the run's configuration.
            parent: the name, folder name, URI or sha256 of the checkpoint that it was made from, if any.

        Returns:
            The checkpoint with `local_path`, `sha256` (of the manifest), `size_bytes` and `uri`.

        Raises:
            ConfigError: the name is no safe file name, or the step is negative.
            StoreError: a sound checkpoint of that step and name exists, or an I/O error. StorageFullError: no room. What was saved before
                is untouched, and nothing is left of the new one. A damaged folder of the same name is replaced.
        """
        start = time.perf_counter()
        if checkpoint.step < 0:
            raise ConfigError(f"Checkpoint.step is {checkpoint.step!r}; expected at least 0.")
        name = safe_name("checkpoint", checkpoint.name)
        final = self.folder / (step_name(checkpoint.step) + ("" if name == step_name(checkpoint.step) else f"-{name}"))
        self._make_way(final)
        meta = checkpoint_meta(checkpoint, {**checkpoint.metrics, **metrics}, fingerprint=fingerprint, parent=parent)
        if self._before_publish:
            self._before_publish()
        saved = from_manifest(final, files.publish(final, write, meta))
        events.emit(
            "checkpoint.saved",
            checkpoint=name,
            step=saved.step,
            kind=saved.kind,
            path=str(final),
            sha256=saved.sha256,
            size_bytes=saved.size_bytes,
            duration_s=time.perf_counter() - start,
        )
        return saved

    def _make_way(self, final: Path) -> None:
        with files.storage_errors(final):
            if not final.exists():
                return
        try:
            files.verify(final)
        except (CorruptError, NotFoundError):
            files.discard(final)
            return
        raise StoreError(f"A checkpoint {final.name!r} exists already in {str(self.folder)!r}. Save under another name, or continue from it.")

    def _entries(self) -> tuple[list[tuple[Checkpoint, files.Manifest]], list[tuple[Path, str]]]:
        good: list[tuple[Checkpoint, files.Manifest]] = []
        bad: list[tuple[Path, str]] = []
        with files.storage_errors(self.folder, "read"):
            folders = sorted(p for p in self.folder.iterdir() if _FOLDER.fullmatch(p.name)) if self.folder.is_dir() else []
        try:
            pins = self._pins()
        except CrucibleError as error:
            pins = frozenset()
            bad.append((self.folder / _PINS, str(error)))
        for folder in folders:
            try:
                manifest = files.read_manifest(folder)
                good.append((from_manifest(folder, manifest, pinned=folder.name in pins), manifest))
            except CrucibleError as error:
                # a folder that another process removed meanwhile is not broken
                if folder.exists():
                    bad.append((folder, str(error)))
        good.sort(key=lambda entry: (entry[0].step, entry[0].created_at))
        return good, bad

    def list(self) -> tuple[Checkpoint, ...]:
        """All checkpoints whose manifest is whole and whose sizes fit, by step, then by time; contents are not read."""
        return tuple(checkpoint for checkpoint, _ in self._entries()[0])

    def broken(self) -> tuple[tuple[Path, str], ...]:
        """What `list` leaves out: the paths, and what is wrong with each."""
        return tuple(self._entries()[1])

    def latest(self, *, verified: bool = False) -> Checkpoint:
        """The checkpoint of the highest step; with `verified`, of those whose every byte is as it was saved.

        Raises:
            NotFoundError: there is none.
        """
        for checkpoint in reversed(self.list()):
            if not verified or _sound(checkpoint):
                return checkpoint
        kind = "sound " if verified else ""
        raise NotFoundError(f"There is no {kind}checkpoint in {str(self.folder)!r}. Train the run until it has saved one.")

    def get(self, name_or_step: str | int) -> Checkpoint:
        """The checkpoint of a name, folder name or step; where several fit, the newest, at one step rather the default name.

        Raises:
            NotFoundError: none fits; the nearest names are given.
        """
        found = self.list()
        step = name_or_step if isinstance(name_or_step, int) else int(name_or_step) if re.fullmatch(r"\d+", name_or_step) else None
        for fits in (
            lambda c: name_or_step in (c.name, _path(c).name),
            lambda c: c.step == step and c.name == step_name(c.step),
            lambda c: c.step == step,
        ):
            if matching := [c for c in found if fits(c)]:
                return matching[-1]
        raise not_found("checkpoint", str(name_or_step), {c.name for c in found} | {_path(c).name for c in found})

    def best(self, metric: str, direction: Direction = "min") -> Checkpoint:
        """The checkpoint with the lowest ("min") or highest ("max") finite value of a metric; of equals, the earliest.

        Raises:
            NotFoundError: no checkpoint has the metric; the nearest ones are named.
        """
        _check_direction(direction)
        found = self.list()
        having = [c for c in found if math.isfinite(c.metrics.get(metric, math.nan))]
        if not having:
            raise not_found("checkpoint metric", metric, {name for c in found for name in c.metrics})
        sign = 1.0 if direction == "min" else -1.0
        return min(having, key=lambda c: sign * c.metrics[metric])

    def verify(self, checkpoint: Checkpoint) -> None:
        """Compares every byte of a checkpoint with what was saved.

        Raises:
            CorruptError: a file, or the manifest, differs from what the checkpoint's `sha256` says.
            NotFoundError: it is not there any more.
        """
        manifest = files.verify(_path(checkpoint))
        if checkpoint.sha256 and manifest.sha256 != checkpoint.sha256:
            raise CorruptError(
                f"{str(_path(checkpoint))!r} has a manifest of sha256 {manifest.sha256[:12]}…; expected {checkpoint.sha256[:12]}…. "
                "Another checkpoint was saved in its place: list the checkpoints again."
            )

    def _pins(self) -> frozenset[str]:
        path = self.folder / _PINS
        try:
            value = files.read_json(path)
        except NotFoundError:
            return frozenset()
        pinned = value.get("pinned") if isinstance(value, dict) else None
        if not isinstance(pinned, list) or not all(isinstance(name, str) for name in pinned):
            raise CorruptError(f"{str(path)!r} does not say what is pinned. Delete it and pin again.")
        return frozenset(cast("Iterable[str]", pinned))

    def sweep(self) -> None:
        """Removes what a crashed writer left behind; for the holder of the run, before it publishes."""
        if self.folder.is_dir():
            with self._pin_lock():
                files.sweep(self.folder)

    def _pin_lock(self) -> AbstractContextManager[None]:
        return files.lock(self.folder / ".pins.lock", "list of pins of", timeout_s=10.0)

    def pin(self, name: str | int, pinned: bool = True) -> Checkpoint:
        """Protects a checkpoint from `prune`, or ends that; safe while another process trains.

        Raises:
            NotFoundError: there is no such checkpoint.
            CorruptError: the list of pins is damaged.
        """
        with self._pin_lock():
            folder = _path(self.get(name)).name
            pins = self._pins()
            changed = pins | {folder} if pinned else pins - {folder}
            if changed != pins:
                files.write_json(self.folder / _PINS, {"pinned": sorted(changed)})
                events.emit("checkpoint.pinned", path=str(self.folder / folder), pinned=pinned)
        return self.get(folder)

    def prune(self, keep: int, *, metric: str | None = None, direction: Direction = "min") -> tuple[Checkpoint, ...]:
        """Removes old checkpoints, and returns them.

        Never removed: the newest `keep`, the newest whose every byte is sound, the best by `metric`, the pinned, and what one of those
        names as its parent. Damaged folders are left for inspection.

        Raises:
            ConfigError: `keep` is below 1.
            CorruptError: the list of pins is damaged, so that nothing may be removed.
        """
        if keep < 1:
            raise ConfigError(f"keep is {keep!r}; expected at least 1 checkpoint.")
        _check_direction(direction)
        if not self.folder.is_dir():
            return ()
        with self._pin_lock():
            self._pins()
            entries = self._entries()[0]
            if len(entries) <= keep:
                return ()
            found = [checkpoint for checkpoint, _ in entries]
            kept = {_path(c).name for c in found[-keep:]} | {_path(c).name for c in found if c.pinned}
            kept |= {_path(c).name for c in [next((c for c in reversed(found) if _sound(c)), found[-1])]}
            if metric is not None and any(math.isfinite(c.metrics.get(metric, math.nan)) for c in found):
                kept.add(_path(self.best(metric, direction)).name)
            parents = {str(m.meta.get("parent", "")) for c, m in entries if _path(c).name in kept} - {""}
            kept |= {_path(c).name for c in found if parents & {c.name, _path(c).name, c.uri, c.sha256}}
            removed = tuple(c for c in found if _path(c).name not in kept)
            for checkpoint in removed:
                files.discard(_path(checkpoint))
                events.emit("checkpoint.removed", checkpoint=checkpoint.name, step=checkpoint.step, size_bytes=checkpoint.size_bytes)
        return removed


def _check_direction(direction: str) -> None:
    if direction not in ("min", "max"):
        raise ConfigError(f"direction is {direction!r}; expected 'min' or 'max'.")


def _path(checkpoint: Checkpoint) -> Path:
    if checkpoint.local_path is None:
        raise StoreError(f"Checkpoint {checkpoint.name!r} ({checkpoint.uri}) has no files here. Download it first.")
    return checkpoint.local_path


def _sound(checkpoint: Checkpoint) -> bool:
    try:
        files.verify(_path(checkpoint))
    except CrucibleError:
        return False
    return True

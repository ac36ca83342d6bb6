"""The runs of a workspace as a whole: found, compared, labelled, given artifacts, and copied in and out.

    <root>/<run>/labels.json    tags, notes and artifacts of a run: what may change after it has ended
    <root>/artifacts/           the attached bytes, each under its sha256
    <root>/models/              the model registry
    <root>/.runs.sqlite         an index over the runs; `rebuild` makes it again

Any number of threads and processes may use a workspace, also while its runs go on. This file does not know what a metric means.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from .. import events, files
from ..config import to_dict
from ..display import table_html
from ..errors import ConfigError, StoreError, UnknownNameError
from ..records import Json, record
from .artifacts import Artifact, Artifacts
from .checkpoints import Checkpoints
from .lineage import Ancestor, around, graph
from .models import Models
from .names import not_found, safe_name
from .query import Condition, Direction, direction_of, ordered, parse_condition
from .run_files import LABELS, METRICS, RUN, SYSTEM, TIMINGS, Labels, RunInfo, read_labels, read_run
from .run_index import RunIndex

__all__ = ["Comparison", "Tracker", "values_of"]


@record
class Comparison:
    """Some runs side by side. Of each name there is a value per run, in their order; None where a run has none.

    Attributes:
        params: the settings in which they differ.
        same: the settings that all share.
        metrics: the last value of every metric.
    """

    names: tuple[str, ...]
    params: Mapping[str, tuple[Json, ...]]
    same: Mapping[str, Json]
    metrics: Mapping[str, tuple[float | None, ...]]

    def _repr_html_(self) -> str:
        rows = [(key, *values) for key, values in (*self.params.items(), *self.metrics.items())]
        return table_html(f"{len(self.names)} runs compared", ("", *self.names), rows, f"{len(self.same)} settings are the same.")


def values_of(info: RunInfo) -> dict[str, Json]:
    """Everything about a run that a condition or an order may name; where names meet, the nearer to the run's own state wins."""
    own: dict[str, Json] = {
        "name": info.name, "status": info.status, "steps": info.steps, "epochs": info.epochs, "base_model": info.base_model,
        "created_at": info.created_at, "finished_at": info.finished_at, "duration_s": info.duration_s, "notes": info.notes, "error": info.error,
    }  # fmt: skip
    return {**info.params, **info.metrics, **{f"tag.{key}": value for key, value in info.tags.items()}, **own}


class Tracker:
    """The runs directly under a folder, which need not exist yet."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.artifacts = Artifacts(self.root / "artifacts")
        self.models = Models(self.root / "models")
        self._index = RunIndex(self.root)

    # ---------------------------------------------------------------------------------------------------------- reading
    def runs(
        self, *, where: Iterable[str] = (), tags: Mapping[str, str] | None = None, text: str = "", order_by: str = "created_at",
        direction: Direction | None = None, limit: int | None = None,
    ) -> tuple[RunInfo, ...]:  # fmt: skip
        """The runs that fit all that is given.

        Args:
            where: conditions over settings, metrics, `tag.<key>`, name, status, steps, epochs, base_model, duration_s, created_at
                ("train/loss < 0.5", "lora.rank = 8", "status != failed", "name = demo*").
            tags: must be there with these values.
            text: part of the name, notes, base model, a tag or the error, without regard to case.
            order_by: one of the same names.
            direction: "min" puts the lowest first, "max" the highest; None knows it of the usual metrics, and puts the oldest run first.
            limit: at most so many.

        Raises:
            ConfigError: a condition does not parse, or a direction is needed. UnknownNameError: no run has what a condition or order names.
        """
        found = [(info, values_of(info)) for info in self._index.infos()]
        known = {key for _, values in found for key in values}
        for condition in map(parse_condition, where):
            _check_known(condition.key, known)
            found = [(info, values) for info, values in found if _fits(condition, values)]
        found = [(info, values) for info, values in found if all(info.tags.get(key) == value for key, value in (tags or {}).items())]
        if text:
            found = [(info, values) for info, values in found if text.lower() in _words(info)]
        if order_by != "created_at" or direction:
            _check_known(order_by, known)
            towards = direction or direction_of(order_by)
            chosen = ordered([(info, _as_number(values.get(order_by))) for info, values in found], towards)
        else:
            chosen = tuple(info for info, _ in found)
        return chosen[:limit]

    def get(self, name: str) -> RunInfo:
        """One run, as its files are now.

        Raises:
            NotFoundError: there is none of that name; the nearest are given. CorruptError: its files are damaged.
        """
        return read_run(self.folder(name))

    def folder(self, name: str) -> Path:
        """The folder of a run. Raises `NotFoundError` where there is none; a path is no name."""
        if not name or "/" in name or name.startswith(".") or not (self.root / name / RUN).is_file():
            raise not_found("run", name, (info.name for info in self._index.infos()), f"List the runs of {str(self.root)!r}: crucible runs")
        return self.root / name

    def compare(self, names: Sequence[str]) -> Comparison:
        """Runs side by side: the settings in which they differ, and their last metrics.

        Raises:
            ConfigError: fewer than two are named. NotFoundError: there is no such run.
        """
        if len(names) < 2:
            raise ConfigError(f"{len(names)} run is named; expected at least two to compare.")
        infos = [self.get(name) for name in names]
        keys = list(dict.fromkeys(key for info in infos for key in info.params))
        rows = {key: tuple(info.params.get(key) for info in infos) for key in keys}
        metrics = dict.fromkeys(key for info in infos for key in info.metrics)
        return Comparison(
            names=tuple(names),
            params={key: row for key, row in rows.items() if any(value != row[0] for value in row)},
            same={key: row[0] for key, row in rows.items() if all(value == row[0] for value in row)},
            metrics={key: tuple(info.metrics.get(key) for info in infos) for key in metrics},
        )

    def history(self, name: str, metric: str, *, by: Literal["step", "epoch", "time"] = "step") -> tuple[tuple[float, float], ...]:
        """The points of a curve: (step or epoch, value) of a metric; of a timing or of the machine also over the seconds since the start.

        Raises:
            NotFoundError: there is no such run, or nothing of that name in it. ConfigError: its rows do not say where on that axis they lie.
        """
        folder = self.folder(name)
        known: set[str] = set()
        for file in (METRICS, TIMINGS, SYSTEM):
            rows = files.read_lines(folder / file)
            known |= {key for row in rows for key in row}
            having = [row for row in rows if _as_number(row.get(metric)) is not None]
            if having:
                axis = {"step": "step", "epoch": "epoch", "time": "ts"}[by]
                if any(_as_number(row.get(axis)) is None for row in having):
                    raise ConfigError(f"{metric!r} of run {name!r} is not written over {by}; expected by='step'.")
                start = self.get(name).created_at if by == "time" else 0.0
                return tuple((float(cast("float", row[axis])) - start, float(cast("float", row[metric]))) for row in having)
        raise not_found("metric", metric, known - {"step", "epoch", "ts"})

    def lineage(self, name: str) -> tuple[Ancestor, ...]:
        """What a run, model version, study or data set was made from and what came of it, itself first.

        Raises:
            NotFoundError: nothing is called so.
        """
        return around(graph(self.root, self.models), name)

    # --------------------------------------------------------------------------------------------------------- labelling
    def _change(self, name: str, change: Callable[[Labels], Labels]) -> Labels:
        folder = self.folder(name)
        with files.lock(folder / ".labels.lock", "labels of", timeout_s=60.0):
            labels = change(read_labels(folder))
            files.write_json(folder / LABELS, to_dict(labels))
        return labels

    def tag(self, name: str, tags: Mapping[str, str | None]) -> RunInfo:
        """Sets tags of a run, which may still be going on; the value None takes one away.

        Raises:
            NotFoundError: there is no such run. ConfigError: a tag is no text under a name.
        """
        for key, value in tags.items():
            if not (isinstance(key, str) and key and (value is None or isinstance(value, str))):
                raise ConfigError(f"Tag {key!r} is {value!r}; expected text under a name that is not empty.")

        def change(labels: Labels) -> Labels:
            merged = {key: value for key, value in {**labels.tags, **tags}.items() if value is not None}
            return dataclasses.replace(labels, tags=merged)

        self._change(name, change)
        events.emit("run.tagged", path=str(self.root / name), tags=cast("Json", dict(tags)))
        return self.get(name)

    def note(self, name: str, text: str) -> RunInfo:
        """Replaces the notes of a run; "" takes them away. Raises `NotFoundError` where there is none."""
        self._change(name, lambda labels: dataclasses.replace(labels, notes=text))
        events.emit("run.noted", path=str(self.root / name), signs=len(text))
        return self.get(name)

    def attach(self, name: str, data: bytes | Path, as_name: str = "") -> Artifact:
        """Keeps bytes, or a copy of a file, with a run; equal bytes are stored once, however many runs have them.

        Args:
            name: of the run.
            data: the bytes, or a file.
            as_name: what it is called in the run; the file's own name where none is given. An older one of that name is replaced.

        Raises:
            NotFoundError: there is no such run or file. ConfigError: bytes without a name, or a name that is no safe file name.
        """
        called = safe_name("artifact", as_name or (data.name if isinstance(data, Path) else ""))
        before: list[str] = []
        key = ""

        def change(labels: Labels) -> Labels:
            nonlocal key
            key = self.artifacts.put(data, owner=name)  # owned before it is named, so that no crash leaves a name without bytes
            before.append(labels.artifacts.get(called, key))
            return dataclasses.replace(labels, artifacts={**labels.artifacts, called: key})

        labels = self._change(name, change)
        if before[0] not in labels.artifacts.values():
            self.artifacts.release(name, before)
        events.emit("run.attached", path=str(self.root / name), artifact=called, key=key)
        return next(one for one in self.artifacts.list() if one.key == key)

    def artifact(self, name: str, called: str) -> bytes:
        """The bytes that a run has under a name, compared with their sha256.

        Raises:
            NotFoundError: there is no such run or artifact. CorruptError: the bytes changed.
        """
        held = read_labels(self.folder(name)).artifacts
        if called not in held:
            raise not_found("artifact", called, held)
        return self.artifacts.get(held[called])

    # ----------------------------------------------------------------------------------------------------- housekeeping
    def rebuild(self) -> dict[str, int]:
        """Makes the indexes of runs and models again from the files, and forgets what deleted runs owned; returns how many of each there are."""
        found = {"runs": self._index.rebuild(), "models": self.models.rebuild()}
        for owner in self.artifacts.owned():
            if not (self.root / owner / RUN).exists():
                self.artifacts.release(owner)
        return found | {"artifacts": len(self.artifacts.list())}

    def problems(self) -> tuple[tuple[str, str], ...]:
        """Compares every byte that has a checksum: what is damaged, and how. Nothing is changed."""
        found = [(info.name, info.error) for info in self._index.infos() if info.status == "broken"]
        for info in self._index.infos():
            kept = Checkpoints(info.folder / "checkpoints")
            found += [(str(path), why) for path, why in kept.broken()]
            found += [(str(one.local_path), why) for one in kept.list() if (why := _damage(one.local_path))]
        found += [(str(path), why) for path, why in self.models.broken()]
        found += [(f"artifact {key[:12]}…", why) for key, why in self.artifacts.verify()]
        return tuple(found)


def _damage(folder: Path | None) -> str:
    try:
        files.verify(cast("Path", folder))
    except StoreError as error:
        return str(error)
    return ""


def _fits(condition: Condition, values: Mapping[str, Json]) -> bool:
    return condition.fits(values.get(condition.key))


def _check_known(key: str, known: set[str]) -> None:
    if known and key not in known:
        raise UnknownNameError("setting or metric of a run", key, known)


def _as_number(value: Json) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _words(info: RunInfo) -> str:
    tags = (f"{key}={value}" for key, value in info.tags.items())
    return "\n".join((info.name, info.notes, info.base_model, info.status, info.error, *tags)).lower()

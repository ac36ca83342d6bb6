"""The model registry: numbered, immutable versions of named models, with tags, metrics, stages and ancestors.

    <registry>/<name>/3/        the version's files, copied from the checkpoint and published with a manifest; never changed
    <registry>/<name>/3.json    what may change: its stage and tags (absent until one of them does)
    <registry>/<name>/aliases.json  names for versions
    <registry>/.index.sqlite    an index over versions and states; `rebuild` makes it again

A version owns its files, so pruning a run never breaks it. Nothing is ever deleted here. This file does not know what a model computes.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast, get_args

import orjson

from .. import events, files
from ..config import to_dict
from ..errors import ConfigError, CorruptError, NotFoundError, UnknownNameError
from ..records import Checkpoint, Json, ModelVersion
from .checkpoints import checkpoint_meta, from_manifest, number
from .index import Index, Row
from .names import not_found, safe_name
from .query import Direction, direction_of, ordered, parse_condition
from .versions import Stage, VersionFiles, assembled, copy_files, counting_stage, first_state, source_files, version_of

__all__ = ["Models", "Stage"]

_REFERENCE = re.compile(r"(?P<name>[^:@]+)(?::(?P<version>[1-9]\d{0,8})|@(?P<word>[A-Za-z][A-Za-z0-9_-]*))?")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_EXACT = re.compile(r"[^:@/]+:[1-9]\d{0,8}")


class Models:
    """The registry in a folder, which need not exist before the first `register`. Any number of threads and processes may use it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = VersionFiles(self.folder)
        self._index = Index(self.folder / ".index.sqlite", self._files.rows)

    # ---------------------------------------------------------------------------------------------------------- writing
    def register(
        self,
        checkpoint: Checkpoint,
        name: str,
        *,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        parents: Iterable[str] = (),
        description: str = "",
        directions: Mapping[str, Direction] | None = None,
    ) -> ModelVersion:
        """Makes the next version of a model from a copy of the checkpoint's files.

        Args:
            checkpoint: with its files here; the checkpoint itself becomes a parent.
            name: of the model.
            tags: searchable words; `tag` changes them later.
            metrics: added to the checkpoint's own.
            parents: "name:version" of other models it was made from, or any URI.
            description: free text.
            directions: of metrics whose name does not say it, whether less ("min") or more ("max") is better; `find` orders by it.

        Raises:
            ConfigError: the name, a tag, a metric or a direction is not usable.
            NotFoundError: a parent of the form "name:version" is not registered, or the checkpoint's files are gone.
            CorruptError: the checkpoint's bytes are not those that were saved.
            StoreError: the checkpoint has no files here, or an I/O error; StorageFullError where there is no room. No version is made then.
        """
        safe_name("model", name)
        source, cards = source_files(checkpoint)
        if wrong := {metric: one for metric, one in (directions or {}).items() if one not in get_args(Direction)}:
            raise ConfigError(f"Directions of metrics are {wrong!r}; expected 'min' or 'max'.")
        extra = to_dict({"tags": _checked_tags(tags or {}), "description": description, "directions": dict(directions or {})})
        scores = {key: float(value) for key, value in {**checkpoint.metrics, **(metrics or {})}.items()}
        origin = self._reference_of(source)
        start = time.perf_counter()
        with self._index.changing(name):
            files.sweep(self.folder)
            files.sweep(self.folder / name)
            ancestry = tuple(dict.fromkeys((*parents, origin)))
            for parent in ancestry:
                if _EXACT.fullmatch(parent) and not (self.folder / parent.replace(":", "/") / files.MANIFEST).is_file():
                    raise not_found("model version", parent, (f"{n}:{v}" for n, v in self._files.versions(None)), "Register the parent first.")
            version = self._files.next_version(name)
            meta = checkpoint_meta(checkpoint, checkpoint.metrics, fingerprint="", parent=origin)
            about = cast("dict[str, Json]", extra) | {"name": name, "version": version, "parents": list(ancestry), "created_at": time.time()}
            about["metrics"] = {key: number(value) for key, value in scores.items()}
            folder = self._files.path(name, version)
            manifest = files.publish(folder, lambda to: copy_files(source, cards, to), {**meta, "model": about})
            made = assembled(folder, manifest, first_state(manifest))
        events.emit(
            "model.registered",
            model=name,
            version=version,
            step=checkpoint.step,
            parents=list(ancestry),
            size_bytes=made.checkpoint.size_bytes,
            duration_s=time.perf_counter() - start,
        )
        return made

    def _reference_of(self, source: Path) -> str:
        """ "name:version" of a folder of this registry, else the folder's URI."""
        path = source.resolve()
        if path.parent.parent == self.folder.resolve() and path.name.isdecimal():
            return f"{path.parent.name}:{path.name}"
        return f"file:{path}"

    def tag(self, reference: str, tags: Mapping[str, str | None]) -> ModelVersion:
        """Sets tags of a version; the value None takes one away.

        Raises:
            NotFoundError: there is no such version. CorruptError: its stage and tags are damaged.
        """
        name, version = self._find_exact(reference)
        kept = _checked_tags({key: value for key, value in tags.items() if value is not None})
        with self._index.changing(name):
            found, old = self._files.load(name, version)
            last = max((s.serial for s in self._files.states(name).values() if s.stage == "production"), default=0)
            merged = {key: value for key, value in {**old.tags, **kept}.items() if tags.get(key, "") is not None}
            self._files.write_state(name, version, old._replace(tags=merged))
        events.emit("model.tagged", model=name, version=version, tags=cast("Json", dict(tags)))
        return dataclasses.replace(found, tags=merged, stage=counting_stage(old, last))

    def promote(self, reference: str, stage: Stage = "production") -> ModelVersion:
        """Gives a version a stage; a name has one version in production at the most, and the one before becomes archived.

        Raises:
            ConfigError: there is no such stage. NotFoundError: no such version. CorruptError: its files or its stage are damaged.
        """
        if stage not in get_args(Stage):
            raise ConfigError(f"stage is {stage!r}; expected one of {', '.join(get_args(Stage))}.")
        name, version = self._find_exact(reference)
        with self._index.changing(name):
            changed, state = self._files.load(name, version, deep=True)
            before = self._files.archive_surplus(name)
            serial = max((s.serial for s in self._files.states(name).values()), default=0) + 1
            self._files.write_state(name, version, state._replace(stage=stage, serial=serial))
            after = self._files.archive_surplus(name)
        replaced = f"{name}:{before}" if before not in (None, version) and after == version else ""
        events.emit("model.promoted", model=name, version=version, stage=stage, was=changed.stage, replaced=replaced)
        return dataclasses.replace(changed, stage=stage)

    def rebuild(self) -> int:
        """Makes the index again from the files and returns how many versions it holds."""
        if not self.folder.is_dir():
            return 0
        with self._index.lock():
            files.sweep(self.folder)
            return self._index.rebuild("asked")

    # ---------------------------------------------------------------------------------------------------------- reading
    def get(self, reference: str) -> ModelVersion:
        """A version, with every byte of its files compared with what was registered.

        Args:
            reference: "name:2" for a version, "name@production" for the newest in a stage, "name@champion" for where an alias points,
                "name" for the newest.

        Raises:
            ConfigError: the reference has another form.
            NotFoundError: there is none; the nearest names are given.
            CorruptError: a byte of the files differs.
        """
        row = self._find_row(reference)
        found = self._from_row(row)
        manifest = files.verify(self._files.path(row.name, row.version))
        if manifest.sha256 != found.checkpoint.sha256:
            raise CorruptError(
                f"Model {row.name}:{row.version} has another manifest than the index says: its folder was replaced. Run `rebuild()` to accept it."
            )
        return found

    def _find_exact(self, reference: str) -> tuple[str, int]:
        row = self._find_row(reference)
        return row.name, row.version

    def _find_row(self, reference: str) -> Row:
        parts = _REFERENCE.fullmatch(reference)
        if parts is None:
            raise ConfigError(
                f"{reference!r} names no model; expected 'name', 'name:2', or 'name@word' with an alias or a stage ({', '.join(get_args(Stage))})."
            )
        rows = self._index.select("name = ?", (parts["name"],))
        if not rows:
            raise not_found("model", parts["name"], {row.name for row in self._index.select()}, "Register a checkpoint under that name first.")
        word, wanted = parts["word"], parts["version"]
        stage = word if word in get_args(Stage) else None
        if word is not None and stage is None:
            wanted = str(self.aliases(parts["name"]).get(word, ""))
        fits = [r for r in rows if wanted in (None, str(r.version)) and stage in (None, orjson.loads(r.body)["stage"])]
        if not fits:
            if word is not None and stage is None:
                raise not_found(
                    "alias or stage",
                    word,
                    (*self.aliases(parts["name"]), *get_args(Stage)),
                    f"Point it at a version: crucible models alias {parts['name']} {word} VERSION",
                )
            known = ", ".join(f"{row.name}:{row.version}@{orjson.loads(row.body)['stage']}" for row in rows[-8:])
            raise NotFoundError(f"No model version fits {reference!r}. There are: {known}.")
        return fits[-1]

    def list(self, name: str | None = None) -> tuple[ModelVersion, ...]:
        """All versions, or those of a name, by name and version; file contents are not read."""
        return self._select() if name is None else self._select("name = ?", (name,))

    def find(
        self,
        *,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        where: Iterable[str] = (),
        stage: Stage | None = None,
        base_model: str | None = None,
        order_by: str | None = None,
        direction: Direction | None = None,
        limit: int | None = None,
    ) -> tuple[ModelVersion, ...]:
        """The versions that fit all that is given.

        Args:
            name: of the model.
            tags: must be there with these values.
            where: conditions over metrics ("dev/loss < 0.5", "accuracy >= 0.8"); a version without the metric does not fit.
            stage: the stage.
            base_model: what was adapted.
            order_by: a metric; the best comes first, versions without it last. None: by name and version.
            direction: whether the lowest ("min") or highest ("max") is best; None takes what was stated at registration, else what the
                metric's name says.
            limit: at most so many.

        Raises:
            ConfigError: a condition does not parse, or nothing says which direction is better.
            UnknownNameError: no version that fits has the metric to order by.
        """
        conditions = ["1"]
        values: tuple[str | float, ...] = ()
        for path, wanted in (("$.name", name), ("$.stage", stage), ("$.checkpoint.base_model", base_model)):
            if wanted is not None:
                conditions.append("json_extract(body, ?) = ?")
                values = (*values, path, wanted)
        for key, value in (tags or {}).items():
            conditions.append("EXISTS (SELECT 1 FROM json_each(body, '$.tags') AS t WHERE t.key = ? AND t.value = ?)")
            values = (*values, key, value)
        for text in where:
            condition = parse_condition(text)
            if condition.number is None:
                raise ConfigError(f"{text!r} compares no number; expected a metric and a number, for example 'dev/loss < 0.5'.")
            test = f"m.key = ? AND m.type != 'text' AND m.value {condition.sign} ?"  # the sign is one of six; text is "nan" or "inf"
            conditions.append("EXISTS (SELECT 1 FROM json_each(body, '$.metrics') AS m WHERE " + test + ")")  # noqa: S608
            values = (*values, condition.key, condition.number)
        found = self._select(" AND ".join(conditions), values)
        if order_by is not None and found:
            if not any(order_by in one.metrics for one in found):
                raise UnknownNameError("metric of these versions", order_by, {metric for one in found for metric in one.metrics})
            stated = {metric: way for one in found for metric, way in one.directions.items()}
            found = ordered([(one, one.metrics.get(order_by)) for one in found], direction or direction_of(order_by, stated))
        return found[:limit]

    # ---------------------------------------------------------------------------------------------------------- aliases
    def alias(self, name: str, alias: str, version: int | None) -> None:
        """Points an alias of a model ("champion") at one of its versions, or takes it away (None); `get("judge@champion")` follows it.

        Raises:
            ConfigError: the alias is a stage or no safe name. NotFoundError: there is no such version. CorruptError: the aliases are damaged.
        """
        safe_name("alias", alias)
        if alias in get_args(Stage) or not _ALIAS.fullmatch(alias):
            raise ConfigError(f"{alias!r} cannot be an alias; expected letters, digits, - or _ after a letter, and none of {', '.join(get_args(Stage))}.")
        if version is not None:
            self._find_exact(f"{name}:{version}")
        with self._index.lock():
            known = {key: value for key, value in self.aliases(name).items() if key != alias} | ({} if version is None else {alias: version})
            self._files.write_aliases(name, known)
        events.emit("model.aliased", model=name, alias=alias, version=version)

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a model and the versions that they point at.

        Raises:
            CorruptError: their file is damaged.
        """
        return self._files.aliases(name)

    def lineage(self, reference: str) -> dict[str, tuple[str, ...]]:
        """What a version was made from: each ancestor, itself first and the nearest next, with its own parents.

        URIs, and versions that are not here, have none. Plain values, so that a report can draw the graph.
        """
        name, version = self._find_exact(reference)
        known = {f"{found.name}:{found.version}": found.parents for found in self.list()}
        graph: dict[str, tuple[str, ...]] = {}
        ahead = [f"{name}:{version}"]
        for node in ahead:
            if node not in graph:
                graph[node] = known.get(node, ())
                ahead += graph[node]
        return graph

    def broken(self) -> tuple[tuple[Path, str], ...]:
        """What the registry leaves out: the paths, and what is wrong with each."""
        return tuple((entry[0], str(entry[1])) for entry in self._files.scan(None) if len(entry) == 2)

    def _select(self, condition: str = "1", values: Iterable[str | int | float] = ()) -> tuple[ModelVersion, ...]:
        return tuple(self._from_row(row) for row in self._index.select(condition, tuple(values)))

    def _from_row(self, row: Row) -> ModelVersion:
        body = orjson.loads(row.body)
        manifest = files.Manifest(files=(), meta=body["checkpoint"], sha256=body["checkpoint"]["sha256"])
        checkpoint = from_manifest(self._files.path(row.name, row.version), manifest)
        return version_of(body, dataclasses.replace(checkpoint, size_bytes=body["checkpoint"]["size_bytes"]), body["stage"], body["tags"])


def _checked_tags(tags: Mapping[str, str]) -> dict[str, str]:
    for key, value in tags.items():
        if not (isinstance(key, str) and key and isinstance(value, str)):
            raise ConfigError(f"Tag {key!r} is {value!r}; expected text under a name that is not empty.")
    return dict(tags)

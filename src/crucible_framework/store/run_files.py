"""What a run's files say: its state, last metrics and labels. Needs no lock and changes nothing; `runs` is the writer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal, cast, get_args

from .. import files
from ..display import table_html
from ..errors import CorruptError, CrucibleError, NotFoundError
from ..exporters import flat
from ..records import Json, record

__all__ = [
    "CONFIG", "EVENTS", "LABELS", "LOCK", "METRICS", "RUN", "SYSTEM", "TIMINGS", "Labels", "RunInfo", "Status",
    "list_runs", "look_at_run", "read_labels", "read_metrics", "read_object", "read_run",
]  # fmt: skip

Status = Literal["running", "done", "failed", "stopped", "interrupted", "broken"]
"""`interrupted`: its process died; `stopped`: it was asked to end and can be resumed; `broken`: its run.json cannot be read."""
RUN, CONFIG, METRICS, TIMINGS, EVENTS, LOCK = "run.json", "config.json", "metrics.jsonl", "timings.jsonl", "events.jsonl", ".lock"
SYSTEM, LABELS = "system.jsonl", "labels.json"


@record
class RunInfo:
    """What a run's files say of it.

    Attributes:
        steps: the highest step in its metrics, 0 before the first.
        metrics: the last value of each metric.
        created_at, finished_at: seconds since the epoch; None while it has not ended.
        result: what the run was finished with.
        error: why it failed, "" otherwise.
        epochs: how often all data had been seen at the last row that says so, None where none does.
        params: the configuration as dotted keys.
        tags, notes, artifacts: what people said of it, and the keys of what they attached, by name; see `Tracker`.
    """

    name: str
    folder: Path
    status: Status
    created_at: float
    base_model: str
    steps: int
    metrics: Mapping[str, float]
    finished_at: float | None = None
    fingerprint: str = ""
    result: Mapping[str, Json] | None = None
    environment: Mapping[str, Json] | None = None
    error: str = ""
    epochs: float | None = None
    params: Mapping[str, Json] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)

    @property
    def duration_s(self) -> float | None:
        """Seconds from its start to its end, None where it has not ended."""
        return None if self.finished_at is None else self.finished_at - self.created_at

    def _repr_html_(self) -> str:
        facts = [("base model", self.base_model), ("steps", self.steps), ("epochs", self.epochs), ("seconds", self.duration_s)]
        rows = [*facts, *((f"tag {key}", value) for key, value in self.tags.items()), *self.metrics.items()]
        return table_html(f"Run {self.name}: {self.status}", ("", "value"), rows, self.error or self.notes)


def read_object(path: Path) -> dict[str, Json]:
    """The JSON object in a file.

    Raises:
        NotFoundError: there is no such file. CorruptError: it holds something else.
    """
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise CorruptError(f"{str(path)!r} holds {type(value).__name__}; expected a JSON object. Restore the file or choose another run.")
    return value


def read_metrics(folder: Path) -> list[dict[str, Json]]:
    """The rows of a run's metrics.jsonl; a torn last line is left out. Needs no lock.

    Raises:
        NotFoundError: the folder holds no run.
        CorruptError: a line before the last is damaged (file:line).
    """
    folder = Path(folder)
    if not (folder / RUN).exists():
        raise NotFoundError(f"{str(folder)!r} holds no run. Expected a folder with {RUN!r} in it.")
    return files.read_lines(folder / METRICS)


def read_run(folder: Path, metrics: tuple[int, Mapping[str, float]] | None = None) -> RunInfo:
    """What a run's files say of it now. Needs no lock.

    Args:
        folder: the run's.
        metrics: its highest step and the last value of each metric, where the caller has read the rows already.

    Raises:
        NotFoundError: the folder holds no run.
        CorruptError: one of its files is damaged.
    """
    folder = Path(folder)
    steps, last = _summary(read_metrics(folder)) if metrics is None else metrics
    state = read_object(folder / RUN)
    config = read_object(folder / CONFIG)
    status = str(state.get("status", ""))
    if status not in get_args(Status):
        raise CorruptError(f"{str(folder / RUN)!r} has status {status!r}; expected one of {', '.join(get_args(Status))}.")
    if status == "running" and not files.held(folder / LOCK):
        # the run may have ended between the two looks
        status = str(read_object(folder / RUN).get("status"))
        status = "interrupted" if status == "running" else status
    labels = read_labels(folder)
    result, environment = state.get("result"), state.get("environment")
    return RunInfo(
        name=folder.name,
        folder=folder,
        status=cast("Status", status),
        created_at=_seconds(state.get("created_at")) or 0.0,
        finished_at=_seconds(state.get("finished_at")),
        base_model=str(config.get("base_model", "")),
        steps=steps,
        metrics=last,
        fingerprint=str(state.get("fingerprint", "")),
        result=result if isinstance(result, dict) else None,
        environment=environment if isinstance(environment, dict) else None,
        error=str(state.get("error") or ""),
        epochs=last.get("epoch"),
        params=flat(config),
        tags=labels.tags,
        notes=labels.notes,
        artifacts=labels.artifacts,
    )


def _summary(rows: Iterable[Mapping[str, Json]]) -> tuple[int, dict[str, float]]:
    """The highest step, and the last finite value of each name; a row without a step says nothing."""
    steps, last = 0, dict[str, float]()
    for row in rows:
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)}
        if (step := numbers.pop("step", None)) is not None:
            steps = max(steps, int(step))
            last.update({k: float(v) for k, v in numbers.items()})
    return steps, last


@record
class Labels:
    """What people said of a run, in its labels.json: the one file of a run that others than its writer may change."""

    tags: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)


def read_labels(folder: Path) -> Labels:
    """A run's labels; none where nobody said anything.

    Raises:
        CorruptError: the file is damaged.
    """
    path = Path(folder) / LABELS
    if not path.exists():
        return Labels()
    body = read_object(path)
    tags, artifacts = body.get("tags", {}), body.get("artifacts", {})
    if not isinstance(tags, dict) or not isinstance(artifacts, dict):
        raise CorruptError(f"{str(path)!r} does not say tags and artifacts by name. Delete it and set them again.")
    return Labels(
        tags={key: str(value) for key, value in tags.items()},
        notes=str(body.get("notes") or ""),
        artifacts={key: str(value) for key, value in artifacts.items()},
    )


def _seconds(value: Json) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def list_runs(root: Path) -> tuple[RunInfo, ...]:
    """All runs directly under a folder, oldest first; one whose files are damaged has the status "broken" and says why in `error`."""
    root = Path(root)
    with files.storage_errors(root, "read"):
        folders = sorted(p.parent for p in root.glob(f"*/{RUN}") if not p.parent.name.startswith("."))
    found: list[RunInfo] = []
    for folder in folders:
        with contextlib.suppress(NotFoundError):  # removed meanwhile
            found.append(look_at_run(folder))
    return tuple(sorted(found, key=lambda info: (info.created_at, info.name)))


def look_at_run(folder: Path, metrics: tuple[int, Mapping[str, float]] | None = None) -> RunInfo:
    """As `read_run`, but a run of which files are damaged or missing has the status "broken" and says why in `error`.

    Raises:
        NotFoundError: there is no run.json, so this is no run.
    """
    try:
        return read_run(folder, metrics)
    except CrucibleError as error:
        if not (folder / RUN).exists():
            raise
        why = f"{str(folder / CONFIG)!r} is missing." if isinstance(error, NotFoundError) else str(error)
        return RunInfo(name=folder.name, folder=folder, status="broken", created_at=0.0, base_model="", steps=0, metrics={}, error=why)

"""Run folders to view models: what each page shows, as plain records, with no HTML.

Files that other parts of Crucible own are read through their readers; what is missing is empty and what is damaged is named.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..config import differing_keys
from ..errors import CrucibleError
from ..files import read_json
from ..records import Estimate, Json, record
from ..reports.cards import estimates_of
from ..reports.layers import issue_table, layer_map
from ..reports.panels import HeatMap
from ..reports.parts import Table
from ..reports.sources import RunFiles, as_table
from ..reports.sources import read_run as read_files
from ..store import RunInfo
from ..training import Watched, read_watched
from .reading import Workspace

__all__ = [
    "CHARTS",
    "ChartSpec",
    "ChartView",
    "Comparison",
    "Line",
    "RunPage",
    "RunRow",
    "chart_views",
    "compare_runs",
    "estimates_of",
    "run_page",
    "run_row",
    "run_rows",
    "smoothed",
]

Role = Literal["raw", "exact", "held_out", "points"]
"""`raw` is noisy and drawn with a smoothed curve over it; `exact` (a schedule, a peak) never is."""
File = Literal["metrics.jsonl", "timings.jsonl"]
_NOT_DRAWN = frozenset(("epoch", "train/tokens"))
PER_LAYER = ("grad/norm/", "grad/flow/", "grad/health/")
"""Metrics of single layers: part of the heat map and its table, and no charts of their own."""
SPARK = 48


@record
class ChartSpec:
    """A chart of the run page: which fields of which file, with what look."""

    key: str
    title: str
    unit: str
    file: File
    fields: tuple[tuple[str, str, Role], ...]
    log: bool = False


CHARTS = (
    ChartSpec(
        key="loss", title="Loss", unit="nats per weight", file="metrics.jsonl",
        fields=(("train/loss", "training", "raw"), ("dev/loss", "held out", "held_out"), ("probe/loss", "fixed examples", "points")),
    ),
    ChartSpec(
        key="grad", title="Gradient norm", unit="L2, before clipping", file="metrics.jsonl", fields=(("grad/global_norm", "all layers", "raw"),), log=True,
    ),
    ChartSpec(key="lr", title="Learning rate", unit="per step", file="metrics.jsonl", fields=(("train/lr", "learning rate", "exact"),)),
    ChartSpec(key="speed", title="Speed", unit="tokens per second", file="timings.jsonl", fields=(("tokens_per_s", "tokens/s", "raw"),)),
    ChartSpec(key="memory", title="Memory", unit="bytes, peak so far", file="timings.jsonl", fields=(("memory_bytes", "peak", "exact"),)),
)  # fmt: skip


@record
class Line:
    """One curve. `field` is the key in the file's rows, so that a page can add live rows to it."""

    name: str
    field: str
    role: Role
    x: tuple[float, ...]
    y: tuple[float, ...]


@record
class ChartView:
    """A chart with its numbers; `file` is where live rows come from."""

    key: str
    title: str
    unit: str
    file: File
    log: bool
    lines: tuple[Line, ...]


@record
class RunRow:
    """A line of the runs table. `score` is the first estimate of the adapter's evaluation, else of any; `spark` the training loss."""

    name: str
    status: str
    base_model: str
    steps: int
    loss: float | None
    dev_loss: float | None
    score: Estimate | None
    created_at: float
    duration_s: float | None
    spark: tuple[tuple[float, float], ...]
    error: str


@record
class RunPage:
    """All of the run page but its events, which stream."""

    info: RunInfo
    files: RunFiles
    charts: tuple[ChartView, ...]
    layers: HeatMap | None
    issues: Table | None
    watched: tuple[Watched, ...]
    problems: tuple[str, ...]


@record
class Comparison:
    """Several runs beside each other. `settings` holds only keys that differ: per run, None where the key is absent."""

    names: tuple[str, ...]
    infos: tuple[RunInfo, ...]
    metrics: tuple[str, ...]
    settings: tuple[tuple[str, tuple[Json, ...]], ...]
    estimates: tuple[tuple[str, str, Estimate], ...]


def run_row(workspace: Workspace, name: str) -> RunRow:
    """The run's line of the table.

    Raises:
        NotFoundError: there is no such run.
    """
    info = workspace.info(name)
    estimates = estimates_of(workspace.folder(name))
    end = info.finished_at or (time.time() if info.status == "running" else None)
    spark: list[tuple[float, float]] = []
    if info.status != "broken":
        spark = workspace.curves(name).points("train/loss", SPARK)
    return RunRow(
        name=info.name,
        status=info.status,
        base_model=info.base_model,
        steps=info.steps,
        loss=info.metrics.get("train/loss"),
        dev_loss=info.metrics.get("dev/loss"),
        score=estimates[0][2] if estimates else None,
        created_at=info.created_at,
        duration_s=end - info.created_at if end and info.created_at else None,
        spark=tuple(spark),
        error=info.error,
    )


def run_rows(workspace: Workspace) -> tuple[RunRow, ...]:
    """All runs' lines, newest first."""
    return tuple(run_row(workspace, info.name) for info in workspace.infos())


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The exponential moving average without its start's bias: the first value is itself.

    Source: Kingma & Ba 2015, section 3 (bias correction), arXiv 1412.6980.
    """
    found, mean, share = [], 0.0, 1.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        share *= weight
        found.append(mean / (1 - share))
    return found


def chart_views(workspace: Workspace, name: str, most: int = 800, low: float = -math.inf, high: float = math.inf) -> tuple[ChartView, ...]:
    """Every chart of a run that has numbers: the known ones first, then one for each other metric.

    Raises:
        NotFoundError: there is no such run.
    """
    known = {field for spec in CHARTS for field, _, _ in spec.fields} | _NOT_DRAWN
    others = [field for field in workspace.curves(name).names() if field not in known and not field.startswith(PER_LAYER)]
    more = (ChartSpec(key=f"m{i}", title=field, unit="", file="metrics.jsonl", fields=((field, field, "raw"),)) for i, field in enumerate(others))
    found = []
    for spec in (*CHARTS, *more):
        curves = workspace.curves(name, spec.file)
        lines = []
        for field, label, role in spec.fields:
            points = curves.points(field, most, low, high)
            if points:
                lines.append(Line(name=label, field=field, role=role, x=tuple(x for x, _ in points), y=tuple(y for _, y in points)))
        if lines:
            found.append(ChartView(key=spec.key, title=spec.title, unit=spec.unit, file=spec.file, log=spec.log, lines=tuple(lines)))
    return tuple(found)


def _watched(folder: Path) -> tuple[Watched, ...]:
    try:
        return read_watched(folder)
    except CrucibleError:
        return ()


def run_page(workspace: Workspace, name: str) -> RunPage:
    """Everything that the run page shows.

    Raises:
        NotFoundError: there is no such run.
    """
    folder = workspace.folder(name)
    info = workspace.info(name)
    files = read_files(folder)
    charts = chart_views(workspace, name)
    curves = workspace.curves(name)
    per_layer = {one: curves.points(one, 1 << 30) for one in curves.names() if one.startswith(PER_LAYER)}
    damaged = curves.damaged
    problems = files.problems
    if damaged and not any(problem.startswith("metrics.jsonl") for problem in problems):
        problems = (*problems, f"metrics.jsonl: {damaged} damaged lines were left out.")
    return RunPage(
        info=info, files=files, charts=charts, layers=layer_map(per_layer), issues=issue_table(per_layer), watched=_watched(folder), problems=problems
    )


def _flat(tree: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    found: dict[str, Json] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def compare_runs(workspace: Workspace, names: Iterable[str]) -> Comparison:
    """The runs beside each other, in the order given.

    Raises:
        NotFoundError: one of them is not there.
    """
    chosen = tuple(dict.fromkeys(names))
    infos = tuple(workspace.info(name) for name in chosen)
    configs: list[Mapping[str, Json]] = []
    for name in chosen:
        try:
            configs.append(as_table(read_json(workspace.folder(name) / "config.json")))
        except CrucibleError:
            configs.append({})
    flat = [_flat(config) for config in configs]
    differing = dict.fromkeys(key for config in configs[1:] for key in differing_keys(configs[0], config))
    # a table on one side only is named as a whole: its leaves are what differs
    leaves = sorted({leaf for key in differing for one in flat for leaf in one if leaf == key or leaf.startswith(f"{key}.")})
    drawn = [set(workspace.curves(name).names()) - _NOT_DRAWN for name in chosen]
    order = dict.fromkeys(["train/loss", "dev/loss", "probe/loss", "grad/global_norm", "train/lr", *sorted(set().union(*drawn) if drawn else ())])
    return Comparison(
        names=chosen,
        infos=infos,
        metrics=tuple(name for name in order if any(name in one for one in drawn)),
        settings=tuple((leaf, tuple(one.get(leaf) for one in flat)) for leaf in leaves),
        estimates=tuple((name, f"{label} {data[:8]}".strip(), one) for name in chosen for label, data, one in estimates_of(workspace.folder(name))),
    )

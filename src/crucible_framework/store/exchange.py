"""Runs as one long table, in CSV, JSON lines or Parquet, and as runs of MLflow; and back.

A row is one fact: (run, kind, name, row, step, epoch, number, text). Kinds: "run" (status and times), "param" (a setting under its dotted
key), "metric", "timing", "tag", "note". `row` numbers the rows of a curve, so that they come back as they were; what is no finite number
stands as JSON in `text`. Checkpoints, events and attached artifacts are not copied.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, cast, get_args

import orjson

from .. import events, files
from ..config import fingerprint
from ..errors import ConfigError, FormatError
from ..exporters import Begin
from ..records import Json
from .names import safe_name
from .run_files import CONFIG, LABELS, METRICS, RUN, TIMINGS, RunInfo, Status, read_object

__all__ = ["FORMATS", "copy_runs", "export_runs", "from_mlflow", "import_runs"]

Kind = Literal["run", "param", "metric", "timing", "tag", "note"]
FORMATS = (".csv", ".jsonl", ".parquet")
COLUMNS = ("run", "kind", "name", "row", "step", "epoch", "number", "text")


class Fact(TypedDict):
    """One row of the table."""

    run: str
    kind: str
    name: str
    row: int | None
    step: int | None
    epoch: float | None
    number: float | None
    text: str | None


def _fact(run: str, kind: Kind, name: str, value: Json, *, row: int | None = None, step: Json = None, epoch: Json = None) -> Fact:
    plain = isinstance(value, float) and math.isfinite(value)
    return {
        "run": run, "kind": kind, "name": name, "row": row, "step": step if isinstance(step, int) else None,
        "epoch": float(epoch) if isinstance(epoch, (int, float)) else None, "number": cast("float", value) if plain else None,
        "text": None if plain else orjson.dumps(value).decode(),
    }  # fmt: skip


def _facts(info: RunInfo) -> Iterator[Fact]:
    state = read_object(info.folder / RUN)
    for name in ("status", "created_at", "finished_at", "error", "result", "environment"):
        yield _fact(info.name, "run", name, info.status if name == "status" else state.get(name))
    for name, value in info.params.items():
        yield _fact(info.name, "param", name, value)
    for name, value in info.tags.items():
        yield _fact(info.name, "tag", name, value)
    if info.notes:
        yield _fact(info.name, "note", "", info.notes)
    kinds: tuple[tuple[Kind, str], ...] = (("metric", METRICS), ("timing", TIMINGS))
    for kind, file in kinds:
        for number, row in enumerate(files.read_lines(info.folder / file)):
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    yield _fact(info.name, kind, name, value, row=number, step=row.get("step"), epoch=row.get("epoch"))


# --------------------------------------------------------------------------------------------------------------- writing
def _needs_arrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("Parquet needs pyarrow. Install it: pip install pyarrow, or use .csv or .jsonl.")


def _written(rows: Sequence[Fact], suffix: str) -> bytes:
    if suffix == ".jsonl":
        return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list[str](COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else repr(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows)
        return text.getvalue().encode()
    return _parquet(rows)


def _parquet(rows: Sequence[Fact]) -> bytes:
    _needs_arrow()
    import pyarrow as pa
    import pyarrow.parquet

    types = {"row": pa.int64(), "step": pa.int64(), "epoch": pa.float64(), "number": pa.float64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    return cast("bytes", sink.getvalue().to_pybytes())


def export_runs(infos: Iterable[RunInfo], path: str | Path) -> int:
    """Writes runs as one table and returns how many rows it has.

    Args:
        infos: which.
        path: ends in .csv, .jsonl or .parquet; replaced where it exists.

    Raises:
        ConfigError: it ends otherwise, or pyarrow is not installed.
        CorruptError: a run is damaged. StorageFullError: no room; an older file is intact.
    """
    path = Path(path)
    suffix = _checked(path)
    rows = [fact for info in infos for fact in _facts(info)]
    files.write_atomic(path, _written(rows, suffix))
    events.emit("run.exported", path=str(path), rows=len(rows))
    return len(rows)


def copy_runs(infos: Iterable[RunInfo], begin: Begin) -> int:
    """Copies runs to another tracker (`exporters.mlflow_copies("name")`, `wandb_copies`, `trackio_copies`); returns how many."""
    count = 0
    for info in infos:
        copy = begin(info.name, {**info.params, **{f"tag.{key}": value for key, value in info.tags.items()}})
        start = info.created_at
        for row in files.read_lines(info.folder / METRICS):
            values = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)}
            step = row.get("step")
            copy.log(step if isinstance(step, int) else 0, values, start)
        copy.end(info.status)
        events.emit("run.copied", path=str(info.folder), status=info.status)
        count += 1
    return count


# --------------------------------------------------------------------------------------------------------------- reading
def _checked(path: Path) -> str:
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path.name!r} ends in {path.suffix!r}; expected one of {', '.join(FORMATS)}.")
    return path.suffix


def _rows(path: Path) -> list[dict[str, Json]]:
    suffix = _checked(path)
    with files.storage_errors(path, "read"):
        if not path.is_file():
            raise ConfigError(f"There is no file {str(path)!r}. Expected one that `export_runs` wrote.")
        if suffix == ".jsonl":
            return files.read_lines(path)
        if suffix == ".parquet":
            _needs_arrow()
            import pyarrow.parquet

            return cast("list[dict[str, Json]]", pyarrow.parquet.read_table(path).to_pylist())
        with path.open(encoding="utf-8", newline="") as file:
            return [{key: _cell(key, value) for key, value in row.items()} for row in csv.DictReader(file)]


def _cell(key: str, value: str) -> Json:
    if value == "" and key not in ("run", "kind", "name"):
        return None
    return int(value) if key in ("row", "step") else float(value) if key in ("epoch", "number") else value


def _value(row: Mapping[str, Json]) -> Json:
    number, text = row.get("number"), row.get("text")
    return cast("Json", orjson.loads(str(text))) if text is not None else number


def import_runs(path: str | Path, root: str | Path) -> tuple[str, ...]:
    """Makes runs from a table that `export_runs` wrote, and returns their names.

    Args:
        path: a .csv, .jsonl or .parquet file.
        root: the workspace.

    Raises:
        ConfigError: the file ends otherwise, or a run of one of the names is there already (then none is made).
        FormatError: a row is no fact; the message says which.
    """
    source, runs = Path(path), dict[str, list[Mapping[str, Json]]]()
    for number, row in enumerate(_rows(source), start=1):
        if set(row) != set(COLUMNS) or row["kind"] not in get_args(Kind) or not isinstance(row["run"], str):
            wanted = f"expected {', '.join(COLUMNS)}, with a kind of {', '.join(get_args(Kind))}"
            raise FormatError(f"{source.name}: row {number} has {', '.join(map(str, row))}; {wanted}.")
        runs.setdefault(row["run"], []).append(row)
    parts = {name: (lambda rows=rows: _parts(rows, source)) for name, rows in runs.items()}
    return _make(parts, Path(root), f"file:{source.name}")


_Parts = tuple[dict[str, Json], dict[str, Json], list[dict[str, Json]], list[dict[str, Json]], dict[str, Json], str]
"""(state, configuration, metrics, timings, tags, notes)."""


def _parts(rows: Sequence[Mapping[str, Json]], path: Path) -> _Parts:
    state, flat_config, tags, notes = dict[str, Json](), dict[str, Json](), dict[str, Json](), ""
    curves: dict[str, dict[int, dict[str, Json]]] = {"metric": {}, "timing": {}}
    try:
        for row in rows:
            kind, name = str(row["kind"]), str(row["name"])
            if kind in curves:
                at = curves[kind].setdefault(int(cast("int", row["row"])), {"step": row["step"]} | ({} if row["epoch"] is None else {"epoch": row["epoch"]}))
                at[name] = _value(row)
            elif kind == "note":
                notes = str(_value(row))
            else:
                {"run": state, "param": flat_config, "tag": tags}[kind][name] = _value(row)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path.name}: a row of run {rows[0]['run']!r} does not parse: {error}. Write the file anew.") from error
    found = [[row for _, row in sorted(curves[kind].items())] for kind in ("metric", "timing")]
    return state, _nested(flat_config), found[0], found[1], tags, notes


def _nested(pairs: Mapping[str, Json]) -> dict[str, Json]:
    """The tree of dotted keys; `flat` gives the keys back."""
    tree: dict[str, Json] = {}
    for key, value in pairs.items():
        *above, leaf = key.split(".")
        node = tree
        for part in above:
            inner = node.setdefault(part, {})
            if not isinstance(inner, dict):  # "loss" is a value and "loss.weight" is too: kept under its dotted key
                node, leaf = tree, key
                break
            node = inner
        node[leaf] = value
    return tree


def _make(parts: Mapping[str, Callable[[], _Parts]], root: Path, source: str) -> tuple[str, ...]:
    names = [safe_name("run", name) for name in parts]
    if taken := [name for name in names if (root / name).exists()]:
        raise ConfigError(f"{str(root)!r} has {', '.join(map(repr, taken[:5]))} already; nothing was imported. Choose another folder, or move them away.")
    for name in names:
        state, config, metrics, timings, tags, notes = parts[name]()
        staged = root / f".tmp-{name}-{uuid.uuid4().hex[:8]}"
        status = state.get("status")
        whole = {
            "name": name, "created_at": 0.0, "finished_at": None, "result": None, "environment": {}, "error": "", **state,
            "status": status if status in get_args(Status) and status not in ("running", "broken") else "stopped",
            "fingerprint": fingerprint(config), "imported_from": source,
        }  # fmt: skip
        try:
            files.write_json(staged / CONFIG, config)
            for file, rows in ((METRICS, metrics), (TIMINGS, timings)):
                files.write_atomic(staged / file, b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
            if tags or notes:
                files.write_json(staged / LABELS, {"tags": tags, "notes": notes, "artifacts": {}})
            files.write_json(staged / RUN, whole)
            files.move(staged, root / name)
        finally:
            _remove(staged)
        events.emit("run.imported", path=str(root / name), source=source)
    return tuple(names)


def _remove(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106 # nothing where it was moved


def from_mlflow(experiment: str, root: str | Path, *, tracking_uri: str = "") -> tuple[str, ...]:
    """Makes runs from those of an MLflow experiment, and returns their names: parameters, every point of every metric, and plain tags.

    Raises:
        ConfigError: MLflow is not installed, there is no such experiment, or a run of one of the names is there already.
    """
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise ConfigError("MLflow is not installed. Install it: pip install mlflow-skinny") from error
    client = MlflowClient(tracking_uri=tracking_uri or None)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ConfigError(f"MLflow has no experiment {experiment!r} at {tracking_uri or 'MLFLOW_TRACKING_URI'}. Check both.")
    runs: dict[str, Callable[[], _Parts]] = {}
    for run in client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"]):
        name = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in run.info.run_name or run.info.run_id).strip(".")[:80]
        name = name if name not in runs else f"{name[:47]}-{run.info.run_id}"
        runs[name] = lambda run=run: _mlflow_parts(client, run)  # type: ignore[misc] # bound now
    return _make(runs, Path(root), f"mlflow:{experiment}")


def _mlflow_parts(client: object, run: object) -> _Parts:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    asked, told = cast("MlflowClient", client), cast("Run", run)
    rows: dict[int, dict[str, Json]] = {}
    for name in told.data.metrics:
        for point in asked.get_metric_history(told.info.run_id, name):
            rows.setdefault(int(point.step), {"step": int(point.step)})[name] = float(point.value)
    ended = told.info.end_time
    state: dict[str, Json] = {
        "status": {"FINISHED": "done", "FAILED": "failed"}.get(str(told.info.status), "stopped"),
        "created_at": told.info.start_time / 1000, "finished_at": ended / 1000 if ended else None,
    }  # fmt: skip
    params = {key: _plain(value) for key, value in told.data.params.items()}
    config = _nested({key: value for key, value in params.items() if not key.startswith("tag.")})
    tags = {key[4:]: str(value) for key, value in told.data.params.items() if key.startswith("tag.")}
    tags |= {key: str(value) for key, value in told.data.tags.items() if not key.startswith(("mlflow.", "crucible."))}
    return state, config, [rows[step] for step in sorted(rows)], [], cast("dict[str, Json]", tags), str(told.data.tags.get("mlflow.note.content", ""))


def _plain(text: str) -> Json:
    """MLflow keeps every parameter as text; numbers, lists and words of Python that mean one thing only are taken back."""
    known: dict[str, Json] = {"None": None, "True": True, "False": False}
    if text in known:
        return known[text]
    try:
        return cast("Json", orjson.loads(text.replace("'", '"')))
    except orjson.JSONDecodeError:
        return text

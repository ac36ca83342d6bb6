"""Reads a run folder tolerantly: what is missing is empty, what cannot be read is empty and named among the problems.

The only file of this folder that reads the disk. It draws no conclusions and knows no page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ..errors import NotFoundError, StoreError
from ..files import Manifest, held, read_json, read_lines, read_manifest, sha256_file, storage_errors
from ..records import Estimate, Finding, Json, record

__all__ = ["Arm", "CheckpointFolder", "Row", "RunFile", "RunFiles", "Shown", "as_list", "as_number", "as_table", "as_text", "prompt_text", "read_run"]


@record
class Row:
    """One scored item of an evaluation."""

    id: str
    document: str
    target: str
    completion: str
    prompt: str
    scores: Mapping[str, float | None]


@record
class Arm:
    """One evaluation: who answered, on what, with what scores.

    Attributes:
        omitted: measures without an estimate, and why.
        source: its folder inside the run.
    """

    label: str
    model: str
    card: Mapping[str, Json]
    params: Mapping[str, Json]
    estimates: tuple[Estimate, ...]
    rows: tuple[Row, ...]
    omitted: tuple[tuple[str, str], ...]
    source: str


@record
class Shown:
    """An entry of samples.json: an item that somebody chose to show, as base and adapter answered it."""

    id: str
    document: str
    prompt: str
    target: str
    base: str
    adapter: str


@record
class CheckpointFolder:
    """A folder below `checkpoints/`; `problem` says why it cannot be used, "" where it can."""

    name: str
    manifest: Manifest | None
    problem: str


@record
class RunFile:
    """A file of the run outside `checkpoints/`."""

    name: str
    size_bytes: int
    sha256: str


@record
class RunFiles:
    """All that a run folder holds, as plain values. `status` is that of run.json, "interrupted" where its process died, "" unknown."""

    folder: Path
    status: str
    run: Mapping[str, Json]
    config: Mapping[str, Json]
    data: Mapping[str, Json]
    metrics: tuple[Mapping[str, Json], ...]
    timings: tuple[Mapping[str, Json], ...]
    arms: tuple[Arm, ...]
    findings: tuple[Finding, ...]
    samples: tuple[Shown, ...]
    checkpoints: tuple[CheckpointFolder, ...]
    files: tuple[RunFile, ...]
    problems: tuple[str, ...]


def as_table(value: object) -> Mapping[str, Json]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Json]:
    """The value where it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def as_number(value: object) -> float | None:
    """The value where it is a finite number, else None."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def as_text(value: object) -> str:
    """A string as it is, "" for nothing, anything else as Python writes it."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def prompt_text(value: object) -> str:
    """A prompt in one piece: a string, or a chat's turns, each under its role."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return "\n\n".join(f"{as_text(as_table(turn).get('role'))}:\n{as_text(as_table(turn).get('content'))}" for turn in value)
    return as_text(value)


def read_run(folder: Path) -> RunFiles:
    """Everything of a run folder that a report can use.

    Raises:
        NotFoundError: there is no such folder, or it holds none of a run's files.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no run folder {str(folder)!r}. Expected the folder of a run, for example 'runs/first'.")
    problems: list[str] = []
    files = _files(folder, problems)
    checkpoints = _checkpoints(folder, problems)
    if not files and not checkpoints:
        raise NotFoundError(f"{str(folder)!r} holds no run. Expected at least run.json or metrics.jsonl in it: name the run's own folder.")
    run = _table(folder, "run.json", problems)
    return RunFiles(
        folder=folder,
        status=_status(folder, run),
        run=run,
        config=_table(folder, "config.json", problems),
        data=_table(folder, "data.json", problems),
        metrics=_rows(folder, "metrics.jsonl", problems),
        timings=_rows(folder, "timings.jsonl", problems),
        arms=_arms(folder, problems),
        findings=_findings(folder, problems),
        samples=_samples(folder, problems),
        checkpoints=checkpoints,
        files=files,
        problems=tuple(problems),
    )


def _status(folder: Path, run: Mapping[str, Json]) -> str:
    status = as_text(run.get("status"))
    return "interrupted" if status == "running" and not held(folder / ".lock") else status


def _json(folder: Path, name: str, problems: list[str]) -> Json:
    try:
        with storage_errors(folder / name, "read"):
            return read_json(folder / name)
    except NotFoundError:
        return None
    except StoreError as error:
        problems.append(f"{name} was left out: {_relative(folder, error)}")
        return None


def _relative(folder: Path, error: Exception) -> str:
    return str(error).replace(f"{folder}/", "")  # a report may leave the machine


def _table(folder: Path, name: str, problems: list[str]) -> Mapping[str, Json]:
    value = _json(folder, name, problems)
    if value is not None and not isinstance(value, dict):
        problems.append(f"{name} was left out: it holds a {type(value).__name__}; expected a JSON object.")
    return as_table(value)


def _rows(folder: Path, name: str, problems: list[str]) -> tuple[Mapping[str, Json], ...]:
    try:
        with storage_errors(folder / name, "read"):
            rows: list[dict[str, Json]] = read_lines(folder / name)
    except StoreError as error:
        problems.append(f"{name} was left out: {_relative(folder, error)}")
        return ()
    kept = tuple(as_table(row) for row in rows if isinstance(row, dict))
    if len(kept) < len(rows):
        problems.append(f"{name}: {len(rows) - len(kept)} lines were left out: they hold no JSON object.")
    return kept


def _estimate(value: Mapping[str, Json]) -> Estimate:
    clusters = as_number(value.get("clusters"))
    return Estimate(
        name=as_text(value.get("name")),
        value=_or_nan(value.get("value")),
        low=_or_nan(value.get("low")),
        high=_or_nan(value.get("high")),
        n=int(as_number(value.get("n")) or 0),
        level=as_number(value.get("level")) or 0.95,
        method=as_text(value.get("method")),
        clusters=None if clusters is None else int(clusters),
    )


def _or_nan(value: object) -> float:
    found = as_number(value)
    return math.nan if found is None else found


def _arms(folder: Path, problems: list[str]) -> tuple[Arm, ...]:
    parent = folder / "eval"
    names = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")) if parent.is_dir() else []
    arms = []
    for name in names:
        source = f"eval/{name}"
        body = _table(folder, f"{source}/evaluation.json", problems)
        rows = _rows(folder, f"{source}/scores.jsonl", problems)
        if not body and not rows:
            continue
        if not body:
            problems.append(f"{source} is unfinished: {len(rows)} rows are there, evaluation.json is not, so it has no estimates.")
        elif _changed(folder / source / "scores.jsonl", as_text(body.get("scores_sha256"))):
            problems.append(f"{source}/scores.jsonl is not the file that its evaluation.json sums up (sha256 differs): rows and estimates may disagree.")
        omitted = body.get("omitted")
        arms.append(
            Arm(
                label=as_text(body.get("label")) or name,
                model=as_text(body.get("model")),
                card=as_table(body.get("card")),
                params=as_table(body.get("params")),
                estimates=tuple(_estimate(as_table(e)) for e in as_list(body.get("estimates")) if as_text(as_table(e).get("name"))),
                rows=tuple(_row(row) for row in rows),
                omitted=tuple((name, as_text(why)) for name, why in as_table(omitted).items()) + tuple((as_text(name), "") for name in as_list(omitted)),
                source=source,
            )
        )
    known = ("base", "adapter")
    return tuple(sorted(arms, key=lambda arm: (known.index(arm.label) if arm.label in known else len(known), arm.label)))


def _changed(path: Path, expected: str) -> bool:
    try:
        return bool(expected) and sha256_file(path) != expected
    except StoreError:
        return True


def _row(row: Mapping[str, Json]) -> Row:
    return Row(
        id=as_text(row.get("id")),
        document=as_text(row.get("document")),
        target=as_text(row.get("target")),
        completion=as_text(row.get("completion")),
        prompt=prompt_text(row.get("prompt")),
        scores={name: as_number(value) for name, value in as_table(row.get("scores")).items()},
    )


def _entries(folder: Path, name: str, key: str, problems: list[str]) -> list[Mapping[str, Json]]:
    """The objects under the file's one key; another shape is a problem."""
    value = _json(folder, name, problems)
    if value is None:
        return []
    entries = value.get(key) if isinstance(value, dict) else value
    if not isinstance(entries, list):
        problems.append(f'{name} was left out: expected {{"{key}": [...]}}.')
        return []
    found = [as_table(entry) for entry in entries if isinstance(entry, dict)]
    if len(found) < len(entries):
        problems.append(f"{name}: {len(entries) - len(found)} entries were left out: they are no JSON objects.")
    return found


def _samples(folder: Path, problems: list[str]) -> tuple[Shown, ...]:
    return tuple(
        Shown(
            id=as_text(value.get("id")),
            document=as_text(value.get("document")),
            prompt=prompt_text(value.get("prompt")),
            target=as_text(value.get("target")),
            base=as_text(value.get("base")),
            adapter=as_text(value.get("adapter")),
        )
        for value in _entries(folder, "samples.json", "samples", problems)
    )


def _findings(folder: Path, problems: list[str]) -> tuple[Finding, ...]:
    found = []
    for value in _entries(folder, "findings.json", "findings", problems):
        ends = [*as_list(value.get("interval")), None, None]
        clusters = as_number(value.get("clusters"))
        found.append(
            Finding(
                name=as_text(value.get("name")),
                test=as_text(value.get("test")),
                statistic=_or_nan(value.get("statistic")),
                p_value=_or_nan(value.get("p_value")),
                effect=_or_nan(value.get("effect")),
                interval=(_or_nan(ends[0]), _or_nan(ends[1])),
                n=int(as_number(value.get("n")) or 0),
                why=as_text(value.get("why")),
                source=as_text(value.get("source")),
                level=as_number(value.get("level")) or 0.95,
                clusters=None if clusters is None else int(clusters),
            )
        )
    return tuple(found)


def _checkpoints(folder: Path, problems: list[str]) -> tuple[CheckpointFolder, ...]:
    parent = folder / "checkpoints"
    found = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            with storage_errors(path, "read"):
                found.append(CheckpointFolder(name=path.name, manifest=read_manifest(path), problem=""))
        except StoreError as error:
            problem = _relative(folder, error)
            found.append(CheckpointFolder(name=path.name, manifest=None, problem=problem))
            problems.append(f"checkpoints/{path.name} cannot be used: {problem}")
    return tuple(found)


def _files(folder: Path, problems: list[str]) -> tuple[RunFile, ...]:
    found = []
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("eval/*/*.json"), *folder.glob("eval/*/*.jsonl"))):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith(".") or path.name == "report.json" or not path.is_file():  # a report is no source of itself
            continue
        try:
            with storage_errors(path, "read"):
                found.append(RunFile(name=name, size_bytes=path.stat().st_size, sha256=sha256_file(path)))
        except StoreError as error:
            problems.append(f"{name} was left out: {_relative(folder, error)}")
    return tuple(found)

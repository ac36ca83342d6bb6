"""The commands about runs as a whole, and about the workspace's indexes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from ..config import places
from ..errors import ConfigError, NotFoundError
from ..exporters import Begin, mlflow_copies, trackio_copies, wandb_copies
from ..store import RunInfo, Tracker, copy_runs, export_runs, from_mlflow, import_runs
from ..store.query import Direction
from . import show
from .models import pair
from .reply import Reply

__all__ = ["register"]

Where = Annotated[list[str] | None, Parameter(help='A condition over settings, metrics, `tag.<key>`, status…: `"train/loss < 0.5"`; may be given again.')]
Workspace = Annotated[Path | None, Parameter(help="The workspace; `runs`, or CRUCIBLE_RUNS, where none is given.")]


def _tracker(workspace: Path | None) -> Tracker:
    return Tracker(workspace or places().runs)


def _one(info: RunInfo) -> Reply:
    facts = {"status": info.status, "base model": info.base_model, "steps": info.steps, "epochs": info.epochs, "notes": info.notes, "error": info.error}
    tags = {f"tag {key}": value for key, value in info.tags.items()}
    kept = {f"artifact {name}": key[:12] for name, key in info.artifacts.items()}
    rows = [(key, value) for key, value in {**facts, **tags, **kept, **info.metrics}.items() if value not in ("", None)]
    return Reply(info, show.table(("key", "value"), rows, ""))


def runs_list(
    folder: Path | None = None, /, *, where: Where = None, tag: list[str] | None = None, text: str = "", order_by: str = "created_at",
    direction: Direction | None = None, limit: int | None = None,
) -> Reply:  # fmt: skip
    """List the runs of the workspace, or show one.

    Args:
        folder: a run folder, or a workspace (`runs`).
        tag: `key=value`; may be given again.
        text: part of a name, note, tag or error.
        order_by: a setting or metric; the best comes first.
        direction: whether less (`min`) or more (`max`) of it is better, where its name does not say so.
        limit: at most so many.
    """
    root = folder or places().runs
    if folder is not None and not folder.is_dir():
        raise NotFoundError(f"There is no folder {str(folder)!r}. List the runs of the workspace: crucible runs")
    if (root / "run.json").exists():
        return _one(Tracker(root.parent).get(root.resolve().name))
    tags = dict(pair(one) for one in tag or ())
    found = Tracker(root).runs(where=where or (), tags=tags, text=text, order_by=order_by, direction=direction, limit=limit)
    rows = []
    for one in found:
        labels = ", ".join(f"{key}={value}" for key, value in one.tags.items())
        rows.append((one.name, one.status, one.steps, one.base_model, show.figure(one.metrics.get("train/loss")), labels, show.when(one.created_at)))
    empty = f"No runs in {root}. Make one: crucible demo --quick" if not (where or tag or text) else "No run fits."
    return Reply(found, show.table(("run", "status", "steps", "base model", "train/loss", "tags", "made"), rows, empty))


def runs_show(name: str, /, *, workspace: Workspace = None) -> Reply:
    """Show one run.

    Args:
        name: of the run.
    """
    return _one(_tracker(workspace).get(name))


def runs_compare(names: list[str], /, *, workspace: Workspace = None) -> Reply:
    """Runs side by side: the settings in which they differ, and their last metrics.

    Args:
        names: of two or more runs.
    """
    found = _tracker(workspace).compare(names)
    rows = [(key, *("–" if value is None else value for value in values)) for key, values in found.params.items()]
    rows += [(key, *(show.figure(value) for value in values)) for key, values in found.metrics.items()]
    return Reply(found, show.table(("", *found.names), rows, "The runs have the same settings and no metrics."))


def runs_tag(name: str, tags: list[str], /, *, workspace: Workspace = None) -> Reply:
    """Put tags on a run; `key=` takes one away.

    Args:
        name: of the run.
        tags: `key=value` each.
    """
    made = _tracker(workspace).tag(name, {key: value or None for key, value in map(pair, tags)})
    return Reply(made, ", ".join(f"{key}={value}" for key, value in made.tags.items()) or f"{name} has no tags.")


def runs_note(name: str, text: str, /, *, workspace: Workspace = None) -> Reply:
    """Replace the notes of a run.

    Args:
        name: of the run.
        text: in any form; an empty text takes them away.
    """
    made = _tracker(workspace).note(name, text)
    return Reply(made, made.notes or f"{name} has no notes.")


def runs_attach(name: str, file: Path, /, *, as_name: str = "", workspace: Workspace = None) -> Reply:
    """Keep a copy of a file with a run; equal files are stored once.

    Args:
        name: of the run.
        file: what is copied.
        as_name: what it is called in the run; the file's own name where none is given.
    """
    made = _tracker(workspace).attach(name, file, as_name)
    return Reply(made, f"{made.key}  {show.size(made.size_bytes)}")


def runs_lineage(name: str, /, *, workspace: Workspace = None) -> Reply:
    """What a run, model, study or data set was made from, and what came of it.

    Args:
        name: `first`, `judge:2`, or an id that this command shows.
    """
    nodes = _tracker(workspace).lineage(name)
    rows = [(node.kind, node.title, ", ".join(node.made_from)) for node in nodes]
    return Reply({"nodes": list(nodes)}, show.table(("kind", "name", "made from"), rows, ""))


def runs_export(target: str, names: list[str] | None = None, /, *, where: Where = None, workspace: Workspace = None) -> Reply:
    """Write runs as one table, or copy them to another tracker.

    Args:
        target: a .csv, .jsonl or .parquet file, or `mlflow:EXPERIMENT`, `wandb:PROJECT`, `trackio:PROJECT`.
        names: which runs; all where none is given.
    """
    tracker = _tracker(workspace)
    infos = [tracker.get(name) for name in names] if names else tracker.runs(where=where or ())
    kind, sign, called = target.partition(":")
    copies: dict[str, Callable[[str], Begin]] = {"mlflow": mlflow_copies, "wandb": wandb_copies, "trackio": trackio_copies}
    if sign and kind in copies:
        count = copy_runs(infos, copies[kind](called))
        return Reply({"target": target, "runs": count}, f"{count} runs copied to {target}.")
    count = export_runs(infos, Path(target))
    return Reply({"target": target, "runs": len(infos), "rows": count}, f"{target}: {count} rows of {len(infos)} runs.")


def runs_import(source: str, /, *, workspace: Workspace = None) -> Reply:
    """Make runs from a table that `runs export` wrote, or from an MLflow experiment.

    Args:
        source: a .csv, .jsonl or .parquet file, or `mlflow:EXPERIMENT`.
    """
    root = workspace or places().runs
    made = from_mlflow(source.removeprefix("mlflow:"), root) if source.startswith("mlflow:") else import_runs(source, root)
    return Reply({"runs": list(made)}, f"{len(made)} runs: {', '.join(made)}")


# ------------------------------------------------------------------------------------------------------------------- db
def db_rebuild(*, workspace: Workspace = None) -> Reply:
    """Make the indexes of runs and models again from the files, which are the truth."""
    found = _tracker(workspace).rebuild()
    return Reply(found, ", ".join(f"{count} {what}" for what, count in found.items()))


def db_verify(*, workspace: Workspace = None) -> Reply:
    """Compare every byte that has a checksum: runs, checkpoints, models and artifacts."""
    found = _tracker(workspace).problems()
    rows = [(what, why) for what, why in found]
    return Reply({"problems": rows}, show.table(("damaged", "how"), rows, "Every byte is as it was saved."), 65 if found else 0)


def db_prune(*, max_size: str, workspace: Workspace = None) -> Reply:
    """Remove the least recently used artifacts that no run has, until the rest fits.

    Args:
        max_size: `0`, `500MB`, `2GB`.
    """
    removed = _tracker(workspace).artifacts.prune(_bytes(max_size))
    freed = sum(one.size_bytes for one in removed)
    return Reply({"removed": list(removed), "freed_bytes": freed}, f"Removed {len(removed)} artifacts, {show.size(freed)}.")


def _bytes(text: str) -> int:
    units: dict[str, int] = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().upper().rstrip("BKMGT")
    unit = text.strip().upper()[len(number) :]
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise ConfigError(f"max_size is {text!r}; expected a number with B, kB, MB, GB or TB, for example 500MB.") from None


def register(app: App) -> None:
    """Adds the commands to the tree."""
    runs = App(name="runs", help="List, filter, compare, label, export and import runs.", default_command=runs_list)
    verbs: dict[str, Callable[..., Reply]] = {
        "list": runs_list, "show": runs_show, "compare": runs_compare, "tag": runs_tag, "note": runs_note, "attach": runs_attach, "lineage": runs_lineage,
        "export": runs_export, "import": runs_import,
    }  # fmt: skip
    for verb, function in verbs.items():
        runs.command(function, name=verb)
    db = App(name="db", help="The indexes and artifacts of a workspace.")
    of_db: dict[str, Callable[..., Reply]] = {"rebuild": db_rebuild, "verify": db_verify, "prune": db_prune}
    for verb, function in of_db.items():
        db.command(function, name=verb)
    app.command(runs)
    app.command(db)

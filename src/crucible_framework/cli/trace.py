"""The commands about traces: what happened inside what, and why. They draw nothing themselves; see `crucible_framework.traces`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import orjson
from cyclopts import App, Parameter

from ..config import places
from ..dashboard import render_trace
from ..errors import NotFoundError
from ..files import write_atomic
from ..traces import Kind, Trace, diff_traces, load_trace
from . import show
from .reply import Reply

__all__ = ["register"]

Workspace = Annotated[Path | None, Parameter(help="The workspace; `runs`, or CRUCIBLE_RUNS, where none is given.")]
Format = Literal["tree", "mermaid", "html", "prov"]


def _load(source: str, workspace: Path | None) -> Trace:
    """The trace of a path, else of a run of the workspace."""
    path = Path(source) if Path(source).exists() else (workspace or places().runs) / source
    return load_trace(path)


def trace_list(workspace: Path | None = None, /) -> Reply:
    """List what has a trace: the runs of a workspace, and what was asked outside any run.

    Args:
        workspace: `runs`, or CRUCIBLE_RUNS, where none is given.
    """
    root = workspace or places().runs
    if workspace is not None and not workspace.is_dir():
        raise NotFoundError(f"There is no folder {str(workspace)!r}. Give a workspace: crucible trace list runs")
    rows = []
    for file in (*root.glob("events.jsonl"), *sorted(root.glob("*/events.jsonl")), *sorted(root.glob("*/cells/*/run/events.jsonl"))):
        trace, folder = load_trace(file), file.parent
        counts = trace.counts()
        rows.append({"source": "." if folder == root else folder.relative_to(root).as_posix(), **counts, "problems": len(trace.problems)})
    shown = show.table(("source", "spans", "decisions", "events", "damaged lines"), [tuple(row.values()) for row in rows], "Nothing has recorded events yet.")
    return Reply({"traces": rows}, shown)


def trace_show(
    source: str, /, *, format: Format = "tree", find: str = "", kind: Kind | None = None, most: int = 400, out: Path | None = None, workspace: Workspace = None,  # noqa: A002 - the flag's name
) -> Reply:  # fmt: skip
    """Show a trace, or write it to a file.

    Args:
        source: a run's name, its folder, an events file, or `.` for what happened outside runs.
        format: `tree`, `mermaid`, `html` (one file without script), or `prov` (W3C PROV-JSON).
        find: only what holds this text.
        kind: only spans, decisions or events.
        most: lines of a tree, nodes of a Mermaid chart.
        out: where the text goes, instead of the terminal.
    """
    trace = _load(source, workspace)
    if find or kind:
        trace = Trace(nodes=trace.query(kind=kind, text=find), problems=trace.problems)
    data: object = {"nodes": list(trace.nodes), "problems": list(trace.problems)}
    match format:
        case "tree":
            text = trace.to_tree(most)
        case "mermaid":
            text = trace.to_mermaid(most)
        case "html":
            text = render_trace(trace, f"Trace of {source}")
        case _:
            data = trace.to_prov()
            text = orjson.dumps(data, option=orjson.OPT_INDENT_2).decode()
    if out is not None:
        write_atomic(out, text.encode())
        return Reply({"path": str(out), "nodes": len(trace.nodes)}, f"{out}: {len(trace.nodes)} nodes.")
    damaged = "".join(f"\nleft out: {problem}" for problem in trace.problems) if format == "tree" else ""
    return Reply(data if format in ("tree", "prov") else {"format": format, "text": text}, text.rstrip("\n") + damaged)


def trace_diff(left: str, right: str, /, *, ignore: list[str] | None = None, workspace: Workspace = None) -> Reply:
    """What two traces do not share. Nodes are paired by their place; ids, times, durations and sizes play no part.

    Args:
        left: as of `show`.
        right: as of `show`.
        ignore: a field whose values do not matter; may be given again.
    """
    found = diff_traces(_load(left, workspace), _load(right, workspace), ignore=ignore or ())
    lines = [*(f"- {node.label()}" for node in found.removed), *(f"+ {node.label()}" for node in found.added)]
    for old, new, keys in found.changed:
        told = (f"{key}: {old.shown(key)} → {new.shown(key)}" for key in keys)
        lines.append(f"~ {old.label(fields=False)}  {', '.join(told)}")
    return Reply(found, "\n".join([*lines, found.summary]))


def register(app: App) -> None:
    """Adds the commands to the tree."""
    trace = App(name="trace", help="What happened inside what, and why: list, show, compare and export traces.", default_command=trace_list)
    verbs: dict[str, Callable[..., Reply]] = {"list": trace_list, "show": trace_show, "diff": trace_diff}
    for verb, function in verbs.items():
        trace.command(function, name=verb)
    app.command(trace)

"""What was made from what: data sets and base models, runs, checkpoints, model versions and studies as one graph.

Everything is read from the files that these leave; what is not on file is left out, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from .. import files
from ..errors import CrucibleError
from ..records import Json, record
from .models import Models
from .names import not_found
from .run_files import CONFIG, RUN

__all__ = ["Ancestor", "ancestry", "around", "graph", "run_of"]

_PLAN, _CELLS, _DATA = "plan.json", "cells", "data.json"


@record
class Ancestor:
    """A node of the graph.

    Attributes:
        id: "data …", "base …", "run <name>", "study <name>", "name:version" of a model, or a checkpoint's URI.
        kind: "data set", "base model", "run", "checkpoint", "model" or "study".
        made_from: ids of other nodes.
        run: the run of the workspace that a page may show, "" where there is none.
    """

    id: str
    title: str
    kind: str
    made_from: tuple[str, ...]
    run: str = ""


def _run_path(uri: str, root: Path) -> str:
    """The run's path below the workspace that a checkpoint's URI points into ("first", "study/cells/a1/run"), "" where it points elsewhere."""
    path = Path(unquote(uri.removeprefix("file:")))
    try:
        parts = path.resolve().relative_to(root.resolve()).parts
    except (ValueError, OSError):
        return ""
    if "checkpoints" not in parts[1:-1]:
        return ""
    run = "/".join(parts[: parts.index("checkpoints", 1)])
    return run if (root / run / RUN).is_file() else ""


def run_of(uri: str, root: Path) -> str:
    """The run directly in the workspace that a checkpoint's URI points into, "" where it points elsewhere."""
    run = _run_path(uri, root)
    return "" if "/" in run else run


def ancestry(models: Models, reference: str, root: Path) -> tuple[Ancestor, ...]:
    """What a version was made from, itself first: versions, checkpoints, their runs, base models and data sets.

    Raises:
        NotFoundError: there is no such version.
    """
    return tuple(_of_models(models, models.lineage(reference), root).values())


def graph(root: Path, models: Models) -> tuple[Ancestor, ...]:
    """The whole workspace: every run and study in it, and every registered version with what it was made from."""
    root = Path(root)
    found: dict[str, Ancestor] = {}
    for path in sorted(root.glob(f"*/{RUN}")):
        if not path.parent.name.startswith("."):
            found |= {node.id: node for node in _run_nodes(path.parent.name, root)}
    for plan in sorted(root.glob(f"*/{_PLAN}")):
        study = plan.parent
        runs = [path.parent.relative_to(root).as_posix() for path in sorted(study.glob(f"{_CELLS}/*/run/{RUN}"))]
        for run in runs:
            found |= {node.id: node for node in _run_nodes(run, root)}
        found[f"study {study.name}"] = Ancestor(id=f"study {study.name}", title=study.name, kind="study", made_from=tuple(f"run {run}" for run in runs))
    if models.folder.is_dir():
        versions: dict[str, tuple[str, ...]] = {f"{one.name}:{one.version}": one.parents for one in models.list()}
        uris: dict[str, tuple[str, ...]] = {parent: () for parents in versions.values() for parent in parents if parent not in versions}
        found |= _of_models(models, versions | uris, root)
    return tuple(found.values())


def _of_models(models: Models, parents: Mapping[str, Sequence[str]], root: Path) -> dict[str, Ancestor]:
    found: dict[str, Ancestor] = {}
    known = {f"{one.name}:{one.version}": one for one in models.list()}
    for node, above in parents.items():
        if node in known:
            base = f"base {known[node].checkpoint.base_model}"
            found[node] = Ancestor(id=node, title=node, kind="model", made_from=tuple(above) or (base,))
            if not above:
                found[base] = Ancestor(id=base, title=base.removeprefix("base "), kind="base model", made_from=())
            continue
        run = _run_path(node, root) if node.startswith("file:") else ""
        made_from = (f"run {run}",) if run else ()
        found[node] = Ancestor(id=node, title=node.rpartition("/")[2], kind="checkpoint", made_from=made_from, run="" if "/" in run else run)
        found |= {one.id: one for one in _run_nodes(run, root)} if run else {}
    return found


def _run_nodes(run: str, root: Path) -> tuple[Ancestor, ...]:
    base, data = "", list[str]()
    try:
        base = str(_table(files.read_json(root / run / CONFIG)).get("base_model") or "")
        cards = _table(files.read_json(root / run / _DATA))
        for card in (_table(cards.get("train")), _table(cards.get("dev"))):
            if card:
                data.append(f"{card.get('name') or ''} {card.get('split') or ''} {str(card.get('sha256') or '')[:8]}".strip())
    except CrucibleError:
        pass
    made_from = (*((f"base {base}",) if base else ()), *(f"data {name}" for name in data))
    nodes = [Ancestor(id=f"run {run}", title=run, kind="run", made_from=made_from, run="" if "/" in run else run)]
    if base:
        nodes.append(Ancestor(id=f"base {base}", title=base, kind="base model", made_from=()))
    nodes += [Ancestor(id=f"data {name}", title=name, kind="data set", made_from=()) for name in data]
    return tuple(nodes)


def _table(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, dict) else {}


def around(nodes: Iterable[Ancestor], name: str) -> tuple[Ancestor, ...]:
    """The part of a graph that leads to a node and that came of it, the node first, what it was made from next.

    Args:
        nodes: a graph.
        name: an id, or a title where only one node has it ("first", "judge:2").

    Raises:
        NotFoundError: no node, or several, are called so.
    """
    by_id = {node.id: node for node in nodes}
    fits = [name] if name in by_id else [node.id for node in by_id.values() if node.title == name]
    if len(fits) != 1:
        raise not_found("node", name, by_id, f"{len(fits)} have that title: give the whole id." if fits else "")
    above, below = fits, list(fits)
    for node in above:
        above += [parent for parent in by_id[node].made_from if parent in by_id and parent not in above]
    for node in below:
        below += [one.id for one in by_id.values() if node in one.made_from and one.id not in below]
    return tuple(by_id[node] for node in dict.fromkeys((*above, *below)))

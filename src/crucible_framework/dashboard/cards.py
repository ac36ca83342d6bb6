"""A model version in words: its card as Markdown, and the graph of what it was made from.

Everything comes from the registry and from the run that it names; what is not on file is left out, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from ..errors import CrucibleError
from ..files import read_json
from ..records import Estimate, ModelVersion, record
from ..reports import words
from ..reports.sources import as_table, as_text
from ..store import Models
from .views import estimates_of

__all__ = ["Ancestor", "ancestry", "model_card", "run_of"]


@record
class Ancestor:
    """A node of the lineage graph. `made_from` are ids of other nodes; `run` names a run of the workspace, "" where it is none."""

    id: str
    title: str
    kind: str
    made_from: tuple[str, ...]
    run: str = ""


def run_of(uri: str, root: Path) -> str:
    """The run of the workspace that a checkpoint's URI points into, "" where it points elsewhere."""
    path = Path(unquote(uri.removeprefix("file:")))
    try:
        parts = path.resolve().relative_to(root.resolve()).parts
    except (ValueError, OSError):
        return ""
    return parts[0] if len(parts) >= 3 and parts[1] == "checkpoints" and (root / parts[0] / "run.json").is_file() else ""


def _short(text: str) -> str:
    """A file's URI by the end of its path: no folder of this machine goes into a card."""
    return "/".join(Path(unquote(text.removeprefix("file:"))).parts[-3:]) if text.startswith("file:") else text


def ancestry(models: Models, reference: str, root: Path) -> tuple[Ancestor, ...]:
    """What a version was made from, itself first: versions, checkpoints, their runs, base models and data sets.

    Raises:
        NotFoundError: there is no such version.
    """
    graph = models.lineage(reference)
    found: dict[str, Ancestor] = {}
    known = {f"{one.name}:{one.version}": one for one in models.list()}
    for node, parents in graph.items():
        run = run_of(node, root) if node.startswith("file:") else ""
        if node in known:
            found[node] = Ancestor(id=node, title=node, kind="model", made_from=parents or (f"base {known[node].checkpoint.base_model}",))
            if not parents:
                base = found[node].made_from[0]
                found[base] = Ancestor(id=base, title=base.removeprefix("base "), kind="base model", made_from=())
        else:
            found[node] = Ancestor(id=node, title=node.rpartition("/")[2], kind="checkpoint", made_from=(f"run {run}",) if run else (), run=run)
        if run:
            found |= {one.id: one for one in _run_nodes(run, root)}
    return tuple(found.values())


def _run_nodes(run: str, root: Path) -> tuple[Ancestor, ...]:
    base, data = "", ""
    try:
        base = as_text(as_table(read_json(root / run / "config.json")).get("base_model"))
        card = as_table(as_table(read_json(root / run / "data.json")).get("train"))
        data = f"{as_text(card.get('name'))} {as_text(card.get('split'))} {as_text(card.get('sha256'))[:8]}".strip()
    except CrucibleError:
        pass
    made_from = tuple(f"{kind} {name}" for kind, name in (("base", base), ("data", data)) if name)
    nodes = [Ancestor(id=f"run {run}", title=run, kind="run", made_from=made_from, run=run)]
    if base:
        nodes.append(Ancestor(id=f"base {base}", title=base, kind="base model", made_from=()))
    if data:
        nodes.append(Ancestor(id=f"data {data}", title=data, kind="data set", made_from=()))
    return tuple(nodes)


_SPECIAL = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_{}[]<>#|!~"})


def _md(text: str) -> str:
    """Text of others inside Markdown: every sign that could start markup is escaped, line ends become blanks."""
    return " ".join(words.visible(text).split()).translate(_SPECIAL)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, tuple("---" for _ in head), *rows)]
    return "\n".join(lines) + "\n"


def _front(version: ModelVersion) -> str:
    base = version.checkpoint.base_model
    quoted = '"' + words.visible(base).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
    return f"---\nbase_model: {quoted}\nlibrary_name: peft\ntags: [lora, crucible-framework]\n---\n"


def _estimates(rows: list[tuple[str, Estimate]]) -> str:
    head = ("evaluation", "measure", "value", "interval", "n", "how")
    cells = [
        (_md(label), _md(e.name), words.number(e.value), f"{words.level(e.level)}: {words.interval(e.low, e.high, share=False)}", f"{e.n:,}", _md(e.method))
        for label, e in rows
    ]
    return _table(head, cells)


def model_card(models: Models, reference: str, runs: Path) -> str:
    """The card of a registered version as Markdown: what it is, how it was made, what it scores with which intervals, how to load it.

    Args:
        models: the registry.
        reference: "name:2", "name@production" or "name".
        runs: the folder of runs; the run that made the version is read for data and evaluations where it is there.

    Raises:
        NotFoundError: there is no such version. CorruptError: its files changed.
    """
    version = models.get(reference)
    checkpoint, lora = version.checkpoint, version.checkpoint.lora
    name = f"{version.name}:{version.version}"
    facts = [
        ("base model", _md(checkpoint.base_model)),
        ("adapter", f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, on {_md(', '.join(lora.target_modules))}"),
        ("trained for", words.counted(checkpoint.step, "step")),
        ("stage", version.stage),
        ("made", words.when(version.created_at)),
        ("size", words.size(checkpoint.size_bytes)),
        ("sha256 of the manifest", f"`{checkpoint.sha256}`"),
    ]
    parts = [_front(version), f"# {_md(name)}\n", f"{_md(version.description)}\n" if version.description else "", _table(("", ""), facts)]
    run = next((run for parent in version.parents if (run := run_of(parent, runs))), "")
    if run:
        parts += _of_run(runs / run)
    if version.metrics:
        parts += ["## Metrics when it was registered\n", _table(("metric", "value"), [(_md(k), words.number(v)) for k, v in sorted(version.metrics.items())])]
    if version.tags:
        parts += ["## Tags\n", _table(("tag", "value"), [(_md(k), _md(v)) for k, v in sorted(version.tags.items())])]
    parts += ["## Made from\n", "".join(f"- {_md(_short(parent))}\n" for parent in version.parents) or "- nothing that is on file\n"]
    parts += ["## Ask it\n", f'```sh\ncrucible sample {name} "…"\n```\n']
    return "\n".join(part for part in parts if part)


def _of_run(folder: Path) -> list[str]:
    found = [f"## Training run {_md(folder.name)}\n"]
    try:
        cards: Mapping[str, object] = as_table(read_json(folder / "data.json"))
    except CrucibleError:
        cards = {}
    keys = ("name", "split", "task", "rows", "licence", "source", "sha256")
    rows = [(split, *(_md(as_text(as_table(card).get(key))) for key in keys)) for split, card in cards.items() if split in ("train", "dev") and as_table(card)]
    if rows:
        found.append(_table(("part", *keys), rows))
    estimates = [(label, one) for label, _, one in estimates_of(folder)]
    if estimates:
        found += ["## Evaluation\n", _estimates(estimates)]
    return found

"""A model version's card as Markdown, and the estimates that its run has on file.

Everything comes from the registry and from the run that it names; what is not on file is left out, nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from ..errors import CrucibleError
from ..files import read_json
from ..records import Estimate, Json, ModelVersion
from ..store import Models
from ..store.lineage import run_of
from . import words
from .sources import as_list, as_number, as_table, as_text

__all__ = ["estimates_of", "model_card"]


def estimates_of(folder: Path) -> tuple[tuple[str, str, Estimate], ...]:
    """(evaluation's label, data set's sha256, estimate) of every finished evaluation of a run, the adapter's first; damaged ones are left out."""
    found: list[tuple[str, str, Estimate]] = []
    parent = folder / "eval"
    names = sorted((p.name for p in parent.iterdir() if p.is_dir()), key=lambda n: (n != "adapter", n)) if parent.is_dir() else []
    for name in names:
        try:
            body = as_table(read_json(parent / name / "evaluation.json"))
        except CrucibleError:
            continue
        data = as_text(as_table(body.get("card")).get("sha256"))
        found += [(as_text(body.get("label")) or name, data, one) for one in map(_estimate, as_list(body.get("estimates"))) if one is not None]
    return tuple(found)


def _estimate(value: Json) -> Estimate | None:
    table = as_table(value)
    number, low, high = (as_number(table.get(key)) for key in ("value", "low", "high"))
    if number is None:
        return None
    return Estimate(
        name=as_text(table.get("name")),
        value=number,
        low=math.nan if low is None else low,
        high=math.nan if high is None else high,
        n=int(as_number(table.get("n")) or 0),
        level=as_number(table.get("level")) or 0.95,
        method=as_text(table.get("method")),
    )


def _short(text: str) -> str:
    """A file's URI by the end of its path: no folder of this machine goes into a card."""
    return "/".join(Path(unquote(text.removeprefix("file:"))).parts[-3:]) if text.startswith("file:") else text


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

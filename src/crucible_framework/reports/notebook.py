"""A document as a Jupyter notebook (nbformat 4.5): the report in Markdown, figures inside it, and a cell that loads the files behind it.

Text is escaped as in the Markdown report. Figures are SVG attachments with their own style. Nothing is run to make it, and it needs no package
but the standard library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import orjson

from ..records import Json
from .charts import dot_plot, line_chart
from .diagrams import rank_diagram, scatter_plot
from .parts import Block, Document, DotPlot, LineChart, Ranks, Scatter
from .text import inline, markdown_of

__all__ = ["render_notebook"]

_LOAD = '''"""The files behind this report, as they are on disk: run this notebook in the folder that it lies in."""
import json
from pathlib import Path


def read(path):
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


files = {path.as_posix(): read(path) for pattern in PATTERNS for path in sorted(Path().glob(pattern))}
for name in files:
    print(name)'''
_PATTERNS = {
    "study": ["plan.json", "findings.json", "calibration.json", "timings.jsonl", "cells/*.json", "bases/*.json"],
    "run": ["run.json", "config.json", "data.json", "findings.json", "metrics.jsonl", "timings.jsonl", "eval/*/evaluation.json"],
}


def render_notebook(document: Document) -> str:
    """The whole file; the same document gives the same bytes."""
    top = [f"# {inline(document.title)}", f"{inline(document.status)} · {inline(document.subtitle)}", inline(document.summary)]
    top += [f"**{inline(document.verdict)}**"] if document.verdict else []
    top += ["\n".join(f"- {inline(notice)}" for notice in document.notices)] if document.notices else []
    cells = [_text("\n\n".join(top)), _code(_LOAD.replace("PATTERNS", repr(_PATTERNS[document.of])))]
    for section in document.sections:
        cells.append(_text(f"## {inline(section.title)}"))
        for index, block in enumerate(section.blocks):
            cells += _cells(block, f"{section.key}{index}")
    for index, cell in enumerate(cells):
        cell["id"] = hashlib.sha256(f"{index}{cell['source']}".encode()).hexdigest()[:12]
    kernel: Json = {"display_name": "Python 3", "language": "python", "name": "python3"}
    body: dict[str, Json] = {"cells": [*cells], "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


def _text(source: str, attachments: dict[str, Json] | None = None) -> dict[str, Json]:
    return {"cell_type": "markdown", "metadata": {}, "source": source, **({"attachments": attachments} if attachments else {})}


def _code(source: str) -> dict[str, Json]:
    return {"cell_type": "code", "metadata": {}, "source": source, "execution_count": None, "outputs": []}


def _cells(block: Block, key: str) -> Iterator[dict[str, Json]]:
    drawn = _drawing(block, key)
    if drawn and isinstance(block, DotPlot | LineChart | Scatter | Ranks):
        name = f"{key}.svg"
        words = f"**{inline(block.title)}** {inline(block.note)} (from {inline(block.source)})"
        yield _text(f"{words}\n\n![{inline(block.title)}](attachment:{name})", {name: {"image/svg+xml": drawn}})
        if isinstance(block, DotPlot):
            return
    text = "\n\n".join(piece for piece in markdown_of(block) if piece)
    if text:
        yield _text(text)


def _drawing(block: Block, key: str) -> str:
    """A figure as an SVG file of its own: the page's style sheet in light colours inside it, and its legend as the Markdown beside it says."""
    match block:
        case DotPlot():
            found = dot_plot(block, key)
        case LineChart():
            found = line_chart(block, key)
        case Scatter():
            found = scatter_plot(block, key)
        case Ranks():
            found = rank_diagram(block, key)
        case _:
            return ""
    picture, end, _ = str(found).partition("</svg>")
    if not end:
        return ""
    sheet = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    rules = "\n".join(line for line in sheet.splitlines() if line.startswith(".chart"))
    colours = sheet[sheet.index(":root") : sheet.index("color-scheme")] + "}"
    head, close, rest = picture.partition(">")
    size = 'xmlns="http://www.w3.org/2000/svg" style="background:#fbfaf8"'
    return f"{head.replace('<svg', f'<svg {size}', 1)}{close}<style>{colours}\n{rules}</style>{rest}{end}"

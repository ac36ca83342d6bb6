"""A document for programs: JSON with every block as it is, and CSV with every cell and every drawn number on a row of its own.

CSV rows are `section, table, row, column, value, source`. A text that a spreadsheet would run as a formula gets an apostrophe before it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import cast

import orjson

from ..config import to_dict
from ..records import Json
from .parts import Block, Document, DotPlot, LineChart, Listing, Note, Ranks, Samples, Scatter, Table

__all__ = ["render_csv", "render_json"]

_COLUMNS = ("section", "table", "row", "column", "value", "source")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def render_json(document: Document) -> str:
    """The whole document; each block says what it is under "kind". Numbers that are not finite are null."""
    body = cast("dict[str, Json]", to_dict(document))
    sections: list[Json] = [
        {
            "key": section.key,
            "title": section.title,
            "blocks": [{"kind": type(block).__name__, **cast("dict[str, Json]", to_dict(block))} for block in section.blocks],
        }
        for section in document.sections
    ]
    return orjson.dumps({**body, "sections": sections}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


def render_csv(document: Document) -> str:
    """Every table and every figure's numbers, one value a row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for section in document.sections:
        for block in section.blocks:
            writer.writerows([section.key, *map(_safe, row)] for row in _rows(block))
    return out.getvalue()


def _safe(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # the writer quotes no lone carriage return
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(_FORMULA) else text
    return text


def _rows(block: Block) -> Iterator[tuple[str, str, str, str, str]]:
    """(table, row, column, value, source)."""
    match block:
        case Note():
            yield "", "", "note", block.text, block.source
        case Listing():
            yield block.title, "", "text", block.text, block.source
        case Samples():
            for item in block.items:
                for column in ("prompt", "target", "base", "adapter", "base_score", "adapter_score"):
                    yield block.rule, item.id, column, str(getattr(item, column)), block.source
        case Table():
            for row in block.rows:
                for column, cell in zip(block.columns[1:], row[1:], strict=True):
                    yield block.title, row[0], column, cell, block.source
        case _:
            for name, column, value in _numbers(block):
                yield block.title, name, column, "" if value is None or not math.isfinite(value) else repr(float(value)), block.source


def _numbers(figure: DotPlot | Scatter | Ranks | LineChart) -> Iterator[tuple[str, str, float | None]]:
    """(row, column, number) of everything that a figure draws."""
    match figure:
        case DotPlot():
            yield from ((dot.label, name, value) for dot in figure.rows for name, value in (("value", dot.value), ("low", dot.low), ("high", dot.high)))
        case Scatter():
            for point in figure.points:
                yield from ((point.label, name, value) for name, value in ((figure.x_label, point.x), (figure.y_label, point.y)))
                yield from ((point.label, name, value) for name, value in (("low", point.low), ("high", point.high)))
        case Ranks():
            yield from ((name, "mean rank", value) for name, value in figure.places)
        case LineChart():
            yield from ((f"{x:g}", series.name, y) for series in figure.series for x, y in zip(series.x, series.y, strict=True))

"""The nouns of a report, free of any format: a document of sections of blocks.

Values in tables are words already; charts keep their numbers. Nothing here is escaped: a format escapes everything that it prints.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from ..records import record

__all__ = [
    "Block",
    "Document",
    "DotPlot",
    "Fact",
    "Interval",
    "LineChart",
    "Listing",
    "Note",
    "Point",
    "Ranks",
    "Sample",
    "Samples",
    "Scatter",
    "Section",
    "Series",
    "Table",
    "Tone",
]

Tone: TypeAlias = Literal["base", "adapter", "other"]


@record
class Series:
    """One line or set of points; `role` decides its look (`hue…` are lines of equal weight). `y` None is a gap."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    role: Literal["raw", "smooth", "held_out", "points", "hue0", "hue1", "hue2", "hue3", "hue4", "hue5"]


@record
class Table:
    """Rows of words; the first cell of each is its heading. `numeric` are the columns to align right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    source: str
    numeric: tuple[int, ...] = ()
    note: str = ""


@record
class LineChart:
    """Curves over steps. `log` asks for a logarithmic vertical axis; `values` are some of its points in words, for readers without sight."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    source: str
    values: Table
    note: str = ""
    log: bool = False


@record
class Interval:
    """A number with its interval; `text` is the number in words."""

    label: str
    value: float
    low: float
    high: float
    text: str
    tone: Tone = "other"


@record
class DotPlot:
    """Numbers with intervals under each other. `zero` draws the line of no difference; `share` numbers the axis in percent."""

    title: str
    rows: tuple[Interval, ...]
    unit: str
    source: str
    note: str = ""
    zero: bool = False
    share: bool = False


@record
class Point:
    """A number with its interval (`low` to `high`) at a cost `x`; `best` where nothing is both cheaper and better."""

    label: str
    x: float
    y: float
    low: float
    high: float
    best: bool = False


@record
class Scatter:
    """What things cost against how good they are; `values` are the same numbers in words."""

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    source: str
    values: Table
    note: str = ""
    share: bool = False


@record
class Ranks:
    """Mean ranks on a line, 1 the best, with bars over those that are not shown to differ (a critical-difference diagram).

    Attributes:
        places: (name, mean rank).
        sets: names under one bar each.
        distance: the critical difference, drawn as a measure.
    """

    title: str
    places: tuple[tuple[str, float], ...]
    sets: tuple[tuple[str, ...], ...]
    distance: float
    source: str
    values: Table
    note: str = ""


@record
class Sample:
    """One item as base and adapter answered it. `base_right`, `adapter_right` None: not scored as right or wrong."""

    id: str
    document: str
    group: str
    prompt: str
    target: str
    base: str
    adapter: str
    base_score: str
    adapter_score: str
    base_right: bool | None
    adapter_right: bool | None


@record
class Samples:
    """Completions side by side, and the rule by which they were chosen."""

    rule: str
    items: tuple[Sample, ...]
    source: str


@record
class Listing:
    """Text to copy as it is: commands, code."""

    title: str
    text: str
    language: str
    source: str


@record
class Note:
    """A sentence between other blocks."""

    text: str
    source: str = ""


Block: TypeAlias = LineChart | DotPlot | Scatter | Ranks | Table | Samples | Listing | Note


@record
class Section:
    """A heading and what stands under it; `key` is its anchor, made of a-z."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@record
class Fact:
    """One of the few numbers at the top."""

    label: str
    value: str
    detail: str = ""


@record
class Document:
    """A whole report. `summary` says what was trained and found, `verdict` what that shows; `notices` what is wrong or missing; `of` what of."""

    title: str
    subtitle: str
    status: str
    finished: bool
    summary: str
    verdict: str
    facts: tuple[Fact, ...]
    notices: tuple[str, ...]
    sections: tuple[Section, ...]
    of: Literal["run", "study"] = "run"

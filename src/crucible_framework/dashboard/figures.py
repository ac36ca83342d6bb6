"""A plot as a figure of a page, as an SVG file of its own and as a CSV table. It knows every kind of plot and no page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from ..reports.charts import dot_plot, line_chart
from ..reports.diagrams import rank_diagram, scatter_plot
from ..reports.markup import Markup, element, join, raw
from ..reports.panels import HeatMap, XYPlot, heat_map, xy_plot
from ..reports.parts import Block, DotPlot, LineChart, Ranks, Scatter, Section
from ..reports.web import render_block
from .frame import link, url

__all__ = ["Plot", "csv_text", "drawing", "figure", "plot_csv", "plot_svg", "plots_in", "section"]

Plot: TypeAlias = LineChart | DotPlot | Scatter | Ranks | HeatMap | XYPlot
_IN_REPORTS = (LineChart, DotPlot, Scatter, Ranks)
_COLOURS = ("#b0451b", "#2f6690", "#2c6a45", "#8a5fa8", "#a67c12", "#b03060", "#1f7a7a", "#6b5b4b")
_HEAT = ("#f6efe6", "#f0dcc6", "#e9c5a3", "#e0ab80", "#d48e5f", "#c46f42", "#a9532a", "#853a19", "#5c240c")
_STYLE = (
    "svg{background:#fbfaf8}text{font:12px system-ui,sans-serif;fill:#625d55}.name{font-size:13px;fill:#1f1d1a}"
    ".value{font-size:13px;font-weight:600;fill:#1f1d1a}"
    ".grid{stroke:#e8e5de}.axis{stroke:#625d55}.zero{stroke:#1f1d1a;stroke-dasharray:4 4}.whisker{stroke:#625d55;stroke-width:2}.dot{fill:#625d55}"
    ".whisker.adapter{stroke:#b0451b}.dot.adapter,.value.adapter{fill:#b0451b}.whisker.base{stroke:#56657a}.dot.base,.value.base{fill:#56657a}"
    ".curve{fill:none;stroke:#56657a;stroke-width:1.25;stroke-linejoin:round}.curve.smooth{stroke:#b0451b;stroke-width:2.25}.curve.dashed{stroke-dasharray:6 4}"
    ".curve.held_out{stroke:#2c6a45;stroke-width:1.5;stroke-dasharray:5 4}.mark{fill:#1f1d1a}.mark.held_out{fill:#2c6a45}"
    ".front{fill:none;stroke:#b0451b;stroke-dasharray:3 4}.dot.best{fill:#b0451b}.bar{stroke:#1f1d1a;stroke-width:4}.branch{stroke:#a29c92}"
    ".cell.none{fill:none;stroke:#dcd8cf}.cell.beyond{fill:#b03060}.cell.below{fill:#2f6690}.sign{fill:#fff;font-size:9px}.in.pale{fill:#1f1d1a}.in.dark{fill:#fff}"
    + "".join(f".curve.c{i},.curve.hue{i},.whisker.c{i}{{stroke:{c};stroke-width:2}}.mark.c{i}{{fill:{c}}}" for i, c in enumerate(_COLOURS))
    + "".join(f".cell.h{i}{{fill:{c}}}" for i, c in enumerate(_HEAT))
)
_LEGEND_ROW = 20.0
_DRAWN: Mapping[str, str] = {"raw": "#56657a", "smooth": "#b0451b", "held_out": "#2c6a45", "points": "#1f1d1a"} | {
    f"hue{i}": colour for i, colour in enumerate(_COLOURS)
}


def drawing(plot: Plot, key: str) -> Markup:
    """The plot as SVG with its legend; "" where there is nothing to draw."""
    match plot:
        case LineChart():
            return line_chart(plot, key)
        case DotPlot():
            return dot_plot(plot, key)
        case Scatter():
            return scatter_plot(plot, key)
        case Ranks():
            return rank_diagram(plot, key)
        case HeatMap():
            return heat_map(plot, key)
        case XYPlot():
            return xy_plot(plot, key)


def _names(plot: Plot) -> list[tuple[str, str]]:
    """(name, colour) of what a legend names."""
    if isinstance(plot, LineChart):
        return [(one.name, _DRAWN.get(one.role, "#56657a")) for one in plot.series]
    return [(one.name, _COLOURS[one.hue % 8]) for one in plot.curves] if isinstance(plot, XYPlot) else []


def plot_svg(plot: Plot, key: str) -> str:
    """The plot as a file of its own: title, light colours and legend inside."""
    drawn, closing, _ = drawing(plot, key).partition("</svg>")
    head, _, rest = drawn.partition(">")
    if not closing:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="60"><title>{element("g", None, plot.title)[3:-4]}</title></svg>\n'
    before, _, after = head.partition('viewBox="')
    box, _, attributes = after.partition('"')
    x, y, width, height = map(float, box.split())
    names = _names(plot)
    legend = [
        join(
            element("line", {"x1": 8, "x2": 30, "y1": height + 34 + _LEGEND_ROW * i, "y2": height + 34 + _LEGEND_ROW * i, "stroke": colour, "stroke-width": 2}),
            element("text", {"x": 38, "y": height + 38 + _LEGEND_ROW * i}, name),
        )
        for i, (name, colour) in enumerate(names)
    ]
    title = element("text", {"x": x + 2, "y": -10, "class": "value"}, plot.title)
    whole = height + 28 + (16 + _LEGEND_ROW * len(names) if names else 0)
    sized = (
        f'{before}viewBox="{x:g} {y - 28:g} {width:g} {whole:g}"{attributes} xmlns="http://www.w3.org/2000/svg" width="960" height="{960 * whole / width:.0f}"'
    )
    return f"{sized}>{element('style', None, raw(_STYLE))}{rest}{title}{join(*legend)}</svg>\n"


def csv_text(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A CSV table; a cell that a spreadsheet would run as a formula is marked as text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow([_safe(cell) if isinstance(cell, str) else cell for cell in row])
    return out.getvalue()


def _safe(cell: str) -> str:
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")  # the writer quotes no lone carriage return
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t") else cell


def plot_csv(plot: Plot) -> str:
    """The plot's numbers, one mark a row."""
    head: tuple[str, ...]
    rows: Iterable[Sequence[object]]
    match plot:
        case LineChart():
            head = ("series", plot.x_label, plot.y_label or "value")
            rows = ((one.name, x, y) for one in plot.series for x, y in zip(one.x, one.y, strict=True))
        case DotPlot():
            head, rows = ("label", "value", "low", "high"), ((one.label, one.value, one.low, one.high) for one in plot.rows)
        case Scatter():
            head = ("label", plot.x_label, plot.y_label, "low", "high", "undominated")
            rows = ((one.label, one.x, one.y, one.low, one.high, "yes" if one.best else "no") for one in plot.points)
        case Ranks():
            head = ("name", "mean rank", "not shown to differ from")
            rows = ((name, rank, "; ".join(sorted({n for names in plot.sets if name in names for n in names} - {name}))) for name, rank in plot.places)
        case HeatMap():
            head = ("row", plot.column_label, plot.unit)
            pairs = zip(plot.rows, plot.values, strict=True)
            rows = ((name, column, "" if value is None else value) for name, values in pairs for column, value in zip(plot.columns, values, strict=True))
        case _:
            head = ("series", plot.x_label, plot.y_label, "low", "high")
            rows = (
                (one.name, x, y, *((one.low[i], one.high[i]) if one.low else ("", ""))) for one in plot.curves
                for i, (x, y) in enumerate(zip(one.x, one.y, strict=True))
            )  # fmt: skip
    return csv_text(head, rows)


def saves(base: Sequence[str], key: str, query: Mapping[str, str | Sequence[str]] | None = None) -> Markup:
    """The links that download a plot; `base` is its page's path."""
    kinds = (("SVG", "svg"), ("CSV", "csv"))
    links = (link(label, url(*base, "plots", f"{key}.{kind}", query=query), download=f"{'-'.join(base)}-{key}.{kind}") for label, kind in kinds)
    return element("span", {"class": "save"}, *links)


def figure(plot: Plot, key: str, base: Sequence[str], *, wide: bool = False, query: Mapping[str, str | Sequence[str]] | None = None) -> Markup:
    """The plot with its title, note and download links."""
    drawn = drawing(plot, key)
    if not drawn:
        return join()
    caption = element("figcaption", None, element("b", None, plot.title), saves(base, key, query))
    note = element("p", {"class": "soft small"}, plot.note) if plot.note else join()
    return element("figure", {"class": "plot wide" if wide else "plot"}, caption, element("div", {"class": "canvas"}, drawn), note)


def plots_in(sections: Iterable[Section]) -> dict[str, Plot]:
    """The plots of a document by the keys that `section` gives them."""
    return {f"{one.key}{index}": block for one in sections for index, block in enumerate(one.blocks) if isinstance(block, _IN_REPORTS) and drawing(block, "x")}


def section(part: Section, base: Sequence[str]) -> Markup:
    """A section of a report whose plots can be downloaded."""

    def shown(block: Block, key: str) -> Markup:
        return figure(block, key, base) if isinstance(block, _IN_REPORTS) else render_block(block, key)

    blocks = (shown(block, f"{part.key}{index}") for index, block in enumerate(part.blocks))
    heading = element("h2", {"id": f"{part.key}-heading"}, part.title)
    return element("section", {"id": part.key, "aria-labelledby": f"{part.key}-heading"}, heading, *blocks)

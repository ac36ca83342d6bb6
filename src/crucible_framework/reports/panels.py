"""Heat maps and free-standing x-y plots as inline SVG: what layers, votes and latencies look like. Knows no runs and no events.

Colours come from the page's style sheet (`h0` … `h8` a sequence from little to much, `c0` … `c7` a set told apart by the colour-blind);
what is missing or outside limits has a shape of its own, so that nothing is told by colour alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from ..records import record
from . import words
from .charts import Scale, log_ticks, tick_words, ticks
from .markup import Markup, element, join

__all__ = ["LEVELS", "Curve", "HeatMap", "XYPlot", "heat_map", "level_of", "xy_plot"]

WIDTH = 640.0
LEVELS = 9
_MOST_LABELS = 8


@record
class HeatMap:
    """A number for each row and column; None is missing. `log` colours by the logarithm; `limits` are the least and greatest healthy value.

    `numbers` writes them into the cells, which only few columns leave room for; `span` fixes the values of the palest and darkest colour.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    unit: str
    column_label: str
    source: str
    note: str = ""
    log: bool = False
    numbers: bool = False
    span: tuple[float, float] | None = None
    limits: tuple[float, float] | None = None


@record
class Curve:
    """One line, staircase or set of points; `low` and `high`, where given, are the ends of each point's interval."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    look: Literal["line", "steps", "points"] = "line"
    hue: int = 0
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@record
class XYPlot:
    """Curves over any x. `diagonal` draws y = x; `x_span` and `y_span` fix the axes; `percent_x`, `percent_y` number an axis in percent."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    source: str
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    diagonal: bool = False
    percent_x: bool = False
    percent_y: bool = False
    x_span: tuple[float, float] | None = None
    y_span: tuple[float, float] | None = None


def level_of(value: float, low: float, high: float, *, log: bool = False) -> int:
    """The colour of a value, 0 … LEVELS − 1; all are pale where they are equal."""
    at, start, end = (math.log10(v) if log else v for v in (value, low, high))
    if not end > start:
        return 1
    return min(LEVELS - 1, max(0, int(LEVELS * (at - start) / (end - start))))


def _range(plot: HeatMap) -> tuple[float, float]:
    if plot.span is not None:
        return plot.span
    known = [v for row in plot.values for v in row if v is not None and math.isfinite(v) and (v > 0 or not plot.log)]
    return (min(known), max(known)) if known else (0.0, 1.0)


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> Markup:
    return element("text", {"x": x, "y": y, "text-anchor": anchor, "class": css}, text)


def _cell(plot: HeatMap, value: float | None, box: tuple[float, float, float, float], told: str, ends: tuple[float, float]) -> Markup:
    x, y, width, height = box
    place: dict[str, str | float | None] = {"x": x, "y": y, "width": width, "height": height}
    if value is None:
        return element("rect", {**place, "class": "cell none"}, element("title", None, f"{told}: nothing on file"))
    low, high = plot.limits or (-math.inf, math.inf)
    if not math.isfinite(value) or value > high:
        css, sign = "cell beyond", "▲"
    elif value < low or (plot.log and value <= 0):
        css, sign = "cell below", "▼"
    else:
        css, sign = f"cell h{level_of(value, *ends, log=plot.log)}", ""
    title = element("title", None, f"{told}: {words.number(value) if math.isfinite(value) else 'not finite'} {plot.unit}")
    drawn = element("rect", {**place, "class": css}, title)
    if plot.numbers and not sign:
        dark = "dark" if css[-1] in "5678" else "pale"
        return join(
            drawn, element("text", {"x": x + width / 2, "y": y + height / 2 + 4, "text-anchor": "middle", "class": f"in {dark}"}, words.number(value, 2))
        )
    return join(drawn, _text(x + width / 2, y + height / 2 + 4, sign, css="sign") if sign and width >= 7 else join())


def heat_map(plot: HeatMap, key: str) -> Markup:
    """The map as SVG with its key; "" where it has no cell."""
    if not plot.rows or not plot.columns:
        return join()
    longest = max(len(name) for name in plot.rows)
    left = min(240.0, 14 + 6.9 * longest)
    height = 34.0 if plot.numbers else min(22.0, max(9.0, 420.0 / len(plot.rows)))
    width = min(96.0, (WIDTH - left - 4) / len(plot.columns))
    ends, gap, top = _range(plot), 1.0 if width > 5 else 0.0, 8.0
    cells: list[Markup] = []
    for r, (name, row) in enumerate(zip(plot.rows, plot.values, strict=True)):
        y = top + r * height
        if height >= 11 or r % 2 == 0:
            cells.append(_text(left - 8, y + height / 2 + 4, words.clip(name, 34).partition(" … [")[0], "end", "row"))
        for c, value in enumerate(row):
            cells.append(_cell(plot, value, (left + c * width, y, width - gap, height - gap), f"{name}, {plot.column_label} {plot.columns[c]}", ends))
    bottom = top + height * len(plot.rows)
    labels = _columns(plot, left, width, bottom)
    scale = _scale(plot, ends, left, bottom + 50)
    told = f"{plot.unit} of {len(plot.rows)} rows over {plot.column_label}, from {words.number(ends[0])} to {words.number(ends[1])}."
    return element(
        "svg",
        {"viewBox": f"0 0 {WIDTH:g} {bottom + 82:g}", "role": "img", "aria-labelledby": f"{key}-title {key}-desc", "class": "chart heat"},
        element("title", {"id": f"{key}-title"}, plot.title),
        element("desc", {"id": f"{key}-desc"}, told),
        *cells,
        *labels,
        *scale,
    )


def _columns(plot: HeatMap, left: float, width: float, bottom: float) -> Iterator[Markup]:
    room = max(1, int(width // 6.6))
    every = 1 if plot.numbers else max(1, math.ceil(len(plot.columns) / _MOST_LABELS))
    for c in range(0, len(plot.columns), every):
        name = plot.columns[c] if len(plot.columns[c]) <= room * every else f"{plot.columns[c][: max(1, room * every - 1)]}…"
        yield _text(left + (c + 0.5) * width, bottom + 16, name)
    yield _text(left + width * len(plot.columns) / 2, bottom + 34, plot.column_label, css="unit")


def _scale(plot: HeatMap, ends: tuple[float, float], left: float, top: float) -> Iterator[Markup]:
    """The colours with the values at their ends, and the signs of what lies outside."""
    for level in range(LEVELS):
        yield element("rect", {"x": left + 18 * level, "y": top, "width": 18, "height": 9, "class": f"cell h{level}"})
    yield _text(left, top + 24, words.number(ends[0], 2), "start")
    yield _text(left + 18 * LEVELS, top + 24, words.number(ends[1], 2), "end")
    yield _text(left + 18 * LEVELS + 12, top + 9, f"{plot.unit}{', logarithmic' if plot.log else ''}", "start", "unit")
    if plot.limits is not None:
        outside = f"▼ below {words.number(plot.limits[0])}   ▲ above {words.number(plot.limits[1])} or not finite"
        yield _text(left + 18 * LEVELS + 12, top + 25, outside, "start", "unit")


# ------------------------------------------------------------------------------------------------------------------ xy
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 62.0, 18.0, 40.0, 52.0, 310.0


def _axis(values: Sequence[float], span: tuple[float, float] | None, *, log: bool) -> tuple[float, float]:
    if span is not None:
        return span
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _marks(low: float, high: float, *, log: bool, percent: bool) -> Iterator[tuple[float, str]]:
    places = log_ticks(low, high) if log else ticks(low, high, 6)
    shown = [100 * v for v in places] if percent else list(places)
    yield from zip(places, [f"{v:,.6g}" for v in shown] if log else tick_words(shown), strict=True)


def _usable(curve: Curve, plot: XYPlot) -> Curve:
    """The curve without what cannot stand on a logarithmic axis or is not finite."""
    kept = [
        i for i, (a, b) in enumerate(zip(curve.x, curve.y, strict=True))
        if math.isfinite(a + b) and (a > 0 or not plot.log_x) and (b > 0 or not plot.log_y)
    ]  # fmt: skip

    def pick(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[i] for i in kept) if values else ()

    return Curve(name=curve.name, x=pick(curve.x), y=pick(curve.y), look=curve.look, hue=curve.hue, low=pick(curve.low), high=pick(curve.high))


def _drawn(curve: Curve, x: Scale, y: Scale) -> Iterator[Markup]:
    colour = f"c{curve.hue % 8}"
    at = [(x(a), y(b)) for a, b in zip(curve.x, curve.y, strict=True)]
    if curve.look == "points":
        for (a, b), low, high in zip(at, curve.low or curve.y, curve.high or curve.y, strict=True):
            yield element("line", {"x1": a, "x2": a, "y1": y(low), "y2": y(high), "class": f"whisker {colour}"})
            yield element("circle", {"cx": a, "cy": b, "r": 4.5, "class": f"mark {colour}"})
        return
    if curve.look == "steps":
        at = [point for (a, b), (c, _) in itertools.pairwise(at) for point in ((a, b), (c, b))] + at[-1:]
    dashed = " dashed" if curve.hue % 2 else ""
    yield element("polyline", {"points": " ".join(f"{a:.1f},{b:.1f}" for a, b in at), "class": f"curve {colour}{dashed}"})


def xy_plot(plot: XYPlot, key: str) -> Markup:
    """The plot as SVG with its legend below; "" where there is nothing to draw."""
    curves = [one for curve in plot.curves if (one := _usable(curve, plot)).x]
    if not curves:
        return join()
    lows, highs = ([v for c in curves for v in (getattr(c, side) or c.y)] for side in ("low", "high"))
    x_low, x_high = _axis([v for c in curves for v in c.x], plot.x_span, log=plot.log_x)
    y_low, y_high = _axis([*lows, *highs], plot.y_span, log=plot.log_y)
    x = Scale(low=x_low, high=x_high, start=_LEFT, end=WIDTH - _RIGHT, log=plot.log_x)
    y = Scale(low=y_low, high=y_high, start=_HEIGHT - _BOTTOM, end=_TOP, log=plot.log_y)
    bottom = _HEIGHT - _BOTTOM
    parts: list[Markup] = []
    for value, text in _marks(y_low, y_high, log=plot.log_y, percent=plot.percent_y):
        parts.append(element("line", {"x1": _LEFT, "x2": WIDTH - _RIGHT, "y1": y(value), "y2": y(value), "class": "grid"}))
        parts.append(_text(_LEFT - 8, y(value) + 4, text, "end"))
    for value, text in _marks(x_low, x_high, log=plot.log_x, percent=plot.percent_x):
        parts.append(element("line", {"x1": x(value), "x2": x(value), "y1": bottom, "y2": bottom + 5, "class": "axis"}))
        parts.append(_text(x(value), bottom + 21, text))
    parts.append(element("line", {"x1": _LEFT, "x2": WIDTH - _RIGHT, "y1": bottom, "y2": bottom, "class": "axis"}))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, _HEIGHT - 7, plot.x_label + (" (logarithmic axis)" if plot.log_x else ""), css="unit"))
    parts.append(_text(0.0, 16.0, plot.y_label + (" (logarithmic axis)" if plot.log_y else ""), "start", "unit"))
    start, end = max(x_low, y_low), min(x_high, y_high)
    if plot.diagonal and start <= end:  # else the two axes have no value in common
        parts.append(element("line", {"x1": x(start), "y1": y(start), "x2": x(end), "y2": y(end), "class": "zero"}))
    told = "; ".join(f"{c.name}: {len(c.x)} points, {words.number(c.y[0])} at {words.number(c.x[0])} to {words.number(c.y[-1])} at {words.number(c.x[-1])}"
                     for c in curves)  # fmt: skip
    legend = (element("li", {"class": f"key c{c.hue % 8}{' dashed' if c.hue % 2 and c.look != 'points' else ''}"}, c.name) for c in curves)
    picture = element(
        "svg",
        {"viewBox": f"0 0 {WIDTH:g} {_HEIGHT:g}", "role": "img", "aria-labelledby": f"{key}-title {key}-desc", "class": "chart"},
        element("title", {"id": f"{key}-title"}, plot.title),
        element("desc", {"id": f"{key}-desc"}, f"{plot.y_label} over {plot.x_label}. {told}."),
        *parts,
        *(mark for curve in curves for mark in _drawn(curve, x, y)),
    )
    return join(picture, element("ul", {"class": "legend", "aria-hidden": "true"}, *legend))

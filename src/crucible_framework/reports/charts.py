"""Line charts and dot plots as inline SVG: axes with units, titles for screen readers, colours from the page's style sheet.

It knows where things lie on a drawing and nothing of runs. Every coordinate is inside the view box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from ..records import record
from . import words
from .markup import Markup, element, join
from .parts import DotPlot, LineChart, Series

__all__ = ["HEIGHT", "WIDTH", "Scale", "dot_plot", "line_chart", "log_ticks", "picture", "thin", "tick_words", "ticks"]

WIDTH, HEIGHT = 640.0, 310.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 16.0, 40.0, 52.0
_MOST = 800
"""Points drawn of one series at the most."""


@record
class Scale:
    """A straight map from values to places on the drawing; with `log`, of the values' logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, never outside the drawing."""
        at, low, high = (math.log10(v) if self.log else v for v in (value, self.low, self.high))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Round values (1, 2 or 5 times a power of ten apart) that lie in [low, high], about `wanted` of them."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return (low,)
    raw = span / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1.0, 2.0, 5.0) if factor * power >= raw * (1 - 1e-9)), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{index * step:.12g}") for index in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten in [low, high]; where there are fewer than three, 2 and 5 times them too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found: tuple[float, ...] = ()
    for factors in ((1.0,), (1.0, 2.0, 5.0)):
        found = tuple(
            value for e in range(first, last + 1) for f in factors if low * (1 - 1e-9) <= (value := float(f"{f * 10.0**e:.12g}")) <= high * (1 + 1e-9)
        )
        if len(found) >= 3:
            return found
    return found or ticks(low, high)


def thin(points: Sequence[tuple[float, float]], most: int = _MOST) -> list[tuple[float, float]]:
    """At most `most` of the points: of each stretch its lowest and its highest, so that no peak is lost; the first and last stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 2) / max(1, (most - 2) // 2))
    kept = [points[0]]
    for start in range(1, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _runs(series: Series) -> Iterator[list[tuple[float, float]]]:
    """The series cut at its gaps."""
    part: list[tuple[float, float]] = []
    for x, y in zip(series.x, series.y, strict=True):
        if y is not None and math.isfinite(y):
            part.append((x, y))
        elif part:
            yield part
            part = []
    if part:
        yield part


def _domain(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.25, high * 1.25)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if low >= 0 else -math.inf  # losses and norms are not negative: the axis does not go there either
    return max(floor, low - room), high + room


def label(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> Markup:
    """Text at a place."""
    return element("text", {"x": x, "y": y, "text-anchor": anchor, "class": css}, text)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """A straight line."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css})


def picture(key: str, title: str, description: str, height: float, *children: str) -> Markup:
    """The frame; the chart's title and description are read out in place of the drawing."""
    return element(
        "svg",
        {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-labelledby": f"{key}-title {key}-desc", "class": "chart"},
        element("title", {"id": f"{key}-title"}, title),
        element("desc", {"id": f"{key}-desc"}, description),
        *children,
    )


def _curves(series: Series, x: Scale, y: Scale) -> Iterator[Markup]:
    for part in _runs(series):
        at = [(x(a), y(b)) for a, b in thin(part)]
        if series.role != "points" and len(at) > 1:
            yield element("polyline", {"points": " ".join(f"{a:.1f},{b:.1f}" for a, b in at), "class": f"curve {series.role}"})
        if series.role in ("points", "held_out") or len(at) == 1:
            yield from (element("circle", {"cx": a, "cy": b, "r": 3.5, "class": f"mark {series.role}"}) for a, b in at)


def tick_words(values: Sequence[float]) -> list[str]:
    """Tick labels with as many decimals as the distance of the ticks asks for."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=0.0)
    if not 1e-4 <= step < 1e6:
        return [words.number(value, 2) for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value + 0.0:,.{decimals}f}".replace("-", "−") for value in values]


def _frame(chart: LineChart, x: Scale, y: Scale) -> Iterator[Markup]:
    bottom = HEIGHT - _BOTTOM
    levels = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
    for value, text in zip(levels, [words.number(v, 1) for v in levels] if y.log else tick_words(levels), strict=True):
        yield line(_LEFT, y(value), WIDTH - _RIGHT, y(value), "grid")
        yield label(_LEFT - 8, y(value) + 4, text, "end")
    whole = [value for value in ticks(x.low, x.high, 6) if value.is_integer()]
    for value in whole or [x.low]:
        yield line(x(value), bottom, x(value), bottom + 5, "axis")
        yield label(x(value), bottom + 22, f"{value:,.0f}")
    yield line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis")
    yield label((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 7, chart.x_label, css="unit")
    yield label(0.0, 16.0, chart.y_label + (" (logarithmic axis)" if y.log else ""), "start", "unit")


def line_chart(chart: LineChart, key: str) -> Markup:
    """The chart as SVG with its legend below; `key` (a-z, 0-9) makes its ids unique on the page. "" where there is nothing to draw."""
    points = [point for series in chart.series for part in _runs(series) for point in part]
    if not points:
        return join()
    log = chart.log and all(b > 0 for _, b in points)
    low, high = _domain([b for _, b in points], log=log)
    xs = [a for a, _ in points]
    x = Scale(low=min(xs), high=max(xs), start=_LEFT, end=WIDTH - _RIGHT)
    y = Scale(low=low, high=high, start=HEIGHT - _BOTTOM, end=_TOP, log=log)
    told = "; ".join(_told(series) for series in chart.series if any(_runs(series)))
    description = f"{chart.y_label}{', logarithmic axis,' if log else ''} over {chart.x_label}. {told}."
    curves = [curve for series in chart.series for curve in _curves(series, x, y)]
    legend = [element("li", {"class": f"key {series.role}"}, series.name) for series in chart.series if any(_runs(series))]
    drawn = picture(key, chart.title, description, HEIGHT, *_frame(chart, x, y), *curves)
    return join(drawn, element("ul", {"class": "legend", "aria-hidden": "true"}, *legend))


def _told(series: Series) -> str:
    points = [point for part in _runs(series) for point in part]
    first, last = points[0], points[-1]
    if len(points) == 1:
        return f"{series.name}: {words.number(first[1])} at {first[0]:,.0f}"
    return f"{series.name}: from {words.number(first[1])} at {first[0]:,.0f} to {words.number(last[1])} at {last[0]:,.0f}"


def dot_plot(plot: DotPlot, key: str) -> Markup:
    """Each number as a dot on its interval; "" where no number is finite."""
    rows = [row for row in plot.rows if math.isfinite(row.value)]
    if not rows:
        return join()
    ends = [end for row in rows for end in (row.low, row.value, row.high) if math.isfinite(end)]
    low, high = (0.0, 1.0) if plot.share and not plot.zero else around([*ends, *([0.0] if plot.zero else [])])
    left, right, pitch = 12.0, WIDTH - 12.0, 58.0
    x = Scale(low=low, high=high, start=left, end=right)
    bottom = 10 + pitch * len(rows)
    parts: list[Markup] = []
    places = ticks(low, high)
    for value, text in zip(places, tick_words([100 * value for value in places] if plot.share else places), strict=True):
        parts += [line(x(value), 6, x(value), bottom, "grid"), label(x(value), bottom + 22, text)]
    if plot.zero:
        parts.append(line(x(0.0), 32, x(0.0), bottom, "zero"))  # below the row's label
    for index, row in enumerate(rows):
        top = 10 + pitch * index
        at = top + 38
        parts.append(label(left, top + 16, words.clip(row.label, 64), "start", "name"))
        parts.append(label(right, top + 16, row.text, "end", f"value {row.tone}"))
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(line(x(row.low), at, x(row.high), at, f"whisker {row.tone}"))
            parts += [line(x(end), at - 6, x(end), at + 6, f"whisker {row.tone}") for end in (row.low, row.high)]
        parts.append(element("circle", {"cx": x(row.value), "cy": at, "r": 6, "class": f"dot {row.tone}"}))
    parts += [line(left, bottom, right, bottom, "axis"), label((left + right) / 2, bottom + 45, plot.unit, css="unit")]
    told = "; ".join(f"{row.label}: {row.text}, interval {words.interval(row.low, row.high, share=plot.share)}" for row in rows)
    return picture(key, plot.title, f"{plot.unit}. {told}.", bottom + 52, *parts)


def around(values: Sequence[float]) -> tuple[float, float]:
    """The values' range with some room."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room

"""Cost against quality, and mean ranks with what cannot be told apart, as inline SVG. Knows where things lie on a drawing and nothing of studies."""

from __future__ import annotations

import math
from collections.abc import Iterator

from . import words
from .charts import HEIGHT, WIDTH, Scale, around, label, line, log_ticks, picture, tick_words, ticks
from .markup import Markup, element, join
from .parts import Point, Ranks, Scatter

__all__ = ["rank_diagram", "scatter_plot", "undominated"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 16.0, 40.0, 52.0
_BROAD = 10.0
"""A logarithmic cost axis where the dearest costs that many times the cheapest."""


def scatter_plot(plot: Scatter, key: str) -> Markup:
    """Points with their intervals, the undominated ones joined; "" where no point is finite."""
    points = [p for p in plot.points if all(map(math.isfinite, (p.x, p.y, p.low, p.high)))]
    if not points:
        return join()
    costs = [p.x for p in points]
    log = min(costs) > 0 and max(costs) / min(costs) > _BROAD
    low, high = (min(costs) / 1.3, max(costs) * 1.3) if log else around(costs)
    x = Scale(low=low if log else max(0.0, low) if min(costs) >= 0 else low, high=high, start=_LEFT, end=WIDTH - _RIGHT, log=log)
    bottom, ends = around([end for p in points for end in (p.low, p.high)])
    y = Scale(low=max(0.0, bottom) if plot.share else bottom, high=min(1.0, ends) if plot.share else ends, start=HEIGHT - _BOTTOM, end=_TOP)
    front = sorted((p for p in points if p.best), key=lambda p: p.x)
    joined = element("polyline", {"points": " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in front), "class": "front"}) if len(front) > 1 else join()
    told = "; ".join(f"{p.label}: {words.number(p.y)} at {words.number(p.x)}" for p in points)
    description = f"{plot.y_label} against {plot.x_label}. {told}."
    return picture(key, plot.title, description, HEIGHT, *_axes(plot, x, y), joined, *(mark for p in points for mark in _marked(p, points, x, y)))


def _axes(plot: Scatter, x: Scale, y: Scale) -> Iterator[Markup]:
    floor = HEIGHT - _BOTTOM
    levels = ticks(y.low, y.high)
    for value, text in zip(levels, tick_words([100 * v for v in levels] if plot.share else levels), strict=True):
        yield line(_LEFT, y(value), WIDTH - _RIGHT, y(value), "grid")
        yield label(_LEFT - 8, y(value) + 4, text, "end")
    costs = log_ticks(x.low, x.high) if x.log else ticks(x.low, x.high)
    for value, text in zip(costs, [words.number(v, 2) for v in costs] if x.log else tick_words(costs), strict=True):
        yield line(x(value), floor, x(value), floor + 5, "axis")
        yield label(x(value), floor + 22, text)
    yield line(_LEFT, floor, WIDTH - _RIGHT, floor, "axis")
    yield label((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 7, plot.x_label + (" (logarithmic axis)" if x.log else ""), css="unit")
    yield label(0.0, 16.0, plot.y_label + (", %" if plot.share else ""), "start", "unit")


def _marked(point: Point, others: list[Point], x: Scale, y: Scale) -> Iterator[Markup]:
    at, up = x(point.x), y(point.y)
    yield line(at, y(point.low), at, y(point.high), "whisker")
    yield element("circle", {"cx": at, "cy": up, "r": 6, "class": "dot best" if point.best else "dot"})
    right = at < WIDTH * 0.6
    near = sum(1 for other in others if other is not point and abs(x(other.x) - at) < 120 and 0 <= up - y(other.y) < 14 and other.label < point.label)
    yield label(at + 11 if right else at - 11, up + 4 + 15 * near, words.clip(point.label, 34), "start" if right else "end", "name")


def rank_diagram(plot: Ranks, key: str) -> Markup:
    """Names hang on a line at their mean rank, the best on the left; bars join those that are not shown to differ. "" for fewer than two."""
    places = sorted(plot.places, key=lambda place: (place[1], place[0]))
    if len(places) < 2:
        return join()
    x = Scale(low=1.0, high=float(len(places)), start=24.0, end=WIDTH - 24.0)
    rank = dict(places)
    top = 76.0
    bars = [(min(rank[n] for n in names), max(rank[n] for n in names)) for names in plot.sets if len(names) > 1]
    under = top + 16 + 11 * len(bars)
    parts = [line(x(1.0), top, x(float(len(places))), top, "axis")]
    for place in range(1, len(places) + 1):
        parts += [line(x(place), top - 6, x(place), top, "axis"), label(x(place), top - 12, str(place))]
    if math.isfinite(plot.distance):
        reach = min(plot.distance, len(places) - 1.0)
        more = " (wider than the line)" if reach < plot.distance else ""
        parts += [line(x(1.0), 30, x(1.0 + reach), 30, "whisker"), *(line(x(end), 25, x(end), 35, "whisker") for end in (1.0, 1.0 + reach))]
        parts.append(label(x(1.0), 14, f"critical difference {words.number(plot.distance)}{more}", "start", "unit"))
    for row, (first, last) in enumerate(bars):
        parts.append(line(x(first) - 4, top + 12 + 11 * row, x(last) + 4, top + 12 + 11 * row, "bar"))
    # a name stands beside the foot of its line; the order of the rows keeps deeper lines on its other side
    middle = (x.start + x.end) / 2
    left = [place for place in places if x(place[1]) <= middle][::-1]
    rows = [*left, *(place for place in places if x(place[1]) > middle)]
    parts += [line(x(value), top, x(value), under + 18 + 24 * row, "branch") for row, (_, value) in enumerate(rows)]
    for row, (name, value) in enumerate(rows):
        down, inner = under + 18 + 24 * row, x(value) <= middle
        text = f"{words.clip(name, 60)} ({value:.2f})"
        parts.append(label(x(value) + 8 if inner else x(value) - 8, down + 2, text, "start" if inner else "end", "name"))
    told = "; ".join(f"{name}: {value:.2f}" for name, value in places)
    apart = "; ".join(" and ".join(names) for names in plot.sets if len(names) > 1)
    description = f"Mean ranks, 1 is the best. {told}. Not shown to differ: {apart or 'none'}."
    return picture(key, plot.title, description, under + 18 + 24 * len(places), *parts)


def undominated(costs: list[tuple[float, float]], *, less_is_better: bool) -> list[bool]:
    """For each (cost, quality) whether nothing else is at most as dear and at least as good, and one of both truly."""
    signed = [(cost, -quality if less_is_better else quality) for cost, quality in costs]
    better = [[a <= c and b >= d and (a, b) != (c, d) for a, b in signed] for c, d in signed]
    return [not any(row) for row in better]

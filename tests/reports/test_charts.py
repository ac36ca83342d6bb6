"""Drawings: every coordinate inside the view box, in order, with ticks that are round and peaks that stay."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.reports.charts import dot_plot, line_chart, log_ticks, thin, tick_words, ticks
from crucible_framework.reports.parts import DotPlot, Interval, LineChart, Series, Table

SPAN = st.floats(1e-9, 1e9)
VALUE = st.floats(-1e12, 1e12, allow_subnormal=False)
EMPTY = Table(title="Values", columns=("Step",), rows=(), source="metrics.jsonl")


def chart(series: tuple[Series, ...], *, log: bool = False) -> LineChart:
    return LineChart(title="Loss", x_label="optimizer step", y_label="loss, nats", series=series, source="metrics.jsonl", values=EMPTY, log=log)


def drawn(svg: str) -> ET.Element:
    return ET.fromstring(f"<div>{svg}</div>")


def coordinates(root: ET.Element) -> list[tuple[str, float]]:
    found = [(key[0] if key[0] in "xy" else key[1], float(v)) for node in root.iter() for key, v in node.attrib.items() if re.fullmatch(r"c?[xy][12]?", key)]
    for node in root.iter("polyline"):
        for pair in node.attrib["points"].split():
            x, y = pair.split(",")
            found += [("x", float(x)), ("y", float(y))]
    return found


def assert_inside(root: ET.Element) -> None:
    svg = root.find("svg")
    assert svg is not None
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    places = coordinates(root)
    assert places
    assert all(0 <= value <= (width if axis == "x" else height) for axis, value in places)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.none(), VALUE)), min_size=1, max_size=60, unique_by=lambda point: point[0]), st.booleans())
def test_lines_lie_inside_and_run_from_left_to_right(points: list[tuple[int, float | None]], log: bool) -> None:
    points.sort(key=lambda point: point[0])
    series = Series(name="loss", x=tuple(float(x) for x, _ in points), y=tuple(y for _, y in points), role="raw")
    svg = line_chart(chart((series,), log=log), "c")
    if all(y is None for _, y in points):
        assert svg == ""
        return
    root = drawn(svg)
    assert_inside(root)
    for line in root.iter("polyline"):
        xs = [float(pair.split(",")[0]) for pair in line.attrib["points"].split()]
        assert xs == sorted(xs)


def test_higher_values_are_drawn_higher_and_the_text_says_them() -> None:
    series = Series(name="training batch", x=(1.0, 2.0, 3.0, 4.0), y=(4.0, 2.0, 3.0, 1.0), role="raw")
    for log in (False, True):
        root = drawn(line_chart(chart((series,), log=log), "c7"))
        line = root.find("svg/polyline")
        assert line is not None
        ys = [float(pair.split(",")[1]) for pair in line.attrib["points"].split()]
        assert ys[0] < ys[2] < ys[1] < ys[3]
        assert root.findtext("svg/title") == "Loss"
        described = root.findtext("svg/desc") or ""
        assert "training batch: from 4 at 1 to 1 at 4" in described
        assert ("logarithmic" in described) is log
        assert {node.text for node in root.iter("text")} >= {"optimizer step", "loss, nats" + (" (logarithmic axis)" if log else "")}
        svg = root.find("svg")
        assert svg is not None
        assert svg.attrib["aria-labelledby"] == "c7-title c7-desc"


def test_gaps_break_the_line_and_lone_points_are_dots() -> None:
    series = Series(name="a", x=(1.0, 2.0, 3.0, 4.0, 5.0), y=(1.0, 2.0, None, math.nan, 3.0), role="raw")
    root = drawn(line_chart(chart((series,)), "c"))
    assert len(list(root.iter("polyline"))) == 1
    assert len(list(root.iter("circle"))) == 1


def test_a_zero_turns_the_logarithmic_axis_off() -> None:
    svg = line_chart(chart((Series(name="a", x=(1.0, 2.0), y=(0.0, 100.0), role="raw"),), log=True), "c")
    assert "logarithmic" not in svg


@given(VALUE, SPAN)
def test_ticks_are_inside_rising_and_few(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    if high > low and span > 1e-6 * abs(low):
        room = 1e-6 * span + 1e-9 * abs(low)
        assert 2 <= len(found) <= 11
        assert all(low - room <= value <= high + room for value in found)
        steps = [b - a for a, b in itertools.pairwise(found)]
        assert all(math.isclose(step, steps[0], rel_tol=1e-3) for step in steps)
        assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6), 2) in (1, 2, 5)
    else:
        assert found


@given(st.floats(1e-12, 1e12), st.floats(1.01, 1e9))
def test_log_ticks_are_inside_and_rising(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert found
    assert list(found) == sorted(set(found))
    assert all(low * 0.999999 <= value <= low * factor * 1.000001 for value in found)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.5, 1.0, 1.5), ["0.5", "1.0", "1.5"]),
        ((-20.0, 0.0, 20.0), ["−20", "0", "20"]),
        ((0.0, 1e-7), ["0", "1×10⁻⁷"]),
        ((0.02, 0.04), ["0.02", "0.04"]),
        ((3.0,), ["3"]),
    ],
)
def test_ticks_share_their_decimals(values: tuple[float, ...], words: list[str]) -> None:
    assert tick_words(values) == words


@given(st.lists(VALUE, min_size=1, max_size=3000), st.integers(10, 400))
def test_thinning_keeps_ends_extremes_and_order(values: list[float], most: int) -> None:
    points = [(float(index), value) for index, value in enumerate(values)]
    kept = thin(points, most)
    assert len(kept) <= max(most, 2)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert set(kept) <= set(points)
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)


ROWS = st.lists(st.tuples(VALUE, st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=5)


@given(ROWS, st.booleans())
def test_dots_lie_on_their_intervals_inside_the_drawing(rows: list[tuple[float, float, float]], zero: bool) -> None:
    intervals = tuple(Interval(label=f"r{i}", value=v, low=v - a, high=v + b, text="t") for i, (v, a, b) in enumerate(rows))
    root = drawn(dot_plot(DotPlot(title="T", rows=intervals, unit="u", source="s", zero=zero), "d"))
    assert_inside(root)
    dots = [float(node.attrib["cx"]) for node in root.iter("circle")]
    whiskers = [node for node in root.iter("line") if "whisker" in node.attrib["class"] and node.attrib["y1"] == node.attrib["y2"]]
    assert len(dots) == len(whiskers) == len(rows)
    for dot, whisker in zip(dots, whiskers, strict=True):
        assert float(whisker.attrib["x1"]) - 0.011 <= dot <= float(whisker.attrib["x2"]) + 0.011
    order = sorted(range(len(rows)), key=lambda index: rows[index][0])
    assert all(dots[a] <= dots[b] + 0.011 for a, b in itertools.pairwise(order))
    assert any("zero" in node.attrib["class"] for node in root.iter("line")) is zero


def test_shares_are_drawn_from_0_to_100_percent_and_missing_intervals_left_out() -> None:
    rows = (Interval(label="base", value=0.25, low=math.nan, high=math.nan, text="25 %"), Interval(label="gone", value=math.nan, low=0, high=1, text="–"))
    root = drawn(dot_plot(DotPlot(title="T", rows=rows, unit="accuracy, %", source="s", share=True), "d"))
    texts = [node.text for node in root.iter("text")]
    assert {"0", "20", "100", "25 %", "accuracy, %"} <= set(texts)
    assert "gone" not in texts
    assert not [node for node in root.iter("line") if "whisker" in node.attrib["class"]]
    (dot,) = root.iter("circle")
    left, right = (float(next(n.attrib["x"] for n in root.iter("text") if n.text == text)) for text in ("0", "100"))
    assert math.isclose(float(dot.attrib["cx"]), left + 0.25 * (right - left), abs_tol=0.02)
    assert dot_plot(DotPlot(title="T", rows=rows[1:], unit="u", source="s"), "d") == ""

"""What events say of votes, hedges and routes, held against numbers worked out by hand; and the drawings made of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.records import Json
from crucible_framework.reports.layers import issue_table, layer_map
from crucible_framework.reports.panels import LEVELS, Curve, HeatMap, XYPlot, heat_map, level_of, xy_plot
from crucible_framework.reports.requests import latency_plot, read_requests, share_plot, summarise_hedges, summarise_routes
from crucible_framework.reports.votes import agreement_map, member_plot, read_votes, reliability_plot, summarise_votes


def vote(answer: str | None, said: dict[str, str | None], *, asked: str = "a", agreement: float = 1.0, **fields: Json) -> dict[str, Any]:
    ballots = [{"member": name, "answer": one, "latency_s": 1.0, "confidence": 0.8} for name, one in said.items()]
    return {"name": "ensemble.vote", "ts": 1.0, "answer": answer, "agreement": agreement, "asked_id": asked, "ballots": ballots, **fields}


VOTES = [
    vote("yes", {"a": "yes", "b": "yes", "c": "no"}, asked="q1", agreement=2 / 3),
    vote("no", {"a": "no", "b": "no", "c": "no"}, asked="q2"),
    vote("yes", {"a": "yes", "b": None, "c": "yes"}, asked="q3", agreement=2 / 3),
    vote(None, {"a": "yes", "b": "no"}, asked="q4", agreement=0.5),
    {"name": "hedge.ended"},
]


def test_votes_are_counted_and_judged_by_targets() -> None:
    summary = summarise_votes(read_votes(VOTES, {"q1": "NO", "q2": "no", "q4": "yes"}))
    assert (len(summary.votes), summary.unanimous, summary.right, summary.judged) == (4, 2, 1, 2)
    assert summary.pairs["a", "b"] == summary.pairs["b", "a"] == (2, 3)
    assert summary.pairs["a", "c"] == (2, 3)
    a, b, c = summary.members
    assert (a.name, a.asked, a.answered, a.with_verdict, a.right, a.judged) == ("a", 4, 4, 3, 2, 3)
    assert (b.abstained, b.answered, b.right, b.judged) == (1, 3, 1, 3)
    assert (c.asked, c.right, c.judged, c.confidence) == (3, 2, 2, 0.8)


def test_the_agreement_map_is_symmetric_and_in_percent() -> None:
    drawn = agreement_map(summarise_votes(read_votes(VOTES, {})))
    assert drawn is not None
    assert drawn.values[0] == pytest.approx((100.0, 200 / 3, 200 / 3))
    assert all(drawn.values[i][j] == drawn.values[j][i] for i in range(3) for j in range(3))
    assert agreement_map(summarise_votes(read_votes([vote("x", {"only": "x"})], {}))) is None


def test_members_are_shown_by_truth_where_there_is_one() -> None:
    known, unknown = (member_plot(summarise_votes(read_votes(VOTES, targets))) for targets in ({"q1": "no"}, {}))
    assert known is not None
    assert unknown is not None
    assert [(row.label, row.value) for row in known.rows] == [("a", 0.0), ("b", 0.0), ("c", 1.0), ("the ensemble", 0.0)]
    assert [row.label for row in unknown.rows] == ["a", "b", "c"]
    assert all(row.low <= row.value <= row.high for row in (*known.rows, *unknown.rows))


def test_reliability_is_share_right_at_each_confidence() -> None:
    events = [vote("x", {"a": "x"}, asked=f"q{i}", agreement=0.75 if i < 8 else 0.25, probability=0.9) for i in range(12)]
    plot = reliability_plot(summarise_votes(read_votes(events, {f"q{i}": "x" if i % 2 or i > 8 else "y" for i in range(12)})))
    assert plot is not None
    probability, agreement = plot.curves
    assert probability.x == (0.9,)
    assert probability.y == pytest.approx((7 / 12,))
    assert agreement.x == (0.25, 0.75)
    assert agreement.y == pytest.approx((3 / 4, 4 / 8))
    assert reliability_plot(summarise_votes(read_votes(VOTES, {}))) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=11, max_size=60))
def test_reliability_bins_hold_every_vote_once(pairs: list[tuple[float, bool]]) -> None:
    events = [vote("x", {"a": "x"}, asked=f"q{i}", agreement=said) for i, (said, _) in enumerate(pairs)]
    plot = reliability_plot(summarise_votes(read_votes(events, {f"q{i}": "x" if right else "y" for i, (_, right) in enumerate(pairs)})))
    assert plot is not None
    curve = plot.curves[-1]
    assert len(curve.x) <= 10
    assert all(low - 1e-12 <= y <= high + 1e-12 for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))
    assert list(curve.x) == sorted(curve.x)


# ------------------------------------------------------------------------------------------------------------- requests
def hedge(*legs: tuple[float, float, str], latency_s: float, ok: bool = True) -> dict[str, Any]:
    told = [{"model": f"m{i}", "started_s": start, "latency_s": took, "outcome": outcome} for i, (start, took, outcome) in enumerate(legs)]
    return {"name": "hedge.ended", "ts": 1.0, "ok": ok, "latency_s": latency_s, "legs": told}


def test_what_hedging_saved_is_estimated_from_calls_that_were_given_up() -> None:
    fast = [hedge((0, 1.0, "won"), latency_s=1.0) for _ in range(8)]
    rescued = hedge((0, 3.0, "cancelled"), (2.0, 1.0, "won"), latency_s=3.0)
    seen = hedge((0, 10.0, "won"), (2.0, 8.0, "cancelled"), latency_s=10.0)
    summary = summarise_hedges(read_requests([*fast, rescued, seen]), [{"name": "hedge.fired", "reason": "slow"}] * 2)
    assert (summary.second, summary.rescued, summary.extra_calls, summary.failed) == (2, 1, 2, 0)
    assert summary.reasons == (("slow", 2),)
    assert summary.busy_s == pytest.approx(8 + 3 + 1 + 10 + 8)
    assert summary.wasted_s == pytest.approx(3 + 8)
    p90 = summary.percentiles[1]
    # 8 of 10 end at 1 s; the one given up at 3 s counts for those that go on: the rest of the mass lies at 10 s
    assert (p90.with_s, p90.without_s, p90.bounded) == (3.0, 10.0, False)
    assert p90.saved_s == 7.0
    assert [(m.model, m.calls, m.won, m.cancelled) for m in summary.models] == [("m0", 10, 9, 1), ("m1", 2, 1, 1)]


def test_a_tail_that_was_never_seen_is_a_bound() -> None:
    summary = summarise_hedges(read_requests([hedge((0, 1.0, "won"), latency_s=1.0), hedge((0, 2.0, "cancelled"), (1.0, 1.0, "won"), latency_s=2.0)]))
    assert [one.bounded for one in summary.percentiles] == [False, True, True, True]


def test_routes_are_tallied_per_member() -> None:
    events: list[dict[str, Json]] = [
        {"name": "route.ended", "chose": "a" if i % 3 else "b", "ok": True, "reward": float(i % 2), "latency_s": 1.0 + i, "cost": None} for i in range(60)
    ]
    summary = summarise_routes([*events, {"name": "route.chosen", "reason": "Thompson"}])
    assert [(arm.name, arm.chosen, arm.cost) for arm in summary.arms] == [("b", 20, None), ("a", 40, None)]
    assert summary.arms[0].reward is not None
    assert summary.arms[0].reward.value == 0.5
    plot = share_plot(summary)
    assert plot is not None
    for index in range(len(plot.curves[0].x)):
        assert sum(curve.y[index] for curve in plot.curves) == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------------------------- layers
def test_layers_are_rows_in_natural_order_and_peaks_are_kept() -> None:
    columns = {f"grad/norm/layers.{i}.q": [(float(s), 1.0 if s != 77 else 50.0) for s in range(1, 201)] for i in (10, 2, 1)}
    drawn = layer_map({**columns, "train/loss": [(1.0, 2.0)]})
    assert drawn is not None
    assert drawn.rows == ("layers.1.q", "layers.2.q", "layers.10.q")
    assert len(drawn.columns) <= 60
    assert all(max(value for value in row if value is not None) == 50.0 for row in drawn.values)
    assert layer_map({"train/loss": [(1.0, 2.0)]}) is None


def test_many_layers_are_joined_by_block() -> None:
    columns = {f"grad/norm/layers.{i}.{part}": [(1.0, 3.0 if part == "q" else 4.0)] for i in range(30) for part in ("q", "v")}
    drawn = layer_map(columns)
    assert drawn is not None
    assert drawn.rows[:2] == ("block 0", "block 1")
    assert {value for row in drawn.values for value in row} == {5.0}
    flow = layer_map({"grad/flow/000": [(1.0, 2.0)], "grad/flow/001": [(1.0, 1.0)]})
    assert flow is not None
    assert flow.rows == ("block 0", "block 1")


def test_issues_are_counted_by_step() -> None:
    found = issue_table({"grad/health/vanishing": [(1.0, 0.0), (2.0, 3.0), (3.0, 1.0)], "grad/health/exploding": [(1.0, 0.0)]})
    assert found is not None
    assert found.rows == (("vanishing", "2 of 3", "3", "2 … 3"), ("exploding", "0 of 1", "0", "–"))
    assert issue_table({}) is None


# ------------------------------------------------------------------------------------------------------------- drawings
NUMBERS = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(1e-9, 1e6))


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=6), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_a_heat_map_draws_every_cell_inside_its_frame(rows: list[list[float | None]], log: bool, numbers: bool) -> None:
    width = min(map(len, rows))
    values = tuple(tuple(row[:width]) for row in rows)
    plot = HeatMap(
        title="<t>", rows=tuple(f"r{i}&" for i in range(len(rows))), columns=tuple(map(str, range(width))), values=values, unit="u", column_label="step",
        source="s", log=log, numbers=numbers, limits=(1e-7, 1e3),
    )  # fmt: skip
    root = ET.fromstring(heat_map(plot, "k"))
    cells = [one for one in root.iter("rect") if one.find("title") is not None]
    assert len(cells) == width * len(rows)
    _, _, across, down = map(float, root.get("viewBox", "").split())
    for rect in root.iter("rect"):
        x, y, w, h = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= across + 0.1
        assert 0 <= y <= y + h <= down
    assert all(re.fullmatch(r"cell (h[0-8]|none|below|beyond)", rect.get("class", "")) for rect in root.iter("rect"))


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.booleans())
def test_levels_rise_with_the_value(a: float, b: float, c: float, log: bool) -> None:
    low, middle, high = sorted((a, b, c))
    first, second, third = (level_of(value, low, high, log=log) for value in (low, middle, high))
    assert 0 <= first <= second <= third < LEVELS


@given(st.lists(st.tuples(st.floats(-10, 1e4), st.floats(-10, 1e4)), max_size=30), st.booleans(), st.booleans(), st.sampled_from(["line", "steps", "points"]))
def test_curves_stay_inside_the_frame(points: list[tuple[float, float]], log_x: bool, log_y: bool, look: Any) -> None:
    points.sort()
    curve = Curve(name="c", x=tuple(x for x, _ in points), y=tuple(y for _, y in points), look=look)
    drawn = xy_plot(XYPlot(title="t", x_label="x", y_label="y", curves=(curve,), source="s", log_x=log_x, log_y=log_y, diagonal=True), "k")
    kept = [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
    assert bool(drawn) == bool(kept)
    if not drawn:
        return
    root = ET.fromstring(drawn.partition("<ul")[0])
    for line in root.iter("polyline"):
        for x, y in (map(float, pair.split(",")) for pair in line.get("points", "").split()):
            assert 0 <= x <= 640
            assert 0 <= y <= 310
    assert "nan" not in drawn
    if look == "points":
        assert len(list(root.iter("circle"))) == len(kept)


def test_nothing_gives_no_drawing() -> None:
    nothing: Sequence[Any] = ()
    assert latency_plot(summarise_hedges(())) is None
    assert share_plot(summarise_routes(nothing)) is None
    assert not heat_map(HeatMap(title="", rows=(), columns=(), values=(), unit="", column_label="", source=""), "k")

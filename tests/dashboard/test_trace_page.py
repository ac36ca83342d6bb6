"""A trace as HTML holds whatever text was recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crucible_framework.dashboard import render_trace
from crucible_framework.events import Event, collect, decision, span
from crucible_framework.traces import Trace, load_trace


def test_a_run_folder_loads(workspace: Path) -> None:
    trace = load_trace(workspace / "run-0")
    assert [one.title for one in trace.query(kind="decision")] == ["hedge: wait", "route: a"]
    route = next(one for one in trace.nodes if one.title == "route: a")
    assert [one.title for one in trace.why(route.id)] == ["hedge: wait"]


def test_a_circle_of_parents_ends() -> None:
    circle: list[Event] = [
        {"name": "s", "kind": "span", "span": "s", "parent": "t", "ts": 3},
        {"name": "t", "kind": "span", "span": "t", "parent": "s", "ts": 4},
    ]
    assert render_trace(Trace.of(circle), "t").count("<li") <= 8


def test_the_html_file_needs_nothing_and_runs_nothing(tags: Callable[[str], object]) -> None:
    with collect() as seen, span("<script>alert(1)</script>"):
        decision("<b>", chose="<i>", among=("<i>", "<u>"), because="<img src=x onerror=alert(1)>")
    page = render_trace(Trace.of(seen), "<title>")
    assert "<script" not in page
    assert "<img" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "There are no events yet" in render_trace(Trace.of([]), "empty")

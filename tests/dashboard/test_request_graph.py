"""The graph of one request: from the Traces page to the picture, with every box, link and reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crucible_framework import events, sinks
from crucible_framework.dashboard import Dashboard
from crucible_framework.dashboard.request_graph import graph_svg, requests_table
from crucible_framework.inference import Ensemble, Fixed, HedgedSampler, RoutedSampler
from crucible_framework.testing import VirtualClock
from crucible_framework.traces import Trace, load_trace

from .asked import PARAMS, Timed
from .conftest import Client, Tags
from .payloads import PAYLOADS


def ask_nested(file: Path, text: str = "yes") -> None:
    """One request: its first call is too slow, the second goes through a router to an ensemble."""
    clock = VirtualClock()
    end = sinks.to_jsonl(file)
    try:
        members = {f"{who}{text}": Timed(f"m-{who}{text}", clock, [said], [0.2]) for who, said in (("a", text), ("b", "no"), ("c", text))}
        routed = RoutedSampler({f"panel{text}": Ensemble(members, clock=clock), "small": Timed("s", clock, ["x"], [0.1])}, "round_robin", clock=clock)
        asked = HedgedSampler([Timed("slow", clock, ["late"], [60.0]), routed], Fixed(1.0), budget=1.0, clock=clock).sample(f"Is it {text}?", PARAMS)
        clock.advance(5.0)
        assert asked.result(0)[0].text == text
    finally:
        end()


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    ask_nested(tmp_path / "events.jsonl")
    return tmp_path


@pytest.fixture
def client(asked: Path) -> Iterator[Client]:
    with Dashboard(asked, every_s=0.02) as dashboard:
        yield Client(dashboard.url)


def test_from_the_traces_page_to_the_graph_of_a_request(client: Client, tags: Callable[[str], Tags]) -> None:
    links = [found.get("href") or "" for tag, found in tags(client.text("/traces")).found if tag == "a"]
    assert "/traces/outside" in links
    listed = client.text("/traces/outside")
    assert "vote: yes" in listed
    (graph,) = {found.get("href") or "" for tag, found in tags(listed).found if tag == "a" and "request=" in (found.get("href") or "")}
    page = client.text(graph)
    kinds = [found.get("class") for tag, found in tags(page).found if tag == "g"]
    assert kinds.count("node decision") == 5
    for said in (
        "first call: slow",
        "a second call after 1 s",
        "hedge: routed(",
        "route: panelyes",
        "vote: yes",
        "answer: call 1",
        "2 of 3 said so",
        "RoundRobin",
        "ayes",
        "byes",
        "cyes",
    ):
        assert said in page, said
    assert client.ask("/traces/outside?request=nothing")[0] == 404


def test_the_picture_has_a_line_for_every_link(asked: Path, tags: Callable[[str], Tags]) -> None:
    trace = load_trace(asked)
    svg = graph_svg(trace)
    lines = [found.get("class") for tag, found in tags(svg).found if tag == "path" and found.get("class")]
    because = [edge for edge in trace.edges() if edge[2] == "because"]
    inside = [edge for edge in trace.edges() if edge[2] == "in" and edge[1] not in {end for _, end, _ in because}]
    assert lines.count("edge because") == len(because)
    assert lines.count("edge in") == len(inside)
    places = [(float(x), float(y)) for x, y in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', svg)]
    assert len(places) == len(set(places)) == len(trace.nodes), "no box on another"


def test_effects_stand_below_their_causes(asked: Path) -> None:
    trace = load_trace(asked)
    heights = dict(zip((node.id for node in trace.nodes), map(float, re.findall(r'<rect x="[\d.]+" y="([\d.]+)"', graph_svg(trace))), strict=True))
    assert all(heights[start] < heights[end] for start, end, _ in trace.edges())


def test_a_circle_is_drawn_too() -> None:
    seen: list[events.Event] = [
        {"name": "decision", "what": "a", "chose": "b", "id": "one", "causes": ["two", "one"], "ts": 1.0},
        {"name": "decision", "what": "c", "chose": "d", "id": "two", "causes": ["one"], "ts": 2.0},
    ]
    assert graph_svg(Trace.of(seen)).count("<rect") == 2
    assert requests_table(Trace.of(seen), "/x") == ""


@pytest.mark.parametrize("payload", PAYLOADS[:12])
def test_texts_of_models_run_nothing(tmp_path: Path, tags: Callable[[str], Tags], payload: str) -> None:
    plain = tags(_page(tmp_path / "plain", "plain")).found
    found = tags(_page(tmp_path / "attack", payload)).found
    assert [tag for tag, _ in found] == [tag for tag, _ in plain]
    assert not [key for _, attributes in found for key in attributes if key.startswith("on")]


def _page(root: Path, text: str) -> str:
    root.mkdir()
    ask_nested(root / "events.jsonl", text)
    return graph_svg(load_trace(root))

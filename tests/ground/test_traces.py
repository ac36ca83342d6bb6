"""A trace has the true edges, answers why, and its views hold whatever text was recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.errors import ConfigError, NotFoundError
from crucible_framework.events import Event, collect, decision, emit, span
from crucible_framework.sinks import to_jsonl
from crucible_framework.traces import Trace, TraceNode, diff_traces, load_trace


def recorded(*, answer: str = "yes", extra: bool = False) -> list[Event]:
    with collect() as seen, span("ask", prompt="p"):
        hedge = decision("hedge", chose="fire", among=("wait", "fire"), because="slow", confidence=0.9)
        with span("route"):
            route = decision("route", chose="small", among=("small", "large"), because="cheap", confidence=0.4, causes=(hedge,))
            emit("inference.sample", model="small", duration_s=0.5)
        decision("vote", chose=answer, among=("yes", "no"), because="2 of 3", causes=(route, hedge))
        if extra:
            emit("more")
    return seen


def node(trace: Trace, title: str) -> TraceNode:
    return next(one for one in trace.nodes if one.title == title)


def test_the_graph_has_spans_decisions_and_their_causes() -> None:
    trace = Trace.of(recorded())
    ask, route = node(trace, "ask"), node(trace, "route")
    assert [one.title for one in trace.roots()] == ["ask"]
    assert {one.title for one in trace.children(ask.id)} == {"hedge: fire", "route", "vote: yes"}
    assert {one.title for one in trace.children(route.id)} == {"route: small", "inference.sample"}
    vote = node(trace, "vote: yes")
    assert [one.title for one in trace.why(vote.id)] == ["route: small", "hedge: fire"]
    assert trace.why(ask.id) == ()
    assert {one.title for one in trace.within(route.id).nodes} == {"route", "route: small", "inference.sample"}
    because = [(trace[a].title, trace[b].title) for a, b, kind in trace.edges() if kind == "because"]
    assert sorted(because) == [("hedge: fire", "route: small"), ("hedge: fire", "vote: yes"), ("route: small", "vote: yes")]
    sample = node(trace, "inference.sample")
    assert sample.end_s - sample.start_s == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(NotFoundError, match="no node 'x'"):
        trace["x"]


def test_queries_combine() -> None:
    trace = Trace.of(recorded())
    assert [one.title for one in trace.query(kind="decision", min_confidence=0.5)] == ["hedge: fire"]
    assert [one.title for one in trace.query(max_confidence=0.5)] == ["route: small"]
    assert [one.title for one in trace.query(name="inference.*")] == ["inference.sample"]
    assert [one.title for one in trace.query(text="2 OF 3")] == ["vote: yes"]
    assert [one.title for one in trace.query(name="ask")] == ["ask"]
    assert trace.query(kind="span", where=lambda one: one.name == "vote") == ()


def test_a_span_that_never_ended_still_holds_its_parts() -> None:
    trace = Trace.of([event for event in recorded() if event["name"] != "ask"])
    assert [one.name for one in trace.roots()] == ["(unfinished)"]
    assert len(trace.children(trace.roots()[0].id)) == 3


def test_a_circle_of_causes_and_parents_ends() -> None:
    circle: list[dict[str, object]] = [
        {"name": "decision", "id": "a", "causes": ["b"], "what": "a", "chose": "1", "span": "s", "ts": 1},
        {"name": "decision", "id": "b", "causes": ["a"], "what": "b", "chose": "2", "span": "s", "ts": 2},
        {"name": "s", "kind": "span", "span": "s", "parent": "t", "ts": 3},
        {"name": "t", "kind": "span", "span": "t", "parent": "s", "ts": 4},
    ]
    trace = Trace.of(circle)  # type: ignore[arg-type]
    assert [one.id for one in trace.why("a")] == ["b"]
    assert diff_traces(trace, trace).changed == ()


def test_diff_pairs_by_place_and_ignores_ids_and_times() -> None:
    same = diff_traces(Trace.of(recorded()), Trace.of(recorded()))
    assert same.summary == "0 added, 0 removed, 0 changed, 6 the same"
    other = diff_traces(Trace.of(recorded()), Trace.of(recorded(answer="no", extra=True)))
    assert [one.title for one in other.added] == ["more"]
    assert [(a.title, b.title, keys) for a, b, keys in other.changed] == [("vote: yes", "vote: no", ("chose",))]
    assert other.removed == ()
    assert diff_traces(Trace.of(recorded()), Trace.of(recorded(answer="no")), ignore=("chose",)).changed == ()
    with pytest.raises(ConfigError, match="expected two traces"):
        diff_traces(Trace.of([]), [])  # type: ignore[arg-type]


@given(st.text(max_size=80))
def test_no_text_breaks_out_of_a_mermaid_label(text: str) -> None:
    with collect() as seen:
        emit(text or "x")
    lines = Trace.of(seen).to_mermaid().splitlines()
    assert lines[0] == "flowchart LR"
    assert len(lines) == 2
    assert re.fullmatch(r'  n0\("[\w .,:;+/=()…#-]*"\)', lines[1])


def test_mermaid_draws_the_edges_and_counts_what_it_cuts() -> None:
    trace = Trace.of(recorded())
    chart = trace.to_mermaid()
    assert chart.count("-->") == 5
    assert chart.count("-.->|because|") == 3
    assert '"4 more"' in trace.to_mermaid(most=2)


def test_prov_json_is_read_by_another_library() -> None:
    prov = pytest.importorskip("prov.model")
    trace = Trace.of(recorded(answer='a"<b>'))
    document = prov.ProvDocument.deserialize(content=json.dumps(trace.to_prov()), format="json")
    kinds = [type(one).__name__ for one in document.get_records()]
    assert kinds.count("ProvActivity") == 2
    assert kinds.count("ProvEntity") == 4
    assert kinds.count("ProvDerivation") == 3
    assert kinds.count("ProvGeneration") == 4
    assert kinds.count("ProvCommunication") == 1
    labels = {str(next(iter(one.get_attribute("prov:label")))) for one in document.get_records() if one.get_attribute("prov:label")}
    assert 'vote: a"<b>' in labels


def test_a_file_loads_and_its_damage_is_told(tmp_path: Path) -> None:
    end = to_jsonl(tmp_path / "events.jsonl")
    for name in ("one", "two"):
        with events.span(name):
            pass
    end()
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_bytes(lines[0].replace(b'"one"', b'"eno"') + lines[1] + b'{"ts":')
    trace = load_trace(tmp_path)
    assert [one.name for one in trace.nodes] == ["two"]
    assert [problem.split(":")[1] for problem in trace.problems] == ["1", "3"]
    with pytest.raises(NotFoundError, match="no events"):
        load_trace(tmp_path / "none")

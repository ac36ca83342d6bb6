"""One request's whole way — hedge, route, ensemble, members, vote, answer — as a graph of linked spans and decisions."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from crucible_framework import events
from crucible_framework.backends.fake import FakeBackend
from crucible_framework.errors import BackendError
from crucible_framework.inference import Ensemble, Fixed, HedgedSampler, Member, Pool, RoutedSampler, SelfConsistent
from crucible_framework.protocols import Sampler
from crucible_framework.records import SamplingParams
from crucible_framework.testing import StreamContract, VirtualClock
from crucible_framework.traces import Trace, TraceNode

from .simulated import Ready, Timed

PARAMS = SamplingParams(max_tokens=4, seed=1)


def titles(nodes: tuple[TraceNode, ...]) -> list[str]:
    return [one.title for one in nodes]


def nested(clock: VirtualClock) -> HedgedSampler:
    """Slow first, then an ensemble of three that a router chose."""
    ensemble = Ensemble({"a": Ready("yes", model="m-a"), "b": Ready("no", model="m-b"), "c": Ready("yes", model="m-c")}, clock=clock)
    routed = RoutedSampler({"ensemble": ensemble, "single": Ready("no")}, "round_robin", clock=clock)
    return HedgedSampler([Timed(clock, [None]), routed], Fixed(1.0), budget=1.0, clock=clock)


def test_the_way_of_one_request() -> None:
    clock = VirtualClock()
    with events.collect() as seen, events.in_run("asking"):
        asked = nested(clock).sample("Is it?", PARAMS)
    with events.collect() as later:
        clock.advance(2.0)
    assert asked.result(0)[0].text == "yes"
    assert not seen, "nothing has ended yet"
    assert {event["run"] for event in later} == {"asking"}, "also from a timer's thread"
    assert len({event["trace"] for event in later}) == 1
    trace = Trace.of(later)
    (root,) = trace.roots()
    assert root.name == "hedge.request"
    assert trace.within(root.id).nodes == trace.nodes

    by_name = {node.name: node for node in trace.nodes}
    decisions = {node.name: node for node in trace.query(kind="decision")}
    assert decisions.keys() == {"hedge.fired", "route.chosen", "ensemble.vote", "hedge.ended"}
    vote = decisions["ensemble.vote"]
    assert (vote.title, vote.fields["among"], bool(vote.because)) == ("vote: yes", ["yes", "no"], True)
    assert decisions["route.chosen"].fields["among"] == ["ensemble", "single"]
    assert decisions["route.chosen"].because == "RoundRobin"
    assert decisions["hedge.fired"].confidence == 1.0
    members = [node for node in trace.nodes if node.name == "ensemble.member"]
    assert [(node.fields["member"], node.fields["answer_read"]) for node in members] == [("a", "yes"), ("b", "no"), ("c", "yes")]

    legs = [node for node in trace.nodes if node.name == "hedge.leg"]
    assert [(leg.fields["leg"], leg.fields["outcome"]) for leg in legs] == [(0, "cancelled"), (1, "won")]
    chain = ["hedge.ended", "route.ended", "ensemble.vote"]
    for effect, cause in itertools.pairwise(chain):
        assert by_name[cause].id in by_name[effect].causes
    assert {node.id for node in members} <= set(vote.causes)
    assert by_name["ensemble.request"].causes == (decisions["route.chosen"].id,)
    assert legs[1].causes == (decisions["hedge.fired"].id,)
    assert set(decisions["hedge.fired"].causes) == {legs[0].id}, "it is slow: that is why the second was sent"
    why = {node.name for node in trace.why(decisions["hedge.ended"].id)}
    assert why >= {"hedge.leg", "hedge.fired", "route.ended", "route.chosen", "ensemble.vote", "ensemble.member"}
    inside = {node.id: node.parent for node in trace.nodes}
    assert inside[by_name["ensemble.request"].id] == by_name["route.request"].id
    assert inside[by_name["route.request"].id] == legs[1].id


def test_answers_of_a_backend_are_in_it() -> None:
    with FakeBackend() as backend:
        pool = Pool([Member(name=name, sampler=backend.sampler(name)) for name in ("tiny", "fake")])
        sampler = HedgedSampler(RoutedSampler({"only": Ensemble(pool)}), Fixed(60.0))
        with events.collect() as seen:
            sampler.sample("hi", PARAMS).result(60)
    trace = Trace.of(seen)
    samples = [node for node in trace.nodes if node.name == "inference.sample"]
    members = {node.id: node for node in trace.nodes if node.name == "ensemble.member"}
    assert sorted(str(members[node.parent].fields["member"]) for node in samples) == ["fake", "tiny"]
    (vote,) = trace.query(name="ensemble.vote")
    assert {node.id for node in samples} <= set(vote.causes)
    (ended,) = trace.query(name="hedge.ended")
    assert {node.id for node in samples} <= {node.id for node in trace.why(ended.id)}
    assert "hedge.fired" not in {node.name for node in trace.nodes}


def test_samples_of_one_model_vote_because_of_what_was_drawn() -> None:
    with FakeBackend() as backend, events.collect() as seen:
        SelfConsistent(backend.sampler("tiny"), samples=6, batch=3, confidence=None).ask("hi", PARAMS)
    trace = Trace.of(seen)
    (vote,) = trace.query(name="ensemble.vote")
    assert len(vote.causes) == 2
    assert [trace[cause].name for cause in vote.causes] == ["inference.sample"] * 2


def test_a_stream_has_its_graph_too() -> None:
    with FakeBackend() as backend:
        routed = RoutedSampler({"tiny": backend.sampler("tiny")})
        with events.collect() as seen:
            HedgedSampler(routed, Fixed(60.0)).stream("hi", PARAMS, lambda _: None).result(60)
    trace = Trace.of(seen)
    (root,) = trace.roots()
    assert [node.name for node in trace.nodes if node.kind == "span"] == ["hedge.request", "hedge.leg", "route.request", "inference.sample"]
    assert trace.within(root.id).nodes == trace.nodes


@pytest.mark.parametrize("how", ["fails", "cancelled"])
def test_spans_end_however_the_request_does(how: str) -> None:
    clock = VirtualClock()
    with events.collect() as seen:
        if how == "fails":
            broken = Ensemble({"a": Ready(BackendError("no")), "b": Ready(BackendError("none"))}, clock=clock)
            asked = HedgedSampler(RoutedSampler({"e": broken}, clock=clock), Fixed(1.0), budget=0.0, clock=clock).sample("?", PARAMS)
            assert asked.exception(0) is not None
        else:
            waiting = HedgedSampler(RoutedSampler({"e": Ensemble({"a": Timed(clock, [None])}, clock=clock)}, clock=clock), Fixed(9.0), clock=clock)
            assert waiting.sample("?", PARAMS).cancel()
    spans = {str(event["name"]): event for event in seen if event.get("kind") == "span"}
    assert spans.keys() == {"hedge.request", "hedge.leg", "route.request", "ensemble.request", "ensemble.member"}
    assert all(spans[name].get("error") for name in ("hedge.request", "route.request", "ensemble.request", "ensemble.member"))
    assert "(unfinished)" not in titles(Trace.of(seen).nodes)


def test_requests_at_once_do_not_mix() -> None:
    with FakeBackend() as backend, events.collect() as seen:
        sampler = HedgedSampler(RoutedSampler({"e": Ensemble({name: backend.sampler(name) for name in ("tiny", "fake")})}), Fixed(60.0))

        def ask() -> None:
            for _ in range(10):
                sampler.sample("hi", PARAMS).result(60)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = Trace.of(seen)
    assert len(trace.roots()) == 40
    sizes = [len(trace.within(root.id).nodes) for root in trace.roots()]
    assert len(set(sizes)) == 1
    assert sum(sizes) == len(trace.nodes)


def test_without_a_listener_nothing_is_kept() -> None:
    assert events.opened("hedge.request") is None
    assert events.linked(None, "hedge.fired") == ""
    events.past("inference.sample", 1.0)
    with events.within(None):
        assert events.traceparent() == ""


class TestNestedStreams(StreamContract):
    """A hedged sampler over a routed one over a backend's tells what the backend's tells."""

    @pytest.fixture
    def sampler(self) -> Iterator[Sampler]:
        with FakeBackend() as backend:
            routed = RoutedSampler({"tiny": backend.sampler("tiny")}, "round_robin")
            yield HedgedSampler([routed, routed], Fixed(600.0), budget=1.0)


def test_a_timed_leg_is_one_too() -> None:
    clock = VirtualClock()
    with events.collect() as seen:
        HedgedSampler([Timed(clock, after_s=[5.0]), Ready("x")], Fixed(1.0), budget=1.0, clock=clock).sample("?", PARAMS)
        clock.advance(10.0)
    assert [event["outcome"] for event in seen if event["name"] == "hedge.leg"] == ["cancelled", "won"]

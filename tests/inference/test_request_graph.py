"""One request's whole way — hedge, route, ensemble, members, vote, answer — as a graph of linked spans and decisions."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest

from crucible_framework import events
from crucible_framework.backends.fake import FakeBackend
from crucible_framework.errors import BackendError
from crucible_framework.inference import Adaptive, Ensemble, Fixed, HedgedSampler, Member, Never, Percentile, Pool, Price, RoutedSampler, SelfConsistent
from crucible_framework.protocols import HedgePolicy, Sampler
from crucible_framework.records import HedgeDecision, HedgeOutcome, HedgeRequest, Json, SamplingParams
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
    assert [event["name"] for event in seen] == ["hedge.started"], "nothing has ended yet"
    assert {str(event["run"]) for event in (*seen, *later)} == {"asking"}, "also from a timer's thread"
    assert len({str(event["trace"]) for event in (*seen, *later)}) == 1
    trace = Trace.of((*seen, *later))
    (root,) = trace.roots()
    assert root.name == "hedge.request"
    assert trace.within(root.id).nodes == trace.nodes

    by_name = {node.name: node for node in trace.nodes}
    decisions = {node.name: node for node in trace.query(kind="decision")}
    assert decisions.keys() == {"hedge.started", "hedge.fired", "route.chosen", "ensemble.vote", "hedge.ended"}
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
    assert legs[0].causes == (decisions["hedge.started"].id,)
    assert legs[1].causes == (decisions["hedge.fired"].id,)
    assert set(decisions["hedge.fired"].causes) == {legs[0].id}, "it is slow: that is why the second was sent"
    why = {node.name for node in trace.why(decisions["hedge.ended"].id)}
    assert why >= {"hedge.started", "hedge.leg", "hedge.fired", "route.ended", "route.chosen", "ensemble.vote", "ensemble.member"}
    inside = {node.id: node.parent for node in trace.nodes}
    assert inside[by_name["ensemble.request"].id] == by_name["route.request"].id
    assert inside[by_name["route.request"].id] == legs[1].id


class Names:
    """A policy that says what it was asked by."""

    def __init__(self, delay_s: float | None, probability: float = 1.0) -> None:
        self.decision = HedgeDecision(delay_s=delay_s, reason="so it is", probability=probability)

    def plan(self, request: HedgeRequest) -> HedgeDecision:
        del request
        return self.decision

    def observe(self, outcome: HedgeOutcome) -> None:
        del outcome


def started(clock: VirtualClock, policy: HedgePolicy, requests: int = 1, **settings: Any) -> list[Mapping[str, Json]]:
    """What is said of the first calls of requests to two models."""
    sampler = HedgedSampler([Ready("x", model="m-a"), Ready("y", model="m-b")], policy, clock=clock, **settings)
    with events.collect() as seen:
        for _ in range(requests):
            sampler.sample("?", PARAMS).result(0)
    return [event for event in seen if event["name"] == "hedge.started"]


@pytest.mark.parametrize(
    ("policy", "settings", "delay_s", "because"),
    [
        (Fixed(0.5), {}, 0.5, "the first in order; a second call after 0.5 s: fixed delay of 0.5 s"),
        (Fixed(0.5), {"rotate": True}, 0.5, "its turn; a second call after 0.5 s: fixed delay of 0.5 s"),
        (Percentile(), {}, None, "the first in order; no second call by time: fewer than 50 calls seen"),
        (Adaptive(), {}, None, "the first in order; no second call by time: fewer than 200 calls seen"),
        (Never(), {}, None, "the first in order; no second call by time: hedging is off"),
        (Fixed(0.5), {"budget": 0.0}, None, "the first in order; no second call: budget or max_legs allow one call"),
        (Fixed(0.5), {"max_legs": 1}, None, "the first in order; no second call: budget or max_legs allow one call"),
        (Fixed(0.5), {"idempotent": False}, None, "the first in order; no second call: the request may not be asked twice"),
    ],
)  # fmt: skip
def test_the_first_call_is_a_decision_too(policy: HedgePolicy, settings: dict[str, Any], delay_s: float | None, because: str) -> None:
    (told,) = started(VirtualClock(), policy, **settings)
    (node,) = Trace.of([told]).query(kind="decision")
    assert (node.title, node.fields["among"], node.fields["delay_s"], node.because) == ("first call: m-a", ["m-a", "m-b"], delay_s, because)
    assert node.confidence is None, "that of a second call is another"


def test_the_first_call_says_the_learned_delay_and_the_credit() -> None:
    clock = VirtualClock()
    last = started(clock, Percentile(90, least=5), requests=7)[-1]
    assert last["delay_s"] == 0.0
    assert "a second call after 0 s: percentile 90" in str(last["reason"])
    assert last["credit"] == pytest.approx(7 * 0.05)
    drawn = started(clock, Names(None, probability=0.3))[0]
    assert drawn["hedge_probability"] == 0.3
    assert [one["chose"] for one in started(clock, Never(), requests=3, rotate=True)] == ["m-a", "m-b", "m-a"]


def test_replicas_are_one_choice() -> None:
    with events.collect() as seen:
        HedgedSampler(Ready("x", model="m"), Fixed(1.0), clock=VirtualClock()).sample("?", PARAMS).result(0)
    (told,) = (event for event in seen if event["name"] == "hedge.started")
    assert (told["chose"], told["among"]) == ("m", ["m"])
    assert str(told["reason"]).startswith("the only one; a second call after 1 s")


def test_a_second_call_that_was_not_allowed_is_told_with_its_reason() -> None:
    clock = VirtualClock()
    slow = HedgedSampler([Timed(clock, ["late"], [5.0], model="m-a"), Ready("y", model="m-b")], Fixed(1.0), budget=0.05, clock=clock)
    with events.collect() as seen:
        asked = slow.sample("?", PARAMS)
        clock.advance(9.0)
    assert asked.done()
    trace = Trace.of(seen)
    (refused,) = trace.query(name="hedge.refused")
    assert (refused.title, refused.fields["among"]) == ("hedge: no further call", ["m-a", "m-b", "no further call"])
    assert refused.because == "the budget is used up (fixed delay of 1 s)"
    assert (refused.fields["elapsed_s"], refused.fields["credit"]) == (1.0, 0.05)
    assert [node.name for node in trace.why(refused.id)] == ["hedge.leg", "hedge.started"]
    assert slow.stats.refused == 1
    assert not trace.query(name="hedge.fired")


def asked(ensemble: Ensemble, clock: VirtualClock) -> tuple[Trace, list[tuple[str, str, list[str]]]]:
    """A question's trace, and of each member that was asked: its name, why, and what led to it."""
    with events.collect() as seen:
        answer = ensemble.submit("?", PARAMS)
        clock.advance(9.0)
    assert answer.done()
    trace = Trace.of(seen)
    told = trace.query(name="ensemble.asked")
    for node in told:
        (member,) = (one for one in trace.query(name="ensemble.member") if node.id in one.causes)
        assert member.fields["member"] == node.fields["chose"]
    return trace, [(str(node.fields["chose"]), node.because, [str(trace[cause].fields["member"]) for cause in node.causes]) for node in told]


def test_a_hedged_ensemble_says_why_it_asks_each_member() -> None:
    clock = VirtualClock()
    members: dict[str, Sampler] = {
        "a": Timed(clock, [None]),
        "b": Timed(clock, [BackendError("no")], [0.5]),
        "c": Timed(clock, ["yes"], [0.1]),
        "d": Ready("yes"),
    }
    trace, told = asked(Ensemble(members, mode="hedged", hedge_delay_s=1.0, clock=clock), clock)
    assert told == [
        ("a", "the first in order; a further one every 1 s and for each failure", []),
        ("b", "no vote after another 1 s", ["a"]),
        ("c", "b failed", ["b"]),
    ]
    (first, *_) = trace.query(name="ensemble.asked")
    assert (first.title, first.fields["among"]) == ("member: a", ["a", "b", "c", "d"])
    (vote,) = trace.query(name="ensemble.vote")
    assert first in trace.why(vote.id)
    _, told = asked(Ensemble(members, mode="hedged", quorum=2, clock=clock), clock)
    assert [(name, why.partition(";")[0], causes) for name, why, causes in told[:2]] == [("a", "one of the first", []), ("b", "one of the first", [])]


@pytest.mark.parametrize("mode", ["sequential", "cascade"])
def test_an_ensemble_that_asks_in_turn_says_why_it_asks_on(mode: Literal["sequential", "cascade"]) -> None:
    clock = VirtualClock()
    pool = Pool([Member(name=name, sampler=Ready(says), price=Price(input_per_million=cost, output_per_million=cost)) for name, says, cost in
                 (("dear", "no", 9.0), ("mid", "no", 3.0), ("cheap", "yes", 1.0))])  # fmt: skip
    _, told = asked(Ensemble(pool, mode=mode, quorum=2, confidence=lambda verdict: verdict.agreement, stop_at=0.95, clock=clock), clock)
    names, until = (
        (("cheap", "mid", "dear"), "while the vote is less sure than 0.95") if mode == "cascade" else (("dear", "mid"), "as long as it can change the vote")
    )
    assert [name for name, _, _ in told] == list(names)
    assert told[0][1] == f"{'the cheapest' if mode == 'cascade' else 'the first in order'}; a further one {until}"
    assert told[1][1:] == ("1 of 2 needed answers", [names[0]])
    if mode == "cascade":
        assert told[2][1] == f"2 answers; a further one {until}"
        assert sorted(told[2][2]) == ["cheap", "mid"]


def test_a_member_that_is_set_aside_or_refuses_is_named_where_the_next_is_asked() -> None:
    clock = VirtualClock()
    ensemble = Ensemble({"a": Ready(BackendError("no")), "b": Ready("yes")}, mode="sequential", failures=1, clock=clock)
    assert [one[:2] for one in asked(ensemble, clock)[1]][1] == ("b", "0 of 1 needed answers")
    ((name, why, _),) = asked(ensemble, clock)[1]
    assert (name, why.rpartition("; ")[2]) == ("b", "a is set aside by its breaker")


def test_members_that_are_all_asked_are_no_choice() -> None:
    clock = VirtualClock()
    assert asked(Ensemble({"a": Ready("yes"), "b": Ready("no"), "c": Ready("yes")}, clock=clock), clock)[1] == []


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

"""Ensembles under a virtual clock: who is asked when, what a failure costs, when it stops."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Never

import pytest

from crucible_framework.backends import connect
from crucible_framework.errors import AllMembersFailedError, CapabilityError, ConfigError, NoConsensusError, ServiceError, UnknownNameError
from crucible_framework.events import collect
from crucible_framework.inference import (
    Abstention,
    Breaker,
    Calibration,
    Ensemble,
    LogOdds,
    Member,
    Pool,
    Price,
    SelfConsistent,
    majority_is_safe,
    read_ranking,
    token_confidence,
)
from crucible_framework.promise import Promise
from crucible_framework.protocols import Sampler
from crucible_framework.records import Ballot, Completion, LoraConfig, Prompt, SamplingParams, Verdict
from crucible_framework.store import Models
from crucible_framework.testing import VirtualClock

from .simulated import PARAMS, Ready, Timed, said

AWAY = ServiceError("the service is away", status=503, retryable=True)


def timed(clock: VirtualClock, *rows: tuple[str | Exception | None, float]) -> dict[str, Timed]:
    return {f"m{i}": Timed(clock, (answer,), (after_s,), model=f"m{i}") for i, (answer, after_s) in enumerate(rows)}


def test_parallel_asks_all_at_once() -> None:
    clock = VirtualClock()
    members = timed(clock, ("4", 1.0), ("four", 3.0), ("5", 2.0))
    with collect() as seen:
        future = Ensemble(members, clock=clock).submit("2 + 2?", PARAMS)
        clock.advance(2.9)
        assert not future.done()
        clock.advance(0.2)
    verdict = future.result(0)
    assert (verdict.answer, verdict.duration_s, [b.latency_s for b in verdict.ballots]) == ("4", 3.0, [1.0, 3.0, 2.0])
    event = next(e for e in seen if e["name"] == "ensemble.vote")
    assert (event["mode"], event["asked"], event["answered"]) == ("parallel", 3, 3)
    assert event["agreement"] == pytest.approx(2 / 3)
    assert clock.pending == 0


def test_sequential_stops_when_nothing_can_change() -> None:
    members = {f"m{i}": Ready("yes") for i in range(5)}
    verdict = Ensemble(members, mode="sequential").ask("?")
    assert (verdict.answer, len(verdict.ballots), verdict.skipped) == ("yes", 3, ("m3", "m4"))
    assert [m.calls for m in members.values()] == [1, 1, 1, 0, 0]
    assert len(Ensemble(members, "borda", "sequential").ask("?").ballots) == 5
    assert len(Ensemble(members, mode="sequential", merge=lambda a, b: a == b).ask("?").ballots) == 5


def test_partial_failure_and_quorum() -> None:
    members: dict[str, Sampler] = {"a": Ready("4"), "b": Ready(AWAY), "c": Ready("4")}
    verdict = Ensemble(members).ask("?")
    assert (verdict.answer, verdict.agreement) == ("4", 1.0)
    assert "the service is away" in verdict.ballots[1].error
    with pytest.raises(AllMembersFailedError, match="2 of 3 members answered; expected at least 3") as caught:
        Ensemble(members, quorum=3).ask("?")
    assert set(caught.value.causes) == {"b"}


def test_a_member_that_raises_at_once_is_a_failure_like_any_other() -> None:
    class Refuses(Ready):
        def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
            raise ConfigError("the prompt is too long")

    verdict = Ensemble({"a": Refuses("x"), "b": Ready("4")}).ask("?")
    assert (verdict.answer, verdict.ballots[0].error) == ("4", "ConfigError: the prompt is too long")


def test_deadline_votes_on_what_has_come() -> None:
    clock = VirtualClock()
    members = timed(clock, ("4", 1.0), (None, 0.0), ("5", 9.0))
    future = Ensemble(members, clock=clock, deadline_s=2.0).submit("?")
    clock.advance(2.0)
    verdict = future.result(0)
    assert (verdict.answer, verdict.duration_s) == ("4", 2.0)
    assert "deadline of 2 s" in verdict.ballots[1].error
    assert all(one.futures[0].cancelled() for one in (members["m1"], members["m2"]))
    late = Ensemble(timed(clock, (None, 0.0)), clock=clock, deadline_s=2.0).submit("?")
    clock.advance(2.0)
    with pytest.raises(AllMembersFailedError):
        late.result(0)


def test_hedged_mode_asks_further_members_when_slow_or_failed() -> None:
    clock = VirtualClock()
    members = timed(clock, (None, 0.0), (AWAY, 0.5), ("4", 0.2), ("5", 0.1))
    future = Ensemble(members, mode="hedged", quorum=1, hedge_delay_s=1.0, clock=clock).submit("?")
    clock.advance(5.0)
    verdict = future.result(0)
    assert (verdict.answer, verdict.skipped) == ("4", ("m0", "m3"))
    assert verdict.duration_s == pytest.approx(1.7)
    assert members["m0"].futures[0].cancelled()
    assert clock.pending == 0


def test_cancelling_cancels_every_member() -> None:
    clock = VirtualClock()
    members = timed(clock, (None, 0.0), (None, 0.0))
    future = Ensemble(members, clock=clock, deadline_s=9.0).submit("?")
    assert future.cancel()
    assert all(one.futures[0].cancelled() for one in members.values())
    assert clock.pending == 0
    with pytest.raises(CancelledError):
        future.result(0)
    both = Ensemble(members, clock=clock).sample("?", PARAMS, 2)
    both.cancel()
    assert all(future.cancelled() for one in members.values() for future in one.futures)


def test_cascade_stops_at_a_calibrated_confidence() -> None:
    sure = Calibration(weights=(-4.0, 0.0, 0.0, 8.0, 0.0), n=100)  # half at a token confidence of .5
    members = {"cheap": Ready("4", logprobs=(-0.01,)), "dear": Ready("5")}
    verdict = Ensemble(members, mode="cascade", confidence=sure, stop_at=0.9).ask("?")
    assert (verdict.answer, verdict.skipped) == ("4", ("dear",))
    assert verdict.probability == pytest.approx(0.98, abs=0.01)
    members["cheap"] = Ready("4", logprobs=(-2.0,))
    assert len(Ensemble(members, mode="cascade", confidence=sure, stop_at=0.9).ask("?").ballots) == 2
    with pytest.raises(ConfigError, match="fit_confidence"):
        Ensemble(members, mode="cascade")


def test_functions_of_the_caller_that_fail_reach_the_caller() -> None:
    def bad(*_: object) -> Never:
        raise ValueError("mine")

    def bad_read(text: str) -> str | None:
        raise ValueError(text)

    for broken in (
        Ensemble({"a": Ready("4")}, bad),
        Ensemble({"a": Ready("mine"), "b": Ready("5")}, read=bad_read),
        Ensemble({"a": Ready("4"), "b": Ready("5")}, mode="cascade", confidence=bad),
    ):
        with pytest.raises(ValueError, match="mine"):
            broken.ask("?")


def test_it_is_a_sampler() -> None:
    inner = {"a": Ready("4"), "b": Ready("4.0"), "c": Ready("5")}
    ensemble = Ensemble(inner)
    got = ensemble.sample("?", SamplingParams(seed=7), 2).result()
    assert [one.text for one in got] == ["4", "4"]
    assert inner["a"].seeds == [7, 8]
    assert Ensemble({"e": ensemble, "f": Ready("4")}, "unanimous").ask("?").answer == "4"
    assert ensemble.model == "ensemble(a, b, c)"
    with pytest.raises(NoConsensusError, match="different answers") as caught:
        Ensemble(inner, "unanimous").sample("?", PARAMS).result()
    assert isinstance(caught.value.verdict, Verdict)
    with pytest.raises(AllMembersFailedError):
        Ensemble({"a": Ready(AWAY)}).sample("?", PARAMS, 2).result()
    with pytest.raises(CapabilityError):
        ensemble.compute_logprobs("?", "4")
    with pytest.raises(ConfigError):
        ensemble.sample("?", PARAMS, 0)


def test_meaning_and_own_reading() -> None:
    members = {"a": Ready("car"), "b": Ready("automobile"), "c": Ready("tree")}
    same = {frozenset(("car", "automobile"))}
    assert Ensemble(members, merge=lambda x, y: frozenset((x, y)) in same).ask("?").agreement == pytest.approx(2 / 3)
    assert Ensemble(members, read=lambda text: text[0]).ask("?").ballots[0].answer == "c"


@pytest.mark.parametrize("settings", [{"mode": "all"}, {"quorum": 0}, {"quorum": 2}, {"stop_at": 0.0}, {"deadline_s": 0.0}, {"hedge_delay_s": -1.0}])
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Ensemble({"a": Ready("4")}, **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ breaker, pool
def test_a_member_that_keeps_failing_is_set_aside_and_tried_again() -> None:
    clock = VirtualClock()
    bad = Timed(clock, (AWAY,), (0.0,))
    ensemble = Ensemble({"bad": bad, "good": Timed(clock, ("4",), (0.0,))}, clock=clock, failures=3, retry_after_s=10.0)

    def ask() -> Verdict:
        future = ensemble.submit("?")
        clock.advance(0.0)
        return future.result(0)

    for _ in range(4):
        ask()
    last = ask()
    assert bad.calls == 3
    assert last.ballots[0].error == "set aside by its breaker"
    clock.advance(10.0)
    assert ensemble.breakers["bad"].state == "half-open"
    ask()
    assert (bad.calls, ensemble.breakers["bad"].state) == (4, "open")
    clock.advance(20.0)
    bad.answers = ("4",)
    ask()
    ask()
    assert (bad.calls, ensemble.breakers["bad"].state) == (6, "closed")


def test_a_half_open_breaker_lets_one_through() -> None:
    clock = VirtualClock()
    breaker = Breaker(clock, failures=1, retry_after_s=1.0, successes=1)
    assert breaker.admit()
    breaker.report(False)
    assert not breaker.admit()
    clock.advance(1.0)
    assert [breaker.admit(), breaker.admit()] == [True, False]
    breaker.report(None)
    assert breaker.admit()
    breaker.report(True)
    assert breaker.state == "closed"
    with pytest.raises(ConfigError):
        Breaker(clock, failures=0)


def test_pool_and_prices() -> None:
    pool = Pool([Member(name="a", sampler=Ready("4"), tags={"size": "small"}, price=Price(input_per_million=1.0, output_per_million=2.0)),
                 Member(name="b", sampler=Ready("4"), weight=2.0)])  # fmt: skip
    assert pool.tagged(size="small").names == ("a",)
    verdict = Ensemble(pool).ask("?")
    assert verdict.ballots[0].cost == pytest.approx(12e-6)
    assert verdict.cost is None  # b's price is unknown
    assert Ensemble(pool.tagged(size="small")).ask("?").cost == pytest.approx(12e-6)
    assert pool["b"].weight == 2.0
    with pytest.raises(UnknownNameError):
        pool["c"]
    with pytest.raises(ConfigError):
        Pool({})
    with pytest.raises(ConfigError):
        Pool([pool["a"], pool["a"]])
    with pytest.raises(ConfigError):
        Price(input_per_million=-1, output_per_million=0)
    with pytest.raises(ConfigError):
        Member(name="", sampler=Ready("4"))
    assert token_confidence(said("x", logprobs=())) is None
    assert token_confidence(said("x", logprobs=(-0.3, -0.3))) == pytest.approx(0.7408, abs=1e-4)


def test_pool_from_the_registry(tmp_path: Path) -> None:
    with connect("fake") as backend:
        session = backend.train("fake", LoraConfig(rank=2))
        models = Models(tmp_path / "models")
        for name, loss in (("a", 0.5), ("b", 0.2), ("c", 0.9)):
            checkpoint = backend.download(session.save(name, kind="sampler").result(), tmp_path / name)
            models.register(checkpoint, name, tags={"task": "facts"} if name != "c" else {}, metrics={"loss": loss})
        assert Pool.from_registry(models, backend, tags={"task": "facts"}, metric="loss").names == ("b:1", "a:1")
        assert Pool.from_registry(models, backend, metric="loss", top=1).names == ("b:1",)  # of a loss less is better
        assert Pool.from_registry(models, backend, metric="loss", direction="max", top=1).names == ("c:1",)
        with pytest.raises(ConfigError, match="No registered model"):
            Pool.from_registry(models, backend, metric="accuracy")
        pool = Pool.from_registry(models, backend)
        assert len(Ensemble(pool).ask("Is it?", SamplingParams(max_tokens=4, seed=1)).ballots) == len(pool) == 3


def test_rankings_are_read_and_counted() -> None:
    members = {"a": Ready("Rome > Paris > Oslo"), "b": Ready("1. Oslo\n2. Paris"), "c": Ready("Paris, Rome"), "d": Ready("I don't know")}
    verdict = Ensemble(members, "instant_runoff", read=read_ranking).ask("?", PARAMS)
    assert [ballot.ranking for ballot in verdict.ballots] == [("rome", "paris", "oslo"), ("oslo", "paris"), ("paris", "rome"), ()]
    assert verdict.ballots[3].answer is None
    assert Ensemble(members, "borda", read=read_ranking).ask("?", PARAMS).answer == "paris"
    same = Ensemble({"a": Ready("Roma > Paris"), "b": Ready("Rome")}, read=read_ranking, merge=lambda one, other: {one, other} == {"roma", "rome"})
    assert same.ask("?", PARAMS).scores == {"roma": 2.0}


def test_it_abstains_where_it_is_not_sure_enough() -> None:
    sure = Abstention(threshold=0.8, error=0.05, bound=0.04, answered=90, n=100, level=0.95)
    members = {"a": Ready("4"), "b": Ready("4"), "c": Ready("5")}
    verdict = Ensemble(members, confidence=lambda verdict: verdict.agreement, abstain=sure).ask("?", PARAMS)
    assert (verdict.answer, verdict.text) == (None, "")
    assert verdict.probability == pytest.approx(2 / 3)
    assert verdict.reason == "the probability that '4' is right is 0.667, too low to answer"
    agreed = Ensemble({"a": Ready("4"), "b": Ready("4")}, LogOdds(accuracies={"a": 0.9, "b": 0.9}), abstain=sure).ask("?", PARAMS)
    assert agreed.answer == "4"
    with pytest.raises(ConfigError, match="abstains by a probability"):
        Ensemble(members, abstain=sure)


def test_a_cascade_asks_the_cheapest_first() -> None:
    prices = {"dear": 9.0, "cheap": 1.0, "middle": 3.0}
    members = [Member(name=name, sampler=Ready("4"), price=Price(input_per_million=0.0, output_per_million=price)) for name, price in prices.items()]
    for pool, first in ((Pool(members), "cheap"), (Pool([*members, Member(name="unknown", sampler=Ready("4"))]), "dear")):
        verdict = Ensemble(pool, mode="cascade", confidence=lambda verdict: 1.0).ask("?", PARAMS)
        assert [ballot.member for ballot in verdict.ballots] == [first]


# --------------------------------------------------------------------------------------------------------- self-consistency
def test_self_consistency_stops_when_enough_agree() -> None:
    sure = Ready("4")
    verdict = SelfConsistent(sure, 20, batch=4).ask("?", SamplingParams(seed=3))
    assert (verdict.answer, sure.calls, sure.seeds) == ("4", 4, [3])
    torn = Ready("4", "5")
    assert SelfConsistent(torn, 20, batch=4).ask("?").tied == ("4", "5")
    assert torn.calls == 20
    assert len(SelfConsistent(Ready("4"), 10, confidence=None).ask("?").ballots) == 10
    assert majority_is_safe({"a": 4})
    assert not majority_is_safe({"a": 3, "b": 1})


def test_self_consistency_by_meaning_stops_sooner() -> None:
    def same(one: str, other: str) -> bool:
        return {one, other} <= {"auto", "car"}

    said = ("car", "auto", "train")
    assert SelfConsistent(Ready(*said), 9, batch=3, confidence=0.8).ask("?").tied
    verdict = SelfConsistent(Ready(*said), 12, batch=3, confidence=0.75, merge=same).ask("?")
    assert (verdict.answer, verdict.scores) == ("auto", {"auto": 4.0, "train": 2.0})


def test_self_consistency_fails_and_cancels() -> None:
    clock = VirtualClock()
    with pytest.raises(ServiceError):
        SelfConsistent(Ready(AWAY)).ask("?")
    slow = Timed(clock, (None,))
    future = SelfConsistent(slow, clock=clock).sample("?", PARAMS, 2)
    future.cancel()
    assert all(one.cancelled() for one in slow.futures)
    inner = SelfConsistent(slow, clock=clock).submit("?", PARAMS)
    slow.futures[-1].cancel()
    assert inner.cancelled()
    owner = SelfConsistent(Ready("4", "5"), 3)
    assert (owner.model, owner.compute_logprobs("?", "ab").result()) == ("self_consistent(ready, 3)", (-1.0, -1.0))
    assert [c.text for c in SelfConsistent(Ready("4"), 3).sample("?", SamplingParams(seed=1), 2).result()] == ["4", "4"]
    for wrong in ({"samples": 0}, {"batch": 0}, {"confidence": 0.4}):
        with pytest.raises(ConfigError):
            SelfConsistent(Ready("4"), **wrong)
    with pytest.raises(ConfigError):
        owner.sample("?", PARAMS, 0)


def race_for_a_promise() -> tuple[int, int, bool]:
    """(how many came first, how often the giver was told of a cancellation, cancelled?)"""
    gone: list[int] = []
    promise: Promise[int] = Promise(lambda: gone.append(1))
    results: list[bool] = []
    ways = (lambda: promise.give(1), lambda: promise.fail(ValueError()), promise.future.cancel)
    threads = [threading.Thread(target=lambda way=way: results.append(way())) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(results), len(gone), promise.future.cancelled()


def test_a_promise_is_kept_once_whoever_is_first() -> None:
    for _ in range(200):
        first, told, cancelled = race_for_a_promise()
        assert (first, told) == (1, int(cancelled))


def test_judge_is_the_vote_alone() -> None:
    ballots: Sequence[Ballot] = (Ballot(member="a", answer="x"), Ballot(member="b", answer="x"))
    assert Ensemble({"a": Ready("4")}).judge(tuple(ballots)).answer == "x"

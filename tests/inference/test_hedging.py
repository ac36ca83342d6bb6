"""Hedging under a virtual clock: who answers when, what is counted, what the budget holds, and the figures that it is built for."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.clock import system_clock
from crucible_framework.errors import AllMembersFailedError, BackendError, ConfigError, ServiceError
from crucible_framework.events import collect
from crucible_framework.inference import Adaptive, Fixed, HedgedSampler, Never, Percentile, Survival, best_hedge, default_policy
from crucible_framework.protocols import HedgePolicy
from crucible_framework.records import Completion, HedgeLeg, HedgeOutcome, HedgeRequest, Prompt, SamplingParams
from crucible_framework.testing import VirtualClock

from .simulated import PARAMS, TRACES, Ready, Timed, replay

REQUEST = HedgeRequest(started=1, elapsed_s=0.0, in_flight=1, credit=1.0)
BROKEN = BackendError("the leg broke")


def two(clock: VirtualClock, first: tuple[str | Exception | None, float], second: tuple[str | Exception | None, float]) -> tuple[Timed, Timed]:
    return Timed(clock, (first[0],), (first[1],), "primary"), Timed(clock, (second[0],), (second[1],), "backup")


def test_a_slow_primary_is_answered_by_the_backup_and_both_calls_are_booked() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, ("slow", 1.0), ("fast", 0.05))
    sampler = HedgedSampler([primary, backup], Fixed(0.1), budget=1.0, clock=clock)
    with collect() as seen:
        future = sampler.sample("?", PARAMS)
        clock.advance(0.1499)
        assert not future.done()
        clock.advance(0.0002)
    assert future.result(0)[0].text == "fast"
    assert primary.futures[0].cancelled()
    stats = sampler.stats
    assert (stats.requests, stats.calls, stats.fired, stats.wins, stats.cancelled, stats.in_flight, stats.extra) == (1, 2, 1, 1, 1, 0, 1.0)
    event = next(e for e in seen if e["name"] == "hedge.fired")
    assert (event["delay_s"], event["probability"], event["model"]) == (0.1, 1.0, "backup")
    assert event["reason"] == "fixed delay of 0.1 s"
    assert event["elapsed_s"] == pytest.approx(0.1)
    assert clock.pending == 0


def test_a_fast_primary_is_not_hedged() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, ("fast", 0.05), ("x", 0.1))
    sampler = HedgedSampler([primary, backup], Fixed(0.1), budget=1.0, clock=clock)
    future = sampler.sample("?", PARAMS)
    clock.advance(1.0)
    assert (future.result(0)[0].text, backup.calls, clock.pending) == ("fast", 0, 0)


def test_a_failed_primary_starts_the_backup_at_once() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, (BROKEN, 0.01), ("saved", 0.05))
    sampler = HedgedSampler([primary, backup], Fixed(9.0), budget=1.0, clock=clock)
    future = sampler.sample("?", PARAMS)
    clock.advance(0.0601)
    assert future.result(0)[0].text == "saved"
    assert (sampler.stats.rescued, sampler.stats.failed) == (1, 1)


def test_a_failed_backup_does_not_harm() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, ("late", 1.0), (BROKEN, 0.01))
    future = HedgedSampler([primary, backup], Fixed(0.1), budget=1.0, clock=clock).sample("?", PARAMS)
    clock.advance(1.0)
    assert future.result(0)[0].text == "late"


def test_all_failed() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, (BROKEN, 0.1), (BROKEN, 0.1))
    future = HedgedSampler([primary, backup], Fixed(9.0), budget=1.0, clock=clock).sample("?", PARAMS)
    clock.advance(0.2)
    with pytest.raises(AllMembersFailedError, match="All 2 calls failed") as caught:
        future.result(0)
    assert set(caught.value.causes) == {"leg 0", "leg 1"}
    with pytest.raises(BackendError, match="the leg broke"):
        HedgedSampler(Ready(BROKEN), Never(), budget=0.0).sample("?", PARAMS).result()


def test_a_fault_of_the_request_is_not_repeated() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, (ConfigError("the prompt is too long"), 0.1), ("x", 0.1))
    future = HedgedSampler([primary, backup], Fixed(0.5), budget=1.0, clock=clock).sample("?", PARAMS)
    clock.advance(0.1)
    with pytest.raises(ConfigError, match="too long"):
        future.result(0)
    assert (backup.calls, clock.pending) == (0, 0)


def test_pushback_stops_hedging_for_a_while() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, ("ok", 1.0), ("b", 0.1))
    primary.answers = (ServiceError("too many requests", status=429), "ok", "ok")
    sampler = HedgedSampler([primary, backup], Fixed(0.2), budget=1.0, pushback_s=5.0, clock=clock)
    first = sampler.sample("?", PARAMS)
    clock.advance(0.1)
    assert not first.done()
    clock.advance(0.2)  # the hedge had started before the service said no
    assert first.result(0)[0].text == "b"
    again = HedgedSampler(Ready(ServiceError("away", status=503)), Fixed(0.2), budget=1.0).sample("?", PARAMS)
    with pytest.raises(ServiceError):
        again.result(0)
    early = Timed(clock, (ServiceError("no", status=429), "ok"), (0.1, 1.0))
    pushed = HedgedSampler([early, backup], Fixed(0.2), budget=1.0, pushback_s=5.0, clock=clock)
    one = pushed.sample("?", PARAMS)
    clock.advance(0.1)
    with pytest.raises(ServiceError):
        one.result(0)
    two_ = pushed.sample("?", PARAMS)
    clock.advance(1.0)
    assert (two_.result(0)[0].text, pushed.stats.fired) == ("ok", 0)


def test_levels_are_a_chain_until_an_answer_is_good_enough() -> None:
    clock = VirtualClock()
    legs = [Timed(clock, (text,), (0.1,), text) for text in ("cheap", "middle", "big")]

    def good(answer: tuple[Completion, ...]) -> bool:
        return answer[0].text == "big"

    future = HedgedSampler(legs, Fixed(9.0), budget=2.0, accept=good, clock=clock).sample("?", PARAMS)
    clock.advance(0.31)
    assert (future.result(0)[0].text, [leg.calls for leg in legs]) == ("big", [1, 1, 1])
    sampler = HedgedSampler(legs, Fixed(9.0), budget=2.0, accept=lambda _: False, clock=clock)
    future = sampler.sample("?", PARAMS)
    clock.advance(0.31)
    assert future.result(0)[0].text == "big"  # none is good, the last level is given
    assert sampler.stats.wasted_tokens == 33

    def broken(_: tuple[Completion, ...]) -> bool:
        raise ValueError("mine")

    future = HedgedSampler(legs, Fixed(9.0), budget=2.0, accept=broken, clock=clock).sample("?", PARAMS)
    clock.advance(0.31)
    with pytest.raises(ValueError, match="mine"):
        future.result(0)


def test_several_delays_start_several_legs() -> None:
    clock = VirtualClock()
    legs = [Timed(clock, (None,)), Timed(clock, (None,)), Timed(clock, ("third",), (0.1,))]
    future = HedgedSampler(legs, Fixed((0.1, 0.3)), budget=2.0, clock=clock).sample("?", PARAMS)
    clock.advance(0.51)
    assert future.result(0)[0].text == "third"
    assert [leg.asked[0][0] for leg in legs] == pytest.approx([0.0, 0.1, 0.4])


@given(budget=st.sampled_from([0.0, 0.02, 0.1, 0.5]), n=st.integers(1, 120), slow=st.booleans())
def test_the_budget_is_hard(budget: float, n: int, slow: bool) -> None:
    clock = VirtualClock()
    sampler = HedgedSampler(Timed(clock, ("x", BROKEN), (1.0 if slow else 0.1,)), Fixed(0.05), budget=budget, clock=clock)
    replay(clock, sampler, n, 0.3)
    stats = sampler.stats
    assert stats.calls - n <= budget * n + 1e-9
    assert stats.in_flight == 0
    assert stats.calls == stats.requests + stats.fired
    if budget == 0:
        assert stats.calls == n


def test_no_hedge_where_asking_twice_has_effects_or_the_pool_is_full() -> None:
    clock = VirtualClock()

    def fired(**settings: object) -> int:
        sampler = HedgedSampler(Timed(clock, ("x",), (1.0,)), Fixed(0.1), budget=1.0, clock=clock, **settings)  # type: ignore[arg-type]
        replay(clock, sampler, 3, 0.01)
        return sampler.stats.fired

    assert fired() == 3
    assert fired(idempotent=False) == 0
    assert fired(idempotent=lambda prompt, params: prompt == "y") == 0
    assert fired(brake_at=3) == 0
    assert fired(max_legs=1) == 0


def test_outer_cancellation_cancels_every_leg() -> None:
    clock = VirtualClock()
    legs = [Timed(clock, (None,)), Timed(clock, (None,))]
    sampler = HedgedSampler(legs, Fixed(0.1), budget=1.0, clock=clock)
    future = sampler.sample("?", PARAMS)
    clock.advance(0.2)
    assert future.cancel()
    assert all(leg.futures[0].cancelled() for leg in legs)
    assert (clock.pending, sampler.stats.in_flight, sampler.stats.cancelled) == (0, 0, 2)


def test_nothing_leaks_after_ten_thousand_cancelled_calls() -> None:
    clock, threads = VirtualClock(), threading.active_count()
    leg = Timed(clock, (None,))
    leg.keep = False
    sampler = HedgedSampler(leg, Fixed(0.1), budget=1.0, clock=clock)
    for i in range(10_000):
        sampler.sample("?", PARAMS).cancel()
        if i % 100 == 0:
            clock.advance(1.0)  # the virtual clock drops cancelled timers when they fall due
    assert (sampler.stats.in_flight, clock.pending, threading.active_count()) == (0, 0, threads)


def test_no_future_and_no_thread_is_left_of_ten_thousand_cancelled_calls_on_the_real_clock() -> None:
    """Their timers would have been due in an hour; the timer thread is the process's one."""
    system_clock.call_later(0.0, lambda: None)
    threads, alive = threading.active_count(), list[weakref.ref[Future[tuple[Completion, ...]]]]()

    class Hanging(Ready):
        def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
            return Future()

    sampler = HedgedSampler(Hanging("x"), Fixed(3600.0), budget=1.0)

    def give_up() -> None:
        future = sampler.sample("?", PARAMS)
        alive.append(weakref.ref(future))
        future.cancel()

    for _ in range(10_000):
        give_up()
    gc.collect()
    assert (threading.active_count() - threads, sum(one() is not None for one in alive), sampler.stats.in_flight) == (0, 0, 0)


def test_a_loser_that_cannot_be_cancelled_is_counted_when_it_ends() -> None:
    clock = VirtualClock()

    class Stubborn(Timed):
        def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
            future: Future[tuple[Completion, ...]] = Future()
            future.set_running_or_notify_cancel()
            inner = super().sample(prompt, params, n)
            inner.add_done_callback(lambda done: future.set_result(done.result()))
            return future

    sampler = HedgedSampler([Stubborn(clock, ("late",), (1.0,)), Timed(clock, ("fast",), (0.1,))], Fixed(0.1), budget=1.0, clock=clock)
    future = sampler.sample("?", PARAMS)
    clock.advance(0.3)
    assert (future.result(0)[0].text, sampler.stats.in_flight, sampler.stats.wasted_tokens) == ("fast", 1, 0)
    clock.advance(1.0)
    assert (sampler.stats.in_flight, sampler.stats.tokens, sampler.stats.wasted_tokens) == (0, 22, 11)


def test_a_leg_cancelled_from_outside_is_a_failure() -> None:
    clock = VirtualClock()
    primary, backup = two(clock, (None, 0.0), ("saved", 0.1))
    future = HedgedSampler([primary, backup], Fixed(9.0), budget=1.0, clock=clock).sample("?", PARAMS)
    primary.futures[0].cancel()
    clock.advance(0.1)
    assert future.result(0)[0].text == "saved"


def test_replicas_take_turns() -> None:
    legs = [Ready("a"), Ready("b")]
    sampler = HedgedSampler(legs, Never(), rotate=True)
    assert [sampler.sample("?", PARAMS).result()[0].text for _ in range(4)] == ["a", "b", "a", "b"]
    assert sampler.model == "hedged(ready)"
    assert sampler.compute_logprobs("?", "ab").result() == (-1.0, -1.0)


@pytest.mark.parametrize("make", [lambda: HedgedSampler([]), lambda: HedgedSampler(Ready("a"), budget=-1), lambda: HedgedSampler(Ready("a"), burst=0.5),
                                  lambda: Fixed(-1.0), lambda: Fixed(()),
                                  lambda: Percentile(100), lambda: Adaptive(-0.1), lambda: Adaptive(0.1, quantile=1.0)])  # fmt: skip
def test_settings_are_checked(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_the_added_time_per_request_is_small() -> None:
    """A generous bound for a busy machine; the benchmark gives the figure."""
    ready = Ready("a")
    sampler = HedgedSampler(ready, Adaptive(0.05), budget=0.05)

    def took(one: Ready | HedgedSampler) -> float:
        start = time.process_time()
        for _ in range(2000):
            one.sample("?", PARAMS).result()
        return time.process_time() - start

    took(sampler)
    assert min(took(sampler) for _ in range(3)) - min(took(ready) for _ in range(3)) < 2000 * 300e-6


# ------------------------------------------------------------------------------------------------------------- estimates
def test_survival_counts_cut_off_calls_as_long_as_they_were_watched() -> None:
    s = Survival(np.array([1.0, 2.0, 2.0, 3.0]), np.array([True, True, False, True]))
    assert s(np.array([0.5, 1.0, 2.0, 3.0])).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.0])
    assert s.quantile(0.5) == 2.0
    assert np.isnan(Survival(np.zeros(0)).quantile(0.5))
    rng = np.random.default_rng(0)
    true, cut = rng.lognormal(0, 0.9, 20_000), rng.lognormal(0.5, 0.9, 20_000)
    seen = Survival(np.minimum(true, cut), true <= cut)
    assert seen.quantile(0.95) == pytest.approx(np.quantile(true, 0.95), rel=0.05)
    assert np.quantile(np.minimum(true, cut), 0.95) < 0.8 * np.quantile(true, 0.95)  # what the naive estimate would say


def test_best_hedge_is_as_good_as_a_search() -> None:
    x = TRACES["lognormal"](np.random.default_rng(0), 4000)
    s = Survival(x)
    found = best_hedge(s, s, 0.05)
    for delay_s in np.quantile(x, [0.5, 0.8, 0.9, 0.95, 0.97]):
        q = min(1.0, 0.05 / float(s(np.array([delay_s]))[0]))
        t = np.linspace(delay_s, found.tail_without_s, 2000)
        tail = s(t) * (1 - q * (1 - s(t - delay_s)))
        assert found.tail_s <= t[np.argmax(tail <= 0.01)] * 1.01
    assert found.probability * float(s(np.array([found.delay_s]))[0]) <= 0.05 + 1e-9
    assert best_hedge(s, s, 0.0).gain == 0.0


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 50), spread=st.sampled_from([0.0, 0.2]))
def test_the_unit_of_time_does_not_matter(factor: float, seed: int, spread: float) -> None:
    x, y = np.random.default_rng(seed).lognormal(0, 0.9, (2, 300))
    one, other = (best_hedge(Survival(x * times), Survival(y * times), 0.05, spread=spread) for times in (1.0, factor))
    assert other.gain == pytest.approx(one.gain, abs=1e-4)
    assert other.tail_s == pytest.approx(one.tail_s * factor, rel=1e-3)


@given(order=st.permutations(range(60)))
def test_the_order_of_latencies_does_not_matter(order: list[int]) -> None:
    rng = np.random.default_rng(1)
    x, ended = rng.lognormal(0, 0.9, 60), rng.random(60) < 0.8
    one, other = Survival(x, ended), Survival(x[order], ended[order])
    assert other.after.tolist() == pytest.approx(one.after.tolist())
    assert best_hedge(other, other, 0.05).delay_s == pytest.approx(best_hedge(one, one, 0.05).delay_s)


def test_percentile_learns_from_elapsed_primaries() -> None:
    policy = Percentile(90, least=10)
    assert policy.plan(REQUEST).delay_s is None
    for i in range(1, 11):
        policy.observe(HedgeOutcome(latency_s=1, ok=True, legs=(HedgeLeg(index=0, started_s=0, latency_s=float(i), outcome="won"),)))
    assert policy.plan(REQUEST).delay_s == 9.0
    policy.observe(HedgeOutcome(latency_s=1, ok=False, legs=(HedgeLeg(index=0, started_s=0, latency_s=0.0, outcome="failed"),)))
    assert policy.plan(REQUEST).delay_s == 9.0


def test_defaults() -> None:
    assert isinstance(default_policy("tinker"), Never)
    assert isinstance(default_policy("local"), Adaptive)
    assert Never().plan(REQUEST).delay_s is None
    assert Adaptive(0.05).plan(REQUEST).probability == 0.0


# ------------------------------------------------------------------------------------------------------------ the figures
def run(make: Callable[[VirtualClock], HedgedSampler], n: int) -> tuple[float, float, float]:
    """(99th percentile after warm-up, extra calls, share of successes)."""
    clock = VirtualClock()
    sampler = make(clock)
    latency, ok = replay(clock, sampler, n, 0.5, count_from=n // 6)
    return float(np.quantile(latency, 0.99)), sampler.stats.extra, float(ok.mean())


def traced(name: str, budget: float, n: int, policy: HedgePolicy | None = None) -> tuple[Callable[[VirtualClock], HedgedSampler], np.ndarray]:
    x, y = TRACES[name](np.random.default_rng(1), n), TRACES[name](np.random.default_rng(2), n)

    def make(clock: VirtualClock) -> HedgedSampler:
        legs = [Timed(clock, after_s=x.tolist()), Timed(clock, after_s=y.tolist())]
        for leg in legs:
            leg.keep = False
        return HedgedSampler(legs, policy, budget=budget, clock=clock)

    return make, x[n // 6 :]


@pytest.mark.parametrize(("name", "budget"), [("bimodal", 0.08), ("rare", 0.02), ("lognormal", 0.05), ("pareto", 0.08)])
def test_within_three_points_of_the_offline_optimum(name: str, budget: float) -> None:
    """5 % on the bimodal trace is in `benchmarks/inference.py`: that the budget is the share of slow requests takes a longer trace."""
    make, x = traced(name, budget, 9000)
    tail, extra, ok = run(make, 9000)
    optimum = best_hedge(Survival(x), Survival(x), budget, candidates=800)
    assert 1 - tail / optimum.tail_without_s >= optimum.gain - 0.03
    assert extra <= budget
    assert ok == 1.0
    if name == "bimodal":
        assert 1 - tail / optimum.tail_without_s >= 0.69


def test_almost_nothing_is_sent_where_hedging_cannot_help() -> None:
    make, _ = traced("light", 0.05, 6000)
    assert run(make, 6000)[1] <= 0.003
    slow = 0.8 * np.random.default_rng(3).lognormal(0, 0.15, 12_000) * np.where(np.random.default_rng(4).random(12_000) < 0.05, 10, 1)
    clock = VirtualClock()

    class Long(Timed):
        """A request that is slow is slow on every leg."""

        def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
            self.calls = round(self.clock.now() / 50.0)  # the request's number, since each is done before the next
            return super().sample(prompt, params, n)

    leg = Long(clock, after_s=slow.tolist())
    leg.keep = False
    sampler = HedgedSampler(leg, Adaptive(0.05), budget=0.05, clock=clock)
    replay(clock, sampler, 12_000, 50.0)
    assert sampler.stats.extra <= 0.003  # the first fifteen hedges that show it, and probes


def test_backups_that_always_fail_cost_no_answer() -> None:
    x = TRACES["bimodal"](np.random.default_rng(1), 5000)

    def make(clock: VirtualClock) -> HedgedSampler:
        return HedgedSampler([Timed(clock, after_s=x.tolist()), Timed(clock, (BROKEN,), (0.05,))], budget=0.05, clock=clock)

    assert run(make, 5000)[2] == 1.0

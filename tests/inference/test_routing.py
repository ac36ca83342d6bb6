"""Routers: what they choose, what they regret, what a ceiling holds, and that what they learned can be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from crucible_framework.errors import BackendError, CapabilityError, ConfigError, NotFoundError
from crucible_framework.events import collect
from crucible_framework.inference import (
    EXP3,
    KLUCB,
    BestPerforming,
    Ceiling,
    LeastLoaded,
    LinUCB,
    Member,
    Pool,
    Price,
    RoundRobin,
    RoutedSampler,
    SlidingWindow,
    Thompson,
    Weighted,
    load_router,
    prompt_features,
    routers,
    save_router,
)
from crucible_framework.protocols import Router
from crucible_framework.records import Completion, Message, Prompt, SamplingParams
from crucible_framework.testing import VirtualClock

from .simulated import PARAMS, Ready, Timed

NAMES = ("a", "b", "c")
ARMS = (0.9, 0.85, 0.8, 0.7, 0.5)


def told(router: Router, name: str, reward: float = 1.0, *, ok: bool = True, latency_s: float = 1.0, context: np.ndarray | None = None) -> None:
    router.observe(name, reward=reward, cost=0.0, latency_s=latency_s, ok=ok, context=context)


def regret(router: Router, means: Sequence[float], steps: int, seed: int, *, flip: bool = False) -> float:
    rng, names, rate, lost = np.random.default_rng(seed), [str(i) for i in range(len(means))], np.array(means), 0.0
    for step in range(steps):
        if flip and step == steps // 2:
            rate = rate[::-1]
        arm = int(router.choose(names))
        lost += float(rate.max() - rate[arm])
        told(router, str(arm), float(rng.random() < rate[arm]))
    return lost


def test_round_robin_and_least_loaded() -> None:
    turn = RoundRobin()
    assert [turn.choose(NAMES) for _ in range(6)] == ["a", "b", "c"] * 2
    busy = LeastLoaded()
    assert [busy.choose(NAMES) for _ in range(3)] == ["a", "b", "c"]
    told(busy, "b")
    assert busy.choose(NAMES) == "b"


def test_weighted() -> None:
    router = Weighted({"a": 0.9, "b": 0.1, "c": 0.0}, seed=1)
    drawn = [router.choose(NAMES) for _ in range(500)]
    assert 400 < drawn.count("a") < 490
    assert drawn.count("c") == 0
    with pytest.raises(ConfigError):
        Weighted({"a": -1.0})
    with pytest.raises(ConfigError, match="all 0"):
        Weighted({"a": 0.0}).choose(["a"])


@pytest.mark.parametrize("make", [lambda: BestPerforming(seed=0), lambda: Thompson(seed=0), lambda: SlidingWindow(seed=0), KLUCB, LinUCB])
def test_a_model_that_fails_fast_gets_under_five_percent(make: Callable[[], Router]) -> None:
    router, fast = make(), 0
    for _ in range(1000):
        name = router.choose(["fails fast", "good"])
        fast += name == "fails fast"
        told(router, name, ok=name == "good", latency_s=0.002 if name == "fails fast" else 0.5)
    assert fast < 50


@pytest.mark.parametrize("make", [lambda: BestPerforming(seed=0, explore=0.0), lambda: Thompson(seed=0), KLUCB, lambda: EXP3(seed=0), LinUCB])
def test_a_newcomer_is_tried_soon(make: Callable[[], Router]) -> None:
    router = make()
    rng = np.random.default_rng(0)
    for _ in range(300):
        name = router.choose(["a", "b"])
        told(router, name, float(rng.random() < 0.6))
    tries = [router.choose(["a", "b", "new"]) for _ in range(60)]
    assert "new" in tries


def test_best_performing_prefers_the_faster_of_equals() -> None:
    router = BestPerforming(explore=0.0)
    for name, latency_s in (("a", 2.0), ("b", 0.5), ("c", 1.0)):
        told(router, name, latency_s=latency_s)
    assert router.choose(NAMES) == "b"


@pytest.mark.parametrize("seed", [0, 1])
def test_thompson_regrets_little(seed: int) -> None:
    assert regret(Thompson(seed=seed), ARMS, 10_000, seed + 100) <= 60


def test_discounted_thompson_follows_a_reversal() -> None:
    assert regret(Thompson(seed=0, discount=0.999), ARMS, 10_000, 100, flip=True) <= 300


def test_a_window_forgets_what_is_older() -> None:
    router = SlidingWindow(window=50, seed=0)
    for won in (1.0, 0.0):
        for _ in range(50):
            router.observe("a", reward=won, cost=0.0, latency_s=1.0, ok=True)
    fresh = SlidingWindow(window=50, seed=0)
    for _ in range(50):
        fresh.observe("a", reward=0.0, cost=0.0, latency_s=1.0, ok=True)
    assert router.state() == fresh.state()
    assert router.probabilities(["a", "b"]).tolist() == fresh.probabilities(["a", "b"]).tolist()
    assert regret(SlidingWindow(window=400, seed=1), ARMS, 4000, 1, flip=True) < regret(Thompson(seed=1), ARMS, 4000, 1, flip=True)
    for damaged in ({"recent": 3}, {"recent": [["a", 2.0]]}, {}):
        with pytest.raises(ConfigError):
            router.restore(damaged)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="window is 0"):
        SlidingWindow(window=0)


def test_the_other_bandits_regret_less_than_a_random_choice() -> None:
    random_choice = 2500 * (0.9 - sum(ARMS) / 5)
    assert regret(KLUCB(), ARMS, 2500, 1) < random_choice / 4
    assert regret(EXP3(seed=1), ARMS, 2500, 1) < random_choice / 2


def test_lin_ucb_learns_which_prompts_suit_whom() -> None:
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(4, 8))
    theta /= np.linalg.norm(theta, axis=1, keepdims=True) * 2
    router, lost = LinUCB(), 0.0
    for _ in range(5000):
        x = rng.normal(size=8)
        x /= np.linalg.norm(x)
        mean = 0.5 + theta @ x
        arm = int(router.choose(["0", "1", "2", "3"], np.append(x, 1.0)))
        lost += float(mean.max() - mean[arm])
        told(router, str(arm), float(np.clip(mean[arm] + rng.normal() * 0.1, 0, 1)), context=np.append(x, 1.0))
    assert lost <= 60


@pytest.mark.parametrize("make", [RoundRobin, LeastLoaded, Weighted, lambda: BestPerforming(explore=0.0), lambda: Thompson(seed=3),
                                  lambda: SlidingWindow(window=30, seed=3), KLUCB, EXP3, LinUCB])  # fmt: skip
def test_what_was_learned_is_kept(make: Callable[[], Router], tmp_path: Path) -> None:
    router = make()
    for i in range(50):
        told(router, router.choose(NAMES), float(i % 3 == 0))
    save_router(router, tmp_path / "router.json")
    again = load_router(make(), tmp_path / "router.json")
    assert again.state() == router.state()
    if not isinstance(router, (Thompson, Weighted, EXP3)):
        assert [again.choose(NAMES) for _ in range(3)] == [router.choose(NAMES) for _ in range(3)]
    with pytest.raises(NotFoundError):
        load_router(make(), tmp_path / "none.json")


def test_damaged_or_foreign_states_are_refused(tmp_path: Path) -> None:
    save_router(Thompson(), tmp_path / "a.json")
    with pytest.raises(ConfigError, match="'Thompson'"):
        load_router(KLUCB(), tmp_path / "a.json")
    with pytest.raises(ConfigError, match="good"):
        Thompson().restore({"good": {"a": "many"}})
    with pytest.raises(ConfigError, match="square"):
        LinUCB().restore({"a": {"inverse": [[1.0, 0.0]], "sums": [1.0]}})
    with pytest.raises(ConfigError, match="square"):
        LinUCB().restore({"a": 3})


@pytest.mark.parametrize("make", [lambda: Thompson(discount=0.0), lambda: EXP3(explore=2.0), lambda: LinUCB(ridge=0.0), lambda: BestPerforming(decay=0.0),
                                  lambda: Ceiling(0.0), lambda: told(Thompson(), "a", 2.0), lambda: LinUCB().choose(["a"], np.array([np.nan]))])  # fmt: skip
def test_settings_are_checked(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_names_make_routers() -> None:
    assert all(hasattr(routers.get(name)(), "choose") for name in routers.names())


# ----------------------------------------------------------------------------------------------------------------- sampler
def test_a_routed_sampler_learns_from_rewards() -> None:
    good, bad = Ready("right"), Ready("wrong")
    sampler = RoutedSampler({"good": good, "bad": bad}, Thompson(seed=0), reward=lambda prompt, answer: float(answer[0].text == "right"))
    with collect() as seen:
        for _ in range(200):
            sampler.sample("?", PARAMS).result()
    assert good.calls > 180
    event = next(e for e in seen if e["name"] == "route.chosen")
    assert (event["among"], event["reason"]) == (["good", "bad"], "Thompson")
    assert sampler.model == "routed(good, bad)"


def test_failures_are_given_and_learned() -> None:
    class Refuses(Ready):
        def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
            raise ConfigError("too long")

    sampler = RoutedSampler({"bad": Ready(BackendError("broken"))}, "kl_ucb")
    with pytest.raises(BackendError, match="broken"):
        sampler.sample("?", PARAMS).result()
    assert sampler.router.state()["reward"] == {"bad": 0.0}
    with pytest.raises(ConfigError, match="too long"):
        RoutedSampler({"a": Refuses("x")}).sample("?", PARAMS).result()
    with pytest.raises(ConfigError, match="reward"):
        RoutedSampler({"a": Ready("x")}, reward=lambda prompt, answer: 7.0).sample("?", PARAMS).result()
    with pytest.raises(CapabilityError):
        sampler.compute_logprobs("?", "x")


def test_cancelling_goes_both_ways() -> None:
    clock = VirtualClock()
    leg = Timed(clock, (None,))
    sampler = RoutedSampler({"a": leg}, "lin_ucb", clock=clock)
    future = sampler.sample("?", PARAMS)
    future.cancel()
    assert leg.futures[0].cancelled()
    again = sampler.sample("?", PARAMS)
    leg.futures[1].cancel()
    assert again.cancelled()


@pytest.mark.parametrize("router", ["thompson", "exp3"])
def test_a_ceiling_holds_and_is_used(router: str) -> None:
    price = {"cheap": 0.1, "dear": 10.0}  # per million tokens; a call has 10 + 1
    pool = Pool([Member(name=n, sampler=Ready(n), price=Price(input_per_million=p, output_per_million=p)) for n, p in price.items()])
    ceiling = Ceiling(30e-6)
    rng = np.random.default_rng(0)
    worth = {"cheap": 0.5, "dear": 0.9}
    sampler = RoutedSampler(pool, router, reward=lambda prompt, answer: float(rng.random() < worth[answer[0].text]), ceiling=ceiling)
    for _ in range(1500):
        sampler.sample("?", PARAMS).result()
    assert ceiling.requests == 1500
    assert 0.97 <= ceiling.spent / 1500 / ceiling.per_request <= 1.01
    with pytest.raises(ConfigError, match="no price of b"):
        RoutedSampler({"b": Ready("x")}, ceiling=ceiling)


def test_prompt_features() -> None:
    code, chat = prompt_features("def f(x):\n    return {x: [1]}\n"), prompt_features((Message(role="user", content="Wer bist du?"),))
    assert code.shape == chat.shape == (8,)
    assert code[5] > chat[5]
    assert prompt_features("ÄÖÜ?")[4] > 0.5
    assert prompt_features((1, 2, 3))[2] > 0.9
    assert prompt_features("")[0] == 1.0
    for features in (code, chat):
        assert ((features >= 0) & (features <= 1)).all()

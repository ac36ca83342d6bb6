"""Judging another router from a log: right on average, intervals that cover, and silence where the log cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from crucible_framework import events
from crucible_framework.errors import ConfigError, DataError, FormatError, TooFewError
from crucible_framework.files import JsonLines
from crucible_framework.inference import (
    EXP3,
    KLUCB,
    BestPerforming,
    Ceiling,
    LinUCB,
    Member,
    Pool,
    Price,
    RoundRobin,
    Routed,
    RoutedSampler,
    Thompson,
    Weighted,
    always,
    off_policy,
    read_routes,
    replayed,
)
from crucible_framework.protocols import Router

from .simulated import PARAMS, Ready

NAMES = ("small", "large")


def logged(seed: int, n: int = 600, *, share: float = 0.2) -> list[Routed]:
    """The large model is right with .9 - .4 x, the small one with .4 + .4 x; the log asks the large one in a share that grows with x."""
    rng, rows = np.random.default_rng(seed), list[Routed]()
    for _ in range(n):
        x = float(rng.random())
        large = share + 0.3 * x
        chose = "large" if rng.random() < large else "small"
        right = 0.9 - 0.4 * x if chose == "large" else 0.4 + 0.4 * x
        chance = large if chose == "large" else 1 - large
        reward, cost = float(rng.random() < right), (1.0 if chose == "large" else 0.1) * float(rng.uniform(0.5, 1.5))
        rows.append(Routed(chose=chose, among=NAMES, probability=chance, reward=reward, cost=cost, latency_s=1.0, ok=True, context=(x,)))
    return rows


def by_prompt(names: tuple[str, ...], context: tuple[float, ...]) -> dict[str, float]:
    return {"large": 1.0} if context[0] < 0.6 else {"small": 1.0}


TRUTH = {"large": 0.7, "small": 0.6}  # means over x in [0, 1]
BY_PROMPT = (0.9 - 0.2 * 0.6) * 0.6 + (0.4 + 0.2 * 1.6) * 0.4


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = {"large": 0, "small": 0, "by_prompt": 0}
    errors = {name: list[float]() for name in covered}
    for seed in range(120):
        log = logged(seed)
        for name, policy, truth in (("large", always("large"), 0.7), ("small", always("small"), 0.6), ("by_prompt", by_prompt, BY_PROMPT)):
            found = off_policy(log, policy).reward
            covered[name] += found.low <= truth <= found.high
            errors[name].append(found.value - truth)
    assert all(count >= 105 for count in covered.values()), covered  # 95 % of 120 are 114; 105 or fewer have a chance of 1e-4
    assert all(abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(120) for values in errors.values())


def test_the_naive_mean_of_what_was_asked_is_wrong_where_the_log_chose_by_prompt() -> None:
    log = logged(1, 20_000)
    naive = np.mean([row.reward for row in log if row.chose == "large"])
    found = off_policy(log, always("large"))
    assert naive < 0.7 - 0.02
    assert found.reward.value == pytest.approx(0.7, abs=0.015)
    assert found.cost.value == pytest.approx(1.0, abs=0.02)


def test_the_gain_says_whether_to_switch() -> None:
    log = logged(2, 3000)
    better, worse = off_policy(log, by_prompt), off_policy(log, lambda names, context: {"small": 1.0} if context[0] < 0.6 else {"large": 1.0})
    assert better.gain.low > 0
    assert worse.gain.high < 0
    assert better.reward.value - np.mean([row.reward for row in log]) == pytest.approx(better.gain.value)
    assert better.effective < 3000
    assert 0 < better.largest_weight < 0.1
    same = off_policy(log, lambda names, context: {"large": 0.2 + 0.3 * context[0], "small": 0.8 - 0.3 * context[0]})
    assert same.gain.low <= 0 <= same.gain.high
    assert same.effective == pytest.approx(3000)


def test_what_the_log_never_tried_is_not_judged() -> None:
    row = Routed(chose="small", among=NAMES, probability=1.0, reward=1.0, cost=0.1, latency_s=1.0, ok=True)
    with pytest.raises(TooFewError, match=r"agree on 0 of 100.*explore"):
        off_policy([row] * 100, always("large"))
    with pytest.raises(TooFewError, match="has 5 rows"):
        off_policy([row] * 5, always("small"))
    unknown = Routed(chose="small", among=NAMES, probability=None, reward=1.0, cost=0.1, latency_s=1.0, ok=True)
    with pytest.raises(DataError, match="1 of 101 rows"):
        off_policy([row] * 100 + [unknown], always("small"))
    with pytest.raises(DataError, match=r"\[0, 1\] features"):
        off_policy([row] * 40 + logged(0, 40), always("small"))
    for policy in (lambda names, context: {"small": 0.5}, lambda names, context: {"other": 1.0}):
        with pytest.raises(ConfigError, match="sum to 1"):
            off_policy([row] * 100, policy)
    with pytest.raises(ConfigError):
        off_policy([row] * 100, always("small"), level=1.0)


def test_a_learning_router_is_played_against_the_log() -> None:
    rng = np.random.default_rng(0)
    log = []
    for _ in range(6000):
        chose = NAMES[int(rng.random() < 0.3)]
        chance = 0.3 if chose == "large" else 0.7
        reward = float(rng.random() < (0.9 if chose == "large" else 0.5))
        log.append(Routed(chose=chose, among=NAMES, probability=chance, reward=reward, cost=0.0, latency_s=1.0, ok=True))
    learned, even = replayed(log, Thompson(seed=1)), replayed(log, RoundRobin())
    assert learned.method == "replay"
    assert learned.value > 0.85  # close to always asking the better one
    assert even.low <= 0.7 <= even.high
    with pytest.raises(TooFewError, match="agreed with"):
        replayed(log[:60], RoundRobin())


# ------------------------------------------------------------------------------------------------------ probabilities
@pytest.mark.parametrize("make", [lambda: Weighted({"a": 3.0, "b": 1.0}), lambda: BestPerforming(explore=0.3), lambda: Thompson(seed=3), lambda: EXP3(seed=2)])
def test_routers_choose_as_often_as_they_say(make: Callable[[], Router]) -> None:
    router, names = make(), ["a", "b", "c"]
    for i in range(30):
        router.observe(names[i % 3], reward=(0.9, 0.6, 0.5)[i % 3], cost=0.0, latency_s=1.0, ok=True)
    law = router.probabilities(names)  # type: ignore[attr-defined]
    assert law.sum() == pytest.approx(1.0)
    drawn = [router.choose(names) for _ in range(4000)]
    assert [drawn.count(name) / 4000 for name in names] == pytest.approx(law.tolist(), abs=0.03)


def routed(router: Router, explore: float = 0.0, ceiling: Ceiling | None = None, n: int = 400) -> list[Routed]:
    price = Price(input_per_million=0.0, output_per_million=1.0)
    pool = Pool([Member(name=name, sampler=Ready(name), price=price) for name in NAMES])
    log: list[Routed] = []
    sampler = RoutedSampler(pool, router, explore=explore, ceiling=ceiling, log=log.append, reward=lambda prompt, answer: 0.5)
    for _ in range(n):
        sampler.sample("?", PARAMS).result()
    return log


@pytest.mark.parametrize("make", [KLUCB, LinUCB, RoundRobin, lambda: Thompson(seed=1), lambda: Weighted({"small": 9.0})])
def test_logged_probabilities_are_those_of_the_choices(make: Callable[[], Router]) -> None:
    """Over any log Σ 1[chose = a] / p(a) is the number of rows on average, if the probabilities are true."""
    log = routed(make(), explore=0.4)
    assert all(row.probability is not None and 0.2 <= row.probability <= 1 for row in log)
    for name in NAMES:
        total = sum(1 / (row.probability or 1) for row in log if row.chose == name)
        assert total == pytest.approx(len(log), rel=0.25)


def test_a_probability_that_cannot_be_said_is_none() -> None:
    log = routed(Thompson(seed=1), ceiling=Ceiling(1.0, slack=5), n=50)
    assert log[-1].probability is None
    assert {row.probability for row in routed(KLUCB(), n=20)} == {1.0}


def test_events_are_the_log(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with closing(JsonLines(path)) as lines:
        stop = events.subscribe(lambda event: lines.append(dict(event)))
        log = routed(Thompson(seed=1), explore=0.1, n=40)
        stop()
    assert list(read_routes(path)) == log
    path.write_text('{"name": "route.ended", "chose": "a"}\n')
    with pytest.raises(FormatError, match=r"route\.ended"):
        read_routes(path)
    with pytest.raises(ConfigError, match="explore is 2"):
        RoutedSampler({"a": Ready("a")}, explore=2)

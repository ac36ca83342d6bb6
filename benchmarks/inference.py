"""Hedging and routing against what is possible: simulated traces under a virtual clock, beside the offline optimum, and the time they cost.

usage: python benchmarks/inference.py [requests per trace]
Every figure but the last is the same on every machine. The offline optimum is SingleR (Kaler, He & Elnikety 2017) with the trace known.
"""

# ruff: noqa: ARG002 - simulated samplers take what every sampler takes
from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from crucible_framework.inference import (
    EXP3,
    KLUCB,
    Adaptive,
    Ceiling,
    HedgedSampler,
    LinUCB,
    Percentile,
    Survival,
    Thompson,
    best_hedge,
)
from crucible_framework.protocols import HedgePolicy, Router
from crucible_framework.records import Completion, Prompt, SamplingParams
from crucible_framework.testing import VirtualClock

Floats = NDArray[np.float64]
ANSWER = (Completion(text="yes", tokens=(1,), logprobs=(-0.1,), stop_reason="stop", prompt_tokens=10),)
PARAMS = SamplingParams(max_tokens=1)
TRACES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "bhope (5% ×10, 5 ms)": lambda rng, n: 0.005 * rng.lognormal(0, 0.4, n) * np.where(rng.random(n) < 0.05, 10, 1),
    "bimodal LLM (5% ×10)": lambda rng, n: 0.8 * rng.lognormal(0, 0.15, n) * np.where(rng.random(n) < 0.05, 10, 1),
    "rare (1.5% ×20)": lambda rng, n: rng.lognormal(0, 0.2, n) * np.where(rng.random(n) < 0.015, 20, 1),
    "lognormal σ .9": lambda rng, n: rng.lognormal(0, 0.9, n),
    "Pareto 1.8": lambda rng, n: 1 + rng.pareto(1.8, n),
    "light (uniform)": lambda rng, n: rng.uniform(0.9, 1.1, n),
}


class Leg:
    """Answers after the next of given times."""

    model = "leg"

    def __init__(self, clock: VirtualClock, after_s: Floats) -> None:
        self.clock, self.after_s, self.calls = clock, after_s.tolist(), 0

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        future: Future[tuple[Completion, ...]] = Future()

        def end() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(ANSWER)

        cancel = self.clock.call_later(self.after_s[self.calls % len(self.after_s)], end)
        future.add_done_callback(lambda done: cancel() if done.cancelled() else None)
        self.calls += 1
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        raise NotImplementedError


class Ready(Leg):
    """Answers at once."""

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        future: Future[tuple[Completion, ...]] = Future()
        future.set_result(ANSWER)
        return future


def replay(x: Floats, y: Floats, policy: HedgePolicy, budget: float, warm: int) -> tuple[float, float]:
    """(99th percentile after warm-up, extra calls) of a stream of requests."""
    clock, latency = VirtualClock(), np.zeros(len(x))
    apart_s = float(np.median(x))
    sampler = HedgedSampler([Leg(clock, x), Leg(clock, y)], policy, budget=budget, clock=clock)

    def arrive(i: int) -> None:
        began_s = clock.now()
        sampler.sample("x", PARAMS).add_done_callback(lambda _: latency.__setitem__(i, clock.now() - began_s))
        if i + 1 < len(x):
            clock.call_later(apart_s, lambda: arrive(i + 1))

    arrive(0)
    clock.advance(apart_s * len(x) + 1e5)
    return float(np.quantile(latency[warm:], 0.99)), sampler.stats.extra


def hedging(n: int) -> None:
    """How far the 99th percentile falls, and what it costs."""
    print(f"{'trace':22s}{'budget':>7s}{'optimum':>9s}{'adaptive':>10s}{'extra':>8s}{'p95':>9s}{'extra':>8s}")
    warm = n // 8
    for name, make in TRACES.items():
        x, y = make(np.random.default_rng(1), n), make(np.random.default_rng(2), n)
        known = Survival(x[warm:])
        for budget in (0.02, 0.05, 0.08):
            best = best_hedge(known, known, budget, candidates=1000)
            tail, extra = replay(x, y, Adaptive(budget), budget, warm)
            simple, simple_extra = replay(x, y, Percentile(95), budget, warm)
            before = best.tail_without_s
            print(f"{name:22s}{budget:7.0%}{best.gain:9.1%}{1 - tail / before:10.1%}{extra:8.2%}{1 - simple / before:9.1%}{simple_extra:8.2%}")


def regret(router: Router, steps: int, seed: int, *, flip: bool = False) -> float:
    """What was lost against always asking the best."""
    rng, names, means, lost = np.random.default_rng(seed), list("01234"), np.array([0.9, 0.85, 0.8, 0.7, 0.5]), 0.0
    for step in range(steps):
        if flip and step == steps // 2:
            means = means[::-1]
        arm = int(router.choose(names))
        lost += float(means.max() - means[arm])
        router.observe(str(arm), reward=float(rng.random() < means[arm]), cost=0.0, latency_s=1.0, ok=True)
    return lost


def contexts(seed: int) -> float:
    """Regret of LinUCB on linear rewards of 8 features, 4 models, 5,000 requests."""
    rng, router, lost = np.random.default_rng(seed), LinUCB(), 0.0
    theta = rng.normal(size=(4, 8))
    theta /= np.linalg.norm(theta, axis=1, keepdims=True) * 2
    for _ in range(5000):
        x = rng.normal(size=8)
        x /= np.linalg.norm(x)
        means = 0.5 + theta @ x
        arm = int(router.choose(list("0123"), np.append(x, 1.0)))
        lost += float(means.max() - means[arm])
        reward = float(np.clip(means[arm] + rng.normal() * 0.1, 0, 1))
        router.observe(str(arm), reward=reward, cost=0.0, latency_s=1.0, ok=True, context=np.append(x, 1.0))
    return lost


def paced(per_request: float) -> tuple[float, float]:
    """(cost as a share of the ceiling, mean reward) of Thompson sampling under a ceiling, 5,000 requests."""
    rng, ceiling, router = np.random.default_rng(0), Ceiling(per_request), Thompson(seed=1)
    costs, worth, won = {"cheap": 0.01, "middle": 0.3, "dear": 1.0}, {"cheap": 0.6, "middle": 0.8, "dear": 0.95}, 0.0
    for _ in range(5000):
        able = ceiling.affordable(list(costs))
        untried = any(not ceiling.expected(name) for name in able)
        name = router.choose(able) if untried else ceiling.best(able, router.scores(able))
        held, cost, reward = ceiling.reserve(name), costs[name] * rng.uniform(0.5, 1.5), float(rng.random() < worth[name])
        won += reward
        ceiling.pay(name, cost, held)
        router.observe(name, reward=reward, cost=cost, latency_s=1.0, ok=True)
    return ceiling.spent / 5000 / per_request, won / 5000


def routing(seeds: int) -> None:
    """Mean regret, and how well a ceiling holds."""
    makers: dict[str, Callable[[int], Router]] = {
        "Thompson": lambda s: Thompson(seed=s),
        "Thompson, discount .999": lambda s: Thompson(seed=s, discount=0.999),
        "KL-UCB": lambda _: KLUCB(),
        "EXP3": lambda s: EXP3(seed=s),
    }
    print(f"\n{'router, arms .9 .85 .8 .7 .5, 10,000 requests':48s}{'regret':>8s}{'reversed half-way':>20s}")
    for name, make in makers.items():
        steady = statistics.mean(regret(make(s), 10_000, 100 + s) for s in range(seeds))
        turned = statistics.mean(regret(make(s), 10_000, 100 + s, flip=True) for s in range(seeds))
        print(f"{name:48s}{steady:8.1f}{turned:20.1f}")
    print(f"{'LinUCB, 8 features, 4 models, 5,000 requests':48s}{statistics.mean(contexts(s) for s in range(seeds)):8.1f}")
    for per_request in (0.1, 0.3, 0.6):
        share, reward = paced(per_request)
        print(f"ceiling {per_request:.1f} of models at .01, .3 and 1: cost {share:.4f} of the ceiling, reward {reward:.3f}")


def overhead(n: int = 5000) -> None:
    """Microseconds that an adaptive hedge adds to a request that is answered at once."""
    ready = Ready(VirtualClock(), np.ones(1))

    def each_us(sampler: Ready | HedgedSampler) -> float:
        start = time.process_time()
        for _ in range(n):
            sampler.sample("x", PARAMS).result()
        return (time.process_time() - start) / n * 1e6

    hedged = HedgedSampler(ready, Adaptive(0.05), budget=0.05)
    added = statistics.median(each_us(hedged) - each_us(ready) for _ in range(7))
    print(f"\nadded per request: {added:.0f} µs of processor time")


if __name__ == "__main__":
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 30_000
    hedging(requests)
    routing(3)
    overhead()

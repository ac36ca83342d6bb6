"""Hedging and routing against what is possible: simulated traces under a virtual clock, beside the offline optimum and the rivals on PyPI.

usage: python benchmarks/inference.py [requests per trace, 20000] [--no-rivals]      (three minutes of processor time)
Writes benchmarks/results/inference.json and inference.md, and prints the latter. All figures but the time that a hedge adds are the same on
every machine. The offline optimum is SingleR (Kaler, He & Elnikety 2017) with the trace known. The rivals (`rivals.py`) run where they are installed,
on fewer requests.
"""

# ruff: noqa: ARG001, ARG002 - simulated samplers take what every sampler takes
from __future__ import annotations

import gc
import json
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import rivals
from numpy.typing import NDArray

from crucible_framework.clock import system_clock
from crucible_framework.errors import BackendError
from crucible_framework.inference import (
    EXP3,
    KLUCB,
    Adaptive,
    BestPerforming,
    Ceiling,
    Fixed,
    HedgedSampler,
    HedgeStats,
    LinUCB,
    SlidingWindow,
    Survival,
    Thompson,
    best_hedge,
)
from crucible_framework.protocols import Clock, OnPiece, Router, Sampler
from crucible_framework.records import Completion, Piece, Prompt, SamplingParams
from crucible_framework.testing import VirtualClock

Floats = NDArray[np.float64]
Row = dict[str, object]
ANSWER = (Completion(text="yes", tokens=(1,), logprobs=(-0.1,), stop_reason="stop", prompt_tokens=10),)
PARAMS = SamplingParams(max_tokens=1)
BROKEN = BackendError("the leg broke")
TRACES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "bimodal LLM (5 % ×10)": lambda rng, n: 0.8 * rng.lognormal(0, 0.15, n) * np.where(rng.random(n) < 0.05, 10, 1),
    "rare (1.5 % ×20)": lambda rng, n: rng.lognormal(0, 0.2, n) * np.where(rng.random(n) < 0.015, 20, 1),
    "lognormal σ .9": lambda rng, n: rng.lognormal(0, 0.9, n),
    "Pareto 1.8": lambda rng, n: 1 + rng.pareto(1.8, n),
}
HOPELESS: dict[str, Callable[[np.random.Generator, int], tuple[Floats, Floats]]] = {
    "light: uniform .9 to 1.1": lambda rng, n: (rng.uniform(0.9, 1.1, n), rng.uniform(0.9, 1.1, n)),
    "slow requests are slow anywhere": lambda rng, n: (times := TRACES["bimodal LLM (5 % ×10)"](rng, n), times),
}
BUDGETS = (0.02, 0.05, 0.08)


class Leg:
    """Answers request i after the i-th time; fails after its size where that is negative. The request's number is its prompt."""

    model = "leg"

    def __init__(self, clock: Clock, after_s: Floats) -> None:
        self.clock, self.after_s = clock, after_s.tolist()

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        future: Future[tuple[Completion, ...]] = Future()
        after_s = self.after_s[int(str(prompt))]

        def end() -> None:
            if future.set_running_or_notify_cancel():
                if after_s < 0:
                    future.set_exception(BROKEN)
                else:
                    future.set_result(ANSWER)

        cancel = self.clock.call_later(abs(after_s), end)
        future.add_done_callback(lambda done: cancel() if done.cancelled() else None)
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        raise NotImplementedError


class Talking(Leg):
    """Streams `max_tokens` tokens, the first after the i-th time and then one every 20 ms."""

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[tuple[Completion, ...]]:
        del n
        future: Future[tuple[Completion, ...]] = Future()

        def say(number: int) -> None:
            if future.cancelled():
                return
            on_piece(Piece(index=0, text="w ", tokens=(number,), logprobs=(-0.1,)))
            if number + 1 < params.max_tokens:
                self.clock.call_later(0.02, lambda: say(number + 1))
            elif future.set_running_or_notify_cancel():
                tokens = tuple(range(params.max_tokens))
                future.set_result((Completion(text="w " * len(tokens), tokens=tokens, logprobs=(), stop_reason="length", prompt_tokens=10),))

        self.clock.call_later(self.after_s[int(str(prompt))], lambda: say(0))
        return future


class Ready(Leg):
    """Answers at once."""

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        future: Future[tuple[Completion, ...]] = Future()
        future.set_result(ANSWER)
        return future


def replay(x: Floats, y: Floats, budget: float) -> tuple[Floats, NDArray[np.bool_], float]:
    """(latency, success, extra calls as a share) of requests that come ten per median latency, with the adaptive policy."""
    clock, latency, ok = VirtualClock(), np.zeros(len(x)), np.zeros(len(x), dtype=bool)
    apart_s = float(np.median(np.abs(x))) / 10
    sampler = HedgedSampler([Leg(clock, x), Leg(clock, y)], Adaptive(budget), budget=budget, clock=clock)

    def arrive(i: int) -> None:
        began_s = clock.now()

        def done(future: Future[tuple[Completion, ...]]) -> None:
            latency[i], ok[i] = clock.now() - began_s, future.exception() is None

        sampler.sample(str(i), PARAMS).add_done_callback(done)
        if i + 1 < len(x):
            clock.call_later(apart_s, lambda: arrive(i + 1))

    arrive(0)
    clock.advance(apart_s * len(x) + 1e5)
    return latency, ok, sampler.stats.extra


Replay = Callable[[Floats, Floats, float], tuple[Floats, NDArray[np.bool_], float]]


def contenders(with_rivals: bool) -> dict[str, Replay]:
    """Who runs, by name."""
    found: dict[str, Replay] = {"crucible": replay}
    for name in rivals.NAMES if with_rivals else ():
        found[name] = lambda x, y, budget, name=name: rivals.replay(name, x, y, budget, float(np.median(np.abs(x))) / 10)  # type: ignore[misc]
    return found


def hedging(n: int, who: dict[str, Replay], budgets: Sequence[float] = BUDGETS) -> list[Row]:
    """How far the 99th percentile falls, and at how many extra calls."""
    rows, warm = list[Row](), n // 8
    for trace, make in TRACES.items():
        x, y = make(np.random.default_rng(1), n), make(np.random.default_rng(2), n)
        known, before = Survival(x[warm:]), float(np.quantile(x[warm:], 0.99))
        for budget in budgets:
            row: Row = {"trace": trace, "budget": budget, "optimum": best_hedge(known, known, budget, candidates=1000).gain}
            for name, run in who.items():
                latency, _, extra = run(x, y, budget)
                row[name], row[f"{name} extra"] = 1 - float(np.quantile(latency[warm:], 0.99)) / before, extra
            rows.append(row)
    return rows


def hopeless(n: int, who: dict[str, Replay]) -> list[Row]:
    """Extra calls where hedging cannot help, at a budget of 5 %."""
    rows = list[Row]()
    for trace, make in HOPELESS.items():
        x, y = make(np.random.default_rng(1), n)
        rows.append({"trace": trace} | {f"{name} extra": run(x, y, 0.05)[2] for name, run in who.items()})
    return rows


def failures(n: int, who: dict[str, Replay]) -> list[Row]:
    """Share of requests that are answered, at a budget of 8 %: backups that always fail after 50 ms, and 5 % of primaries that fail at once."""
    rng = np.random.default_rng(1)
    x, rows = TRACES["bimodal LLM (5 % ×10)"](rng, n), list[Row]()
    broken = np.where(rng.random(n) < 0.05, -0.01, x)
    for what, first, second in (("backups always fail", x, np.full(n, -0.05)), ("5 % of primaries fail", broken, x[::-1].copy())):
        rows.append({"case": what} | {f"{name} success": float(run(first, second, 0.08)[1].mean()) for name, run in who.items()})
    return rows


def streams(n: int) -> Row:
    """Time to the first token of streams of 30 tokens, 5 % of which start ten times later; waste is drawn tokens that nobody saw."""
    clock, seen, warm = VirtualClock(), np.zeros(n), n // 8
    firsts = [0.2 * rng.lognormal(0, 0.15, n) * np.where(rng.random(n) < 0.05, 10, 1) for rng in map(np.random.default_rng, (1, 2))]
    sampler = HedgedSampler([Talking(clock, times) for times in firsts], budget=0.05, clock=clock)

    def ask(i: int) -> None:
        began_s = clock.now()

        def told(piece: Piece) -> None:
            seen[i] = seen[i] or clock.now() - began_s

        sampler.stream(str(i), SamplingParams(max_tokens=30), told)
        if i + 1 < n:
            clock.call_later(0.1, lambda: ask(i + 1))

    ask(0)
    clock.advance(0.1 * n + 1000)
    before, stats = float(np.quantile(firsts[0][warm:], 0.99)), sampler.stats
    known = Survival(firsts[0][warm:])
    return {
        "p99_lower": 1 - float(np.quantile(seen[warm:], 0.99)) / before, "optimum": best_hedge(known, known, 0.05, candidates=1000).gain,
        "extra": stats.extra, "wasted": stats.wasted_drawn / stats.drawn,
    }  # fmt: skip


def example() -> tuple[float, HedgeStats]:
    """(seconds, counts) of a primary of 1000 ms with a backup of 50 ms after 100 ms."""
    clock, done = VirtualClock(), list[float]()
    sampler = HedgedSampler([Leg(clock, np.array([1.0])), Leg(clock, np.array([0.05]))], Fixed(0.1), budget=1.0, clock=clock)
    sampler.sample("0", PARAMS).add_done_callback(lambda _: done.append(clock.now()))
    clock.advance(5.0)
    return done[0], sampler.stats


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


def paced(per_request: float, seed: int) -> tuple[float, float]:
    """(cost as a share of the ceiling, mean reward) of Thompson sampling under a ceiling, 5,000 requests."""
    rng, ceiling, router = np.random.default_rng(seed), Ceiling(per_request), Thompson(seed=seed + 1)
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


def routing(seeds: int) -> list[Row]:
    """Mean regret over seeds, steady and with the arms reversed half-way."""
    makers: dict[str, Callable[[int], Router]] = {
        "thompson": lambda s: Thompson(seed=s),
        "thompson, discount .999": lambda s: Thompson(seed=s, discount=0.999),
        "sliding_window, 1000": lambda s: SlidingWindow(seed=s),
        "kl_ucb": lambda _: KLUCB(),
        "exp3": lambda s: EXP3(seed=s),
    }
    rows = list[Row]()
    for name, make in makers.items():
        steady, turned = ([regret(make(s), 10_000, 100 + s, flip=flip) for s in range(seeds)] for flip in (False, True))
        rows.append({"router": name, "regret": statistics.mean(steady), "reversed": statistics.mean(turned)})
    return rows


def failing_fast() -> float:
    """The largest share of 2,000 requests that a model gets which fails after 2 ms, beside one that answers half of them after 500 ms."""
    shares = []
    for router in (BestPerforming(seed=1), Thompson(seed=1), KLUCB(), LinUCB()):
        rng, asked = np.random.default_rng(0), 0
        for _ in range(2000):
            name = router.choose(["broken", "good"])
            asked += name == "broken"
            ok = name == "good" and rng.random() < 0.5
            router.observe(name, reward=float(ok), cost=0.0, latency_s=0.002 if name == "broken" else 0.5, ok=ok)
        shares.append(asked / 2000)
    return max(shares)


def overhead(n: int = 3000) -> float:
    """Microseconds of processor time that an adaptive hedge adds to a request that is answered at once: the least of 9 rounds, alternating."""
    ready = Ready(VirtualClock(), np.ones(1))

    def each_us(sampler: Sampler) -> float:
        start = time.process_time()
        for _ in range(n):
            sampler.sample("0", PARAMS).result()
        return (time.process_time() - start) / n * 1e6

    hedged = HedgedSampler(ready, Adaptive(0.05), budget=0.05)
    rounds = [(each_us(hedged), each_us(ready)) for _ in range(9)]  # other work on the machine only adds
    return min(with_hedge for with_hedge, _ in rounds) - min(alone for _, alone in rounds)


def leaks(calls: int = 10_000) -> tuple[int, int]:
    """(threads, futures) that are left after calls on the real clock that were cancelled before they were answered, their timers an hour away."""
    system_clock.call_later(0.0, lambda: None)  # its one thread is there from now on
    threads, alive = threading.active_count(), list[weakref.ref[Future[tuple[Completion, ...]]]]()
    never = HedgedSampler(Leg(system_clock, np.array([3600.0])), Fixed(3600.0), budget=1.0)
    for _ in range(calls):
        future = never.sample("0", PARAMS)
        alive.append(weakref.ref(future))
        future.cancel()
    del future
    gc.collect()
    return threading.active_count() - threads, sum(one() is not None for one in alive)


def targets(results: dict[str, object], seeds: int) -> list[Row]:
    """Each promise with what was measured."""
    rows, out = results["hedging"], list[Row]()
    assert isinstance(rows, list)

    def promise(what: str, measured: float, limit: float, *, least: bool = False) -> None:
        out.append(
            {"what": what, "measured": measured, "limit": limit, "kind": "≥" if least else "≤", "met": measured >= limit if least else measured <= limit}
        )

    promise("points behind the offline optimum, the worst of 12", max(100 * (row["optimum"] - row["crucible"]) for row in rows), 3.0)
    promise("extra calls beyond the budget, the worst of 12", max(round(row["crucible extra"] - row["budget"], 12) for row in rows), 0.0)
    bimodal = next(row for row in rows if row["budget"] == 0.05)
    promise("P99 lower on the bimodal trace at 5 % extra", bimodal["crucible"], 0.69, least=True)
    promise("extra calls where hedging cannot help", max(row["crucible extra"] for row in results["hopeless"]), 0.003)  # type: ignore[attr-defined]
    promise("success when backups always fail", results["failures"][0]["crucible success"], 0.9995, least=True)  # type: ignore[index]
    took_s, stats = example()
    promise("1000 ms, backup 50 ms after 100 ms: answered at (ms)", round(1000 * took_s, 6), 150)
    promise("… calls booked", stats.calls, 2, least=True)
    stream = results["streams"][0]  # type: ignore[index]
    promise("streams: P99 time to first token lower", stream["p99_lower"], 0.70, least=True)
    promise("streams: extra calls", stream["extra"], 0.05)
    promise("streams: wasted tokens", stream["wasted"], 0.005)
    promise("added per request (µs of processor time)", overhead(), 60)
    threads, futures = leaks()
    promise("threads left after 10,000 cancelled calls", threads, 0)
    promise("futures left after 10,000 cancelled calls", futures, 0)
    routers = results["routing"]
    assert isinstance(routers, list)
    promise("regret, arms .9 .85 .8 .7 .5, 10,000 requests, the best router", min(row["regret"] for row in routers), 60)
    promise("regret with the arms reversed half-way, the best router", min(row["reversed"] for row in routers), 300)
    promise("regret of lin_ucb, 8 features, 4 models, 5,000 requests", statistics.mean(contexts(s) for s in range(seeds)), 60)
    promise("share of requests to a model that fails fast, the worst of 4 routers", failing_fast(), 0.05)
    paces = [paced(per_request, seed) for per_request in (0.1, 0.3, 0.6) for seed in range(seeds)]
    promise("cost ceiling: distance from it (share), the worst of ceilings .1 .3 .6", max(abs(1 - share) for share, _ in paces), 0.01)
    return out


def cell(key: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    percent = any(word in key for word in ("extra", "optimum", "crucible", "success", "budget", "lower", "wasted", "hedge"))
    return f"{value:.2%}" if percent and key != "what" else f"{value:.4g}"


def table(rows: list[Row]) -> str:
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(cell(key, row[key]) for key in keys) + " |" for row in rows])


def main() -> None:
    n = next((int(word) for word in sys.argv[1:] if word.isdigit()), 20_000)
    seeds, own, everybody = 3, contenders(False), contenders("--no-rivals" not in sys.argv)
    fewer = min(n, 6000)  # a rival takes a millisecond a request
    parts: dict[str, tuple[str, Callable[[], object]]] = {
        "hedging": ("P99 lower by, and extra calls", lambda: hedging(n, own)),
        "hopeless": ("Extra calls where hedging cannot help, budget 5 %", lambda: hopeless(n, own)),
        "failures": ("Share answered, budget 8 %", lambda: failures(n, own)),
        "streams": ("Streams, budget 5 %", lambda: [streams(n)]),
        "routing": ("Regret, mean of 3 seeds", lambda: routing(seeds)),
        "beside": (f"Beside the rivals, {fewer:,} requests per trace: P99 lower by", lambda: hedging(fewer, everybody, (0.05,))),
        "beside_hopeless": (f"Beside the rivals, {fewer:,} requests: extra calls where hedging cannot help, budget 5 %", lambda: hopeless(fewer, everybody)),
        "beside_failures": (f"Beside the rivals, {fewer:,} requests: share answered, budget 8 %", lambda: failures(fewer, everybody)),
    }
    if len(everybody) == 1:
        parts = {name: part for name, part in parts.items() if not name.startswith("beside")}
    results: dict[str, object] = {"requests": n}
    for name, (_, make) in parts.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        results[name] = make()
    results["targets"] = targets(results, seeds)
    text = f"# Hedging and routing, {n:,} requests per trace\n"
    for name, (head, _) in {"targets": ("Promises", list), **parts}.items():
        rows = results[name]
        assert isinstance(rows, list)
        text += f"\n## {head}\n\n{table(rows)}\n"
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "inference.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (folder / "inference.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

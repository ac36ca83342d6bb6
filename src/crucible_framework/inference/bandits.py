"""Routers: which of several models gets the next request. Numbers in, a name out; knows no samplers and no clock.

All learn from rewards in [0, 1] and give their state as JSON values. Those with `scores` give an index per model, of which the largest is
chosen; a cost ceiling (`routing.Ceiling`) prices it. Those that draw say with `probabilities` how likely each choice is, which a log needs to
be of use later (`offpolicy.py`). Models that were never tried are tried first.
"""

# ruff: noqa: ARG002 - every router is told everything and uses what it can
from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..plugins import Registry
from ..protocols import Router
from ..records import Json

__all__ = ["EXP3", "KLUCB", "BestPerforming", "LeastLoaded", "RoundRobin", "SlidingWindow", "Thompson", "Weighted", "routers"]

Context: TypeAlias = NDArray[np.float64] | None
_TABLE = {
    "round_robin": "RoundRobin", "least_loaded": "LeastLoaded", "weighted": "Weighted", "best_performing": "BestPerforming",
    "thompson": "Thompson", "kl_ucb": "KLUCB", "exp3": "EXP3", "sliding_window": "SlidingWindow",
}  # fmt: skip
_ROWS = {name: f"crucible_framework.inference.bandits:{cls}" for name, cls in _TABLE.items()} | {"lin_ucb": "crucible_framework.inference.linear:LinUCB"}
routers: Registry[type[Router]] = Registry("router", _ROWS)
"""Names to router classes; those of the table can be made without arguments."""


def numbers(state: Mapping[str, Json], key: str) -> dict[str, float]:
    """A table of name → number out of a saved state.

    Raises:
        ConfigError: there is none under that key.
    """
    table = state.get(key)
    if not isinstance(table, dict) or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in table.values()):
        raise ConfigError(f"The router's state holds {key}={table!r}; expected names with numbers. It was saved by another router, or is damaged.")
    return {name: float(cast("float", value)) for name, value in table.items()}


def unit_reward(reward: float) -> float:
    """The reward, if it is one."""
    if not 0 <= reward <= 1:
        raise ConfigError(f"The reward is {reward!r}; expected a number in [0, 1]. Scale it.")
    return reward


class _Tables:
    """Named tables of numbers, guarded by one lock: the whole state of a simple router."""

    tables: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._t: dict[str, dict[str, float]] = {table: {} for table in self.tables}

    def _row(self, table: str, name: str, start: float = 0.0) -> float:
        return self._t[table].get(name, start)

    def _add(self, table: str, name: str, value: float) -> None:
        self._t[table][name] = self._row(table, name) + value

    def state(self) -> dict[str, Json]:
        """All that was learned, as JSON values."""
        with self._lock:
            return {table: cast("Json", dict(rows)) for table, rows in self._t.items()}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Takes a saved state in place of its own."""
        found = {table: numbers(state, table) for table in self.tables}
        with self._lock:
            self._t = found

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """Nothing to learn."""


class RoundRobin(_Tables):
    """Each in turn: the one asked least often, of equals the first."""

    tables = ("asked",)

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """The next in turn."""
        with self._lock:
            name = min(names, key=lambda one: self._row("asked", one))
            self._add("asked", name, 1)
            return name


class LeastLoaded(_Tables):
    """The one with the fewest requests in flight; of equals the one asked least often."""

    tables = ("asked",)

    def __init__(self) -> None:
        super().__init__()
        self._busy: dict[str, int] = {}

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """The least busy."""
        with self._lock:
            name = min(names, key=lambda one: (self._busy.get(one, 0), self._row("asked", one)))
            self._busy[name] = self._busy.get(name, 0) + 1
            self._add("asked", name, 1)
            return name

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """One request less in flight."""
        with self._lock:
            self._busy[name] = max(0, self._busy.get(name, 0) - 1)


class Weighted(_Tables):
    """At random in proportion to weights; a model without one has 1."""

    def __init__(self, weights: Mapping[str, float] | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self._weights = dict(weights or {})
        if any(not (math.isfinite(w) and w >= 0) for w in self._weights.values()):
            raise ConfigError(f"The routing weights are {self._weights!r}; expected finite numbers of at least 0.")
        self._rng = np.random.default_rng(seed)

    def probabilities(self, names: Sequence[str], context: Context = None) -> NDArray[np.float64]:
        """With which probability each would be chosen now."""
        weights = np.array([self._weights.get(name, 1.0) for name in names])
        if not weights.sum() > 0:
            raise ConfigError(f"The routing weights of {list(names)!r} are all 0; expected at least one above.")
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """A weighted draw."""
        with self._lock:
            return names[int(self._rng.choice(len(names), p=self.probabilities(names)))]


class BestPerforming(_Tables):
    """The best by rewards received, and only among equals by speed: a model that fails fast is no fast model.

    Means fade with `decay` per answer, so that a model which got better is seen; `explore` of the requests go to a random model.
    """

    tables = ("count", "reward", "latency")

    def __init__(self, *, explore: float = 0.05, decay: float = 0.99, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= explore <= 1 or not 0 < decay <= 1:
            raise ConfigError(f"BestPerforming has explore={explore!r} and decay={decay!r}; expected [0, 1] and (0, 1].")
        self._explore, self._decay, self._rng = explore, decay, np.random.default_rng(seed)

    def scores(self, names: Sequence[str], context: Context = None) -> dict[str, float]:
        """Mean reward (untried: above all), and up to 0.01 for being fast."""
        with self._lock:
            slowest = max((self._row("latency", n) / self._row("count", n) for n in names if self._row("count", n)), default=0.0) or 1.0
            return {n: self._row("reward", n) / c + 0.01 * (1 - self._row("latency", n) / c / slowest) if (c := self._row("count", n)) else 2.0 for n in names}

    def probabilities(self, names: Sequence[str], context: Context = None) -> NDArray[np.float64]:
        """With which probability each would be chosen now."""
        scores = self.scores(names)
        chances = np.full(len(names), self._explore / len(names))
        chances[int(np.argmax([scores[name] for name in names]))] += 1 - self._explore
        return chances

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """The best, or a random one."""
        with self._lock:
            if self._rng.random() < self._explore:
                return names[int(self._rng.integers(len(names)))]
            scores = self.scores(names, context)
            return max(names, key=lambda name: scores[name])

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """Adds to the fading means."""
        with self._lock:
            for table, value in (("count", 1.0), ("reward", unit_reward(reward) if ok else 0.0), ("latency", latency_s)):
                self._t[table][name] = self._row(table, name) * self._decay + value


class Thompson(_Tables):
    """Thompson sampling: draws each model's mean reward from its Beta posterior and takes the largest.

    Args:
        discount: what an observation still weighs after each further one of the router; 0.999 follows drift, 1 forgets nothing.
        seed: of the draws.

    Source: Agrawal & Goyal 2012, arXiv 1111.1797 (rewards in [0, 1] count in part); with a discount Raj & Kalyani 2017, arXiv 1707.09727.
    """

    tables = ("good", "bad")

    def __init__(self, *, discount: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 < discount <= 1:
            raise ConfigError(f"Thompson.discount is {discount!r}; expected a number in (0, 1]. 0.999 follows drift over about 1,000 requests.")
        self._discount, self._rng = discount, np.random.default_rng(seed)

    def scores(self, names: Sequence[str], context: Context = None) -> dict[str, float]:
        """One draw per model."""
        with self._lock:
            good = [1.0 + self._row("good", name) for name in names]
            bad = [1.0 + self._row("bad", name) for name in names]
            return dict(zip(names, self._rng.beta(good, bad).tolist(), strict=True))

    def probabilities(self, names: Sequence[str], context: Context = None) -> NDArray[np.float64]:
        """With which probability each draw would be the largest: for each model the mean, over its own posterior, of the others being less."""
        from scipy.special import betainc, betaincinv

        with self._lock:
            good = np.array([1.0 + self._row("good", name) for name in names])
            bad = np.array([1.0 + self._row("bad", name) for name in names])
        middles = (np.arange(256) + 0.5) / 256
        at = betaincinv(good[:, None], bad[:, None], middles)  # models × points of equal posterior mass
        below = betainc(good[None, :, None], bad[None, :, None], at[:, None, :])  # P(model j below a point of model i)
        below[np.arange(len(names)), np.arange(len(names))] = 1.0
        chances = below.prod(axis=1).mean(axis=1)
        return np.asarray(chances / chances.sum(), dtype=np.float64)

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """The largest draw."""
        scores = self.scores(names, context)
        return max(names, key=lambda name: scores[name])

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """Updates the posterior."""
        won = unit_reward(reward) if ok else 0.0
        with self._lock:
            if self._discount < 1:
                for table in self._t.values():
                    for one in table:
                        table[one] *= self._discount
            self._add("good", name, won)
            self._add("bad", name, 1 - won)


class SlidingWindow(Thompson):
    """Thompson sampling on the last `window` observations of the router alone: what is older is forgotten at once, not faded.

    Source: Trovò et al. 2020, "Sliding-Window Thompson Sampling for Non-Stationary Environments" (JAIR 68).
    """

    def __init__(self, *, window: int = 1000, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if window < 1:
            raise ConfigError(f"SlidingWindow.window is {window!r}; expected a whole number of at least 1.")
        self._window = window
        self._recent: deque[tuple[str, float]] = deque()

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """Takes one in, and the oldest out."""
        won = unit_reward(reward) if ok else 0.0
        with self._lock:
            self._recent.append((name, won))
            super().observe(name, reward=won, cost=cost, latency_s=latency_s, ok=True)
            if len(self._recent) > self._window:
                old, its = self._recent.popleft()
                self._t["good"][old] = max(0.0, self._row("good", old) - its)
                self._t["bad"][old] = max(0.0, self._row("bad", old) - (1 - its))

    def state(self) -> dict[str, Json]:
        """The observations in the window, oldest first."""
        with self._lock:
            return {"recent": cast("Json", [[name, won] for name, won in self._recent])}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Takes a saved state in place of its own."""
        rows = state.get("recent")
        fits = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in rows)
        if not fits:
            raise ConfigError(f"The router's state holds recent={rows!r:.80}; expected pairs of a name and a reward. It was saved by another router.")
        pairs = [(str(name), unit_reward(float(won))) for name, won in cast("list[tuple[str, float]]", rows)]
        with self._lock:
            self._t, self._recent = {table: {} for table in self.tables}, deque()
            for name, won in pairs:
                self.observe(name, reward=won, cost=0.0, latency_s=0.0, ok=True)


def _kl(p: float, q: float) -> float:
    p, q = min(max(p, 1e-12), 1 - 1e-12), min(max(q, 1e-12), 1 - 1e-12)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


class KLUCB(_Tables):
    """The largest mean reward that the data do not contradict: max q with n KL(mean, q) ≤ log t. No random numbers.

    Source: Garivier & Cappé 2011, arXiv 1102.2490.
    """

    tables = ("count", "reward")

    def scores(self, names: Sequence[str], context: Context = None) -> dict[str, float]:
        """The upper bound per model, by bisection; 2 for one that was never tried."""
        with self._lock:
            total = sum(self._t["count"].values())
            return {name: self._bound(name, math.log(max(total, 2.0))) for name in names}

    def _bound(self, name: str, level: float) -> float:
        count = self._row("count", name)
        if not count:
            return 2.0
        mean = self._row("reward", name) / count
        low, high = mean, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if count * _kl(mean, middle) <= level else (low, middle)
        return low

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """The largest bound."""
        scores = self.scores(names, context)
        return max(names, key=lambda name: scores[name])

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """Adds to the mean."""
        with self._lock:
            self._add("count", name, 1)
            self._add("reward", name, unit_reward(reward) if ok else 0.0)


class EXP3(_Tables):
    """For rewards that an adversary may choose: draws by exponential weights of importance-weighted losses.

    Several requests may be open: each reward is weighted by the probability at the time it is observed. Source: Auer et al. 2002 (SIAM).

    Args:
        rate: the learning rate; None takes √(2 ln K / (t K)), which needs no horizon.
        explore: probability spread evenly, so that none is ever forgotten.
        seed: of the draws.
    """

    tables = ("loss", "count")

    def __init__(self, *, rate: float | None = None, explore: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= explore <= 1 or (rate is not None and not rate > 0):
            raise ConfigError(f"EXP3 has rate={rate!r} and explore={explore!r}; expected a number above 0 or none, and [0, 1].")
        self._rate, self._explore, self._rng = rate, explore, np.random.default_rng(seed)
        self._names: tuple[str, ...] = ()

    def probabilities(self, names: Sequence[str], context: Context = None) -> NDArray[np.float64]:
        """With which probability each would be chosen now."""
        with self._lock:
            count = len(names)
            steps = 1 + sum(self._t["count"].values())
            rate = self._rate or math.sqrt(2 * math.log(max(2, count)) / (steps * count))
            losses = np.array([self._row("loss", name) for name in names])
            weights = np.exp(-rate * (losses - losses.min()))
            return np.asarray((1 - self._explore) * weights / weights.sum() + self._explore / count, dtype=np.float64)

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """A draw."""
        with self._lock:
            self._names = tuple(names)
            return names[int(self._rng.choice(len(names), p=self.probabilities(names)))]

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """Adds the loss over its probability, an unbiased estimate of what every request would have lost."""
        with self._lock:
            names = self._names if name in self._names else (*self._names, name)
            chance = float(self.probabilities(names)[names.index(name)])
            self._add("loss", name, (1 - (unit_reward(reward) if ok else 0.0)) / chance)
            self._add("count", name, 1)

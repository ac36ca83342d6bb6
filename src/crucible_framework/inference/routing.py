"""One of several models answers each request: `RoutedSampler` is a Sampler made of Samplers. Which one is a router's choice (`bandits.py`)."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .. import events
from ..clock import system_clock
from ..errors import CapabilityError, ConfigError
from ..files import read_json, write_json
from ..protocols import Clock, Router, Sampler
from ..records import Completion, Prompt, SamplingParams, record
from .bandits import routers
from .pool import Pool
from .promise import Promise

__all__ = ["Ceiling", "RoutedSampler", "load_router", "prompt_features", "save_router"]

Answer: TypeAlias = tuple[Completion, ...]


@runtime_checkable
class _Scoring(Protocol):
    """A router that has an index per model."""

    def scores(self, names: Sequence[str], context: NDArray[np.float64] | None = None) -> dict[str, float]: ...


@record
class _Asked:
    """A request on its way."""

    name: str
    prompt: Prompt
    held: float
    began_s: float
    context: NDArray[np.float64] | None


def prompt_features(prompt: Prompt) -> NDArray[np.float64]:
    """Eight numbers about a prompt, each in [0, 1]: a constant, length, digits, capitals, other scripts, code signs, lines, questions."""
    text = prompt if isinstance(prompt, str) else " ".join(str(getattr(part, "content", part)) for part in prompt)
    size = max(1, len(text))

    def share(pattern: str, times: float) -> float:
        return min(1.0, len(re.findall(pattern, text)) * times / size)

    parts = [1.0, min(1.0, math.log1p(len(text)) / 10), share(r"\d", 3), share(r"[A-Z]", 3), share(r"[^\x00-\x7f]", 1), share(r"[{}()\[\];=<>\\]", 5)]
    return np.array([*parts, min(1.0, text.count("\n") / 20), min(1.0, text.count("?") / 3)])


class Ceiling:
    """Holds the mean cost per request at or below a ceiling, and spends it where it buys most.

    A price λ on cost rises when requests cost more than the ceiling and falls when less (dual gradient descent); models compete by
    score − λ × cost. And a model whose expected cost is not covered by what was saved so far is not asked, so the mean cannot end above
    the ceiling by more than one request's. Source: online primal-dual pacing, Balseiro & Gur 2019; Agrawal & Devanur 2016.

    Args:
        per_request: the ceiling, in the pool's currency.
        rate: the step of the price.
        slack: requests' worth of credit to start with, so that dear models can be tried at once.
    """

    def __init__(self, per_request: float, *, rate: float = 0.02, slack: float = 0.0) -> None:
        if not (math.isfinite(per_request) and per_request > 0 and rate > 0 and slack >= 0):
            raise ConfigError(f"The ceiling is {per_request!r} with rate={rate!r} and slack={slack!r}; expected a cost above 0, a rate above 0 and slack ≥ 0.")
        self.per_request, self._rate, self._slack = per_request, rate, slack
        self.price = self.spent = 0.0
        self.requests = self._open = 0
        self._costs: dict[str, tuple[float, int]] = {}
        self._reserved = 0.0

    def expected(self, name: str) -> float:
        """The mean cost of a model; 0 for one that was never tried."""
        total, count = self._costs.get(name, (0.0, 0))
        return total / count if count else 0.0

    def affordable(self, names: Sequence[str]) -> list[str]:
        """Those whose expected cost is covered, else the cheapest."""
        left = self.per_request * (self.requests + self._open + 1 + self._slack) - self.spent - self._reserved
        able = [name for name in names if self.expected(name) <= left]
        return able or [min(names, key=self.expected)]

    def best(self, names: Sequence[str], scores: Mapping[str, float]) -> str:
        """The largest score after its price."""
        dearest = max(map(self.expected, names)) or 1.0
        return max(names, key=lambda name: scores[name] - self.price * self.expected(name) / dearest)

    def reserve(self, name: str) -> float:
        """Sets the expected cost aside until `pay`."""
        held = self.expected(name)
        self._open += 1
        self._reserved += held
        return held

    def pay(self, name: str, cost: float, held: float) -> None:
        """Books what the request cost and moves the price."""
        total, count = self._costs.get(name, (0.0, 0))
        self._costs[name] = (total + cost, count + 1)
        self._open, self._reserved = self._open - 1, self._reserved - held
        self.requests, self.spent = self.requests + 1, self.spent + cost
        dearest = max((t / c for t, c in self._costs.values()), default=0.0) or 1.0
        self.price = max(0.0, self.price + self._rate * (cost - self.per_request) / dearest)


class RoutedSampler:
    """Sends each request to one member of a pool and learns from how it went.

    Args:
        pool: members; with a ceiling each needs a price.
        router: a registered name, or a router.
        reward: how good an answer is, in [0, 1]; None counts an answer 1 and a failure 0.
        features: of the prompt, for routers that use them.
        ceiling: mean cost per request at the most.
        clock: latencies.

    Raises:
        ConfigError: there is a ceiling and a member without a price.
    """

    def __init__(
        self,
        pool: Pool | Mapping[str, Sampler],
        router: str | Router = "thompson",
        *,
        reward: Callable[[Prompt, Answer], float] | None = None,
        features: Callable[[Prompt], NDArray[np.float64]] | None = None,
        ceiling: Ceiling | None = None,
        clock: Clock = system_clock,
    ) -> None:
        self.pool = pool if isinstance(pool, Pool) else Pool(pool)
        self.router: Router = routers.get(router)() if isinstance(router, str) else router
        self._reward, self._ceiling, self._clock = reward, ceiling, clock
        self._features = features or (prompt_features if router == "lin_ucb" else None)
        self._lock = threading.Lock()
        unpriced = [member.name for member in self.pool if member.price is None]
        if ceiling is not None and unpriced:
            raise ConfigError(f"There is a cost ceiling, but no price of {', '.join(unpriced)}. Give each member a Price; an unknown cost cannot be held.")

    @property
    def model(self) -> str:
        """The members' names."""
        return f"routed({', '.join(self.pool.names)})"

    def _choose(self, context: NDArray[np.float64] | None) -> tuple[str, float, str]:
        """(name, reserved cost, reason)."""
        names, ceiling, held = self.pool.names, self._ceiling, 0.0
        with self._lock:
            if ceiling is None:
                return self.router.choose(names, context), 0.0, type(self.router).__name__
            able = ceiling.affordable(names)
            untried = [name for name in able if not ceiling.expected(name)]
            if untried or not isinstance(self.router, _Scoring):
                name = self.router.choose(able, context)
            else:
                name = ceiling.best(able, self.router.scores(able, context))
            held = ceiling.reserve(name)
            why = f"{type(self.router).__name__} with a price of {ceiling.price:.3g} on cost; {len(able)} of {len(names)} within the ceiling"
            return name, held, why

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[Answer]:
        """The chosen member's answer. A failure is given as it is: wrap the members in a `HedgedSampler` to have another one asked."""
        context = self._features(prompt) if self._features is not None else None
        name, held, why = self._choose(context)
        events.emit("route.chosen", chose=name, among=list(self.pool.names), reason=why)
        began_s = self._clock.now()
        inner: list[Future[Answer]] = []

        def given_up() -> None:
            for one in inner:
                one.cancel()

        promise: Promise[Answer] = Promise(given_up)

        def done(future: Future[Answer]) -> None:
            asked = _Asked(name=name, prompt=prompt, held=held, began_s=began_s, context=context)
            self._learn(asked, future, promise)

        try:
            inner.append(self.pool[name].sampler.sample(prompt, params, n))
        except Exception as error:
            refused: Future[Answer] = Future()
            refused.set_exception(error)
            inner.append(refused)
        inner[0].add_done_callback(done)
        return promise.future

    def _learn(self, asked: _Asked, future: Future[Answer], promise: Promise[Answer]) -> None:
        error = None if future.cancelled() else future.exception()
        ok = not future.cancelled() and error is None
        price = self.pool[asked.name].price
        cost = price.of(future.result()) if ok and price is not None else 0.0
        reward = 0.0
        try:
            if ok:
                reward = 1.0 if self._reward is None else self._reward(asked.prompt, future.result())
            with self._lock:
                if self._ceiling is not None:
                    self._ceiling.pay(asked.name, cost, asked.held)
                latency_s = self._clock.now() - asked.began_s
                self.router.observe(asked.name, reward=reward, cost=cost, latency_s=latency_s, ok=ok, context=asked.context)
            events.emit("route.done", chose=asked.name, ok=ok, reward=reward, cost=cost if price is not None else None, latency_s=latency_s)
        except Exception as failure:  # the caller's own reward, or a router that refuses it
            promise.fail(failure)
            return
        if future.cancelled():
            promise.future.cancel()
        elif error is not None:
            promise.fail(error)
        else:
            promise.give(future.result())

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """Depends on who is asked: CapabilityError."""
        del prompt, completion
        raise CapabilityError(f"{self.model} has no log-probs of its own, they are each model's; ask a member: routed.pool[name].sampler.compute_logprobs(…).")


def save_router(router: Router, path: Path) -> None:
    """Writes what a router has learned as JSON, atomically."""
    write_json(Path(path), {"format": 1, "router": type(router).__name__, "state": router.state()})


def load_router(router: Router, path: Path) -> Router:
    """Gives a router of the same class what was saved, and gives it back.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it was saved by another kind of router.
    """
    saved = read_json(Path(path))
    kind = saved.get("router") if isinstance(saved, dict) else None
    state = saved.get("state") if isinstance(saved, dict) else None
    if kind != type(router).__name__ or not isinstance(state, dict):
        raise ConfigError(f"{str(path)!r} holds the state of {kind!r}; expected that of {type(router).__name__!r}. Load it with the router that saved it.")
    router.restore(state)
    return router

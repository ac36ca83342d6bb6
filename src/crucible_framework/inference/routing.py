"""One of several models answers each request: `RoutedSampler` is a Sampler made of Samplers. Which one is a router's choice (`bandits.py`)."""

from __future__ import annotations

import math
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .. import events
from ..clock import system_clock
from ..errors import CapabilityError, ConfigError, FormatError
from ..files import read_json, read_lines, write_json
from ..promise import Promise
from ..protocols import Clock, OnPiece, Router, Sampler, StreamSampler
from ..records import Completion, Json, Prompt, SamplingParams, record
from .bandits import routers
from .pool import Pool

__all__ = ["Ceiling", "Routed", "RoutedSampler", "load_router", "prompt_features", "read_routes", "save_router"]

Answer: TypeAlias = tuple[Completion, ...]


@runtime_checkable
class _Scoring(Protocol):
    """A router that has an index per model."""

    def scores(self, names: Sequence[str], context: NDArray[np.float64] | None = None) -> dict[str, float]: ...


@runtime_checkable
class _Drawing(Protocol):
    """A router that chooses by chance and says by which."""

    def probabilities(self, names: Sequence[str], context: NDArray[np.float64] | None = None) -> NDArray[np.float64]: ...


@record
class Routed:
    """A request that was routed and how it went: a row of the log from which another router can be judged (`offpolicy.py`).

    Attributes:
        probability: with which `chose` was chosen; None where the router cannot say.
        context: the features that the router saw; empty where it saw none.
    """

    chose: str
    among: tuple[str, ...]
    probability: float | None
    reward: float
    cost: float
    latency_s: float
    ok: bool
    context: tuple[float, ...] = ()


@record
class _Asked:
    """A request on its way."""

    name: str
    probability: float | None
    prompt: Prompt
    held: float
    began_s: float
    context: NDArray[np.float64] | None
    span: events.OpenSpan | None
    chosen: str


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

    @property
    def credit(self) -> float:
        """What was saved so far and is not reserved; below 0 where requests cost more than was expected."""
        return self.per_request * (self.requests + self._open + self._slack) - self.spent - self._reserved

    def expected(self, name: str) -> float:
        """The mean cost of a model; 0 for one that was never tried."""
        total, count = self._costs.get(name, (0.0, 0))
        return total / count if count else 0.0

    def affordable(self, names: Sequence[str]) -> list[str]:
        """Those whose expected cost is covered, else the cheapest."""
        left = self.credit + self.per_request
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
        explore: share of requests that go to any model, evenly; their log then says something about every model.
        log: gets a row per request that ended; the events `route.ended` hold the same (`read_routes`).
        seed: of the exploration.
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
        explore: float = 0.0,
        log: Callable[[Routed], None] | None = None,
        seed: int = 0,
        clock: Clock = system_clock,
    ) -> None:
        self.pool = pool if isinstance(pool, Pool) else Pool(pool)
        self.router: Router = routers.get(router)() if isinstance(router, str) else router
        self._reward, self._ceiling, self._clock = reward, ceiling, clock
        self._features = features or (prompt_features if router == "lin_ucb" else None)
        self._explore, self._log, self._random = explore, log, random.Random(seed)  # noqa: S311  # a coin, no secret
        self._lock = threading.Lock()
        if not 0 <= explore <= 1:
            raise ConfigError(f"RoutedSampler.explore is {explore!r}; expected a share in [0, 1]. 0.05 to 0.1 makes a log useful.")
        unpriced = [member.name for member in self.pool if member.price is None]
        if ceiling is not None and unpriced:
            raise ConfigError(f"There is a cost ceiling, but no price of {', '.join(unpriced)}. Give each member a Price; an unknown cost cannot be held.")

    @property
    def model(self) -> str:
        """The members' names."""
        return f"routed({', '.join(self.pool.names)})"

    def _choose(self, context: NDArray[np.float64] | None) -> tuple[str, float | None, float, str]:
        """(name, its probability, reserved cost, reason)."""
        names, ceiling, router = self.pool.names, self._ceiling, self.router
        with self._lock:
            able = list(names) if ceiling is None else ceiling.affordable(names)
            chances = self._chances(able, context)
            why = type(router).__name__
            if ceiling is not None:
                why += f" with a price of {ceiling.price:.3g} on cost; {len(able)} of {len(names)} within the ceiling"
            if self._explore and self._random.random() < self._explore:
                name, why = able[self._random.randrange(len(able))], "exploration"
                if chances is None:  # what the router would have done is asked, so that the probability is known
                    chances = {self._decide(able, context): 1.0}
            else:
                name = self._decide(able, context)
                chances = {name: 1.0} if chances is None else chances
            own = chances.get(name, 0.0) if chances else None
            probability = None if own is None else self._explore / len(able) + (1 - self._explore) * own
            return name, probability, 0.0 if ceiling is None else ceiling.reserve(name), why

    def _decide(self, able: Sequence[str], context: NDArray[np.float64] | None) -> str:
        ceiling, router = self._ceiling, self.router
        if ceiling is None or not isinstance(router, _Scoring) or any(not ceiling.expected(name) for name in able):
            return router.choose(able, context)
        return ceiling.best(able, router.scores(able, context))

    def _chances(self, able: Sequence[str], context: NDArray[np.float64] | None) -> dict[str, float] | None:
        """The probability per model; empty where it cannot be said, None where nobody asks or the router does not draw."""
        if not isinstance(self.router, _Drawing):
            return None
        if self._log is None and not events.listening():
            return {}
        if self._ceiling is not None and isinstance(self.router, _Scoring) and all(self._ceiling.expected(name) for name in able):
            return {}  # a draw less a price on cost: its law is not that of the draw
        return dict(zip(able, self.router.probabilities(able, context).tolist(), strict=True))

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[Answer]:
        """The chosen member's answer. A failure is given as it is: wrap the members in a `HedgedSampler` to have another one asked."""
        return self._ask(prompt, lambda sampler: sampler.sample(prompt, params, n))

    def stream(self, prompt: Prompt, params: SamplingParams, on_piece: OnPiece, n: int = 1) -> Future[Answer]:
        """The same, told piece by piece; see `StreamSampler`.

        Raises:
            CapabilityError: a member cannot stream.
        """
        silent = [member.name for member in self.pool if not isinstance(member.sampler, StreamSampler)]
        if silent:
            raise CapabilityError(f"{', '.join(silent)} cannot stream; expected members with `stream`. Wrap them: Streamed(sampler, tokenizer).")
        return self._ask(prompt, lambda sampler: cast("StreamSampler", sampler).stream(prompt, params, on_piece, n))

    def _ask(self, prompt: Prompt, call: Callable[[Sampler], Future[Answer]]) -> Future[Answer]:
        context = self._features(prompt) if self._features is not None else None
        name, probability, held, why = self._choose(context)
        credit = None if self._ceiling is None else self._ceiling.credit
        span = events.opened("route.request", model=self.model)
        fields: dict[str, Json] = {"probability": probability, "credit": credit, "reason": why}
        chosen = events.linked(span, "route.chosen", (), what="route", chose=name, among=list(self.pool.names), **fields)
        asked = _Asked(name=name, probability=probability, prompt=prompt, held=held, began_s=self._clock.now(), context=context, span=span, chosen=chosen)
        inner: list[Future[Answer]] = []

        def given_up() -> None:
            for one in inner:
                one.cancel()

        promise: Promise[Answer] = Promise(given_up)
        try:
            with events.within(span, chosen):
                inner.append(call(self.pool[name].sampler))
        except Exception as error:
            refused: Future[Answer] = Future()
            refused.set_exception(error)
            inner.append(refused)
        inner[0].add_done_callback(lambda future: self._learn(asked, future, promise))
        return promise.future

    def _learn(self, asked: _Asked, future: Future[Answer], promise: Promise[Answer]) -> None:
        error = None if future.cancelled() else future.exception()
        ok = not future.cancelled() and error is None
        price = self.pool[asked.name].price
        cost = price.of(future.result()) if ok and price is not None else 0.0
        reward = 0.0
        ended = ""
        try:
            if ok:
                reward = 1.0 if self._reward is None else self._reward(asked.prompt, future.result())
            with self._lock:
                if self._ceiling is not None:
                    self._ceiling.pay(asked.name, cost, asked.held)
                latency_s = self._clock.now() - asked.began_s
                self.router.observe(asked.name, reward=reward, cost=cost, latency_s=latency_s, ok=ok, context=asked.context)
            if not future.cancelled():
                ended = self._tell(asked, reward, cost, latency_s, ok=ok)
        except Exception as failure:  # the caller's own reward, or a router that refuses it
            error, ok = failure, False
        if asked.span is not None:
            asked.span.end(ended, **({} if ok else {"error": "CancelledError" if error is None else type(error).__name__}))
        if error is not None:
            promise.fail(error)
        elif not ok:
            promise.future.cancel()
        else:
            promise.give(future.result())

    def _tell(self, asked: _Asked, reward: float, cost: float, latency_s: float, *, ok: bool) -> str:
        """Logs how it went; gives the event's id."""
        if self._log is None and not events.listening():
            return ""
        context = () if asked.context is None else tuple(asked.context.tolist())
        row = Routed(
            chose=asked.name, among=self.pool.names, probability=asked.probability, reward=reward, cost=cost, latency_s=latency_s, ok=ok, context=context
        )
        ended = events.linked(
            asked.span, "route.ended", (asked.chosen, *(() if asked.span is None else asked.span.found)), chose=row.chose, among=list(row.among),
            probability=row.probability, reward=reward, cost=cost, latency_s=latency_s, ok=ok, context=list(context),
        )  # fmt: skip
        if self._log is not None:
            self._log(row)
        return ended

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        """Depends on who is asked: CapabilityError."""
        del prompt, completion
        raise CapabilityError(f"{self.model} has no log-probs of its own, they are each model's; ask a member: routed.pool[name].sampler.compute_logprobs(…).")


def read_routes(path: Path) -> tuple[Routed, ...]:
    """The `route.ended` events of a file of events, one JSON object a line, in the order of their ends.

    Raises:
        NotFoundError: there is no such file.
        FormatError: a row lacks a field.
    """
    rows = [row for row in read_lines(Path(path)) if row.get("name") == "route.ended"]
    made: list[Routed] = []
    for row in rows:
        try:
            chance = row["probability"]
            made.append(
                Routed(
                    chose=str(row["chose"]), among=tuple(map(str, cast("list[str]", row["among"]))), ok=bool(row["ok"]),
                    probability=None if chance is None else float(cast("float", chance)), reward=float(cast("float", row["reward"])),
                    cost=float(cast("float", row["cost"])), latency_s=float(cast("float", row["latency_s"])),
                    context=tuple(map(float, cast("list[float]", row["context"]))),
                )
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"A route.ended event of {str(path)!r} is {row!r:.200}: {error}. Expected the fields of Routed.") from error
    return tuple(made)


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

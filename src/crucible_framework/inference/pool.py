"""Members that answer together: samplers with a name, a weight, tags and a price; and the breaker that sets a failing one aside.

Adapters of one local base model are submitted together without waiting, so that the engine may put them into one pass; whether it does is
its own matter. This file knows no votes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Literal, cast

from ..errors import ConfigError, UnknownNameError
from ..protocols import Backend, Clock, Sampler
from ..records import Completion, ModelVersion, less_is_better, record
from ..store import Models

__all__ = ["Breaker", "Member", "Pool", "Price", "token_confidence"]


@record
class Price:
    """What tokens cost, per million; in any currency, but the same for the whole pool."""

    input_per_million: float
    output_per_million: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.input_per_million) and math.isfinite(self.output_per_million) and min(self.input_per_million, self.output_per_million) >= 0):
            raise ConfigError(f"{self!r} holds a price that is no finite number of at least 0. Give what a million tokens cost; leave an unknown price None.")

    def of(self, completions: Iterable[Completion]) -> float:
        """The cost of one call: its prompt once, and the tokens of each completion."""
        all_of = tuple(completions)
        prompt = max((one.prompt_tokens for one in all_of), default=0)
        return (prompt * self.input_per_million + sum(len(one.tokens) for one in all_of) * self.output_per_million) / 1e6


def token_confidence(completion: Completion) -> float | None:
    """The mean probability of the tokens, in [0, 1]; None where the sampler gave no log-probs. It ranks answers; it is not calibrated."""
    if not completion.logprobs:
        return None
    return min(1.0, math.fsum(math.exp(min(0.0, logp)) for logp in completion.logprobs) / len(completion.logprobs))


class Breaker:
    """Sets a member aside that keeps failing, and lets single requests through after a while to see whether it is back.

    Args:
        clock: what `retry_after_s` is measured on.
        failures: consecutive failures that set it aside.
        retry_after_s: how long it is left alone; doubled after each probe that fails, up to 16 times.
        successes: consecutive probes that bring it back.
    """

    def __init__(self, clock: Clock, *, failures: int = 5, retry_after_s: float = 30.0, successes: int = 2) -> None:
        if failures < 1 or successes < 1 or not retry_after_s > 0:
            raise ConfigError(
                f"The breaker has failures={failures!r}, successes={successes!r}, retry_after_s={retry_after_s!r}; expected at least 1, 1 and a time above 0."
            )
        self._clock, self._failures, self._retry_after_s, self._successes = clock, failures, retry_after_s, successes
        self._lock = threading.Lock()
        self._bad = self._good = self._opened = 0
        self._until_s = -math.inf
        self._probing = False

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """closed: in use; open: set aside; half-open: one request at a time may try."""
        with self._lock:
            if not self._opened:
                return "closed"
            return "open" if self._clock.now() < self._until_s else "half-open"

    def admit(self) -> bool:
        """Whether a request may go to the member now; of several that ask while it is half-open, one may. A yes must be followed by `report`."""
        with self._lock:
            if not self._opened:
                return True
            if self._probing or self._clock.now() < self._until_s:
                return False
            self._probing = True
            return True

    def report(self, ok: bool | None) -> None:
        """How a request that was let through ended; None where it was given up without an outcome."""
        with self._lock:
            self._probing = False
            if ok is None:
                return
            if ok:
                self._bad, self._good = 0, self._good + 1
                if self._opened and self._good >= self._successes:
                    self._opened = 0
                return
            self._good, self._bad = 0, self._bad + 1
            if self._opened or self._bad >= self._failures:
                self._until_s = self._clock.now() + self._retry_after_s * 2 ** min(4, self._opened)
                self._opened += 1


@record
class Member:
    """One of a pool. `price` None means that its cost is unknown, never that it is free."""

    name: str
    sampler: Sampler
    weight: float = 1.0
    tags: Mapping[str, str] = field(default_factory=dict)
    price: Price | None = None

    def __post_init__(self) -> None:
        if not self.name or not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"The member {self.name!r} has the weight {self.weight!r}; expected a name and a finite weight of at least 0.")


class Pool:
    """Members by name, in a fixed order: that in which a sequential ensemble or a cascade asks (cheapest first).

    Args:
        members: or a mapping of names to samplers.

    Raises:
        ConfigError: there is none, or two have one name.
    """

    def __init__(self, members: Iterable[Member] | Mapping[str, Sampler]) -> None:
        if isinstance(members, Mapping):
            samplers = cast("Mapping[str, Sampler]", members)
            members = [Member(name=name, sampler=one) for name, one in samplers.items()]
        given = tuple(members)
        self._members = {member.name: member for member in given}
        if not given or len(self._members) != len(given):
            raise ConfigError(f"The pool has the members {[member.name for member in given]!r}; expected at least one, each with a name of its own.")

    @classmethod
    def from_versions(cls, versions: Iterable[ModelVersion], backend: Backend) -> Pool:
        """One member per registered model version, named "name:version", with its tags."""
        return cls([Member(name=f"{v.name}:{v.version}", sampler=backend.sampler(v.checkpoint), tags=v.tags) for v in versions])

    @classmethod
    def from_registry(
        cls,
        models: Models,
        backend: Backend,
        *,
        tags: Mapping[str, str] | None = None,
        metric: str = "",
        direction: Literal["max", "min"] | None = None,
        top: int | None = None,
    ) -> Pool:
        """The registered models with all these tags; with a metric, the best `top` by it, best first.

        Args:
            models: the registry.
            backend: what runs them.
            tags: all must match.
            metric: one that the versions carry; those without it are left out.
            direction: whether more or less of it is better; None goes by its name (`less_is_better`): losses and errors min, others max.
            top: how many.

        Raises:
            ConfigError: nothing matches.
        """
        found = [v for v in models.find(tags=dict(tags or {})) if not metric or metric in v.metrics]
        if metric:
            less = less_is_better(metric) if direction is None else direction == "min"
            found.sort(key=lambda v: (v.metrics[metric] if less else -v.metrics[metric], v.name, v.version))
        if not found:
            asked = f"tags {dict(tags or {})!r}" + (f" and the metric {metric!r}" if metric else "")
            raise ConfigError(f"No registered model has {asked}. List them: crucible models list")
        return cls.from_versions(found[:top], backend)

    def tagged(self, **tags: str) -> Pool:
        """The members that have all these tags."""
        return Pool([m for m in self if all(m.tags.get(key) == value for key, value in tags.items())])

    @property
    def names(self) -> tuple[str, ...]:
        """In the pool's order."""
        return tuple(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __getitem__(self, name: str) -> Member:
        if name not in self._members:
            raise UnknownNameError("member", name, self._members)
        return self._members[name]

"""Quality targets and the gate that they make: which metric, which direction, how much; what falls short and by how much.

A metric that is missing or not finite falls short: a gate never passes on what was not measured. This file does not know how metrics come to
be; it emits events and writes no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

from ..errors import ConfigError
from ..events import emit
from ..records import Evaluation, less_is_better, record

__all__ = ["CLAIM_TARGETS", "Gate", "Shortfall", "Target", "check_quality", "monitor", "parse_target"]

Direction: TypeAlias = Literal["at_least", "at_most"]
_TARGET = re.compile(r"\s*(?P<metric>[^\s<>=]+)\s*(?P<sign><=|>=)\s*(?P<limit>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")


@record
class Target:
    """One thing that is asked of a metric. Its limit is in the metric's own unit."""

    metric: str
    limit: float
    direction: Direction = "at_least"

    def __post_init__(self) -> None:
        if self.direction not in ("at_least", "at_most"):
            raise ConfigError(f"Target.direction is {self.direction!r}; expected 'at_least' or 'at_most'.")
        if not self.metric or not math.isfinite(self.limit):
            raise ConfigError(f"The target of {self.metric!r} has the limit {self.limit!r}; expected a metric's name and a finite number.")
        if self.direction == "at_least" and less_is_better(self.metric):
            raise ConfigError(
                f"The target asks for at least {self.limit:g} of {self.metric!r}, of which less is better. Write '{self.metric}<={self.limit:g}'."
            )

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.direction == 'at_least' else '<='}{self.limit:g}"


CLAIM_TARGETS = (
    Target(metric="schema_compliance", limit=0.95),
    Target(metric="citation_accuracy", limit=0.95),
    Target(metric="invented_documents", limit=0.0, direction="at_most"),
    Target(metric="entailment", limit=0.50),
    Target(metric="validation", limit=0.75),
    Target(metric="cyclic", limit=0.0, direction="at_most"),
)
"""A usual bar for claim extraction: the names are those of `validation_scorers` and of the scorers of `evaluation`."""


def parse_target(text: str) -> Target:
    """ "citation_accuracy>=0.95" or "dev/loss<=1.2" as a target.

    Raises:
        ConfigError: it has another form, or asks for more of a metric of which less is better.
    """
    found = _TARGET.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is no quality target; expected metric>=number or metric<=number, for example 'citation_accuracy>=0.95'.")
    return Target(metric=found["metric"], limit=float(found["limit"]), direction="at_least" if found["sign"] == ">=" else "at_most")


@record
class Shortfall:
    """A target that is not met. `value` is None where the metric is missing or not finite; `gap` is how far off, in the metric's unit."""

    target: Target
    value: float | None
    gap: float | None
    reason: str


@record
class Gate:
    """Whether all targets are met, and which are not."""

    passed: bool
    shortfalls: tuple[Shortfall, ...]


def _numbers(metrics: Mapping[str, float | None] | Evaluation, bound: bool, direction: Direction) -> Mapping[str, float | None]:
    if not isinstance(metrics, Evaluation):
        return metrics
    if not bound:
        return {estimate.name: estimate.value for estimate in metrics.estimates}
    return {estimate.name: estimate.low if direction == "at_least" else estimate.high for estimate in metrics.estimates}


def check_quality(metrics: Mapping[str, float | None] | Evaluation, targets: Sequence[Target | str], *, bound: bool = False) -> Gate:
    """Holds metrics against targets.

    Args:
        metrics: by name, or an evaluation, whose estimates are taken.
        targets: at least one; texts are read by `parse_target`.
        bound: of an evaluation take the bad end of each interval instead of the value: passed then means that it is safe to say so.

    Raises:
        ConfigError: no targets, a text that is none, or `bound` with plain numbers.
    """
    if not targets:
        raise ConfigError("The gate has no targets; expected at least one, for example 'citation_accuracy>=0.95'.")
    if bound and not isinstance(metrics, Evaluation):
        raise ConfigError("bound=True was asked of plain numbers, which have no intervals. Pass an Evaluation.")
    shortfalls: list[Shortfall] = []
    for target in (parse_target(target) if isinstance(target, str) else target for target in targets):
        value = _numbers(metrics, bound, target.direction).get(target.metric)
        if value is None or not math.isfinite(value):
            shortfalls.append(Shortfall(target=target, value=None, gap=None, reason="not measured" if value is None else f"measured as {value}"))
            continue
        gap = target.limit - value if target.direction == "at_least" else value - target.limit
        if gap > 0:
            shortfalls.append(Shortfall(target=target, value=value, gap=gap, reason=f"{value:g}, asked {target}"))
    return Gate(passed=not shortfalls, shortfalls=tuple(shortfalls))


# -------------------------------------------------------------------------------------------------------------- monitor
class _Progress(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


def monitor(
    targets: Sequence[Target | str],
    *,
    action: Literal["warn", "stop"] = "warn",
    kinds: Sequence[str] = ("evaluation",),
    measure: Callable[[], Mapping[str, float | None] | Evaluation] | None = None,
) -> Callable[[_Progress], Literal["stop"] | None]:
    """A trainer's callback that holds each evaluation against targets while training runs.

    Args:
        targets: what is asked.
        action: "warn" emits an event and trains on; "stop" ends training after the step, with a checkpoint.
        kinds: at which moments: "step", "epoch", "evaluation", "checkpoint".
        measure: what to hold against them, for example `lambda: evaluate(trainer.sampler(), dev, scorers)`; None takes the metrics of the moment
            ("dev/loss"). It runs between steps and training waits for it.

    Raises:
        ConfigError: no targets, or an unknown action or moment.

    Emits:
        `quality.shortfall` with step, metric, value and limit for every target that is missed.
    """
    checked = tuple(parse_target(target) if isinstance(target, str) else target for target in targets)
    check_quality({}, checked)
    if action not in ("warn", "stop") or not set(kinds) <= {"step", "epoch", "evaluation", "checkpoint"}:
        raise ConfigError(f"monitor has action {action!r} at {tuple(kinds)!r}; expected 'warn' or 'stop' at step, epoch, evaluation or checkpoint.")

    def callback(progress: _Progress) -> Literal["stop"] | None:
        if progress.kind not in kinds:
            return None
        gate = check_quality(progress.metrics if measure is None else measure(), checked)
        for short in gate.shortfalls:
            emit("quality.shortfall", step=progress.step, metric=short.target.metric, value=short.value, limit=short.target.limit)
        return "stop" if action == "stop" and not gate.passed else None

    return callback

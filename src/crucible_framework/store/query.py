"""Conditions ("dev/loss < 0.5", "status = done") and the order of metrics. Knows no runs and no models, only names and values."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

from ..errors import ConfigError
from ..records import Json, record

__all__ = ["LESS_IS_BETTER", "MORE_IS_BETTER", "Condition", "Direction", "direction_of", "ordered", "parse_condition"]

T = TypeVar("T")
Direction = Literal["min", "max"]
LESS_IS_BETTER = frozenset(
    {
        "brier", "chirality", "circuit_rank", "cost", "cyclic", "ece", "error_rate", "global_norm", "invented_documents", "latency", "loss", "memory_bytes",
        "nll", "perplexity", "polarity_conflict", "step_s", "target_nll",
    }
)  # fmt: skip
MORE_IS_BETTER = frozenset({"accuracy", "agreement", "exact_match", "f1", "label_accuracy", "passes_tests", "precision", "recall", "tokens_per_s"})
"""Metrics, by the last part of their name, whose direction everybody agrees on. Of others it has to be said."""

_CONDITION = re.compile(r"(?P<key>[^\s<>=!]+)\s*(?P<sign><=|>=|!=|==|=|<|>)\s*(?P<value>\S.*)")


@record
class Condition:
    """A value's name, a sign and what it is compared with; `number` is None where that is no number."""

    key: str
    sign: Literal["<", "<=", "=", "!=", ">=", ">"]
    text: str
    number: float | None

    def fits(self, value: Json) -> bool:
        """Whether a value fits; nothing (None, NaN) fits only "!=". Texts are compared without regard to case, and `*` stands for anything."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return self.sign == "!="
        if self.number is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            return {
                "<": value < self.number, "<=": value <= self.number, "=": value == self.number,
                "!=": value != self.number, ">=": value >= self.number, ">": value > self.number,
            }[self.sign]  # fmt: skip
        if self.sign in ("=", "!="):
            same = fnmatch.fnmatchcase(str(value).lower(), self.text.lower())
            return same == (self.sign == "=")
        return False


def parse_condition(text: str) -> Condition:
    """The condition that a text states.

    Raises:
        ConfigError: it has another form, or compares a text by size.
    """
    parts = _CONDITION.fullmatch(text.strip())
    if parts is None:
        raise ConfigError(f"{text!r} is no condition; expected a name, one of < <= = != >= >, and a value, for example 'dev/loss < 0.5'.")
    sign = "=" if parts["sign"] == "==" else parts["sign"]
    try:
        number = float(parts["value"])
    except ValueError:
        number = None
    if number is None and sign not in ("=", "!="):
        raise ConfigError(f"{text!r} is no condition: {parts['value']!r} is no number, and {sign} needs one, for example 'dev/loss < 0.5'.")
    return Condition(key=parts["key"], sign=sign, text=parts["value"], number=number)  # type: ignore[arg-type] # one of the six


def direction_of(metric: str, stated: Mapping[str, str] | None = None) -> Direction:
    """Whether less ("min") or more ("max") of a metric is better: as stated, else by the last part of its name.

    Raises:
        ConfigError: neither says.
    """
    last = metric.rpartition("/")[2]
    known = (stated or {}).get(metric) or ("min" if last in LESS_IS_BETTER else "max" if last in MORE_IS_BETTER else "")
    if known not in ("min", "max"):
        raise ConfigError(f"Nothing says whether more of {metric!r} is better. Say direction='max' or 'min' (--direction).")
    return known  # type: ignore[return-value] # one of the two


def ordered(found: Iterable[tuple[T, float | None]], direction: Direction) -> tuple[T, ...]:
    """Things by a number that they have, the best first; those without one, or with NaN, come last in the order in which they came."""
    sign = 1.0 if direction == "min" else -1.0
    pairs = [(thing, (True, 0.0) if value is None or math.isnan(value) else (False, sign * value)) for thing, value in found]
    return tuple(thing for thing, _ in sorted(pairs, key=lambda pair: pair[1]))

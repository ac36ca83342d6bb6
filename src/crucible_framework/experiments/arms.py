"""The sides of a study: arms (ways of training, and ensembles of them), cells, claims made beforehand, and how words choose arms.

It knows neither how arms are made from settings nor how a cell is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Literal

from ..errors import ConfigError, UnknownNameError
from ..records import TrainConfig, record

__all__ = ["BASE", "Arm", "Cell", "Claim", "EnsemblePlan", "Hypothesis", "less_is_better", "member_names", "select", "word"]

BASE = "base"
"""The untrained base model, wherever an arm can be named."""
_LESS_IS_BETTER = frozenset({"target_nll"})
Claim = Literal["better", "equivalent", "noninferior"]


@record
class Hypothesis:
    """One claim made before the study: that `better` is better than `than`; with a margin, that both are equivalent, or `better` no worse.

    Attributes:
        better, than: an arm's name, "base", or some of an arm's settings ("lora.rank=8"), which stand for all arms that have them; these
            are compared in pairs that agree in everything else.
        metric: "" is the primary one.
        because: the reason, for the report.
        margin: the largest difference that does not matter, in the metric's unit.
        claim: "better"; "equivalent": the difference lies inside ±margin; "noninferior": `better` is not worse by the margin or more. None is
            "equivalent" where there is a margin, else "better".
    """

    better: str
    than: str = BASE
    metric: str = ""
    because: str = ""
    margin: float | None = None
    claim: Claim | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin > 0):
            raise ConfigError(f"Hypothesis.margin is {self.margin!r}; expected a positive number: the largest difference that does not matter.")
        if (self.margin is None) != (self.claims == "better"):
            raise ConfigError(
                f"Hypothesis.claim is {self.claims!r} with the margin {self.margin!r}; expected a margin with 'equivalent' and 'noninferior', "
                "and none with 'better'."
            )

    @property
    def claims(self) -> Claim:
        """What is claimed."""
        return self.claim or ("better" if self.margin is None else "equivalent")


@record
class EnsemblePlan:
    """An arm that trains nothing: in each seed, the members' answers on file are votes.

    Attributes:
        name: of the arm.
        members: arms by name, or by some of their settings, which stand for all arms that have them.
        vote: a rule that needs no weights and no confidences ("majority", "plurality", "unanimous", …), or "module:attribute".
    """

    name: str
    members: tuple[str, ...]
    vote: str = "majority"

    def __post_init__(self) -> None:
        if not self.name.strip() or self.name == BASE or "," in self.name:
            raise ConfigError(f"EnsemblePlan.name is {self.name!r}; expected a name without commas, other than {BASE!r}.")
        if self.vote in ("weighted", "best_confidence"):
            raise ConfigError(
                f"EnsemblePlan.vote is {self.vote!r}, which goes by weights or confidences; answers on file have none. "
                "Expected for example 'majority', 'plurality', 'unanimous', or your own 'module:attribute'."
            )


@record
class Arm:
    """One way of training, or an ensemble. `parts` are what sets it apart in words ("lora.rank=8"); its name is their list.

    An ensemble has `members` (names of arms) and a `vote`; its `config` and `backend` are those of its first member, which say what its base is.
    """

    name: str
    parts: tuple[str, ...]
    config: TrainConfig
    backend: str
    members: tuple[str, ...] = ()
    vote: str = ""


@record
class Cell:
    """One arm with one seed on one data set. `id` names its files and holds a part of the fingerprint of its settings.

    Of an ensemble, `members` are arm → the id of its cell of the same seed and data set.
    """

    id: str
    arm: str
    seed: int
    data: str
    base: str
    config: TrainConfig
    backend: str
    members: Mapping[str, str] = field(default_factory=dict)
    vote: str = ""


def less_is_better(metric: str) -> bool:
    """Whether a smaller value is the better one."""
    return metric in _LESS_IS_BETTER


def word(value: object) -> str:
    """A value on one line without commas, as names of arms need it."""
    if isinstance(value, Mapping):
        return "+".join(f"{word(weight)}*{name}" for name, weight in value.items())
    if isinstance(value, (list, tuple)):
        return "+".join(map(word, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace(",", ";")


def member_names(arms: Sequence[Arm], plan: EnsemblePlan) -> tuple[str, ...]:
    """The arms that an ensemble asks, in the order of its words.

    Raises:
        UnknownNameError: a word names no arm.
        ConfigError: they are fewer than two.
    """
    names = tuple(dict.fromkeys(name for words in plan.members for name in _matching(arms, words).values()))
    if len(names) < 2:
        raise ConfigError(f"The ensemble {plan.name!r} has the members {list(names)!r}; expected at least two arms.")
    return names


def _matching(arms: Sequence[Arm], words: str) -> dict[tuple[str, ...], str]:
    """Arms that have all the parts, by the parts that are left."""
    parts = tuple(part.strip() for part in words.split(",") if part.strip())
    found = {tuple(p for p in arm.parts if p not in parts): arm.name for arm in arms if set(parts) <= set(arm.parts)}
    if not found:
        raise UnknownNameError("arm of this experiment", words, {BASE, *(arm.name for arm in arms), *(part for arm in arms for part in arm.parts)})
    return found


def select(arms: Sequence[Arm], hypothesis: Hypothesis) -> tuple[tuple[str, str], ...]:
    """The pairs of arms (better, than) that a hypothesis compares; "base" stands for the untrained model.

    Raises:
        UnknownNameError: a side names no arm.
        ConfigError: the sides are the same, or do not pair up.
    """
    if hypothesis.better == hypothesis.than:
        raise ConfigError(f"A hypothesis compares {hypothesis.better!r} with itself; expected two sides.")
    if hypothesis.better == BASE:
        return tuple((BASE, name) for name in _matching(arms, hypothesis.than).values())
    better = _matching(arms, hypothesis.better)
    if hypothesis.than == BASE:
        return tuple((name, BASE) for name in better.values())
    than = _matching(arms, hypothesis.than)
    if len(better) == len(than) == 1:
        return ((next(iter(better.values())), next(iter(than.values()))),)
    if better.keys() != than.keys() or set(better.values()) & set(than.values()):
        raise ConfigError(
            f"{hypothesis.better!r} ({len(better)} arms) and {hypothesis.than!r} ({len(than)} arms) do not pair up; "
            "expected settings of one axis each, or two whole arms."
        )
    return tuple((better[rest], than[rest]) for rest in better)

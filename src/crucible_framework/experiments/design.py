"""What a study is going to do: arms × seeds × data sets, what is measured, and what is claimed beforehand.

An arm is one way of training. Arms are the product of named `conditions` and of a `matrix` over settings of `TrainConfig`, and ensembles of
these; a cell is one arm with one seed on one data set. This file knows neither how a cell is run nor what comes out of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from ..config import fingerprint, from_dict, load_toml, merge, parse_overrides, to_dict
from ..errors import ConfigError, UnknownNameError
from ..inference.voting import votes
from ..records import Json, SamplingParams, TrainConfig, record
from .arms import BASE, Arm, Cell, EnsemblePlan, Hypothesis, member_names, select, word

__all__ = ["Budget", "DataPlan", "Experiment", "Stopping", "experiment_from", "load_experiment"]

NLL = "target_nll"
FIRST_LOOK = 3
"""Seeds before "hopeless" looks for the first time."""
_GREEDY = SamplingParams(max_tokens=32, temperature=0.0)


def _need(owner: object, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}; expected {expected}.")


@record
class DataPlan:
    """Which rows an arm learns from and answers.

    Attributes:
        name: a data set's name or path.
        train, test: the splits.
        dev: a split whose loss is taken every `eval_interval` steps.
        task: where the data set has several.
        train_limit, test_limit: only the first examples.
        label: what the data set is called in this study; "" takes its name.
    """

    name: str = "minifact"
    train: str = "train"
    test: str = "test"
    dev: str | None = None
    task: str | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    label: str = ""

    @property
    def key(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


@record
class Budget:
    """What a study may use. None is no limit.

    Attributes:
        hours: of all workers together.
        tokens: trained and asked together.
        money: in any one currency, from the two prices.
        price_per_hour: of one worker.
        price_per_million_tokens: trained or asked.
    """

    hours: float | None = None
    tokens: int | None = None
    money: float | None = None
    price_per_hour: float = 0.0
    price_per_million_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hours", "tokens", "money"):
            value = getattr(self, name)
            _need(self, name, value is None or value > 0, "a positive number, or none")
        for name in ("price_per_hour", "price_per_million_tokens"):
            _need(self, name, getattr(self, name) >= 0, "a number of at least 0")
        _need(self, "money", self.money is None or self.price_per_hour + self.price_per_million_tokens > 0, "a price beside it")

    @property
    def limited(self) -> bool:
        """Whether anything is limited."""
        return any(value is not None for value in (self.hours, self.tokens, self.money))

    def cost(self, seconds: float, tokens: float) -> float:
        """Money for that much work."""
        return self.price_per_hour * seconds / 3600 + self.price_per_million_tokens * tokens / 1e6


@record
class Stopping:
    """Arms may be dropped before all their seeds have run; `stopping.py` says how the tests stay valid.

    Attributes:
        rule: "hopeless" drops an arm that is shown to be worse than another; "halving" keeps the best `keep` after `selection` seeds.
        spending: of α over the looks of "hopeless", one a seed from the third on: "obrien-fleming", "pocock" or "linear".
        keep: the share of arms that "halving" keeps, by the best loss on `data.dev`.
        selection: seeds that "halving" chooses by; no test uses them.
    """

    rule: Literal["hopeless", "halving"] = "hopeless"
    spending: Literal["obrien-fleming", "pocock", "linear"] = "pocock"
    keep: float = 0.5
    selection: int = 1

    def __post_init__(self) -> None:
        _need(self, "keep", 0 < self.keep < 1, "a share between 0 and 1")
        _need(self, "selection", self.selection >= 1, "a whole number of at least 1")


@record
class Experiment:
    """A study before it is run.

    Attributes:
        train: the settings that all arms share.
        matrix: dotted keys of `TrainConfig`, or "backend", each with the values that it takes.
        conditions: named sets of settings, crossed with the matrix.
        ensembles: arms that vote with the answers of others of the same seed.
        seeds: each sets the seeds of adapter, dropout and batches.
        data: the data sets.
        backend, options: where cells are trained and asked.
        threads: inside one operation, where the backend has that option; they decide the last bits, so they are part of the plan.
        scorers: names; `perplexity` adds "target_nll".
        primary: the metric that decides; one of the scorers or "target_nll".
        sampling: how answers are drawn.
        choose: the answer is the label that the model finds likeliest instead of what it writes, so that bases are compared fairly.
        in_flight: questions asked ahead; 1 is used with `perplexity`, so that every bit of it is reproducible.
        hypotheses: claimed beforehand and corrected together; everything else is exploratory.
        alpha: the share of false findings that a family of comparisons may have.
        stopping: drops arms early; None runs every cell.
        budget, retries: limits; they may change between a run and its resumption. Retries are for failures that can pass.
    """

    name: str
    train: TrainConfig = TrainConfig()
    matrix: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    ensembles: tuple[EnsemblePlan, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    data: tuple[DataPlan, ...] = (DataPlan(),)
    backend: str = "local"
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    threads: int = 2
    scorers: tuple[str, ...] = ("label_accuracy",)
    perplexity: bool = False
    primary: str = "label_accuracy"
    sampling: SamplingParams = _GREEDY
    choose: bool = False
    in_flight: int = 8
    hypotheses: tuple[Hypothesis, ...] = ()
    alpha: float = 0.05
    stopping: Stopping | None = None
    budget: Budget = Budget()
    retries: int = 1

    def __post_init__(self) -> None:
        _need(self, "name", bool(self.name.strip()), "a name")
        _need(self, "seeds", bool(self.seeds) and len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0, "different whole numbers, at least one")
        keys = [plan.key for plan in self.data]
        _need(self, "data", bool(keys) and len(set(keys)) == len(keys), "data sets with different labels, at least one")
        _need(self, "scorers", bool(self.scorers) and len(set(self.scorers)) == len(self.scorers), "different names, at least one")
        _need(self, "alpha", 0 < self.alpha < 1, "a number between 0 and 1")
        for name, least in (("threads", 1), ("in_flight", 1), ("retries", 0)):
            _need(self, name, getattr(self, name) >= least, f"a whole number of at least {least}")
        for key, values in self.matrix.items():
            words = [word(value) for value in values]
            if not words or len(set(words)) != len(words):
                raise ConfigError(f"The axis {key!r} has the values {list(values)!r}; expected different ones, at least one.")
        arms = self.arms()
        self._check_stopping(self.trained())
        for metric in (self.primary, *(h.metric for h in self.hypotheses)):
            if metric and metric not in self.metrics:
                raise UnknownNameError("metric of this experiment", metric, self.metrics, fix="Add it to scorers, or set perplexity = true.")
        voting = {arm.name for arm in arms if arm.members}
        for metric, sides in ((self.primary, voting), *((h.metric or self.primary, {n for pair in select(arms, h) for n in pair}) for h in self.hypotheses)):
            if metric == NLL and sides & voting:
                raise ConfigError(f"{NLL!r} is asked of {sorted(sides & voting)}; an ensemble votes on answers and has none. Expected one of {self.scorers}.")

    def _check_stopping(self, arms: Sequence[Arm]) -> None:
        rule = self.stopping
        if rule is None:
            return
        least = FIRST_LOOK + 1 if rule.rule == "hopeless" else rule.selection + 1
        if len(self.seeds) < least or len(arms) < 2:
            raise ConfigError(f"stopping is {rule.rule!r} with {len(self.seeds)} seeds and {len(arms)} arms; expected at least {least} seeds and 2 arms.")
        blind = any(plan.dev is None for plan in self.data) or any(arm.config.eval_interval == 0 for arm in arms)
        if rule.rule == "halving" and blind:
            raise ConfigError("stopping is 'halving', which chooses by the loss on held-out data; expected data.dev and train.eval_interval to be set.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What every cell is measured in. A scorer of another distribution reports under its own name."""
        names = tuple(name.rpartition(":")[2] for name in self.scorers)
        return (*names, NLL) if self.perplexity else names

    def measured(self, arm: Arm) -> tuple[str, ...]:
        """What cells of that arm are measured in: an ensemble has no log-probs of a target."""
        return tuple(name for name in self.metrics if name != NLL or not arm.members)

    def arms(self) -> tuple[Arm, ...]:
        """All arms: those that are trained, in the order of the conditions and the matrix, then the ensembles.

        Raises:
            ConfigError: an axis or condition names no setting (the nearest is named), or a value is out of range; an ensemble has the name of
                another arm, or fewer than two members.
            UnknownNameError: a member names no arm, or a vote no rule.
        """
        trained = self.trained()
        return (*trained, *_ensembles(self, trained))

    def trained(self) -> tuple[Arm, ...]:
        """The arms that are trained."""
        axes = [[(key, value) for value in values] for key, values in self.matrix.items()]
        named: list[tuple[str, Mapping[str, object]]] = list(self.conditions.items()) or [("", {})]
        return tuple(_arm(self, name, settings, chosen) for (name, settings), chosen in itertools.product(named, itertools.product(*axes)))

    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed by seed, so that a study that ends early is balanced; ensembles come after their members."""
        arms = self.arms()
        found: list[Cell] = []
        for seed, plan in itertools.product(self.seeds, self.data):
            here: dict[str, Cell] = {}
            for arm in arms:
                here[arm.name] = _voting_cell(arm, here) if arm.members else _cell(self, arm, seed, plan)
            found += here.values()
        return tuple(found)

    def plan_of(self, key: str) -> DataPlan:
        """The data set of that label."""
        return next(plan for plan in self.data if plan.key == key)

    def plan(self) -> dict[str, Json]:
        """What decides the results, as plain values: everything but the limits."""
        plain = cast("dict[str, Json]", to_dict(self))
        return {key: value for key, value in plain.items() if key not in ("budget", "retries", "in_flight")}


def _set(tree: dict[str, object], key: str, value: object) -> None:
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        below = node.get(parent)
        if not isinstance(below, dict):
            raise ConfigError(f"{key!r} names no setting: {parent!r} holds no others. Settings are those of TrainConfig, for example 'lora.rank'.")
        node = below
    if leaf not in node:
        raise UnknownNameError("training setting", key, _dotted(tree), fix="An axis may also be called 'backend'.")
    node[leaf] = value


def _dotted(tree: Mapping[str, object], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        found += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and key != "loss" else [prefix + key]
    return found


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested tables as dotted keys; the weights over losses are one value."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key != "loss":
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _arm(experiment: Experiment, name: str, settings: Mapping[str, object], chosen: Sequence[tuple[str, object]]) -> Arm:
    tree = cast("dict[str, object]", to_dict(experiment.train))
    backend = experiment.backend
    for key, value in (*_flat(settings).items(), *chosen):
        if key == "backend":
            backend = str(value)
        else:
            _set(tree, key, value)
    parts = (*([name] if name else []), *(f"{key}={word(value)}" for key, value in chosen if len(experiment.matrix[key]) > 1))
    title = ", ".join(parts) or "adapter"
    if title == BASE:
        raise ConfigError(f"A condition cannot be called {BASE!r}: that is the untrained model. Choose another name.")
    return Arm(name=title, parts=parts or (title,), config=from_dict(TrainConfig, tree), backend=backend)


def _ensembles(experiment: Experiment, trained: Sequence[Arm]) -> tuple[Arm, ...]:
    found: list[Arm] = []
    for plan in experiment.ensembles:
        taken = {name for arm in (*trained, *found) for name in (arm.name, *arm.parts)}
        if plan.name in taken:
            raise ConfigError(f"An ensemble is called {plan.name!r}, like another arm or one of its settings. Choose another name.")
        if ":" not in plan.vote:  # a rule of one's own may be known to the workers alone
            votes.get(plan.vote)
        members = member_names(trained, plan)
        first = next(arm for arm in trained if arm.name == members[0])
        found.append(Arm(name=plan.name, parts=(plan.name,), config=first.config, backend=first.backend, members=members, vote=plan.vote))
    return tuple(found)


def _voting_cell(arm: Arm, here: Mapping[str, Cell]) -> Cell:
    """The cell of an ensemble, from those of its seed and data set."""
    first, members = here[arm.members[0]], {name: here[name].id for name in arm.members}
    mark = fingerprint({"members": members, "vote": arm.vote})[:8]
    name = f"{_slug(arm.name)}-s{first.seed}-{_slug(first.data)}-{mark}"
    return dataclasses.replace(first, id=name, arm=arm.name, members=members, vote=arm.vote)


def _slug(*words: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-.")[:60]


def _cell(experiment: Experiment, arm: Arm, seed: int, plan: DataPlan) -> Cell:
    lora = dataclasses.replace(arm.config.lora, seed=seed)
    config = dataclasses.replace(arm.config, lora=lora, seed=seed)
    asked = [
        to_dict(plan),
        list(experiment.scorers),
        experiment.perplexity,
        to_dict(experiment.sampling),
        dict(experiment.options),
        experiment.threads,
        experiment.choose,
    ]
    mark = fingerprint({"config": to_dict(config), "backend": arm.backend, "asked": asked})[:8]
    base_mark = fingerprint({"model": config.base_model, "backend": arm.backend, "asked": asked})[:8]
    return Cell(
        id=f"{_slug(arm.name)}-s{seed}-{_slug(plan.key)}-{mark}",
        arm=arm.name,
        seed=seed,
        data=plan.key,
        base=f"{_slug(BASE, config.base_model)}-{_slug(plan.key)}-{base_mark}",
        config=config,
        backend=arm.backend,
    )


# ---------------------------------------------------------------------------------------------------------------- files
def experiment_from(tree: Mapping[str, object]) -> Experiment:
    """Plain values, as a TOML file has them, to an experiment; `matrix` may be nested tables.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value that does not fit.
    """
    plain = dict(tree)
    matrix = plain.get("matrix", {})
    if not isinstance(matrix, Mapping):
        raise ConfigError(f"'matrix' is {matrix!r}; expected a table of settings with a list of values each.")
    axes = _flat(cast("Mapping[str, object]", matrix))
    for key, values in axes.items():
        if not isinstance(values, (list, tuple)):
            raise ConfigError(f"The axis {key!r} is {values!r}; expected a list of values.")
    plain["matrix"] = axes
    data = plain.get("data")
    if isinstance(data, Mapping):
        plain["data"] = [data]
    return from_dict(Experiment, plain)


def load_experiment(file: str | Path, settings: Iterable[str] = ()) -> Experiment:
    """An experiment from a TOML file; `settings` are "key=value" and win over the file.

    Raises:
        ConfigError: no such file, no TOML, an unknown key or a value that does not fit.
    """
    return experiment_from(merge(load_toml(Path(file)), parse_overrides(settings)))

"""Scores of two sides of a study, pair by pair: the same item, the same seed, the same other settings; and the test that such pairs ask for.

This file knows neither families of comparisons nor how a cell was run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from statistics import fmean
from typing import cast

from ..errors import StatisticsError
from ..records import Evaluation, Finding
from ..stats import Freedom, Side, paired_difference, seeds_and_items, tost
from .arms import BASE
from .study import CellResult, Study

__all__ = ["Paired", "Scores", "bounded", "clusters_of", "held_to_margin", "paired_up", "tested"]


class Scores:
    """A study's scores, by arm, seed and data set."""

    def __init__(self, study: Study) -> None:
        self.study, self.arms = study, study.experiment.arms()
        self._cells = {(cell.arm, cell.seed, cell.data): cell for cell in study.cells}

    def of(self, arm: str, seed: int, data: str, against: str) -> Evaluation | None:
        """An arm's evaluation, or that of the base which `against` started from."""
        cell = self._cells[against if arm == BASE else arm, seed, data]
        found: CellResult = self.study.base_of(cell) if arm == BASE else cell
        return found.evaluation


class Paired:
    """Scores of two sides, pair by pair: the same item, the same seed, the same other settings."""

    def __init__(self) -> None:
        self.before: list[float | None] = []
        self.after: list[float | None] = []
        self.items: list[str] = []
        self.documents: list[str] = []
        self.seeds: dict[int, dict[str, list[tuple[float | None, float | None]]]] = {}
        self.sets = 0
        self.missing: list[int] = []

    def add(self, seed: int, before: Evaluation, after: Evaluation, metric: str) -> None:
        """One pair of evaluations; items in the order of their ids, so that neither side's order decides a bit."""
        other = {item.id: item for item in before.items}
        rows = self.seeds.setdefault(seed, {})
        for item in sorted(after.items, key=lambda one: one.id):
            pair = other[item.id].scores.get(metric), item.scores.get(metric)
            self.before.append(pair[0])
            self.after.append(pair[1])
            self.items.append(item.id)
            self.documents.append(item.document)
            rows.setdefault(item.id, []).append(pair)
        self.sets += 1

    def clusters(self) -> list[str] | None:
        """Documents where every item has one; else the items, where they come more than once."""
        return clusters_of(self.items, self.documents, self.sets)

    def per_seed(self) -> dict[int, float]:
        """The mean difference of each seed that has one."""
        found = {seed: [b - a for pairs in rows.values() for a, b in pairs if a is not None and b is not None] for seed, rows in self.seeds.items()}
        return {seed: fmean(values) for seed, values in found.items() if values}

    def per_item(self) -> dict[str, float]:
        """The mean difference of each example that has one, in the order of their ids."""
        found: dict[str, list[float]] = {}
        for rows in self.seeds.values():
            for item, pairs in rows.items():
                found.setdefault(item, []).extend(b - a for a, b in pairs if a is not None and b is not None)
        return {item: fmean(values) for item, values in sorted(found.items()) if values}

    def rows(self) -> tuple[list[list[float | None]], list[list[float | None]], list[str] | None]:
        """(before, after) as [seed][item], each the mean over the other settings, and the items' documents."""
        sides = [[[_mean([pair[side] for pair in pairs]) for pairs in rows.values()] for rows in self.seeds.values()] for side in (0, 1)]
        documents = dict(zip(self.items, self.documents, strict=True))
        return sides[0], sides[1], list(documents.values()) if all(documents.values()) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def clusters_of(items: Sequence[str], documents: Sequence[str], sets: int) -> list[str] | None:
    """Documents where every item has one; else the items where they come in several sets."""
    if documents and all(documents):
        return list(documents)
    return list(items) if sets > 1 else None


def paired_up(scores: Scores, pairs: Sequence[tuple[str, str]], data: str, metric: str, seeds: Sequence[int]) -> Paired:
    """All pairs (better, than) in those seeds; `missing` are the seeds that one side has no result of."""
    found = Paired()
    for seed in seeds:
        sides = [(scores.of(than, seed, data, better), scores.of(better, seed, data, than)) for better, than in pairs]
        if any(before is None or after is None for before, after in sides):
            found.missing.append(seed)  # the whole seed: what is left would not be balanced over the other settings
            continue
        for before, after in sides:
            found.add(seed, cast("Evaluation", before), cast("Evaluation", after), metric)
    return found


def bounded(metric: str) -> bool | None:
    """Whether a metric cannot leave [0, 1], None to see it from its values."""
    return False if metric == "target_nll" else None


def tested(name: str, paired: Paired, metric: str, level: float, *, freedom: Freedom) -> tuple[Finding, Finding | None]:
    """(the finding about new examples and, with several seeds, new seeds; the one about new examples for the adapters at hand).

    Args:
        freedom: of the first one, see `seeds_and_items`.

    Raises:
        StatisticsError: too few items or documents, or no spread.
    """
    refused: StatisticsError | None = None
    given: Finding | None = None
    try:
        given = paired_difference(name, paired.before, paired.after, clusters=paired.clusters(), level=level, bounded=bounded(metric))
    except StatisticsError as error:
        refused = error
    if len(paired.seeds) > 1:
        before, after, documents = paired.rows()
        with contextlib.suppress(StatisticsError):
            both = seeds_and_items(name, before, after, clusters=documents, paired_seeds=True, level=level, freedom=freedom)
            if both.interval[0] < both.interval[1]:  # without any spread a t interval has no width; the score method is then the honest one
                return both, given
    if given is None:
        raise refused or StatisticsError(f"{name!r} has no finding.")
    return given, given


def held_to_margin(name: str, paired: Paired, metric: str, level: float, *, margin: float, side: Side) -> Finding:
    """Whether the difference lies inside ±margin, or on one side of it: about new examples and, with several seeds, new seeds.

    Raises:
        StatisticsError: too few items or documents, or no spread.
    """
    if len(paired.seeds) > 1:
        before, after, documents = paired.rows()
        with contextlib.suppress(StatisticsError):
            return seeds_and_items(name, before, after, clusters=documents, paired_seeds=True, level=level, margin=margin, side=side)
    return tost(name, paired.before, paired.after, margin=margin, paired=True, clusters=paired.clusters(), level=level, bounded=bounded(metric), side=side)

"""Which arms cannot be told apart: mean ranks over documents, their critical difference, and the ranks that each arm may have.

Rows are documents (examples where there are none), which are independent of each other; an arm's score of a row is the mean over its seeds. So
the ranks are about other documents for the adapters at hand. This file does not know how a cell was run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from ..errors import StatisticsError
from ..records import Evaluation, Finding, record
from ..stats import Rank, friedman, nemenyi, rank_sets, tied_sets

__all__ = ["Ranking", "ranking_of"]


@record
class Ranking:
    """The order of arms on one data set in one metric.

    Attributes:
        rows: how many rows of `unit` were ranked; each has a score of every arm.
        mean_ranks: arm → mean rank, 1 is the best.
        critical_difference: of mean ranks, for all pairs together (Nemenyi).
        overall: whether any arms differ (Friedman).
        ranks: the ranks that each arm may have, all together at the study's level.
        sets: the largest sets of arms that are not shown to differ.
    """

    data: str
    metric: str
    rows: int
    unit: str
    mean_ranks: Mapping[str, float]
    critical_difference: float
    overall: Finding
    ranks: tuple[Rank, ...]
    sets: tuple[tuple[str, ...], ...]


def _by_row(evaluations: Sequence[Evaluation], metric: str, *, documents: bool) -> dict[str, float]:
    """Row → mean score over its items and the seeds; rows without a score are left out."""
    found: dict[str, list[float]] = {}
    for evaluation in evaluations:
        for item in evaluation.items:
            value = item.scores.get(metric)
            if value is not None:
                found.setdefault(item.document if documents else item.id, []).append(value)
    return {row: fmean(values) for row, values in found.items()}


def ranking_of(data: str, metric: str, arms: Mapping[str, Sequence[Evaluation]], *, alpha: float, less_is_better: bool) -> Ranking | None:
    """The ranking of arms, None where there are fewer than three with a result or fewer than two common rows.

    Source: Demšar 2006, JMLR 7:1-30; Al Mohamad, Goeman & van Zwet 2022 (ranges of ranks).
    """
    known = {arm: evaluations for arm, evaluations in arms.items() if evaluations}
    if len(known) < 3:
        return None
    documents = all(item.document for evaluations in known.values() for one in evaluations for item in one.items)
    scores = {arm: _by_row(evaluations, metric, documents=documents) for arm, evaluations in known.items()}
    rows = sorted(set.intersection(*(set(found) for found in scores.values())))
    sign = 1.0 if less_is_better else -1.0  # so that rank 1 is the best
    groups = {arm: [sign * found[row] for row in rows] for arm, found in scores.items()}
    try:
        overall, pairs = friedman(f"{metric} on {data}", groups, level=1 - alpha), nemenyi(metric, groups, level=1 - alpha)
    except StatisticsError:
        return None
    ranks = rank_sets(list(groups), pairs, [pair.p_value for pair in pairs], alpha=alpha, less_is_better=True)
    return Ranking(
        data=data,
        metric=metric,
        rows=len(rows),
        unit="document" if documents else "example",
        mean_ranks=_mean_ranks(groups),
        critical_difference=(pairs[0].interval[1] - pairs[0].interval[0]) / 2,
        overall=overall,
        ranks=ranks,
        sets=tied_sets(ranks),
    )


def _mean_ranks(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    names, columns = list(groups), list(zip(*groups.values(), strict=True))
    ranks = [[sum(b < a for b in row) + (sum(b == a for b in row) + 1) / 2 for a in row] for row in columns]
    return {name: fmean(row[index] for row in ranks) for index, name in enumerate(names)}

"""Which rank each of several groups may have: from tested pairs to ranks with their range, and to sets that cannot be told apart.

Knows no scores: it reads findings of pairs. A leader board that shows one order hides that most of its places could be changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..errors import StatisticsError
from ..records import Finding, record

__all__ = ["Rank", "rank_sets", "tied_sets"]


@record
class Rank:
    """One group's place.

    Attributes:
        best, worst: the ranks that it may have (1 is the best): one more than the groups shown to be better, and k less those shown to be worse.
        tied: the groups that it is not shown to differ from, in the order given.
    """

    name: str
    best: int
    worst: int
    tied: tuple[str, ...]


def _order(names: Sequence[str], pairs: Sequence[Finding], adjusted: Sequence[float], alpha: float, *, less_is_better: bool) -> dict[tuple[str, str], bool]:
    """(better, worse) → True for each pair that is shown to differ."""
    if len(set(names)) != len(names) or len(pairs) != len(adjusted):
        raise StatisticsError(f"{len(names)} names, {len(pairs)} pairs and {len(adjusted)} p-values; expected different names and a p-value for each pair.")
    titles = {f"{b} - {a}": (a, b) for a, b in itertools.permutations(names, 2)}
    found: dict[tuple[str, str], bool] = {}
    seen: set[frozenset[str]] = set()
    for pair, p in zip(pairs, adjusted, strict=True):
        if pair.name not in titles:
            raise StatisticsError(f"The pair {pair.name!r} is of none of {', '.join(names)}; expected names like 'b - a'.")
        a, b = titles[pair.name]
        seen.add(frozenset((a, b)))
        if p < alpha and pair.effect != 0:
            better, worse = (b, a) if (pair.effect > 0) != less_is_better else (a, b)
            found[better, worse] = True
    missing = [pair for pair in itertools.combinations(names, 2) if frozenset(pair) not in seen]
    if missing:
        raise StatisticsError(f"There is no finding of {missing[0][1]!r} - {missing[0][0]!r}; expected one for every pair. Compare without a control.")
    return found


def rank_sets(
    names: Sequence[str], pairs: Sequence[Finding], adjusted: Sequence[float], *, alpha: float = 0.05, less_is_better: bool = False
) -> tuple[Rank, ...]:  # fmt: skip
    """The ranks that each group may have; all ranges hold together with confidence 1 - α where `adjusted` controls the family-wise error.

    Args:
        names: of the groups.
        pairs: one finding for every pair, named "b - a", as `compare_groups` and the post-hoc tests give them.
        adjusted: their corrected p-values (`Comparison.adjusted`; those of `tukey`, `nemenyi`, … are corrected already).

    Raises:
        StatisticsError: a pair is missing or of unknown groups.

    Source: Al Mohamad, Goeman & van Zwet 2022, Simultaneous confidence intervals for ranks; Mogstad, Romano, Shaikh & Wilhelm 2024, Inference for Ranks.
    """
    order = _order(names, pairs, adjusted, alpha, less_is_better=less_is_better)
    found = []
    for name in names:
        above, below = (sum(pair[side] == name for pair in order) for side in (1, 0))
        tied = tuple(other for other in names if other != name and (name, other) not in order and (other, name) not in order)
        found.append(Rank(name=name, best=1 + above, worst=len(names) - below, tied=tied))
    return tuple(found)


def tied_sets(ranks: Sequence[Rank]) -> tuple[tuple[str, ...], ...]:
    """The largest sets within which no two groups are shown to differ, in the order given; a group may be in several.

    Source: Bron & Kerbosch 1973 (maximal cliques of "not shown to differ").
    """
    near = {rank.name: set(rank.tied) for rank in ranks}
    place = {rank.name: index for index, rank in enumerate(ranks)}
    found: list[tuple[str, ...]] = []

    def grow(chosen: set[str], open_: set[str], closed: set[str]) -> None:
        if not open_ and not closed:
            found.append(tuple(sorted(chosen, key=place.__getitem__)))
            return
        pivot = max(open_ | closed, key=lambda name: len(near[name] & open_))
        for name in sorted(open_ - near[pivot], key=place.__getitem__):
            grow(chosen | {name}, open_ & near[name], closed & near[name])
            open_ = open_ - {name}
            closed = closed | {name}

    grow(set(), set(place), set())
    return tuple(sorted(found, key=lambda names: [place[name] for name in names]))

"""The front door: `compare_groups` takes scores as they were collected and picks the test by their design. Computes nothing itself.

The design is what was done: paired or not, clustered or not, 0/1 outcomes or numbers. There is no look at normality first: tests chosen that
way have p-values that mean nothing (Zimmerman 2004; Rochon, Gondan & Kieser 2012).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from ..errors import StatisticsError, TooFewError
from ..records import Estimate, Finding, record
from .corrections import Correction, adjust
from .effects import hedges_g
from .groups import anova, clustered_anova, cochran_q, complete_rows, friedman, kruskal_wallis, repeated_anova, welch_anova
from .intervals import paired_difference
from .proportions import chi_square, proportion_difference
from .ranks import brunner_munzel, wilcoxon
from .samples import Values, check_level, is_binary, sample
from .significance import clustered_t, welch_t

__all__ = ["Comparison", "compare_groups"]

Clusters: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]] | None


@record
class Comparison:
    """What `compare_groups` found.

    Attributes:
        design: what was collected, in words.
        why: which test that asks for, and what was not taken.
        overall: whether any groups differ; with two groups the one pair; None where it is not defined (see `undefined`).
        pairs: one finding per pair, named "b - a"; p-value and interval are of this pair alone and agree with each other.
        adjusted: p-values of `pairs` corrected over the family, in the same order.
        correction: how.
        effects: standardised effects of pairs of unclustered numbers, named as the pairs.
        undefined: one sentence for each comparison that these data do not allow.
    """

    name: str
    design: str
    why: str
    overall: Finding | None
    pairs: tuple[Finding, ...]
    adjusted: tuple[float, ...]
    correction: str
    effects: tuple[Estimate, ...]
    undefined: tuple[str, ...] = ()

    def __getitem__(self, pair: str) -> Finding:
        """The finding of a pair, by its name "b - a"."""
        for finding in self.pairs:
            if finding.name == pair:
                return finding
        raise StatisticsError(f"No pair is called {pair!r}; expected one of {', '.join(finding.name for finding in self.pairs)}.")


@record
class _Design:
    paired: bool
    clustered: bool
    binary: bool
    ranks: bool

    def words(self) -> str:
        rows = "paired rows" if self.paired else "independent groups"
        what = "0/1 outcomes" if self.binary else "numbers compared by rank" if self.ranks else "numbers"
        return f"{rows}{', clustered' if self.clustered else ''}, {what}"


_WHY = {
    (True, "clustered"): "rows of one cluster depend on each other, so the clusters are the observations; tests that take rows as independent were not taken",
    (True, "binary"): "the same items were answered each time, so only the items that changed speak; a test of independent shares was not taken",
    (True, "ranks"): "the same items were measured each time, and only their order is to count; a test of means was not taken, as asked",
    (True, "numbers"): "the same items were measured each time, so the differences are tested; a test of independent groups would throw away what pairs share",
    (False, "clustered"): "values of one cluster depend on each other, so standard errors are by cluster; tests that take values as independent were not taken",
    (False, "binary"): "independent 0/1 outcomes, so shares are compared by a score test",
    (False, "ranks"): "independent groups whose order is to count, as asked; spreads may differ, so not Mann-Whitney for pairs",
    (False, "numbers"): "independent groups, whose variances need not be equal, so Welch; Student's test and a look at normality first were not taken",
}


def compare_groups(
    name: str,
    groups: Mapping[str, Values],
    *,
    paired: bool = False,
    clusters: Clusters = None,
    ranks: bool = False,
    control: str | None = None,
    level: float = 0.95,
    correction: Correction = "holm",
) -> Comparison:
    """Compares two or more groups by the test that their design asks for, and says why.

    | design | two groups | three or more |
    |---|---|---|
    | paired, clustered | cluster-robust paired t | cluster-robust Hotelling |
    | paired, 0/1 | McNemar score test with Tango's interval | Cochran's Q |
    | paired, numbers | paired t | repeated-measures ANOVA (Greenhouse-Geisser) |
    | paired, `ranks` | Wilcoxon signed-rank | Friedman |
    | independent, clustered | cluster-robust Welch | the same, Welch's ANOVA |
    | independent, 0/1 | score test with Miettinen-Nurminen interval | χ² |
    | independent, numbers | Welch | Welch's ANOVA |
    | independent, `ranks` | Brunner-Munzel | Kruskal-Wallis |

    Args:
        groups: name → scores; None where the measure does not apply. The effect of pair "b - a" is b less a, with a before b in this mapping.
        paired: scores stand by position: the same items in each group. Incomplete rows are left out.
        clusters: the source of each row (paired), or of each value of each group (a mapping).
        ranks: only the order of scores counts (grades, heavy tails).
        control: compare each other group with this one only.
        correction: over the pairs.

    Raises:
        TooFewError: two groups, and their data do not allow the test; with more groups such pairs stand in `undefined`.
        StatisticsError: fewer than two groups, an unknown control, ranks together with clusters, or lengths that do not fit.
    """
    check_level(level)
    if len(groups) < 2:
        raise StatisticsError(f"{name!r} has the groups {list(groups)}; expected at least two.")
    if control is not None and control not in groups:
        raise StatisticsError(f"control is {control!r}; expected one of {', '.join(groups)}.")
    design = _design(name, groups, paired=paired, clusters=clusters, ranks=ranks)
    couples = itertools.combinations(groups, 2) if control is None else ((control, group) for group in groups if group != control)
    pairs, effects, undefined = _compare_pairs(groups, tuple(couples), design, clusters, level=level)
    overall: Finding | None = None
    try:
        overall = pairs[0] if len(groups) == 2 else _overall(name, groups, design, clusters, level)
    except TooFewError as error:
        undefined.append(str(error))
    return Comparison(
        name=name,
        design=design.words(),
        why=_WHY[paired, "clustered" if design.clustered else "binary" if design.binary else "ranks" if ranks else "numbers"],
        overall=overall,
        pairs=tuple(pairs),
        adjusted=adjust([finding.p_value for finding in pairs], correction),
        correction=correction,
        effects=tuple(effects),
        undefined=tuple(undefined),
    )


def _compare_pairs(
    groups: Mapping[str, Values], couples: Sequence[tuple[str, str]], design: _Design, clusters: Clusters, *, level: float
) -> tuple[list[Finding], list[Estimate], list[str]]:  # fmt: skip
    pairs, effects, undefined = list[Finding](), list[Estimate](), list[str]()
    for a, b in couples:
        try:
            pairs.append(_pair(groups, (a, b), design, clusters, level=level))
        except TooFewError as error:
            if len(groups) == 2:
                raise
            undefined.append(str(error))
            continue
        if not (design.clustered or design.binary or design.ranks):
            try:
                effects.append(hedges_g(f"{b} - {a}", groups[a], groups[b], paired=design.paired, level=level))
            except TooFewError as error:
                undefined.append(str(error))
    return pairs, effects, undefined


def _design(name: str, groups: Mapping[str, Values], *, paired: bool, clusters: Clusters, ranks: bool) -> _Design:
    if paired:
        x, kept, _ = complete_rows(name, groups)
        binary = is_binary(x)
        if isinstance(clusters, Mapping):
            raise StatisticsError("clusters is a mapping; expected one cluster for each row where paired is True.")
        if clusters is not None and len(clusters) != len(next(iter(groups.values()))):
            raise StatisticsError(f"{name!r} has {len(next(iter(groups.values())))} rows and {len(clusters)} clusters; expected one for each row.")
        clustered = clusters is not None and len({clusters[row] for row in kept}) < len(kept)
    else:
        binary = all(is_binary(sample(f"{name} {group}", values).x) for group, values in groups.items())
        if clusters is not None and not (isinstance(clusters, Mapping) and set(clusters) == set(groups)):
            raise StatisticsError(f"clusters of independent groups; expected a mapping with {', '.join(groups)}.")
        clustered = isinstance(clusters, Mapping) and any(len(set(names)) < len(names) for names in clusters.values())
        clustered = clustered or (isinstance(clusters, Mapping) and _shared(list(clusters.values())))
    if ranks and clustered:
        raise StatisticsError("ranks and clusters were both given; expected one of them. Use permutation_test with clusters, or compare means.")
    return _Design(paired=paired, clustered=clustered, binary=binary, ranks=ranks and not binary)


def _shared(sides: Sequence[Sequence[str]]) -> bool:
    return len({name for side in sides for name in side}) < sum(len(set(side)) for side in sides)


def _pair(groups: Mapping[str, Values], names: tuple[str, str], design: _Design, clusters: Clusters, *, level: float) -> Finding:
    before, after, pair = groups[names[0]], groups[names[1]], f"{names[1]} - {names[0]}"
    if design.paired and not design.ranks:
        rows = None if isinstance(clusters, Mapping) else clusters
        try:
            return paired_difference(pair, before, after, clusters=rows, level=level)
        except TooFewError:
            raise
        except StatisticsError as error:  # pairs that all differ by the same amount
            raise TooFewError(str(error)) from error
    if design.paired:
        return wilcoxon(pair, before, after, level=level)
    if design.clustered and isinstance(clusters, Mapping):
        return clustered_t(pair, before, after, before_clusters=clusters[names[0]], after_clusters=clusters[names[1]], level=level)
    test: Callable[..., Finding] = proportion_difference if design.binary else brunner_munzel if design.ranks else welch_t
    return test(pair, before, after, level=level)


def _overall(name: str, groups: Mapping[str, Values], design: _Design, clusters: Clusters, level: float) -> Finding:
    if design.paired:
        if design.clustered and clusters is not None and not isinstance(clusters, Mapping):
            return clustered_anova(name, groups, clusters, level=level)
        paired_test = cochran_q if design.binary else friedman if design.ranks else repeated_anova
        return paired_test(name, groups, level=level)
    if design.clustered and isinstance(clusters, Mapping):
        if _shared(list(clusters.values())):
            raise TooFewError(f"{name!r} has clusters in several groups that are not paired: no overall test is known here. Compare in pairs.")
        return welch_anova(name, groups, clusters=clusters, level=level)
    samples = {group: sample(f"{name} {group}", values) for group, values in groups.items()}
    if design.binary:
        return chi_square(name, [[int(data.x.sum()), len(data.x) - int(data.x.sum())] for data in samples.values()], level=level)
    if design.ranks:
        return kruskal_wallis(name, groups, level=level)
    flat = any(data.sd() == 0 for data in samples.values())  # Welch would weigh such a group infinitely
    return anova(name, groups, level=level) if flat else welch_anova(name, groups, level=level)

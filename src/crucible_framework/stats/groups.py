"""Tests of three or more groups. Knows no pairwise comparisons and chooses no test.

The effect is a share of variance (or of what the statistic can reach) less what chance alone gives, from 0 on. Such a test looks at one
side, so at α its interval is of level 1 - 2α, and its lower end leaves 0 exactly where p < α (Steiger 2004).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..errors import StatisticsError, TooFewError
from ..records import Finding, record
from .noncentral import chi2_interval, f_interval
from .samples import Floats, Sample, Values, is_binary, left_out, one_sided, sample

__all__ = ["Check", "anova", "clustered_anova", "cochran_q", "friedman", "kruskal_wallis", "levene", "repeated_anova", "shapiro", "welch_anova"]

Groups = Mapping[str, Values]


@record
class Check:
    """What a look at an assumption gave. It never chooses a test: that would spoil the p-value of the test chosen."""

    name: str
    test: str
    statistic: float
    p_value: float
    n: int
    why: str
    source: str


def independent(name: str, groups: Groups, least: int) -> dict[str, Sample]:
    """The groups' values, at least two groups of at least `least` values each."""
    if len(groups) < 2:
        raise TooFewError(f"{name!r} has {len(groups)} group(s); expected at least two.")
    samples = {group: sample(f"{name} {group}", values) for group, values in groups.items()}
    for group, data in samples.items():
        if len(data.x) < least:
            raise TooFewError(f"Group {group!r} of {name!r} has {len(data.x)} value{'s' * (len(data.x) != 1)}; expected at least {least}.")
    return samples


def complete_rows(name: str, groups: Groups) -> tuple[Floats, list[int], int]:
    """(float64[n, k] of the rows in which each group has a value, their positions, how many rows were left out)."""
    if len(groups) < 2:
        raise TooFewError(f"{name!r} has {len(groups)} group(s); expected at least two.")
    lengths = {group: len(values) for group, values in groups.items()}
    if len(set(lengths.values())) != 1:
        raise StatisticsError(f"{name!r} has groups of different lengths {lengths}; expected rows by position where paired is True.")
    total = next(iter(lengths.values()))
    kept = [row for row in range(total) if all(values[row] is not None for values in groups.values())]
    if len(kept) < 2:
        raise TooFewError(f"{name!r} has {len(kept)} complete row(s) of {total}; expected at least two.")
    return np.stack([sample(f"{name} {group}", [values[row] for row in kept]).x for group, values in groups.items()], axis=1), kept, total - len(kept)


def _f_finding(
    name: str, test: str, *, f: float, df: tuple[float, float], n: int, why: str, source: str, level: float, effect: str, clusters: int | None = None
) -> Finding:
    from scipy.special import fdtrc

    wide = one_sided(level)
    low, high = f_interval(f, *df, wide)
    gain = max(0.0, f - 1) * df[0]
    return Finding(
        name=name,
        test=test,
        statistic=f,
        p_value=float(fdtrc(*df, f)),
        effect=gain / (gain + n),
        interval=(low / (low + n), high / (high + n)),
        n=n,
        why=f"{why}; F with {df[0]:.4g} and {df[1]:.4g} degrees of freedom; the effect is {effect}, its interval of {wide:g} (Steiger)",
        source=source,
        level=wide,
        clusters=clusters,
    )


def _equal(name: str, test: str, *, n: int, source: str, level: float, clusters: int | None = None) -> Finding:
    return Finding(
        name=name,
        test=test,
        statistic=0.0,
        p_value=1.0,
        effect=0.0,
        interval=(0.0, 0.0),
        n=n,
        why="the groups are exactly equal and show no spread; the interval has no width and says nothing of other samples",
        source=source,
        level=one_sided(level),
        clusters=clusters,
    )


def _no_spread(name: str) -> TooFewError:
    return TooFewError(f"{name!r} has no spread within its groups, whose means differ: no test is defined; expected values that differ. Report the means.")


def _sizes(samples: Mapping[str, Sample]) -> str:
    dropped = sum(data.dropped for data in samples.values())
    total = sum(len(data.x) for data in samples.values())
    return f"{len(samples)} independent groups ({', '.join(f'{group}: {len(data.x)}' for group, data in samples.items())})" + left_out(dropped, total + dropped)


def anova(name: str, groups: Groups, *, level: float = 0.95) -> Finding:
    """One-way analysis of variance, with one common variance; the effect is ω². Prefer `welch_anova` where variances may differ.

    Raises:
        TooFewError: fewer than two groups, no more values than groups, or no spread within groups whose means differ.
    """
    source = "Fisher 1925; Hays 1963 (ω²); Steiger 2004, Psychological Methods 9:164-182"
    samples = independent(name, groups, 1)
    n, k = sum(len(data.x) for data in samples.values()), len(samples)
    if n <= k:
        raise TooFewError(f"{name!r} has {n} values in {k} groups; expected more values than groups.")
    grand = sum(float(data.x.sum()) for data in samples.values()) / n
    between = sum(len(data.x) * (data.mean - grand) ** 2 for data in samples.values())
    within = sum((len(data.x) - 1) * data.sd() ** 2 for data in samples.values())
    if within == 0:
        if len({data.mean for data in samples.values()}) == 1:
            return _equal(name, "one-way ANOVA", n=n, source=source, level=level)
        raise _no_spread(name)
    f = between / (k - 1) / (within / (n - k))
    return _f_finding(
        name, "one-way ANOVA", f=f, df=(k - 1, n - k), n=n, why=f"{_sizes(samples)} with one common variance", source=source, level=level, effect="ω²"
    )


def welch_anova(name: str, groups: Groups, *, clusters: Mapping[str, Sequence[str]] | None = None, level: float = 0.95) -> Finding:
    """Welch's analysis of variance of independent groups, whose variances may differ; the effect is ω² of its F.

    Args:
        clusters: the source of each value of each group; no cluster may be in two groups. Standard errors are then cluster-robust, and
            clusters count in place of values.

    Raises:
        TooFewError: fewer than two groups, a group with fewer than two values (clusters), or a group without spread while means differ.
        StatisticsError: a cluster is in two groups.
    """
    source = "Welch 1951, Biometrika 38:330-336; Steiger 2004, Psychological Methods 9:164-182" + ("; Cameron & Miller 2015" if clusters else "")
    samples = independent(name, groups, 2) if clusters is None else _clustered(name, groups, clusters)
    units = np.array([data.units for data in samples.values()], dtype=np.float64)
    means, ses = np.array([data.mean for data in samples.values()]), np.array([data.se() for data in samples.values()])
    n, k, total = sum(len(data.x) for data in samples.values()), len(samples), int(units.sum())
    counted = None if clusters is None else total
    if not ses.any() and len(set(means.tolist())) == 1:
        return _equal(name, "Welch's ANOVA", n=n, source=source, level=level, clusters=counted)
    if not ses.all():
        flat = list(samples)[int(np.flatnonzero(ses == 0)[0])]
        raise TooFewError(f"Group {flat!r} of {name!r} has no spread, so Welch's weights are not defined; expected values that differ. Use anova.")
    weights = (ses.min() / ses) ** 2  # at most 1, so that tiny variances do not overflow
    mean = float(weights @ means / weights.sum())
    spread = float((((1 - weights / weights.sum()) ** 2) / (units - 1)).sum())
    f = float(weights @ ((means - mean) / ses.min()) ** 2) / (k - 1) / (1 + 2 * (k - 2) / (k**2 - 1) * spread)
    df = (k - 1.0, (k**2 - 1) / (3 * spread))
    robust = "" if clusters is None else f"; values come from {total} clusters and may depend on each other within one"
    why = f"{_sizes(samples)}, whose variances may differ{robust}"
    found = _f_finding(name, "Welch's ANOVA", f=f, df=df, n=total, why=why, source=source, level=level, effect="ω²", clusters=counted)
    return replace(found, n=n)


def _clustered(name: str, groups: Groups, clusters: Mapping[str, Sequence[str]]) -> dict[str, Sample]:
    if set(clusters) != set(groups):
        raise StatisticsError(f"{name!r} has groups {sorted(groups)} and clusters of {sorted(clusters)}; expected clusters for each group.")
    seen: set[str] = set()
    for group in groups:
        if seen & set(clusters[group]):
            both = min(seen & set(clusters[group]))
            raise StatisticsError(f"Cluster {both!r} of {name!r} is in two groups; expected rows by position and paired=True, or clusters of one group each.")
        seen |= set(clusters[group])
    samples = {group: sample(f"{name} {group}", values, clusters[group]) for group, values in groups.items()}
    for group, data in samples.items():
        if data.units < 2:
            raise TooFewError(f"Group {group!r} of {name!r} has a single cluster; expected at least two.")
    return samples


def repeated_anova(name: str, groups: Groups, *, level: float = 0.95) -> Finding:
    """Repeated-measures analysis of variance of rows in which each group has a value, with Greenhouse and Geisser's correction.

    Raises:
        TooFewError: fewer than two complete rows, or no spread around groups whose means differ.
    """
    source = "Greenhouse & Geisser 1959, Psychometrika 24:95-112; Steiger 2004, Psychological Methods 9:164-182"
    x, _, dropped = complete_rows(name, groups)
    n, k = x.shape
    centred = x - x.mean(axis=1, keepdims=True)
    residual = centred - centred.mean(axis=0)
    error, between = float((residual**2).sum()), n * float(((centred.mean(axis=0)) ** 2).sum())
    dust = 1e-20 * n * k * max(1e-300, float(np.abs(x).max())) ** 2
    if error <= dust:
        if between <= dust:
            return _equal(name, "repeated-measures ANOVA", n=n, source=source, level=level)
        raise _no_spread(name)
    covariance = residual.T @ residual
    epsilon = min(1.0, float(np.trace(covariance)) ** 2 / ((k - 1) * float((covariance**2).sum())))
    f = between / (error / (n - 1))
    why = f"{n} rows in {k} groups; ε = {epsilon:.3g} (Greenhouse-Geisser) corrects for unequal covariances{left_out(dropped, n + dropped)}"
    df = (epsilon * (k - 1), epsilon * (k - 1) * (n - 1))
    found = _f_finding(name, "repeated-measures ANOVA", f=f, df=df, n=n * k, why=why, source=source, level=level, effect="partial ω²")
    return replace(found, n=n)


def clustered_anova(name: str, groups: Groups, clusters: Sequence[str], *, level: float = 0.95) -> Finding:
    """Equality of the means of groups measured on the same rows, which come in clusters: a cluster-robust Hotelling T² test.

    Raises:
        TooFewError: no more clusters than groups, or no spread between clusters while means differ.
        StatisticsError: lengths differ.
    """
    source = "Hotelling 1931; Cameron & Miller 2015, J. Human Resources 50(2)"
    x, kept, dropped = complete_rows(name, groups)
    n, k = x.shape
    if len(clusters) != len(next(iter(groups.values()))):
        raise StatisticsError(f"{name!r} has {len(next(iter(groups.values())))} rows and {len(clusters)} clusters; expected one cluster for each row.")
    names, codes = np.unique(np.array([clusters[row] for row in kept], dtype=str), return_inverse=True)
    units = len(names)
    if units <= k:
        raise TooFewError(f"{name!r} has {units} clusters for {k} groups; expected at least {k + 1} clusters. Compare in pairs.")
    d = x[:, 1:] - x[:, :1]
    mean = d.mean(axis=0)
    sums = np.zeros((units, k - 1))
    np.add.at(sums, codes, d - mean)
    covariance = units / (units - 1) * sums.T @ sums / n**2
    values, vectors = np.linalg.eigh(covariance)
    solid = values > 1e-12 * max(float(values.max()), 1e-24 * float(np.abs(x).max()) ** 2, 1e-300)
    along = vectors.T @ mean
    if (np.abs(along[~solid]) > 1e-9 * max(1e-300, float(np.abs(x).max()))).any():
        raise _no_spread(name)
    rank = int(solid.sum())
    if rank == 0:
        return _equal(name, "cluster-robust Hotelling test", n=n, source=source, level=level, clusters=units)
    wald = float((along[solid] ** 2 / values[solid]).sum())
    f, df = wald * (units - rank) / ((units - 1) * rank), (float(rank), float(units - rank))
    why = f"{n} rows in {k} groups from {units} clusters; rows of one cluster may depend on each other{left_out(dropped, n + dropped)}"
    found = _f_finding(
        name, "cluster-robust Hotelling test", f=f, df=df, n=units, why=why, source=source, level=level, effect="a share like ω², per cluster", clusters=units
    )  # fmt: skip
    return replace(found, n=n)


# --------------------------------------------------------------------------------------------------------------- ranks
def _chi2_finding(name: str, test: str, *, statistic: float, df: int, scale: float, n: int, why: str, source: str, level: float) -> Finding:
    from scipy.special import chdtrc

    wide = one_sided(level)
    low, high = chi2_interval(statistic, df, wide)
    return Finding(
        name=name,
        test=test,
        statistic=statistic,
        p_value=float(chdtrc(df, statistic)),
        effect=min(1.0, max(0.0, statistic - df) / scale),
        interval=(min(1.0, low / scale), min(1.0, high / scale)),
        n=n,
        why=f"{why}; χ² with {df} degrees of freedom, its interval of {wide:g} (Steiger)",
        source=source,
        level=wide,
    )


def kruskal_wallis(name: str, groups: Groups, *, level: float = 0.95) -> Finding:
    """Kruskal-Wallis test of independent groups by rank, corrected for ties; the effect is η² of the ranks less what chance gives.

    Raises:
        TooFewError: fewer than two groups, an empty group, or no more values than groups.
    """
    from scipy.stats import rankdata

    source = "Kruskal & Wallis 1952, JASA 47:583-621; Tomczak & Tomczak 2014 (η² of H)"
    samples = independent(name, groups, 1)
    x = np.concatenate([data.x for data in samples.values()])
    n, k = len(x), len(samples)
    if n <= k:
        raise TooFewError(f"{name!r} has {n} values in {k} groups; expected more values than groups.")
    if x.min() == x.max():
        return _equal(name, "Kruskal-Wallis test", n=n, source=source, level=level)
    ranks = np.asarray(rankdata(x), dtype=np.float64)
    parts = np.split(ranks, np.cumsum([len(data.x) for data in samples.values()])[:-1])
    h = (n - 1) * sum(len(part) * (float(part.mean()) - (n + 1) / 2) ** 2 for part in parts) / float(((ranks - (n + 1) / 2) ** 2).sum())
    why = f"{_sizes(samples)} compared by rank, corrected for ties; the effect is η² of the ranks corrected for chance"
    return _chi2_finding(name, "Kruskal-Wallis test", statistic=h, df=k - 1, scale=n - k, n=n, why=why, source=source, level=level)


def friedman(name: str, groups: Groups, *, level: float = 0.95) -> Finding:
    """Friedman test of rows in which each group has a value, corrected for ties; the effect is Kendall's W less what chance gives.

    Raises:
        TooFewError: fewer than two complete rows.
    """
    return _friedman(name, groups, "Friedman test", "compared by their ranks within each row", "Friedman 1937; Demšar 2006, JMLR 7:1-30", level=level)


def cochran_q(name: str, groups: Groups, *, level: float = 0.95) -> Finding:
    """Cochran's Q test of rows of 0/1 outcomes (the Friedman test of such rows).

    Raises:
        TooFewError: fewer than two complete rows.
        StatisticsError: a value is neither 0 nor 1.
    """
    if not is_binary(complete_rows(name, groups)[0]):
        raise StatisticsError(f"{name!r} has values that are neither 0 nor 1; expected 0/1 outcomes. Use friedman or repeated_anova.")
    return _friedman(name, groups, "Cochran's Q test", "of 0/1 outcomes", "Cochran 1950, Biometrika 37:256-266", level=level)


def _friedman(name: str, groups: Groups, test: str, how: str, source: str, *, level: float) -> Finding:
    from scipy.stats import rankdata

    x, _, dropped = complete_rows(name, groups)
    n, k = x.shape
    ranks = np.asarray(rankdata(x, axis=1), dtype=np.float64)
    spread = float(((ranks - (k + 1) / 2) ** 2).sum())
    if spread == 0:
        return _equal(name, test, n=n, source=source, level=level)
    q = (k - 1) * n**2 * float(((ranks.mean(axis=0) - (k + 1) / 2) ** 2).sum()) / spread
    why = f"{n} rows in {k} groups {how}, corrected for ties; the effect is Kendall's W corrected for chance{left_out(dropped, n + dropped)}"
    return _chi2_finding(name, test, statistic=q, df=k - 1, scale=n * (k - 1), n=n, why=why, source=source, level=level)


# -------------------------------------------------------------------------------------------------------------- checks
def levene(name: str, groups: Groups) -> Check:
    """Levene's test of equal variances around medians (Brown and Forsythe): for the record, never to choose a test."""
    samples = independent(name, groups, 2)
    deviations = {group: [float(v) for v in np.abs(data.x - np.median(data.x))] for group, data in samples.items()}
    found = anova(name, deviations)
    why = f"{_sizes(samples)}; a look at equal variances, which does not choose a test"
    return Check(name=name, test="Brown-Forsythe test", statistic=found.statistic, p_value=found.p_value, n=found.n, why=why, source="Brown & Forsythe 1974")


def shapiro(name: str, values: Values) -> Check:
    """Shapiro and Wilk's test of normality: for the record, never to choose a test.

    Raises:
        TooFewError: fewer than three values, or values without spread.
        StatisticsError: more than 5,000 values, for which it has no p-value.
    """
    from scipy.stats import shapiro as test

    data = sample(name, values)
    if len(data.x) < 3 or data.sd() == 0:
        raise TooFewError(f"{name!r} has {len(data.x)} values, {len(set(data.x.tolist()))} of them different; expected at least three that differ.")
    if len(data.x) > 5000:
        raise StatisticsError(f"{name!r} has {len(data.x)} values; expected at most 5000. Look at a quantile plot.")
    statistic, p = (float(part) for part in test((data.x - data.mean) / data.sd()))
    why = f"a look at normality, which does not choose a test{data.note()}"
    return Check(
        name=name, test="Shapiro-Wilk test", statistic=statistic, p_value=min(1.0, p), n=len(data.x), why=why, source="Shapiro & Wilk 1965; Royston 1995"
    )

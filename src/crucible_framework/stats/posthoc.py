"""All pairs of several groups at once, with p-values and intervals that hold for the whole family together. Chooses no test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from ..errors import TooFewError
from ..records import Finding
from .groups import complete_rows, independent
from .samples import Values, check_level, left_out

__all__ = ["dunn", "games_howell", "nemenyi", "tukey"]

Groups = Mapping[str, Values]


def _range_p(q: float, k: int, df: float) -> float:
    from scipy.stats import studentized_range

    return min(1.0, max(0.0, float(studentized_range.sf(q, k, df)))) if q > 0 else 1.0


def _range_critical(level: float, k: int, df: float) -> float:
    """The q at which p = 1 - level, from the very function that gives p, so that the two agree to the last digits."""
    from scipy.optimize import brentq

    return float(brentq(lambda q: _range_p(q, k, df) - (1 - level), 1e-3, 1e4 if df < 3 else 200.0, xtol=1e-9, rtol=1e-10))


def _finding(name: str, test: str, *, effect: float, se: float, p: float, critical: float, n: int, why: str, source: str, level: float) -> Finding:
    half = critical * se
    return Finding(
        name=name,
        test=test,
        statistic=effect / se if se else 0.0,
        p_value=p,
        effect=effect,
        interval=(effect - half, effect + half),
        n=n,
        why=why + ("; equal without spread" if se == 0 else ""),
        source=source,
        level=level,
    )


def _t_family(name: str, groups: Groups, level: float, *, pooled: bool) -> tuple[Finding, ...]:
    check_level(level)
    samples = independent(name, groups, 2)
    k, n = len(samples), sum(len(data.x) for data in samples.values())
    variance = sum((len(data.x) - 1) * data.sd() ** 2 for data in samples.values()) / (n - k)
    test = "Tukey-Kramer test" if pooled else "Games-Howell test"
    source = "Tukey 1953; Kramer 1956" if pooled else "Games & Howell 1976, J. Educational Statistics 1:113-125"
    critical = _range_critical(level, k, n - k) if pooled else 0.0
    found = []
    for a, b in itertools.combinations(samples, 2):
        x, y = samples[a], samples[b]
        va, vb = ((variance if pooled else data.sd() ** 2) / len(data.x) for data in (x, y))
        se, effect = math.sqrt((va + vb) / 2), y.mean - x.mean
        df = float(n - k)
        if not pooled and se > 0:
            share = va / (va + vb)
            df = 1 / (share**2 / (len(x.x) - 1) + (1 - share) ** 2 / (len(y.x) - 1))
            critical = _range_critical(level, k, df)
        if se == 0 and effect != 0:
            raise TooFewError(f"Groups {a!r} and {b!r} of {name!r} have no spread and different means: no test is defined. Report the means.")
        p = _range_p(abs(effect) / se, k, df) if se else 1.0
        kind = "one common variance" if pooled else "variances that may differ"
        why = f"all {k * (k - 1) // 2} pairs of {k} independent groups with {kind}; p and interval hold for all pairs together ({df:.4g} degrees of freedom)"
        found.append(
            _finding(f"{b} - {a}", test, effect=effect, se=se, p=p, critical=critical, n=len(x.x) + len(y.x), why=why, source=source, level=level)
        )  # fmt: skip
    return tuple(found)


def tukey(name: str, groups: Groups, *, level: float = 0.95) -> tuple[Finding, ...]:
    """Tukey and Kramer's test of all pairs after `anova`: one common variance, simultaneous intervals.

    Raises:
        TooFewError: fewer than two groups, a group with fewer than two values, or no spread while means differ.
    """
    return _t_family(name, groups, level, pooled=True)


def games_howell(name: str, groups: Groups, *, level: float = 0.95) -> tuple[Finding, ...]:
    """Games and Howell's test of all pairs after `welch_anova`: variances may differ, simultaneous intervals. Raises as `tukey`."""
    return _t_family(name, groups, level, pooled=False)


def dunn(name: str, groups: Groups, *, level: float = 0.95) -> tuple[Finding, ...]:
    """Dunn's test of all pairs after `kruskal_wallis`: differences of mean ranks, corrected for ties, Bonferroni over the pairs.

    Raises:
        TooFewError: fewer than two groups, or an empty one.
    """
    from scipy.special import ndtr, ndtri
    from scipy.stats import rankdata

    check_level(level)
    samples = independent(name, groups, 1)
    x = np.concatenate([data.x for data in samples.values()])
    n, ranks = len(x), np.asarray(rankdata(x), dtype=np.float64)
    parts = dict(zip(samples, np.split(ranks, np.cumsum([len(data.x) for data in samples.values()])[:-1]), strict=True))
    variance, pairs = float(((ranks - (n + 1) / 2) ** 2).sum()) / max(1, n - 1), list(itertools.combinations(parts, 2))
    critical = -float(ndtri((1 - level) / 2 / len(pairs)))
    source, found = "Dunn 1964, Technometrics 6:241-252", list[Finding]()
    for a, b in pairs:
        effect, se = float(parts[b].mean() - parts[a].mean()), math.sqrt(variance * (1 / len(parts[a]) + 1 / len(parts[b])))
        p = min(1.0, 2 * len(pairs) * float(ndtr(-abs(effect) / se))) if se else 1.0
        why = f"mean ranks of all {len(pairs)} pairs of {len(parts)} independent groups, corrected for ties; p and interval are Bonferroni's over the pairs"
        n_pair = len(parts[a]) + len(parts[b])
        found.append(
            _finding(f"{b} - {a}", "Dunn's test", effect=effect, se=se, p=p, critical=critical, n=n_pair, why=why, source=source, level=level)
        )  # fmt: skip
    return tuple(found)


def nemenyi(name: str, groups: Groups, *, level: float = 0.95) -> tuple[Finding, ...]:
    """Nemenyi's test of all pairs after `friedman`: differences of mean ranks over rows, with the critical difference of Demšar's diagrams.

    Half of each interval's width is the critical difference q·√(k(k + 1)/6n).

    Raises:
        TooFewError: fewer than two complete rows.
    """
    from scipy.stats import rankdata

    check_level(level)
    x, _, dropped = complete_rows(name, groups)
    n, k = x.shape
    ranks = np.asarray(rankdata(x, axis=1), dtype=np.float64).mean(axis=0)
    se, critical = math.sqrt(k * (k + 1) / (12 * n)), _range_critical(level, k, math.inf)
    found = []
    for (i, a), (j, b) in itertools.combinations(enumerate(groups), 2):
        effect = float(ranks[j] - ranks[i])
        why = f"mean ranks of {k} groups over {n} rows; critical difference {critical * se:.4g}, for all pairs together{left_out(dropped, n + dropped)}"
        p = _range_p(abs(effect) / se, k, math.inf)
        source = "Nemenyi 1963; Demšar 2006, JMLR 7:1-30"
        found.append(_finding(f"{b} - {a}", "Nemenyi test", effect=effect, se=se, p=p, critical=critical, n=n, why=why, source=source, level=level))
    return tuple(found)

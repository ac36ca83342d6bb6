"""Makes tests/stats/oracles.json again: fixed data, and what scipy, statsmodels and pingouin say of them.

usage: python benchmarks/studies/stats_oracles.py        needs pingouin and statsmodels; not run by `make bench`, which only reads the file
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pingouin
import scipy.optimize
import scipy.special
import scipy.stats
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import Table2x2, cochrans_q, mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.oneway import anova_oneway
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.stats.oracle_cases import FILE, gap  # noqa: E402

VERSIONS = {name: importlib.metadata.version(name) for name in ("scipy", "statsmodels", "pingouin")}
Groups = dict[str, list[float]]


def kinds() -> Iterator[tuple[str, Groups]]:
    """Three groups each: the shapes that break statistics."""
    r = np.random.default_rng(20)

    def rounded(values: Any) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    yield "normal", {"a": rounded(r.normal(0, 1, 12)), "b": rounded(r.normal(0.8, 1, 15)), "c": rounded(r.normal(0.3, 1, 13))}
    yield "spreads", {"a": rounded(r.normal(0, 1, 12)), "b": rounded(r.normal(0.5, 4, 20)), "c": rounded(r.normal(1, 0.3, 14))}
    yield (
        "whole numbers",
        {"a": [3, 7, 1, 12, 5, 9, 4, 8, 2, 6, 11, 10], "b": [14, 6, 13, 17, 9, 21, 16, 8, 12, 19, 15, 18, 20], "c": [1, 3, 2, 5, 7, 4, 9, 8, 6, 11, 13, 10]},
    )
    yield "skewed", {"a": rounded(r.lognormal(0, 1, 12)), "b": rounded(r.lognormal(0.7, 1, 14)), "c": rounded(r.lognormal(0.2, 1, 12))}
    yield (
        "far from 0",
        {
            "a": [1e6 + v for v in rounded(r.normal(0, 1, 12))],
            "b": [1e6 + v for v in rounded(r.normal(1, 1, 13))],
            "c": [1e6 + v for v in rounded(r.normal(0, 1, 12))],
        },
    )
    yield "tiny", {"a": rounded(r.normal(0, 1e-7, 12)), "b": rounded(r.normal(1e-7, 1e-7, 12)), "c": rounded(r.normal(0, 1e-7, 12))}
    yield "far apart", {"a": rounded(r.normal(0, 1, 12)), "b": rounded(r.normal(9, 1, 12)), "c": rounded(r.normal(4, 1, 12))}
    yield "same", {"a": rounded(r.normal(0, 1, 12)), "b": rounded(r.normal(0, 1, 12)), "c": rounded(r.normal(0, 1, 12))}


def long(groups: Groups, rows: int | None = None) -> pd.DataFrame:
    return pd.DataFrame([{"g": name, "row": i, "x": float(v)} for name, values in groups.items() for i, v in enumerate(values[:rows])])


def pairs(table: pd.DataFrame) -> dict[str, float]:
    return {f"{row.B} - {row.A}": float(row.pval if hasattr(row, "pval") else row.p_tukey) for row in table.itertuples()}


def two(d: Groups) -> Iterator[tuple[str, str, Callable[[], dict[str, float]]]]:
    """(test, oracle, what it says) of two groups, always as float64: scipy's own trap with whole numbers is not the oracle's fault."""
    a, b = (np.array(d[name], dtype=np.float64) for name in "ab")
    paired = b[: len(a)]

    def ends(pooled: str) -> tuple[float, float]:
        low, high = CompareMeans(DescrStatsW(b), DescrStatsW(a)).tconfint_diff(usevar=pooled)
        return float(low), float(high)

    yield "student", "statsmodels", lambda: {"p": scipy.stats.ttest_ind(b, a).pvalue, "low": ends("pooled")[0], "high": ends("pooled")[1]}
    yield "welch", "statsmodels", lambda: {"p": scipy.stats.ttest_ind(b, a, equal_var=False).pvalue, "low": ends("unequal")[0], "high": ends("unequal")[1]}
    within = scipy.stats.ttest_rel(paired, a)
    yield "paired t", "scipy", lambda: {"p": within.pvalue, "low": within.confidence_interval().low, "high": within.confidence_interval().high}
    if len({*a, *b}) == len(a) + len(b):  # with ties scipy's exact distribution is wrong
        yield "mann-whitney", "scipy", lambda: {"p": scipy.stats.mannwhitneyu(b, a, method="exact").pvalue}
    if len(set(np.abs(paired - a))) == len(a) and 0 not in (paired - a):
        yield "wilcoxon", "scipy", lambda: {"p": scipy.stats.wilcoxon(paired - a, method="exact").pvalue}
    if scipy.stats.mannwhitneyu(a, b).statistic not in (0, len(a) * len(b)):  # without overlap the test is not defined; ours takes the exact one
        yield "brunner-munzel", "scipy", lambda: {"p": scipy.stats.brunnermunzel(a, b).pvalue}
    mean = lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis)  # noqa: E731
    yield "permutation", "scipy", lambda: {"p": scipy.stats.permutation_test((b[:7], a[:7]), mean, vectorized=True, n_resamples=np.inf).pvalue}
    yield "cohen d", "pingouin", lambda: {"value": pingouin.compute_effsize(b, a, eftype="cohen")}


def three(d: Groups) -> Iterator[tuple[str, str, Callable[[], dict[str, float]]]]:
    groups = [np.array(values, dtype=np.float64) for values in d.values()]
    both = lambda found: {"statistic": float(found.statistic), "p": float(found.pvalue)}  # noqa: E731
    yield "anova", "scipy", lambda: both(scipy.stats.f_oneway(*groups))
    yield "welch anova", "statsmodels", lambda: both(anova_oneway(groups, use_var="unequal"))
    yield "kruskal", "scipy", lambda: both(scipy.stats.kruskal(*groups))
    yield "friedman", "scipy", lambda: both(scipy.stats.friedmanchisquare(*(g[:12] for g in groups)))
    yield "levene", "scipy", lambda: both(scipy.stats.levene(*groups, center="median"))
    yield "shapiro", "scipy", lambda: both(scipy.stats.shapiro((groups[1] - groups[1].mean()) / groups[1].std(ddof=1)))
    yield "tukey", "pingouin", lambda: pairs(pingouin.pairwise_tukey(long(d), dv="x", between="g"))
    yield "games-howell", "pingouin", lambda: pairs(pingouin.pairwise_gameshowell(long(d), dv="x", between="g"))
    yield "eta squared", "pingouin", lambda: {"value": float(pingouin.anova(long(d), dv="x", between="g", detailed=True, effsize="n2")["n2"][0])}


def score_interval(k1: int, n1: int, k2: int, n2: int) -> tuple[float, float]:
    """Miettinen and Nurminen's interval from the restricted likelihood itself; 48/80 and 56/70 give 0.0528 and 0.3382 (Newcombe 1998, table II)."""

    def z(delta: float) -> float:
        def minus(p: float) -> float:
            return -(k1 * np.log(p) + (n1 - k1) * np.log(1 - p) + k2 * np.log(p + delta) + (n2 - k2) * np.log(1 - p - delta))

        low, high = max(0.0, -delta) + 1e-12, min(1.0, 1 - delta) - 1e-12
        p = scipy.optimize.minimize_scalar(minus, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        variance = (p * (1 - p) / n1 + (p + delta) * (1 - p - delta) / n2) * (n1 + n2) / (n1 + n2 - 1)
        return float((k2 / n2 - k1 / n1 - delta) / np.sqrt(variance))

    edge, seen = scipy.stats.norm.isf(0.025), k2 / n2 - k1 / n1
    return scipy.optimize.brentq(lambda d: z(d) - edge, -0.99, seen), scipy.optimize.brentq(lambda d: z(d) + edge, seen, 0.99)


def others() -> Iterator[tuple[str, str, str, Any, dict[str, float], float]]:
    """(test, kind, oracle, data, expected, tolerance)."""
    r = np.random.default_rng(21)
    for index in range(4):
        sizes = r.integers(1, 6, 9 + index)
        names = [f"d{i}" for i, size in enumerate(sizes) for _ in range(size)]
        x = [float(f"{v:.5g}") for v in np.repeat(r.normal(0, 1, len(sizes)), sizes) + r.normal(0, 0.5, len(names))]
        # statsmodels' factor for clusters is G/(G-1) (n-1)/(n-k); with one constant the second part is 1
        found = sm.OLS(x, np.ones(len(x))).fit(cov_type="cluster", cov_kwds={"groups": pd.factorize(np.array(names))[0]}, use_t=True)
        low, high = found.conf_int()[0]
        yield "clustered mean", f"{len(sizes)} clusters", "statsmodels", {"x": x, "clusters": names}, {"low": float(low), "high": float(high)}, 1e-8
    for k, n in ((0, 9), (3, 10), (17, 40), (40, 40), (250, 1000)):
        for name, method in (("wilson", "wilson"), ("clopper-pearson", "beta")):
            low, high = proportion_confint(k, n, method=method)
            yield name, f"{k} of {n}", "statsmodels", {"k": k, "n": n}, {"low": float(low), "high": float(high)}, 1e-8
    for k1, n1, k2, n2 in ((48, 80, 56, 70), (5, 20, 11, 25), (10, 30, 18, 28), (60, 80, 50, 90), (28, 31, 15, 22)):
        low, high = score_interval(k1, n1, k2, n2)
        a, b = [1.0] * k1 + [0.0] * (n1 - k1), [1.0] * k2 + [0.0] * (n2 - k2)
        yield (
            "two shares",
            f"{k1}/{n1}, {k2}/{n2}",
            "likelihood maximised numerically; statsmodels 0.15 does not agree with Newcombe 1998",
            {"a": a, "b": b},
            {"low": float(low), "high": float(high)},
            2e-6,
        )
        table = [[k1, n1 - k1], [k2, n2 - k2]]
        chi = scipy.stats.chi2_contingency(table, correction=False)
        yield "chi square", f"{table}", "scipy", {"table": table}, {"statistic": float(chi.statistic), "p": float(chi.pvalue)}, 1e-9
        if k1:
            ends = Table2x2(np.array([[k2, n2 - k2], [k1, n1 - k1]])).oddsratio_confint()
            yield "odds ratio", f"{table}", "statsmodels", {"a": a, "b": b}, {"low": float(ends[0]), "high": float(ends[1])}, 1e-8
        tails = [scipy.stats.fisher_exact(table, alternative=side).pvalue for side in ("less", "greater")]
        yield "fisher", f"{table}", "scipy, twice the smaller tail", {"table": table}, {"p": min(1.0, 2 * min(map(float, tails)))}, 1e-9
    for gained, lost in ((1, 7), (12, 4), (0, 6), (30, 31)):
        p = float(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue)
        yield "mcnemar", f"{gained}, {lost}", "statsmodels", {"gained": gained, "lost": lost}, {"p": p}, 1e-9
    for index in range(3):
        rows = (r.random((18, 3)) < (0.3, 0.5, 0.4 + 0.15 * index)).astype(float)
        found = cochrans_q(rows)
        yield (
            "cochran q",
            f"{index}",
            "statsmodels",
            {name: rows[:, i].tolist() for i, name in enumerate("abc")},
            {"statistic": float(found.statistic), "p": float(found.pvalue)},
            1e-9,
        )
    for index, p in enumerate(([0.01, 0.03, 0.04, 0.2], [0.001, 0.001, 0.9], [0.02], [float(f"{v:.5g}") for v in r.random(9) ** 3])):
        for name, method in (("holm", "holm"), ("hochberg", "simes-hochberg"), ("bh", "fdr_bh"), ("by", "fdr_by")):
            yield name, f"{index}", "statsmodels", {"p": p}, {str(i): float(v) for i, v in enumerate(multipletests(p, method=method)[1])}, 1e-12
    for effect, n in ((0.5, 64), (0.2, 30), (1.1, 9)):
        yield "power", f"{effect}, {n}", "statsmodels", {"effect": effect, "n": n}, {"power": float(TTestIndPower().power(effect, n, 0.05))}, 1e-6
        yield "paired power", f"{effect}, {n}", "statsmodels", {"effect": effect, "n": n}, {"power": float(TTestPower().power(effect, n, 0.05))}, 1e-6


def cases() -> Iterator[dict[str, Any]]:
    for kind, groups in kinds():
        for told in (two, three):
            for test, oracle, say in told(groups):
                expected = {key: float(value) for key, value in say().items()}
                tolerance = 2e-6 if test in ("tukey", "games-howell") or kind == "far from 0" else 1e-8
                yield {"test": test, "kind": kind, "oracle": oracle, "data": groups, "expected": expected, "tolerance": tolerance}
        a, b = (np.array(groups[name], dtype=np.float64) for name in "ab")
        margin = float(f"{2 * np.concatenate([a, b]).std():.3g}")
        p = float(ttost_ind(b, a, -margin, margin, usevar="unequal")[0])
        yield {"test": "tost", "kind": kind, "oracle": "statsmodels", "data": {**groups, "margin": margin}, "expected": {"p": p}, "tolerance": 1e-8}
        table = pingouin.rm_anova(long(groups, 12), dv="x", within="g", subject="row", correction=True)
        column = next(name for name in table.columns if name.lower().replace("_", "-") in ("p-gg-corr", "p-gg-corrected"))
        yield {"test": "repeated anova", "kind": kind, "oracle": "pingouin", "data": groups, "expected": {"p": float(table[column][0])}, "tolerance": 2e-6}
        j = np.exp(scipy.special.gammaln((len(a) + len(b) - 2) / 2) - scipy.special.gammaln((len(a) + len(b) - 3) / 2)) * np.sqrt(2 / (len(a) + len(b) - 2))
        value = float(j * pingouin.compute_effsize(b, a, eftype="cohen"))
        yield {"test": "hedges g", "kind": kind, "oracle": "pingouin, exact factor", "data": groups, "expected": {"value": value}, "tolerance": 1e-8}
    for test, kind, oracle, data, expected, tolerance in others():
        yield {"test": test, "kind": kind, "oracle": oracle, "data": data, "expected": expected, "tolerance": tolerance}


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(cases())
    FILE.write_text("{\n" + f'"versions": {json.dumps(VERSIONS)},\n"cases": [\n' + ",\n".join(json.dumps(case) for case in found) + "\n]}\n", encoding="utf-8")
    print(f"{len(found)} cases of {len({case['test'] for case in found})} tests, {FILE.stat().st_size:,} bytes")
    for case in found:
        if (apart := gap(case)) > case["tolerance"]:
            print(f"  {case['test']} ({case['kind']}): {apart:.2e} above {case['tolerance']:.0e}; oracle {case['expected']}")

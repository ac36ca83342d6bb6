"""Stored cases: data, and what scipy, statsmodels and pingouin say of them. `benchmarks/studies/stats_oracles.py` makes the file again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crucible_framework import stats
from crucible_framework.records import Estimate, Finding

FILE = Path(__file__).with_name("oracles.json")
Numbers = dict[str, float]


def _told(found: Finding | stats.Check) -> Numbers:
    return {"statistic": found.statistic, "p": found.p_value}


def _both(found: Finding) -> Numbers:
    return {"p": found.p_value, "low": found.interval[0], "high": found.interval[1]}


def _value(found: Estimate) -> Numbers:
    return {"value": found.value}


def _ends(found: tuple[float, float] | Estimate) -> Numbers:
    low, high = (found.low, found.high) if isinstance(found, Estimate) else found
    return {"low": low, "high": high}


def _list(values: tuple[float, ...]) -> Numbers:
    return {str(index): value for index, value in enumerate(values)}


OURS: Mapping[str, Callable[[Any], Numbers]] = {
    "student": lambda d: _both(stats.student_t("x", d["a"], d["b"])),
    "welch": lambda d: _both(stats.welch_t("x", d["a"], d["b"])),
    "paired t": lambda d: _both(stats.paired_t("x", d["a"], d["b"][: len(d["a"])])),
    "mann-whitney": lambda d: {"p": stats.mann_whitney("x", d["a"], d["b"]).p_value},
    "wilcoxon": lambda d: {"p": stats.wilcoxon("x", d["a"], d["b"][: len(d["a"])]).p_value},
    "brunner-munzel": lambda d: {"p": stats.brunner_munzel("x", d["a"], d["b"]).p_value},
    "permutation": lambda d: {"p": stats.permutation_test("x", d["a"][:7], d["b"][:7]).p_value},
    "anova": lambda d: _told(stats.anova("x", d)),
    "welch anova": lambda d: _told(stats.welch_anova("x", d)),
    "kruskal": lambda d: _told(stats.kruskal_wallis("x", d)),
    "friedman": lambda d: _told(stats.friedman("x", {name: values[:12] for name, values in d.items()})),
    "repeated anova": lambda d: {"p": stats.repeated_anova("x", {name: values[:12] for name, values in d.items()}).p_value},
    "levene": lambda d: _told(stats.levene("x", d)),
    "shapiro": lambda d: _told(stats.shapiro("x", d["b"])),
    "tukey": lambda d: {one.name: one.p_value for one in stats.tukey("x", d)},
    "games-howell": lambda d: {one.name: one.p_value for one in stats.games_howell("x", d)},
    "tost": lambda d: {"p": stats.tost("x", d["a"], d["b"], margin=d["margin"]).p_value},
    "cohen d": lambda d: _value(stats.cohen_d("x", d["a"], d["b"])),
    "hedges g": lambda d: _value(stats.hedges_g("x", d["a"], d["b"])),
    "eta squared": lambda d: _value(stats.eta_squared("x", d)),
    "clustered mean": lambda d: _ends(stats.mean_estimate("x", d["x"], clusters=d["clusters"], bounded=False)),
    "wilson": lambda d: _ends(stats.wilson(d["k"], d["n"])),
    "clopper-pearson": lambda d: _ends(stats.clopper_pearson(d["k"], d["n"])),
    "two shares": lambda d: _ends(stats.proportion_difference("x", d["a"], d["b"]).interval),
    "fisher": lambda d: {"p": stats.fisher_exact("x", d["table"]).p_value},
    "chi square": lambda d: _told(stats.chi_square("x", d["table"])),
    "mcnemar": lambda d: {"p": stats.mcnemar_exact("x", d["gained"], d["lost"]).p_value},
    "cochran q": lambda d: _told(stats.cochran_q("x", d)),
    "holm": lambda d: _list(stats.adjust(d["p"], "holm")),
    "hochberg": lambda d: _list(stats.adjust(d["p"], "hochberg")),
    "bh": lambda d: _list(stats.adjust(d["p"], "bh")),
    "by": lambda d: _list(stats.adjust(d["p"], "by")),
    "power": lambda d: {"power": stats.plan("independent", effect=d["effect"], n=d["n"]).power},
    "paired power": lambda d: {"power": stats.plan("paired", effect=d["effect"], n=d["n"]).power},
    "odds ratio": lambda d: _ends(stats.odds_ratio("x", d["a"], d["b"])),
}


def load() -> list[dict[str, Any]]:
    """The stored cases: test, data, expected, oracle, tolerance."""
    return list(json.loads(FILE.read_text(encoding="utf-8"))["cases"])


def gap(case: Mapping[str, Any]) -> float:
    """The largest difference from the oracle, relative where numbers are above 1."""
    ours, theirs = OURS[str(case["test"])](case["data"]), case["expected"]
    assert ours.keys() == theirs.keys(), case["test"]
    return max(abs(ours[key] - float(theirs[key])) / max(1.0, abs(float(theirs[key]))) for key in ours)

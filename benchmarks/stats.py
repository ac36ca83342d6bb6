"""Statistics beside their oracles: agreement on 120 random cases, coverage of 95 % intervals, and time per comparison.

usage: python benchmarks/stats.py [samples]        samples of the coverage simulation, 1000 unless told

Oracles: scipy and statsmodels; pingouin is timed where it is installed. It exits with 1 where a p-value is off by more than 1e-8.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import scipy.stats
from statsmodels.stats.oneway import anova_oneway
from statsmodels.stats.weightstats import ttost_ind

from crucible_framework import stats

Case = tuple[str, Callable[[list[float], list[float]], float], Callable[[list[float], list[float]], float]]
PAIRS: list[Case] = [
    ("Student", lambda a, b: stats.student_t("x", a, b).p_value, lambda a, b: scipy.stats.ttest_ind(b, a).pvalue),
    ("Welch", lambda a, b: stats.welch_t("x", a, b).p_value, lambda a, b: scipy.stats.ttest_ind(b, a, equal_var=False).pvalue),
    ("paired t", lambda a, b: stats.paired_t("x", a, b).p_value, lambda a, b: scipy.stats.ttest_rel(b, a).pvalue),
    ("Mann-Whitney", lambda a, b: stats.mann_whitney("x", a, b).p_value, lambda a, b: scipy.stats.mannwhitneyu(b, a, method="exact").pvalue),
    ("Wilcoxon", lambda a, b: stats.wilcoxon("x", a, b).p_value, lambda a, b: scipy.stats.wilcoxon(np.subtract(b, a), method="exact").pvalue),
    ("Brunner-Munzel", lambda a, b: stats.brunner_munzel("x", a, b).p_value, lambda a, b: scipy.stats.brunnermunzel(a, b).pvalue),
    ("TOST", lambda a, b: stats.tost("x", a, b, margin=1).p_value, lambda a, b: ttost_ind(np.array(b), np.array(a), -1, 1, usevar="unequal")[0]),
    ("ANOVA", lambda a, b: stats.anova("x", {"a": a, "b": b, "c": a[:9]}).p_value, lambda a, b: scipy.stats.f_oneway(a, b, a[:9]).pvalue),
    ("Welch ANOVA", lambda a, b: stats.welch_anova("x", {"a": a, "b": b, "c": a[:9]}).p_value,
     lambda a, b: anova_oneway([a, b, a[:9]], use_var="unequal").pvalue),
    ("Kruskal-Wallis", lambda a, b: stats.kruskal_wallis("x", {"a": a, "b": b, "c": a[:9]}).p_value, lambda a, b: scipy.stats.kruskal(a, b, a[:9]).pvalue),
    ("Friedman", lambda a, b: stats.friedman("x", {"a": a, "b": b, "c": a[::-1]}).p_value, lambda a, b: scipy.stats.friedmanchisquare(a, b, a[::-1]).pvalue),
    ("Tukey", lambda a, b: stats.tukey("x", {"a": a, "b": b})[0].p_value, lambda a, b: scipy.stats.tukey_hsd(a, b).pvalue[0, 1]),
]  # fmt: skip


def agreement() -> bool:
    """Prints the largest difference of p-values per test over ten random cases each."""
    print(f"{'p-values against scipy/statsmodels':36}  largest difference of 10")
    worst = 0.0
    for name, ours, theirs in PAIRS:
        gaps = []
        for case in range(10):
            r = np.random.default_rng(case)
            a, b = r.normal(0, 1, 14 + case).tolist(), r.normal(0.1 * case, 1 + 0.2 * case, 14 + case).tolist()
            gaps.append(abs(ours(a, b) - float(theirs(a, b))))
        worst = max(worst, *gaps)
        print(f"  {name:34}  {max(gaps):.1e}")
    return worst < 1e-8


def coverage(samples: int) -> None:
    """Prints how often 95 % intervals hold the truth."""
    r = np.random.default_rng(0)
    cases: dict[str, tuple[Callable[[list[float], list[float]], tuple[float, float]], float]] = {
        "Welch, spreads 1 and 2": (lambda a, b: stats.welch_t("x", a, b).interval, 1.0),
        "Mann-Whitney shift": (lambda a, b: stats.mann_whitney("x", a, (np.array(b) / 2 + 0.5).tolist()).interval, 1.0),
        "paired t": (lambda a, b: stats.paired_t("x", a, b).interval, 1.0),
        "Wilcoxon pseudo-median": (lambda a, b: stats.wilcoxon("x", a, b).interval, 1.0),
    }
    print(f"\n{'coverage of 95 % intervals':36}  of {samples} samples, n = 20")
    for name, (interval, truth) in cases.items():
        held = 0
        for _ in range(samples):
            low, high = interval(r.normal(0, 1, 20).tolist(), r.normal(1, 2, 20).tolist())
            held += low <= truth <= high
        print(f"  {name:34}  {held / samples:.1%}")


def milliseconds(work: Callable[[], object]) -> float:
    """The best of five."""
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def speed() -> None:
    """Prints milliseconds per comparison."""
    r = np.random.default_rng(0)
    a, b = r.normal(0, 1, 1000).tolist(), r.normal(0.1, 1, 1000).tolist()
    groups = {str(i): r.normal(i / 50, 1, 500).tolist() for i in range(50)}
    bits = {"a": (r.random(1000) < 0.6).astype(float).tolist(), "b": (r.random(1000) < 0.65).astype(float).tolist()}
    print("\ntime per comparison                       ms")
    print(f"  {'2 × 1,000 numbers, Welch':34}  {milliseconds(lambda: stats.compare_groups('x', {'a': a, 'b': b})):7.2f}")
    print(f"  {'2 × 1,000 paired answers, McNemar':34}  {milliseconds(lambda: stats.compare_groups('x', bits, paired=True)):7.2f}")
    print(f"  {'2 × 1,000 by rank':34}  {milliseconds(lambda: stats.compare_groups('x', {'a': a, 'b': b}, ranks=True)):7.2f}")
    print(f"  {'permutation, 9,999 arrangements':34}  {milliseconds(lambda: stats.permutation_test('x', a, b, paired=True)):7.2f}")
    print(f"  {'50 × 500, all 1,225 pairs':34}  {milliseconds(lambda: stats.compare_groups('x', groups)):7.2f}")
    if importlib.util.find_spec("pingouin") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pingouin

        print(f"  {'pingouin: 2 × 1,000, Welch':34}  {milliseconds(lambda: pingouin.ttest(b, a, correction=True)):7.2f}")
        print(f"  {'pingouin: 2 × 1,000 by rank (mwu)':34}  {milliseconds(lambda: pingouin.mwu(b, a)):7.2f}")


if __name__ == "__main__":
    right = agreement()
    coverage(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    speed()
    sys.exit(0 if right else 1)

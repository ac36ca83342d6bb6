"""Statistics beside their oracles: agreement on stored cases, coverage of 95 % intervals, p-values without an effect, time per comparison.

usage: python benchmarks/stats.py [samples]        samples of each simulation, 1000 unless told

The stored cases are those of tests/stats/oracles.json (scipy, statsmodels, pingouin; `python benchmarks/studies/stats_oracles.py` makes them again).
Figures go to benchmarks/results/stats.json. It exits with 1 where a case does not agree, coverage leaves 93 to 97 %, or p-values are too small
too often. Pingouin is timed where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crucible_framework import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.stats.oracle_cases import gap, load  # noqa: E402
from tests.stats.test_simulations import COVERS, NULLS, covered, rejected  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "stats.json"
LOOSE = {"seeds × items"}
"""Variance parts cannot be negative, so with few seeds this interval covers more than it promises."""


def agreement() -> tuple[bool, dict[str, object]]:
    """Prints the largest difference from the oracle per test over the stored cases."""
    cases = load()
    print(f"{'stored cases against scipy/statsmodels/pingouin':50}  cases  largest difference")
    found: dict[str, object] = {}
    wrong = 0
    for test in dict.fromkeys(case["test"] for case in cases):
        mine = [case for case in cases if case["test"] == test]
        gaps = [gap(case) for case in mine]
        wrong += sum(apart > case["tolerance"] for apart, case in zip(gaps, mine, strict=True))
        found[test] = {"cases": len(mine), "largest_difference": max(gaps)}
        print(f"  {test:48}  {len(mine):5}  {max(gaps):.1e}")
    print(f"  {len(cases) - wrong} of {len(cases)} agree")
    return wrong == 0, {"cases": len(cases), "agree": len(cases) - wrong, "tests": found}


def coverage(samples: int) -> tuple[bool, dict[str, float]]:
    """Prints how often 95 % intervals hold the truth."""
    print(f"\n{'coverage of 95 % intervals':50}  of {samples} samples")
    found: dict[str, float] = {}
    for name, (draw, truth) in COVERS.items():
        found[name] = covered(draw, truth, samples, 4)
        print(f"  {name:48}  {found[name]:.1%}")
    slack = 3 * (0.05 * 0.95 / samples) ** 0.5  # three standard errors of the simulation itself
    return all(0.93 - slack <= share <= (0.99 if name in LOOSE else 0.97) + slack for name, share in found.items()), found


def nulls(samples: int) -> tuple[bool, dict[str, float]]:
    """Prints how often p < 0.05 where there is no effect, and how far p-values are from uniform where they are small."""
    print(f"\n{'p-values where there is no effect':50}  p < 0.05  largest excess up to p = 0.1")
    found: dict[str, float] = {}
    right = True
    for name, (draw, exact) in NULLS.items():
        rate, above = rejected(draw, samples, 2)
        found[name] = rate
        error = (0.05 * 0.95 / samples) ** 0.5
        right = right and rate <= 0.05 + 4 * error and above <= 4.5 * error + 0.005 and (not exact or rate >= 0.05 - 4 * error)
        print(f"  {name:48}  {rate:7.1%}   {above:+.3f}")
    return right, found


def milliseconds(work: Callable[[], object]) -> float:
    """The best of five."""
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def speed() -> dict[str, float]:
    """Prints milliseconds per comparison; pingouin's beside ours, in turns, as ratios."""
    r = np.random.default_rng(0)
    a, b = r.normal(0, 1, 1000).tolist(), r.normal(0.1, 1, 1000).tolist()
    groups = {str(i): r.normal(i / 50, 1, 500).tolist() for i in range(50)}
    bits = {"a": (r.random(1000) < 0.6).astype(float).tolist(), "b": (r.random(1000) < 0.65).astype(float).tolist()}
    work: dict[str, Callable[[], object]] = {
        "2 × 1,000 numbers, Welch": lambda: stats.compare_groups("x", {"a": a, "b": b}),
        "2 × 1,000 paired answers, McNemar": lambda: stats.compare_groups("x", bits, paired=True),
        "2 × 1,000 by rank": lambda: stats.compare_groups("x", {"a": a, "b": b}, ranks=True),
        "permutation, 9,999 arrangements": lambda: stats.permutation_test("x", a, b, paired=True),
        "50 × 500, all 1,225 pairs": lambda: stats.compare_groups("x", groups),
    }
    print("\ntime per comparison                                       ms")
    found = {name: milliseconds(do) for name, do in work.items()}
    for name, taken in found.items():
        print(f"  {name:48}  {taken:8.2f}")
    if importlib.util.find_spec("pingouin") is None:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pingouin

        rivals: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "Welch, 2 × 1,000": (lambda: stats.welch_t("x", a, b), lambda: pingouin.ttest(b, a, correction=True)),
            "Mann-Whitney, 2 × 1,000": (lambda: stats.mann_whitney("x", a, b), lambda: pingouin.mwu(b, a)),
            "Wilcoxon, 1,000 pairs": (lambda: stats.wilcoxon("x", a, b), lambda: pingouin.wilcoxon(b, a)),
        }
        print("\nbeside pingouin                                     ours, ms  pingouin, ms  ratio")
        for name, (ours, theirs) in rivals.items():
            pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(3)]
            ratio = float(np.median([theirs_ms / ours_ms for ours_ms, theirs_ms in pairs]))
            found |= {f"{name}: ours": pairs[0][0], f"{name}: pingouin": pairs[0][1], f"{name}: pingouin / ours": ratio}
            print(f"  {name:48}  {pairs[0][0]:8.2f}  {pairs[0][1]:12.2f}  {ratio:5.1f}")
    return found


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    agrees, told = agreement()
    covers, shares = coverage(samples)
    honest, rates = nulls(samples)
    body = {"samples": samples, "machine": platform.processor() or platform.machine(), "agreement": told, "coverage": shares, "null_rejections": rates}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({**body, "milliseconds": speed(), "passed": agrees and covers and honest}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"\nagreement {agrees}, coverage {covers}, p-values {honest}; {RESULTS.relative_to(ROOT)}")
    sys.exit(0 if agrees and covers and honest else 1)

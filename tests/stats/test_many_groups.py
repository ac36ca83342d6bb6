"""Tests of several groups, their pairs, corrections, seeds × items and the front door: held to scipy, statsmodels and published values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.contingency_tables import cochrans_q
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.oneway import anova_oneway

from crucible_framework.errors import StatisticsError, TooFewError
from crucible_framework.stats import (
    adjust,
    anova,
    chi_square,
    clustered_anova,
    cochran_q,
    compare_groups,
    dunn,
    friedman,
    games_howell,
    interquartile_mean,
    kruskal_wallis,
    levene,
    nemenyi,
    paired_difference,
    repeated_anova,
    seeds_and_items,
    shapiro,
    tukey,
    welch_anova,
    welch_t,
)

from .agreement import PANDAS, SCIPY, check

RANDOM = np.random.default_rng(5)
GROUPS = {
    "a": RANDOM.normal(0, 1, 12).tolist(),
    "b": RANDOM.normal(0.8, 2, 15).tolist(),
    "c": RANDOM.normal(2.5, 0.7, 9).tolist(),
}
ROWS = {
    name: (RANDOM.normal(0, 2, 14) * 0 + np.linspace(0, 3, 14) + RANDOM.normal(shift, 1, 14)).tolist() for name, shift in (("a", 0), ("b", 0.6), ("c", 1.2))
}
TIED = {"a": [1.0, 2, 2, 3, 3, 4], "b": [2.0, 3, 3, 4, 5, 5, 5], "c": [1.0, 1, 2, 2, 6]}
CELLS = st.lists(st.integers(0, 5).map(float), min_size=4, max_size=8)


# ------------------------------------------------------------------------------------------------------------ omnibus
def test_one_way_tests_are_those_of_scipy_and_statsmodels() -> None:
    for groups in (GROUPS, TIED):
        found, oracle = anova("x", groups), SCIPY.f_oneway(*groups.values())
        assert (found.statistic, found.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))
        welch, holder = welch_anova("x", groups), anova_oneway(list(groups.values()), use_var="unequal", welch_correction=True)
        assert (welch.statistic, welch.p_value) == pytest.approx((holder.statistic, holder.pvalue))
        kruskal, rank = kruskal_wallis("x", groups), SCIPY.kruskal(*groups.values())
        assert (kruskal.statistic, kruskal.p_value) == pytest.approx((rank.statistic, rank.pvalue))
        for one in (found, welch, kruskal):
            check(one)
            assert one.level == 0.9


def test_omega_squared_is_the_textbook_formula_and_its_interval_inverts_noncentral_f() -> None:
    found = anova("x", GROUPS)
    x = np.concatenate(list(GROUPS.values()))
    within = sum(float(np.var(values) * len(values)) for values in GROUPS.values())
    between = float(np.var(x) * len(x)) - within
    mean_square = within / (len(x) - 3)
    assert found.effect == pytest.approx((between - 2 * mean_square) / (between + within + mean_square))
    for end, tail in zip(found.interval, (0.95, 0.05), strict=True):
        assert SCIPY.ncf.cdf(found.statistic, 2, len(x) - 3, len(x) * end / (1 - end)) == pytest.approx(tail, abs=1e-6)


def test_two_groups_by_anova_are_the_t_tests() -> None:
    two = {"a": GROUPS["a"], "b": GROUPS["b"]}
    assert welch_anova("x", two).p_value == pytest.approx(welch_t("x", *two.values()).p_value)


def test_repeated_measures_are_those_of_statsmodels_with_greenhouse_geisser() -> None:
    found = repeated_anova("x", ROWS)
    table = PANDAS.DataFrame([(i, name, value) for name, values in ROWS.items() for i, value in enumerate(values)], columns=["row", "group", "y"])
    oracle = AnovaRM(table, "y", "row", within=["group"]).fit().anova_table.iloc[0]
    assert found.statistic == pytest.approx(oracle["F Value"])
    contrasts = np.linalg.qr(np.column_stack([np.ones(3), np.eye(3)[:, :2]]))[0][:, 1:]
    covariance = contrasts.T @ np.cov(np.array(list(ROWS.values()))) @ contrasts
    epsilon = np.trace(covariance) ** 2 / (2 * np.trace(covariance @ covariance))
    assert found.p_value == pytest.approx(SCIPY.f.sf(found.statistic, 2 * epsilon, 26 * epsilon))
    check(found)


def test_rank_tests_of_rows_are_those_of_scipy_and_statsmodels() -> None:
    for rows in (ROWS, {name: np.round(values).tolist() for name, values in ROWS.items()}):
        found, oracle = friedman("x", rows), SCIPY.friedmanchisquare(*rows.values())
        assert (found.statistic, found.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))
        check(found)
    bits = {name: (RANDOM.random(30) < share).astype(float).tolist() for name, share in (("a", 0.3), ("b", 0.5), ("c", 0.8))}
    holder = cochrans_q(np.array(list(bits.values())).T)
    assert cochran_q("x", bits).p_value == pytest.approx(holder.pvalue)
    with pytest.raises(StatisticsError, match="neither 0 nor 1"):
        cochran_q("x", ROWS)


def test_hotelling_with_one_row_per_cluster_is_hotelling() -> None:
    x = np.array(list(ROWS.values())).T
    d, n = x[:, 1:] - x[:, :1], len(x)
    t2 = n * d.mean(axis=0) @ np.linalg.solve(np.cov(d.T), d.mean(axis=0))
    found = clustered_anova("x", ROWS, [str(i) for i in range(n)])
    assert found.p_value == pytest.approx(SCIPY.f.sf(t2 * (n - 2) / (2 * (n - 1)), 2, n - 2))
    check(found)


def test_two_groups_by_clustered_hotelling_is_the_cluster_robust_t() -> None:
    two, names = {"a": ROWS["a"], "b": ROWS["b"]}, [str(i // 2) for i in range(14)]
    assert clustered_anova("x", two, names).p_value == pytest.approx(paired_difference("x", *two.values(), clusters=names).p_value)


def test_chi_square_is_that_of_scipy() -> None:
    table = [[12, 5, 9], [20, 11, 3]]
    found, oracle = chi_square("x", table), SCIPY.chi2_contingency(table, correction=False)
    assert (found.statistic, found.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))
    check(found)
    assert "below 5" in chi_square("x", [[1, 2], [3, 4]]).why
    with pytest.raises(TooFewError, match="1 columns"):
        chi_square("x", [[3, 0], [4, 0]])
    with pytest.raises(StatisticsError, match="differ in length"):
        chi_square("x", [[1, 2], [3]])


@given(CELLS, CELLS, CELLS)
def test_any_small_groups_have_an_answer_or_are_too_few(a: list[float], b: list[float], c: list[float]) -> None:
    n = min(len(a), len(b), len(c))
    rows = {"a": a[:n], "b": b[:n], "c": c[:n]}
    for test, groups in ((anova, {"a": a, "b": b, "c": c}), (welch_anova, {"a": a, "b": b, "c": c}), (kruskal_wallis, {"a": a, "b": b, "c": c}),
                         (repeated_anova, rows), (friedman, rows)):  # fmt: skip
        try:
            check(test("x", groups))
        except TooFewError as error:
            assert "no spread" in str(error)  # noqa: PT017


@pytest.mark.parametrize("test", [anova, welch_anova, kruskal_wallis, repeated_anova, friedman])
def test_constants(test: object) -> None:
    found = test("x", {"a": [1.0] * 4, "b": [1.0] * 4, "c": [1.0] * 4})  # type: ignore[operator]
    assert (found.p_value, found.effect, found.interval) == (1.0, 0.0, (0.0, 0.0))
    with pytest.raises(TooFewError, match="at least"):
        test("x", {"a": [1.0]})  # type: ignore[operator]
    with pytest.raises(TooFewError):
        test("x", {"a": [1.0], "b": [1.0], "c": [2.0]})  # type: ignore[operator]


def test_checks_are_those_of_scipy_and_say_that_they_choose_nothing() -> None:
    found, oracle = levene("x", GROUPS), SCIPY.levene(*GROUPS.values())
    assert (found.statistic, found.p_value) == pytest.approx((oracle.statistic, oracle.pvalue))
    normal, holder = shapiro("x", GROUPS["a"]), SCIPY.shapiro(GROUPS["a"])
    assert (normal.statistic, normal.p_value) == pytest.approx((holder.statistic, holder.pvalue))
    assert "does not choose a test" in normal.why
    assert "does not choose a test" in found.why
    with pytest.raises(TooFewError, match="expected at least three"):
        shapiro("x", [1.0, 1.0, 1.0, 1.0])
    with pytest.raises(StatisticsError, match="at most 5000"):
        shapiro("x", np.arange(5001.0).tolist())


# ----------------------------------------------------------------------------------------------------------- post hoc
def test_tukey_is_that_of_scipy() -> None:
    oracle = SCIPY.tukey_hsd(*GROUPS.values())
    ends = oracle.confidence_interval(0.95)
    for found, (i, j) in zip(tukey("x", GROUPS), itertools.combinations(range(3), 2), strict=True):
        assert found.p_value == pytest.approx(oracle.pvalue[j, i], abs=1e-9)
        assert found.interval == pytest.approx((ends.low[j, i], ends.high[j, i]), rel=1e-5)
        check(found)


def test_games_howell_is_that_of_scipy() -> None:
    oracle = SCIPY.tukey_hsd(*GROUPS.values(), equal_var=False)
    ends = oracle.confidence_interval(0.95)
    for found, (i, j) in zip(games_howell("x", GROUPS), itertools.combinations(range(3), 2), strict=True):
        assert found.p_value == pytest.approx(oracle.pvalue[j, i], abs=1e-9)
        assert found.interval == pytest.approx((ends.low[j, i], ends.high[j, i]), rel=1e-5)
        check(found)


def test_dunn_of_two_groups_is_kruskal_wallis_and_of_three_is_larger() -> None:
    two = {"a": TIED["a"], "b": TIED["b"]}
    assert dunn("x", two)[0].p_value == pytest.approx(kruskal_wallis("x", two).p_value)
    found = dunn("x", TIED)
    assert [one.name for one in found] == ["b - a", "c - a", "c - b"]
    ranks = SCIPY.rankdata(np.concatenate(list(TIED.values())))
    gap, variance = ranks[6:13].mean() - ranks[:6].mean(), ranks.var(ddof=1) * (1 / 6 + 1 / 7)
    assert found[0].p_value == pytest.approx(min(1.0, 3 * 2 * SCIPY.norm.sf(abs(gap) / math.sqrt(variance))))
    for one in found:
        check(one)


def test_nemenyi_has_the_critical_difference_of_demsar() -> None:
    """Demšar 2006: four algorithms on 14 data sets: average ranks 3.143, 2.000, 2.893, 1.964; χ² = 9.28; critical difference 1.25 at 0.05."""
    auc = [
        (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967), (0.628, 0.661, 0.654, 0.657),
        (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931), (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625),
        (0.775, 0.838, 0.866, 0.875), (1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
        (0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970),
    ]  # fmt: skip
    groups = dict(zip(("C4.5", "m", "cf", "m+cf"), (list(column) for column in zip(*auc, strict=True)), strict=True))
    found = {one.name: one for one in nemenyi("AUC", groups)}
    for one in found.values():
        assert (one.interval[1] - one.interval[0]) / 2 == pytest.approx(1.25, abs=0.005)
        check(one)
    assert found["m - C4.5"].effect == pytest.approx(3.143 - 2.0, abs=0.001)  # here the best has the largest rank, there the smallest
    assert found["m+cf - C4.5"].effect == pytest.approx(3.143 - 1.964, abs=0.001)


def test_post_hoc_of_constants() -> None:
    flat = {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    for test in (tukey, games_howell, dunn, nemenyi):
        assert all(one.p_value == 1 and one.effect == 0 for one in test("x", flat))
    with pytest.raises(TooFewError, match="no spread"):
        tukey("x", {"a": [1.0, 1.0], "b": [2.0, 2.0]})


# -------------------------------------------------------------------------------------------------------- corrections
@settings(max_examples=10)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_corrections_are_those_of_statsmodels(p_values: list[float]) -> None:
    for ours, theirs in (("holm", "holm"), ("hochberg", "simes-hochberg"), ("bonferroni", "bonferroni"), ("bh", "fdr_bh"), ("by", "fdr_by")):
        oracle = multipletests(p_values, method=theirs)[1]
        assert adjust(p_values, ours) == pytest.approx(oracle, abs=1e-12)  # type: ignore[arg-type]
    assert adjust(p_values, "none") == pytest.approx(p_values)


def test_corrections_refuse_what_is_no_p_value() -> None:
    assert adjust([]) == ()
    for bad in (math.nan, -0.1, 1.1):
        with pytest.raises(StatisticsError, match="position 1"):
            adjust([0.5, bad])
    with pytest.raises(StatisticsError, match="holm"):
        adjust([0.5], "fdr")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ seeds × items
def scores(seeds: int, items: int, shift: float, random: np.random.Generator, item: np.ndarray, seed_sd: float = 0.3) -> list[list[float]]:
    return [(shift + random.normal(0, seed_sd) + item + random.normal(0, 0.5, items)).tolist() for _ in range(seeds)]


def test_seeds_without_their_own_variation_leave_the_items() -> None:
    item = RANDOM.normal(0, 1, 40)
    gain = RANDOM.normal(0.4, 1, 40)
    before, after = [item.tolist()] * 3, [(item + gain).tolist()] * 3
    found, plain = seeds_and_items("x", before, after), paired_difference("x", before[0], after[0])
    assert found.interval == pytest.approx(plain.interval, rel=0.03)  # each seed's mean is the same, so only items vary


def test_paired_seeds_with_equal_items_are_a_paired_t_of_seeds() -> None:
    offsets = [0.1, 0.5, 0.2, 0.4]
    found = seeds_and_items("x", [[1.0] * 50] * 4, [[1.0 + offset] * 50 for offset in offsets], paired_seeds=True)
    oracle = SCIPY.ttest_1samp(offsets, 0)
    assert found.p_value == pytest.approx(oracle.pvalue)
    check(found)


@pytest.mark.parametrize("method", ["t", "bootstrap"])
@pytest.mark.parametrize("clustered", [False, True])
def test_seed_variation_widens_the_interval(method: str, clustered: bool) -> None:
    random = np.random.default_rng(2)
    item = random.normal(0, 1, 60)
    names = [str(i // 4) for i in range(60)] if clustered else None
    steady, shaky = (
        seeds_and_items("x", scores(5, 60, 0, random, item, sd), scores(5, 60, 0.5, random, item, sd), clusters=names, method=method)  # type: ignore[arg-type]
        for sd in (0.0, 1.0)
    )
    assert shaky.interval[1] - shaky.interval[0] > 2 * (steady.interval[1] - steady.interval[0])
    for one in (steady, shaky):
        check(one)
        assert one.clusters == (15 if clustered else None)


def test_seeds_and_items_says_what_it_needs() -> None:
    row = [1.0, 2.0, None]
    with pytest.raises(TooFewError, match="paired_difference"):
        seeds_and_items("x", [row], [row, row])
    with pytest.raises(StatisticsError, match="different lengths"):
        seeds_and_items("x", [row, row], [[1.0], [2.0]])
    with pytest.raises(StatisticsError, match="as many on both sides"):
        seeds_and_items("x", [row, row], [row, row, row], paired_seeds=True)
    with pytest.raises(TooFewError, match="no item"):
        seeds_and_items("x", [[None], [1.0]], [[1.0], [1.0]])
    with pytest.raises(TooFewError, match="single item"):
        seeds_and_items("x", [[1.0], [1.0]], [[1.0], [1.0]])
    with pytest.raises(TooFewError, match="no spread"):
        seeds_and_items("x", [[1.0, 1.0]] * 2, [[2.0, 2.0]] * 2)
    with pytest.raises(StatisticsError, match="at least 1000"):
        seeds_and_items("x", [row, row], [row, row], method="bootstrap", resamples=10)
    same = seeds_and_items("x", [row, row], [row, row])
    assert (same.effect, same.p_value) == (0.0, 1.0)
    assert "1 of 3 did not apply" in same.why


def test_interquartile_mean_is_the_trimmed_mean_of_scipy() -> None:
    table = RANDOM.normal(0, 1, (6, 9)).tolist()
    found = interquartile_mean("x", table)
    assert found.value == pytest.approx(SCIPY.trim_mean(np.ravel(table), 0.25))
    assert found.low < found.value < found.high
    with pytest.raises(TooFewError, match="two scores of each"):
        interquartile_mean("x", [[1.0]])


# --------------------------------------------------------------------------------------------------------- front door
BITS = {name: (RANDOM.random(40) < share).astype(float).tolist() for name, share in (("a", 0.3), ("b", 0.6), ("c", 0.6))}
NAMES = [str(i // 2) for i in range(14)]


@pytest.mark.parametrize(
    ("groups", "options", "pair", "overall"),
    [
        (ROWS, {"paired": True}, "paired t test", "repeated-measures ANOVA"),
        (ROWS, {"paired": True, "ranks": True}, "Wilcoxon signed-rank test", "Friedman test"),
        (ROWS, {"paired": True, "clusters": NAMES}, "cluster-robust paired t test (CR1)", "cluster-robust Hotelling test"),
        (BITS, {"paired": True}, "McNemar score test with Tango interval", "Cochran's Q test"),
        (BITS, {}, "score test of two proportions with Miettinen-Nurminen interval", "Pearson's χ² test"),
        (GROUPS, {}, "Welch's t test", "Welch's ANOVA"),
        (GROUPS, {"ranks": True}, "Brunner-Munzel test", "Kruskal-Wallis test"),
        (
            ROWS,
            {"clusters": {group: [group + name for name in NAMES] for group in ROWS}},
            "cluster-robust Welch's t test (CR1)",
            "Welch's ANOVA",
        ),
    ],
)
def test_the_design_picks_the_test(groups: dict[str, list[float]], options: dict[str, object], pair: str, overall: str) -> None:
    found = compare_groups("score", groups, **options)  # type: ignore[arg-type]
    assert found.overall is not None
    assert [one.test for one in found.pairs] == [pair] * 3
    assert found.overall.test == overall
    assert [one.name for one in found.pairs] == ["b - a", "c - a", "c - b"]
    assert found.adjusted == adjust([one.p_value for one in found.pairs])
    assert found.why
    assert not found.undefined
    for one in (*found.pairs, found.overall):
        check(one)
    two = compare_groups("score", {name: groups[name] for name in ("a", "b")}, **{**options, **_first_two(options)})  # type: ignore[arg-type]
    assert two.overall == two["b - a"] == two.pairs[0]
    assert two.pairs[0].effect == pytest.approx(found.pairs[0].effect)


def _first_two(options: dict[str, object]) -> dict[str, object]:
    clusters = options.get("clusters")
    return {"clusters": {name: clusters[name] for name in ("a", "b")}} if isinstance(clusters, dict) else {}


def test_control_compares_each_with_it_only() -> None:
    found = compare_groups("score", GROUPS, control="b", correction="bonferroni")
    assert [one.name for one in found.pairs] == ["a - b", "c - b"]
    assert found.adjusted == tuple(min(1.0, 2 * one.p_value) for one in found.pairs)
    assert [one.name for one in found.effects] == ["a - b", "c - b"]
    assert found["a - b"].effect == pytest.approx(np.mean(GROUPS["a"]) - np.mean(GROUPS["b"]))
    with pytest.raises(StatisticsError, match="No pair is called"):
        found["b - a"]


def test_clusters_of_one_row_are_no_clusters() -> None:
    found = compare_groups("score", ROWS, paired=True, clusters=[str(i) for i in range(14)])
    assert found.pairs[0].test == "paired t test"


def test_shared_clusters_of_unpaired_groups_have_pairs_but_no_overall_test() -> None:
    found = compare_groups("score", ROWS, clusters=dict.fromkeys(ROWS, NAMES))
    assert found.overall is None
    assert len(found.pairs) == 3
    assert "in pairs" in found.undefined[0]


def test_what_cannot_be_compared_is_said_and_the_rest_is_compared() -> None:
    groups = {"a": [1.0] * 5, "b": [2.0] * 5, "c": [1.0, 2.5, 3.0, 4.0, 5.0]}
    found = compare_groups("score", groups)
    assert [one.name for one in found.pairs] == ["c - a", "c - b"]
    assert "no spread" in found.undefined[0]
    assert found.overall is not None
    assert found.overall.test == "one-way ANOVA"
    paired = compare_groups("score", groups, paired=True)
    assert [one.name for one in paired.pairs] == ["c - a", "c - b"]
    with pytest.raises(TooFewError):
        compare_groups("score", {"a": [1.0] * 5, "b": [2.0] * 5})


def test_the_front_door_refuses_designs_that_do_not_fit() -> None:
    with pytest.raises(StatisticsError, match="at least two"):
        compare_groups("score", {"a": [1.0, 2.0]})
    with pytest.raises(StatisticsError, match="control is 'z'"):
        compare_groups("score", GROUPS, control="z")
    with pytest.raises(StatisticsError, match="different lengths"):
        compare_groups("score", GROUPS, paired=True)
    with pytest.raises(StatisticsError, match="a mapping with a, b, c"):
        compare_groups("score", GROUPS, clusters=["a"])
    with pytest.raises(StatisticsError, match="for each row"):
        compare_groups("score", ROWS, paired=True, clusters={"a": []})
    with pytest.raises(StatisticsError, match="14 rows and 1 clusters"):
        compare_groups("score", ROWS, paired=True, clusters=["a"])
    with pytest.raises(StatisticsError, match="ranks and clusters"):
        compare_groups("score", ROWS, paired=True, clusters=NAMES, ranks=True)


def test_cluster_robust_welch_is_the_regression_of_statsmodels() -> None:
    """Equal cluster sizes and two groups: the sandwich of statsmodels but for its small-sample factor."""
    y = np.concatenate([ROWS["a"], ROWS["b"]])
    x, codes = sm.add_constant(np.repeat([0.0, 1.0], 14)), np.array([i // 2 for i in range(28)])
    oracle = sm.OLS(y, x).fit(cov_type="cluster", cov_kwds={"groups": codes, "use_correction": False})
    found = compare_groups("s", {"a": ROWS["a"], "b": ROWS["b"]}, clusters={"a": [f"a{n}" for n in NAMES], "b": [f"b{n}" for n in NAMES]}).pairs[0]
    assert found.effect / found.statistic == pytest.approx(oracle.bse[1] * math.sqrt(7 / 6))

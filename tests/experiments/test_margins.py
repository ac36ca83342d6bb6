"""Claims of equivalence and non-inferiority: the margin is declared, the test goes by it, and every report says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.experiments.conftest import small
from tests.experiments.test_analysis import made, noisy, study_of

from crucible_framework.errors import ConfigError
from crucible_framework.experiments import Hypothesis, analyse, experiment_from, load_analysis, run
from crucible_framework.reports.study import write_study_report
from crucible_framework.stats import seeds_and_items, tost


def claimed(**changes: object) -> Hypothesis:
    return Hypothesis(**{"better": "lora.rank=8", "than": "lora.rank=4", "margin": 0.1, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"margin": 0.0}, {"margin": -1.0}, {"margin": float("inf")}, {"claim": "better"}, {"claim": "noninferior", "margin": None}])
def test_a_margin_belongs_to_a_claim_that_needs_one(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="margin"):
        claimed(**wrong)


def test_toml_has_both_claims_and_a_margin_alone_means_equivalence() -> None:
    rows = [{"better": "lora.rank=8", "than": "lora.rank=4", "margin": 0.02}, {"better": "lora.rank=8", "claim": "noninferior", "margin": 0.03}]
    found = experiment_from({"name": "x", "matrix": {"lora.rank": [4, 8]}, "hypotheses": rows}).hypotheses
    assert [(one.claims, one.margin) for one in found] == [("equivalent", 0.02), ("noninferior", 0.03)]
    assert Hypothesis(better="lora.rank=8").claims == "better"


@pytest.mark.parametrize(
    ("shift", "claim", "verdict"),
    [
        (0.0, "equivalent", "equivalent"), (0.3, "equivalent", "not shown"), (-0.3, "equivalent", "not shown"),
        (0.3, "noninferior", "noninferior"), (0.0, "noninferior", "noninferior"), (-0.3, "noninferior", "not shown"),
    ],
)  # fmt: skip
def test_the_verdict_is_of_the_claim_and_agrees_with_the_interval(shift: float, claim: str, verdict: str, tmp_path: Path) -> None:
    study = study_of(made(hypotheses=(claimed(claim=claim),)), tmp_path, noisy(np.random.default_rng(1), {"lora.rank=8": shift}, seed_sd=0.01))
    analysis = analyse(study)
    one = next(one for one in analysis.contrasts if one.declared)
    assert (one.claim, one.margin, one.verdict) == (claim, 0.1, verdict)
    held = one.against_margin
    assert held is not None
    assert one.finding is not None
    assert held.effect == one.finding.effect
    assert held.level == 0.9
    inside = held.interval[0] > -0.1 and (claim == "noninferior" or held.interval[1] < 0.1)
    assert inside == (held.p_value < 0.05) == (verdict != "not shown")
    assert one.p_adjusted == held.p_value, "the claim is what was declared, so its p-value is the one that is corrected"
    assert one.simultaneous == pytest.approx(held.interval)
    assert held.test in analysis.methods
    assert any(("Schuirmann" if claim == "equivalent" else "Piaggio") in source for source in analysis.sources)
    assert load_analysis(tmp_path) == analysis
    exploratory = [one for one in analysis.contrasts if not one.declared and one.name == "lora.rank=8 − lora.rank=4"]
    assert [one.claim for one in exploratory] == ["better"], "whether they differ was not declared"


def test_of_a_loss_less_is_not_worse(tmp_path: Path) -> None:
    for shift, verdict in ((-0.4, "noninferior"), (0.4, "not shown")):
        plan = made(perplexity=True, primary="target_nll", hypotheses=(claimed(claim="noninferior"),))
        study = study_of(plan, tmp_path / verdict, noisy(np.random.default_rng(2), {"lora.rank=8": shift}, seed_sd=0.01))
        assert analyse(study)["lora.rank=8 − lora.rank=4"].verdict == verdict


def test_claims_with_a_margin_share_the_family_of_the_declared(tmp_path: Path) -> None:
    plan = made(
        hypotheses=(
            claimed(),
            claimed(claim="noninferior"),
            claimed(better="lora.rank=4", than="lora.rank=8", claim="noninferior"),
            Hypothesis(better="lora.rank=8"),
        )
    )
    declared = [one for one in analyse(study_of(plan, tmp_path, noisy(np.random.default_rng(3), {}))).contrasts if one.declared]
    assert [one.claim for one in declared] == ["equivalent", "noninferior", "noninferior", "better"], "not worse one way is another claim than the other way"
    assert {one.family for one in declared} == {4}
    assert all(one.p_adjusted is not None and one.p_adjusted >= (one.against_margin or one.finding).p_value for one in declared)  # type: ignore[union-attr]


def test_one_seed_of_shares_is_held_by_the_score_method(tmp_path: Path) -> None:
    random = np.random.default_rng(4)

    def right(arm: str, seed: int, n: int) -> list[float]:
        del arm, seed
        return [float(one) for one in random.random(n) < 0.7]

    study = study_of(made(seeds=(0,), hypotheses=(claimed(margin=0.2),)), tmp_path, right, n=300, per_document=0)
    held = next(one for one in analyse(study).contrasts if one.declared).against_margin
    assert held is not None
    assert held.test == "TOST (two one-sided score tests)"


def test_the_same_in_every_seed_is_no_certainty(tmp_path: Path) -> None:
    study = study_of(made(hypotheses=(claimed(margin=0.05),)), tmp_path, lambda arm, seed, n: [1.0] * n, n=12)
    one = next(one for one in analyse(study).contrasts if one.declared)
    assert one.against_margin is not None
    assert one.against_margin.interval[0] < -0.05, "four documents without a difference do not show one below five points"
    assert one.verdict == "not shown"


@pytest.mark.parametrize("side", ["both", "lower", "upper"])
def test_seeds_and_items_are_held_at_the_promised_rate(side: str) -> None:
    """At the margin itself 5 % of studies pass by chance; of 600, more than 7.5 % (or fewer than 2.5 %) has a chance below 0.3 %."""
    random, margin, passed = np.random.default_rng(5), 0.1, 0
    for _ in range(600):
        shift = margin if side == "upper" else -margin
        before = random.normal(0, 0.2, (4, 40))
        after = before + shift + random.normal(0, 0.05, (4, 1)) + random.normal(0, 0.1, 40) + random.normal(0, 0.1, (4, 40))
        found = seeds_and_items("x", before.tolist(), after.tolist(), paired_seeds=True, margin=margin, side=side)  # type: ignore[arg-type]
        passed += found.p_value < 0.05
        ends = (found.interval[0] > -margin, found.interval[1] < margin)
        assert (found.p_value < 0.05) == {"both": all(ends), "lower": ends[0], "upper": ends[1]}[side]
    assert 0.025 < passed / 600 < 0.075


def test_one_side_is_the_t_test_of_the_moved_difference() -> None:
    from scipy import stats

    random = np.random.default_rng(6)
    before, after = random.normal(0, 1, 30), random.normal(0.1, 1, 30)
    lower = tost("x", before.tolist(), after.tolist(), margin=0.5, paired=True, side="lower")
    upper = tost("x", before.tolist(), after.tolist(), margin=0.5, paired=True, side="upper")
    assert lower.p_value == pytest.approx(stats.ttest_rel(after, before - 0.5, alternative="greater").pvalue)
    assert upper.p_value == pytest.approx(stats.ttest_rel(after, before + 0.5, alternative="less").pvalue)
    assert tost("x", before.tolist(), after.tolist(), margin=0.5, paired=True).p_value == max(lower.p_value, upper.p_value)


def test_every_format_reports_the_margin(tmp_path: Path) -> None:
    plan = small(hypotheses=(
        Hypothesis(better="lora.rank=8", than="lora.rank=2", margin=9.0, because="the loss is <below> that"),
        Hypothesis(better="lora.rank=8", claim="noninferior", margin=7.0),
    ))  # fmt: skip
    analysis = analyse(run(plan, tmp_path, jobs=0))
    assert [one.verdict for one in analysis.contrasts if one.declared] == ["equivalent", "noninferior"]
    formats = ("html", "markdown", "latex", "json", "csv", "jupyter")
    for path in write_study_report(tmp_path, formats):
        text = path.read_text()
        for words in ("equivalent to", "not worse than", "claims with a margin", "TOST"):
            assert words in text, (path.name, words)
    markdown = (tmp_path / "report.md").read_text().replace("\\", "")
    assert "Declared: lora.rank=8 is equivalent to lora.rank=2 in target_nll, margin ±9. Supported" in markdown
    assert "90 % interval" in markdown.replace("\u00a0", " ").replace("&nbsp;", " ")
    assert "2 supported" in markdown
    findings = json.loads((tmp_path / "findings.json").read_text())["contrasts"]
    assert [one["margin"] for one in findings if one["declared"]] == [9.0, 7.0]

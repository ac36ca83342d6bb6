"""Analysis: the differences are those of the scores, what was declared stays apart, and nothing is found where nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from crucible_framework.errors import NotFoundError
from crucible_framework.experiments import BASE, CellResult, DataPlan, Experiment, Failure, Hypothesis, Study, analyse, load_analysis
from crucible_framework.records import DatasetCard, Evaluation, ScoredExample

CARD = DatasetCard(name="made", split="test", task="verify", rows=0, sha256="0", licence="none", source="the test")


def evaluation(values: list[float | None], per_document: int, metric: str) -> Evaluation:
    items = tuple(
        ScoredExample(id=f"i{n:03}", document=f"d{n // per_document}" if per_document else "", target="yes", completion="yes", scores={metric: value})
        for n, value in enumerate(values)
    )
    return Evaluation(model="m", card=CARD, items=items, estimates=())


def study_of(experiment: Experiment, folder: Path, score: object, *, n: int = 60, per_document: int = 3, lost: tuple[int, ...] = ()) -> Study:
    """A study whose scores are `score(arm, seed, n)`; the cells at `lost` have failed."""
    metric, failure = experiment.primary, Failure(error="NumericError", message="NaN")
    cells = tuple(
        CellResult(id=c.id, arm=c.arm, seed=c.seed, data=c.data, base=c.base, status="failed", training={}, failure=failure)
        if index in lost
        else CellResult(id=c.id, arm=c.arm, seed=c.seed, data=c.data, base=c.base, status="done", training={},
                        evaluation=evaluation(score(c.arm, c.seed, n), per_document, metric))  # type: ignore[operator]
        for index, c in enumerate(experiment.cells())
    )  # fmt: skip
    first = experiment.cells()[0]
    base = CellResult(id=first.base, arm=BASE, seed=0, data=first.data, base=first.base, status="done", training={},
                      evaluation=evaluation(score(BASE, 0, n), per_document, metric))  # type: ignore[operator]  # fmt: skip
    folder.mkdir(exist_ok=True)
    return Study(experiment=experiment, folder=folder, cells=cells, bases={first.base: base})


def made(**changes: object) -> Experiment:
    plain: dict[str, object] = {
        "name": "made", "matrix": {"lora.rank": (4, 8)}, "seeds": (0, 1, 2), "data": (DataPlan(),),
        "hypotheses": (Hypothesis(better="lora.rank=8", than="lora.rank=4"),),
    }  # fmt: skip
    return Experiment(**{**plain, **changes})  # type: ignore[arg-type]


def noisy(random: Generator, shift: dict[str, float], seed_sd: float = 0.02):  # type: ignore[no-untyped-def]
    items: dict[int, np.ndarray] = {}

    def score(arm: str, seed: int, n: int) -> list[float | None]:
        common = items.setdefault(n, random.normal(0.5, 0.2, n))
        return (common + shift.get(arm, 0.0) + random.normal(0, seed_sd) + random.normal(0, 0.1, n)).tolist()  # type: ignore[no-any-return]

    return score


def test_the_effect_is_the_mean_difference_and_the_declared_stay_apart(tmp_path: Path) -> None:
    study = study_of(made(), tmp_path, noisy(np.random.default_rng(1), {"lora.rank=8": 0.3, "lora.rank=4": 0.1}))
    analysis = analyse(study)
    declared = [one for one in analysis.contrasts if one.declared]
    assert [one.name for one in declared] == ["lora.rank=8 − lora.rank=4"]
    one = declared[0]
    assert one.finding is not None

    def mean(arm: str) -> float:
        cells = [cell.evaluation for cell in study.cells if cell.arm == arm]
        return float(np.mean([item.scores["label_accuracy"] for found in cells if found for item in found.items]))

    assert one.finding.effect == pytest.approx(mean("lora.rank=8") - mean("lora.rank=4"))
    assert np.mean(one.per_seed) == pytest.approx(one.finding.effect)
    assert one.seeds == (0, 1, 2)
    assert one.verdict == "better"
    assert (one.family, one.p_adjusted) == (1, one.finding.p_value), "a family of one is not corrected"
    assert one.given_seeds is not None
    assert one.given_seeds.clusters == 20
    assert one.given_seeds.interval[0] > one.finding.interval[0], "new seeds are one more thing that may differ"
    others = [one for one in analysis.contrasts if not one.declared]
    assert {one.name for one in others} == {"lora.rank=4 − base", "lora.rank=8 − base"}, "the declared pair is not tested again"
    for other in others:
        assert other.finding is not None
        assert other.p_adjusted is not None
        assert other.simultaneous is not None
        assert other.p_adjusted >= other.finding.p_value
        assert other.simultaneous[0] < other.finding.interval[0]
        assert other.simultaneous[1] > other.finding.interval[1]
    assert load_analysis(tmp_path) == analysis
    assert analysis["lora.rank=8 − base"].verdict == "better"
    with pytest.raises(NotFoundError, match="lora.rank=8 − base".replace(".", r"\.")):
        analysis["nothing"]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), shift=st.floats(-0.5, 0.5), n=st.integers(4, 40), per_document=st.integers(0, 3), seeds=st.integers(1, 3),
    binary=st.booleans(),
)  # fmt: skip
def test_turning_a_comparison_round_turns_its_sign(
    seed: int, shift: float, n: int, per_document: int, seeds: int, binary: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def score_of(random: Generator):  # type: ignore[no-untyped-def]
        plain = noisy(random, {"lora.rank=8": shift})
        return lambda arm, s, size: [float(v > 0.5) if binary else v for v in plain(arm, s, size)]

    found = []
    for better, than in (("lora.rank=8", "lora.rank=4"), ("lora.rank=4", "lora.rank=8")):
        experiment = made(seeds=tuple(range(seeds)), hypotheses=(Hypothesis(better=better, than=than),))
        study = study_of(experiment, tmp_path_factory.mktemp("s"), score_of(np.random.default_rng(seed)), n=n, per_document=per_document)
        found.append(next(one for one in analyse(study).contrasts if one.declared))
    one, other = found
    assert (one.finding is None) == (other.finding is None)
    if one.finding is not None and other.finding is not None:
        assert one.finding.effect == pytest.approx(-other.finding.effect)
        assert one.finding.interval == pytest.approx((-other.finding.interval[1], -other.finding.interval[0]), abs=1e-9)
        assert {one.verdict, other.verdict} in ({"better", "worse"}, {"not shown"})
        excluded = one.finding.interval[0] > 0 or one.finding.interval[1] < 0
        assert (one.verdict != "not shown") == (excluded and one.finding.effect != 0), "verdict and interval agree in a family of one"


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    """Of 60 studies without any difference, 5 % find one in the declared family by chance: more than 9 has a chance of 0.2 %."""
    false = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        study = study_of(made(), tmp_path / str(seed), noisy(random, {}, seed_sd=0.1), n=30)
        false += next(one for one in analyse(study).contrasts if one.declared).verdict != "not shown"
    assert false <= 9


def test_less_is_better_of_a_loss(tmp_path: Path) -> None:
    experiment = made(perplexity=True, primary="target_nll", hypotheses=(Hypothesis(better="lora.rank=8"), Hypothesis(better="lora.rank=4")))
    study = study_of(experiment, tmp_path, noisy(np.random.default_rng(2), {"lora.rank=8": -0.4, "lora.rank=4": 0.4}))
    assert [one.verdict for one in analyse(study).contrasts if one.declared] == ["better", "worse"]


def test_a_failed_cell_leaves_its_seed_out_and_is_named(tmp_path: Path) -> None:
    study = study_of(made(), tmp_path, noisy(np.random.default_rng(3), {"lora.rank=8": 0.3}), lost=(0,))
    analysis = analyse(study)
    one = analysis["lora.rank=8 − lora.rank=4"]
    assert one.seeds == (1, 2)
    assert "without seed 0" in one.note
    assert analysis["lora.rank=8 − base"].seeds == (0, 1, 2), "other comparisons keep it"
    assert [f.error for f in analysis.failed] == ["NumericError"]
    assert "1 failed" in analysis.methods
    lost = analyse(study_of(made(), tmp_path / "all", noisy(np.random.default_rng(3), {}), lost=(0, 1, 2, 3, 4, 5)))
    assert {one.verdict for one in lost.contrasts} == {"no result"}
    assert "Nothing could be compared" in lost.methods
    assert load_analysis(tmp_path / "all") == lost


def test_main_effects_pair_arms_that_agree_in_the_rest(tmp_path: Path) -> None:
    experiment = made(matrix={"lora.rank": (4, 8), "adam.lr": (1e-3, 1e-4)})
    shift = {"lora.rank=8, adam.lr=0.001": 0.5, "lora.rank=8, adam.lr=0.0001": 0.1}
    study = study_of(experiment, tmp_path, noisy(np.random.default_rng(4), shift, seed_sd=0.0))
    analysis = analyse(study)
    one = analysis["lora.rank=8 − lora.rank=4"]
    assert one.finding is not None
    assert one.finding.effect == pytest.approx(0.3, abs=0.03)
    assert {"adam.lr=0.0001 − adam.lr=0.001", "lora.rank=8, adam.lr=0.001 − base"} <= {c.name for c in analysis.contrasts}
    lost = analyse(replace(study, cells=(replace(study.cells[0], status="failed", evaluation=None), *study.cells[1:])))
    assert lost["lora.rank=8 − lora.rank=4"].seeds == (1, 2), "half a seed would not be balanced over the other axis"


def test_degenerate_scores_have_a_defined_answer(tmp_path: Path) -> None:
    same = analyse(study_of(made(), tmp_path / "same", lambda arm, seed, n: [1.0] * n))
    assert {one.verdict for one in same.contrasts} == {"not shown"}
    one = same["lora.rank=8 − base"]
    assert one.finding is not None
    assert one.finding.interval[0] < 0 < one.finding.interval[1], "no spread is no certainty"
    alone = analyse(study_of(made(), tmp_path / "alone", lambda arm, seed, n: [0.5], n=1, per_document=0))
    assert {one.verdict for one in alone.contrasts} == {"no result"}
    assert all(one.note for one in alone.contrasts)
    none = analyse(study_of(made(), tmp_path / "none", lambda arm, seed, n: [None] * n))
    assert {one.verdict for one in none.contrasts} == {"no result"}
    assert {arm.estimate for arm in none.arms} == {None}


def test_methods_say_what_was_done(tmp_path: Path) -> None:
    analysis = analyse(study_of(made(), tmp_path, noisy(np.random.default_rng(5), {})))
    told = ("2 arms", "3 seeds (0, 1 and 2)", "6 cells", "60 held-out examples", "(20 documents)", "two-way (seed × item) t test", "Holm")
    for words in (*told, "1 comparison was declared", "2 comparisons were not declared"):
        assert words in analysis.methods, words
    assert any("Holm 1979" in source for source in analysis.sources)
    single = analyse(study_of(made(seeds=(0,), hypotheses=()), tmp_path / "b", noisy(np.random.default_rng(5), {}), per_document=0))
    assert "single seed" in single.methods
    assert "declared before the study and corrected" not in single.methods

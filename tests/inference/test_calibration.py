"""Probabilities that hold, accuracies with and without labels, abstention that keeps its promise, how many samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from crucible_framework.errors import ConfigError, TooFewError
from crucible_framework.inference import LogOdds, abstain_at, calls_needed, dawid_skene, fit_confidence, learn_accuracies, majority, samples_needed
from crucible_framework.records import Ballot, Verdict

ACCURACIES = (0.92, 0.62, 0.60, 0.58, 0.55)


def questions(n: int, seed: int, accuracies: tuple[float, ...] = ACCURACIES, *, answers: int = 4, shared: float = 0.0) -> tuple[list[list[Ballot]], list[str]]:
    """Ballots on questions whose right answer varies; `shared` is the correlation of errors, and shared errors are the same answer."""
    rng = np.random.default_rng(seed)
    history: list[list[Ballot]] = []
    truths: list[str] = []
    for _ in range(n):
        truth, trap = (int(x) for x in rng.choice(answers, 2, replace=False))
        luck = np.sqrt(shared) * rng.normal() + np.sqrt(1 - shared) * rng.normal(size=len(accuracies))
        wrong = [int(x) for x in rng.choice([a for a in range(answers) if a != truth], len(accuracies))]
        said = [truth if z < norm.ppf(p) else (trap if shared else w) for z, p, w in zip(luck, accuracies, wrong, strict=True)]
        history.append([Ballot(member=f"m{i}", answer=str(a)) for i, a in enumerate(said)])
        truths.append(str(truth))
    return history, truths


def score(rule: LogOdds | None, history: list[list[Ballot]], truths: list[str]) -> float:
    return float(np.mean([(rule or majority)(ballots).answer == truth for ballots, truth in zip(history, truths, strict=True)]))


def test_learned_weights_beat_the_majority_with_and_without_labels() -> None:
    history, truths = questions(400, 0)
    test, answers = questions(3000, 1)
    labelled = learn_accuracies(history, truths)
    alone = dawid_skene(history, answers=4)
    assert [labelled[f"m{i}"] for i in range(5)] == pytest.approx(ACCURACIES, abs=0.06)
    assert [alone[f"m{i}"] for i in range(5)] == pytest.approx(ACCURACIES, abs=0.08)
    heads = score(None, test, answers)
    assert heads == pytest.approx(0.878, abs=0.02)
    for found in (labelled, alone):
        assert score(LogOdds(accuracies=found, answers=4), test, answers) > heads + 0.04


def test_failures_and_abstentions_are_no_errors() -> None:
    ballots = [Ballot(member="a", answer="x"), Ballot(member="b", answer=None), Ballot(member="c", answer=None, error="away")]
    assert learn_accuracies([ballots], ["x"]) == {"a": pytest.approx(2 / 3)}
    with pytest.raises(TooFewError):
        dawid_skene([ballots])


def verdicts(n: int, seed: int, shared: float) -> tuple[list[Verdict], list[bool]]:
    rule = LogOdds(accuracies={f"m{i}": 0.75 for i in range(5)}, answers=4)
    history, truths = questions(n, seed, (0.75,) * 5, shared=shared)
    found = [rule(ballots) for ballots in history]
    return found, [v.answer == truth for v, truth in zip(found, truths, strict=True)]


def test_the_probability_is_calibrated_though_errors_are_shared() -> None:
    fitted = fit_confidence(*verdicts(800, 0, 0.5))
    test, right = verdicts(4000, 1, 0.5)
    promised = np.array([fitted(v) for v in test], dtype=float)
    naive = np.array([v.probability for v in test], dtype=float)
    rate = np.array(right, dtype=float)
    assert abs(promised.mean() - rate.mean()) < 0.03
    assert naive.mean() - rate.mean() > 0.1  # the formula for independent members promises too much
    for low, high in ((0.0, 0.7), (0.7, 1.0)):
        there = (promised >= low) & (promised < high)
        if there.sum() > 100:
            assert abs(promised[there].mean() - rate[there].mean()) < 0.06


def test_calibration_needs_data_and_answers() -> None:
    found, right = verdicts(19, 0, 0.0)
    with pytest.raises(TooFewError, match="at least 20"):
        fit_confidence(found, right)
    silent = majority([Ballot(member="a", answer=None)])
    fitted = fit_confidence([*verdicts(40, 0, 0.0)[0], silent], [*verdicts(40, 0, 0.0)[1], False])
    assert fitted.n == 40
    assert fitted(silent) is None
    sure = fit_confidence(found * 2, [True] * 38)
    assert 0.9 < (sure(found[0]) or 0) < 1.0


def test_abstention_keeps_its_promise_in_at_least_the_level_of_samples() -> None:
    broken, naive_broken, answered = 0, 0, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.5, 1.0, 300)
        rule = abstain_at(confidence.tolist(), (rng.random(300) < confidence).tolist(), error=0.1)
        true_error = (1 - rule.threshold) / 2 if rule.threshold <= 1 else 0.0  # mean of 1 − c above the threshold
        broken += true_error > 0.1
        answered += rule.answered
        observed = rng.random(300) < confidence
        order = np.argsort(-confidence)
        errors = np.cumsum(~observed[order]) / np.arange(1, 301)
        ok = np.flatnonzero(errors <= 0.1)
        naive_broken += len(ok) > 0 and (1 - confidence[order][ok[-1]]) / 2 > 0.1
    assert broken <= 150 * 0.05 + 7
    assert naive_broken > 50
    assert answered > 150 * 20


def test_abstention_where_nothing_can_be_promised() -> None:
    rule = abstain_at([0.9] * 10, [True] * 10, error=0.05)
    assert (rule.threshold, rule(1.0), rule(None)) == (float("inf"), False, False)
    sure = abstain_at([0.9] * 100, [True] * 100, error=0.05)
    assert sure(0.9)
    assert not sure(0.89)
    assert sure.bound == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-6)
    with pytest.raises(ConfigError):
        abstain_at([0.9], [True], error=0.0)


def test_more_samples_can_be_worse() -> None:
    best, curve = samples_needed([0.9] * 5 + [0.45] * 5, most=41)
    assert 1 < best < 41
    assert curve[best] > curve[41]
    assert samples_needed([0.8])[0] == 41
    assert samples_needed([0.3])[0] == 1
    with pytest.raises(ConfigError):
        samples_needed([])


def test_calls_needed_are_read_from_answers() -> None:
    rng = np.random.default_rng(0)

    def asked(rate: float, wrong: int) -> list[Ballot]:
        said = ["right" if rng.random() < rate else f"wrong {rng.integers(wrong)}" for _ in range(9)]
        return [Ballot(member=f"m#{i}", answer=answer) for i, answer in enumerate(said)]

    easy = [asked(0.6, 10) for _ in range(80)]  # wrong answers differ, so more answers help
    curve = calls_needed(easy, ["right"] * 80, draws=30)
    assert curve.accuracy[1].value == pytest.approx(np.mean([[b.answer == "right" for b in row] for row in easy]), abs=0.03)
    assert curve.accuracy[9].value > 0.9 > curve.accuracy[1].value
    assert 3 <= curve.enough <= curve.best
    trap = [asked(0.35, 1) for _ in range(80)]  # wrong answers agree, so more answers harm
    worse = calls_needed(trap, ["right"] * 80, most=7, draws=30)
    assert (worse.best, worse.enough, max(worse.accuracy)) == (1, 1, 7)
    assert worse.accuracy[7].value < worse.accuracy[1].value
    with pytest.raises(TooFewError, match="9 questions"):
        calls_needed(easy[:9], ["right"] * 9)
    with pytest.raises(ConfigError, match="most=10"):
        calls_needed(easy, ["right"] * 80, most=10)
    with pytest.raises(ConfigError, match=r"\[8, 9\] ballots"):
        calls_needed([easy[0][:8], *easy[1:]], ["right"] * 80)

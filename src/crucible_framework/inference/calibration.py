"""What votes are worth: calibrated probabilities, accuracies with and without labels, abstention that keeps a promise, how many samples.

Numbers and ballots in, numbers out: knows no models. Independence of the members is nowhere assumed but where it is said.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, TooFewError
from ..protocols import Vote
from ..records import Ballot, Estimate, Verdict, record
from .voting import votes

__all__ = [
    "Abstention",
    "Calibration",
    "CallCurve",
    "abstain_at",
    "calls_needed",
    "dawid_skene",
    "fit_confidence",
    "learn_accuracies",
    "majority_is_safe",
    "samples_needed",
]

Floats = NDArray[np.float64]


def _features(verdict: Verdict) -> Floats:
    """A constant, agreement, how many answered, and the winners' mean confidence where it is known."""
    mine = [b.confidence for b in verdict.ballots if b.answer == verdict.answer and b.confidence is not None]
    heard = sum(not b.error for b in verdict.ballots)
    return np.array([1.0, verdict.agreement, math.log(max(1, heard)) * verdict.agreement, float(np.mean(mine)) if mine else 0.0, float(bool(mine))])


@record
class Calibration:
    """A logistic model of "the verdict is right"; pass it as `Ensemble(confidence=…)`. `weights` go with the features of a verdict."""

    weights: tuple[float, ...]
    n: int

    def __call__(self, verdict: Verdict) -> float | None:
        """The probability that the verdict is right; None where it has no answer."""
        if verdict.answer is None:
            return None
        return 1.0 / (1.0 + math.exp(-min(50.0, max(-50.0, float(_features(verdict) @ np.array(self.weights))))))


def fit_confidence(verdicts: Sequence[Verdict], right: Sequence[bool], *, ridge: float = 1.0) -> Calibration:
    """Fits the probability that a verdict is right, on verdicts whose truth is known.

    Since it is fitted on what the ensemble as a whole got right, errors that members share are in it; formulas from single accuracies
    promise too much then. For a cascade fit it on the verdicts after one, two, … members, for those are what it will see.

    Args:
        verdicts: those without an answer are left out.
        right: for each whether its answer is right.
        ridge: penalty on all weights but the constant.

    Raises:
        TooFewError: fewer than 20 verdicts with an answer.

    Source: Platt 1999, with the smoothed targets that keep small samples from promising certainty.
    """
    rows = [(_features(v), bool(r)) for v, r in zip(verdicts, right, strict=True) if v.answer is not None]
    if len(rows) < 20:
        raise TooFewError(f"The calibration got {len(rows)} verdicts with an answer; expected at least 20. Label more questions.")
    x, y = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    good, bad = int(y.sum()), int((~y).sum())
    target = np.where(y, (good + 1) / (good + 2), 1 / (bad + 2))
    penalty = np.diag([1e-6, *[ridge] * (x.shape[1] - 1)])
    w = np.zeros(x.shape[1])
    for _ in range(50):  # Newton's method on a convex loss
        p = 1 / (1 + np.exp(-np.clip(x @ w, -50, 50)))
        gradient = x.T @ (p - target) + penalty @ w
        step = np.linalg.solve((x.T * np.maximum(p * (1 - p), 1e-9)) @ x + penalty, gradient)
        w -= step / max(1.0, float(np.abs(step).max()) / 5)
        if float(np.abs(step).max()) < 1e-10:
            break
    return Calibration(weights=tuple(w.tolist()), n=len(rows))


def learn_accuracies(history: Sequence[Sequence[Ballot]], truths: Sequence[str], *, prior: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
    """Each member's accuracy from labelled questions, for `LogOdds`: (right + a) / (answered + a + b) with the prior Beta(a, b).

    Args:
        history: the ballots of each question; failures and abstentions are left out.
        truths: the right answers in normal form.
        prior: a, b.
    """
    right, said = Counter[str](), Counter[str]()
    for ballots, truth in zip(history, truths, strict=True):
        for ballot in ballots:
            if ballot.answer is not None and not ballot.error:
                said[ballot.member] += 1
                right[ballot.member] += ballot.answer == truth
    return {member: (right[member] + prior[0]) / (count + sum(prior)) for member, count in sorted(said.items())}


def dawid_skene(history: Sequence[Sequence[Ballot]], *, answers: int = 2, steps: int = 200, tolerance: float = 1e-8) -> dict[str, float]:
    """Each member's accuracy without labels, from how the members agree (one-coin Dawid–Skene by expectation maximisation).

    It takes the members for better than chance on the whole and their errors for independent: where all make the same mistakes it takes
    the mistake for the truth. Start: majority.

    Args:
        history: the ballots of each question.
        answers: possible answers per question, of which wrong ones are equally likely.
        steps: at the most.
        tolerance: largest change of an accuracy at which it stops.

    Raises:
        TooFewError: no question was answered by two members.

    Source: Dawid & Skene 1979; the one-coin model as in Zhang et al. 2016, arXiv 1406.3824.
    """
    rows = [[(b.member, b.answer) for b in ballots if b.answer is not None and not b.error] for ballots in history]
    rows = [row for row in rows if len(row) >= 2]
    if not rows or answers < 2:
        raise TooFewError(f"Dawid–Skene got {len(rows)} questions that two members answered, and {answers} possible answers; expected 1 and 2 at least.")
    accuracy = dict.fromkeys(sorted({member for row in rows for member, _ in row}), 0.7)
    for _ in range(steps):
        right, said = dict.fromkeys(accuracy, 1.0), dict.fromkeys(accuracy, 2.0)
        for row in rows:
            found = {answer: 0.0 for _, answer in row}
            for member, answer in row:
                p = min(0.999, max(0.001, accuracy[member]))
                found[answer] += math.log(p * (answers - 1) / (1 - p))
            top = max(found.values())
            mass = {answer: math.exp(value - top) for answer, value in found.items()}
            whole = math.fsum(mass.values()) + max(0, answers - len(mass)) * math.exp(-top)
            for member, answer in row:
                right[member] += mass[answer] / whole
                said[member] += 1
        new = {member: right[member] / said[member] for member in accuracy}
        change = max(abs(new[member] - accuracy[member]) for member in accuracy)
        accuracy = new
        if change < tolerance:
            break
    return accuracy


@record
class Abstention:
    """Answer where the confidence is at least `threshold`. `error` is the rate promised, `bound` the upper bound met, `answered` of n were."""

    threshold: float
    error: float
    bound: float
    answered: int
    n: int
    level: float

    def __call__(self, probability: float | None) -> bool:
        """Whether to answer."""
        return probability is not None and probability >= self.threshold


def _upper(errors: int, n: int, level: float) -> float:
    from scipy.stats import beta

    return 1.0 if errors >= n else float(beta.ppf(level, errors + 1, n - errors))


def abstain_at(confidences: Sequence[float], right: Sequence[bool], *, error: float = 0.05, level: float = 0.95) -> Abstention:
    """The lowest threshold above which the error rate is at most `error` with confidence `level`; infinite where none can be promised.

    Thresholds are tested from the highest down until the first that fails, each at the whole level: the fixed-sequence test of
    Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052), with the exact binomial bound of Clopper & Pearson. Choosing the threshold
    by the observed error rate breaks the promise in about every second sample.

    Args:
        confidences: of answers to labelled questions that nothing was fitted on.
        right: for each whether the answer was right.
        error: the rate promised for what is answered.
        level: with which confidence over samples.
    """
    if not 0 < error < 1 or not 0 < level < 1:
        raise ConfigError(f"abstain_at got error={error!r} and level={level!r}; expected numbers in (0, 1).")
    rows = sorted(zip(confidences, right, strict=True), reverse=True)
    least = math.ceil(math.log(1 - level) / math.log(1 - error))  # fewer answers than this cannot show it even without an error
    found = Abstention(threshold=math.inf, error=error, bound=1.0, answered=0, n=len(rows), level=level)
    errors = 0
    for count, (confidence, ok) in enumerate(rows, 1):
        errors += not ok
        if count < least or (count < len(rows) and rows[count][0] == confidence):
            continue
        bound = _upper(errors, count, level)
        if bound > error:
            break
        found = Abstention(threshold=confidence, error=error, bound=bound, answered=count, n=len(rows), level=level)
    return found


def majority_is_safe(counts: Mapping[str, int], confidence: float = 0.95) -> bool:
    """Whether the leading answer would stay ahead of the second with this probability if sampling went on: P(Beta(v₁+1, v₂+1) > ½).

    Source: Adaptive-Consistency, Aggarwal et al. 2023, arXiv 2305.11860.
    """
    first, second = [*sorted(counts.values(), reverse=True), 0, 0][:2]
    tosses = first + second + 1
    ahead = sum(math.comb(tosses, k) for k in range(first + 1)) / float(2**tosses)
    return bool(ahead >= confidence)


@record
class CallCurve:
    """How right a vote is by the number of answers that it is on.

    Attributes:
        accuracy: per number of answers the expected share of right verdicts, over questions.
        best: the number of the highest; more can be worse.
        enough: the least number that is not shown to be worse than `best` on these questions.
    """

    accuracy: Mapping[int, Estimate]
    best: int
    enough: int


def calls_needed(
    history: Sequence[Sequence[Ballot]], truths: Sequence[str], vote: str | Vote = "majority", *, most: int | None = None, draws: int = 100,
    level: float = 0.95, seed: int = 0,
) -> CallCurve:  # fmt: skip
    """How many answers a vote should take, from questions that were answered many times: nothing is assumed about the errors.

    For each number n every question votes on `draws` random n of its ballots; that is what n calls would have said. Intervals are over
    questions, and `enough` compares paired. Ballots of failed members stay in, as they would.

    Args:
        history: the ballots of each question, equally many, say 10 answers of one model (`SelfConsistent(sampler, 10, confidence=None)`) or of a pool.
        truths: the right answers in normal form.
        vote: a registered rule, or your own.
        most: the largest n; all ballots where None.
        draws: per question and n.
        level: of the intervals.
        seed: of the draws.

    Raises:
        TooFewError: fewer than 10 questions.
        ConfigError: the questions have different numbers of ballots, or `most` is more.
    """
    from ..stats import mean_estimate

    sizes = {len(ballots) for ballots in history}
    if len(history) < 10 or len(history) != len(truths):
        raise TooFewError(f"calls_needed got {len(history)} questions and {len(truths)} answers; expected at least 10, and as many answers.")
    if len(sizes) != 1 or not 1 <= (most or 1) <= max(sizes):
        raise ConfigError(f"The questions have {sorted(sizes)} ballots with most={most!r}; expected one number of ballots, and most within it.")
    rule, rng = votes.get(vote), np.random.default_rng(seed)
    right: dict[int, Floats] = {}
    for n in range(1, (most or max(sizes)) + 1):
        right[n] = np.zeros(len(history))
        for i, (ballots, truth) in enumerate(zip(history, truths, strict=True)):
            several = 1 if n == len(ballots) else draws
            picks = (rng.permutation(len(ballots))[:n] for _ in range(several))
            right[n][i] = np.mean([rule([ballots[j] for j in pick]).answer == truth for pick in picks])
    accuracy = {n: mean_estimate(f"{n} answers", values.tolist(), level=level) for n, values in right.items()}
    best = max(right, key=lambda n: (round(float(right[n].mean()), 12), -n))
    lost = {n: mean_estimate("lost", (right[best] - values).tolist(), level=level) for n, values in right.items() if n < best}
    return CallCurve(accuracy=accuracy, best=best, enough=next((n for n, one in lost.items() if one.low <= 0), best))


def samples_needed(rates: Sequence[float], most: int = 41) -> tuple[int, dict[int, float]]:
    """How many samples a majority vote should take, from how often each question's samples were right; more can be worse.

    Args:
        rates: per labelled question the share of right samples; wrong ones are taken to agree, the worst case.
        most: the largest odd number to look at.

    Returns:
        The number of best expected accuracy (the least of equals), and the accuracy for each odd number.

    Source: Chen et al. 2024, "Are More LLM Calls All You Need?", arXiv 2403.02419.
    """
    from scipy.stats import binom

    if not len(rates) or any(not 0 <= rate <= 1 for rate in rates):
        raise ConfigError(f"samples_needed got {len(rates)} rates; expected at least one, each in [0, 1].")
    p = np.asarray(rates, dtype=np.float64)
    curve = {n: float(np.mean(binom.sf(n // 2, n, p))) for n in range(1, most + 1, 2)}
    return max(curve, key=lambda n: (round(curve[n], 12), -n)), curve

"""Voting rules: pure functions from ballots to a verdict, the same for every order of the ballots. Knows no models, no clock, no files.

What all rules share: a failed member casts no vote and is not in the shares; an abstention (`answer` None without an error) casts none
either, but is in the shares, so that agreement falls when members do not know. Ties are drawn by a hash of the seed, the ballots' texts
and the answer: the same ballots always give the same winner, and no answer is favoured by its spelling.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ..errors import ConfigError, InferenceError
from ..plugins import Registry
from ..protocols import Vote
from ..records import Ballot, Verdict, record

__all__ = [
    "LogOdds",
    "best_confidence",
    "borda",
    "instant_runoff",
    "majority",
    "plurality",
    "settled",
    "unanimous",
    "votes",
    "weighted",
]

_NAMES = ("majority", "weighted", "best_confidence", "unanimous", "plurality", "borda", "instant_runoff")
votes: Registry[Vote] = Registry("vote", {name: f"crucible_framework.inference.voting:{name}" for name in _NAMES})
"""Names to voting rules; `votes.register("mine")` adds one."""
_NEW = "\x00 an answer that nobody has given yet"


def _answered(ballots: Sequence[Ballot]) -> list[Ballot]:
    """Those who did not fail, in an order that does not depend on that of the ballots."""
    here = sorted((b for b in ballots if not b.error), key=lambda b: (b.member, b.answer or "", b.text, b.confidence or 0.0, b.weight))
    if not here:
        causes = "; ".join(f"{b.member}: {b.error}" for b in ballots) or "there are no ballots"
        raise InferenceError(f"No ballot was cast ({causes}); expected at least one answer or abstention. Ask members that can answer.")
    return here


def _draw(answers: Iterable[str], ballots: Sequence[Ballot], seed: int) -> str:
    """One of tied answers, evenly over questions and seeds."""
    ground = "\x1f".join([str(seed), *sorted(f"{b.member}\x1e{b.text}\x1e{b.answer}" for b in ballots)])
    return min(answers, key=lambda answer: (hashlib.sha256(f"{ground}\x1f{answer}".encode()).digest(), answer))


def _text_of(answer: str, here: Sequence[Ballot]) -> str:
    """How the winner is shown: as its most confident supporter said it, of equals the first by name."""
    mine = [b for b in here if b.answer == answer and b.text]
    return max(mine, key=lambda b: -1.0 if b.confidence is None else b.confidence).text if mine else answer


def _none(strategy: str, ballots: Sequence[Ballot], reason: str, scores: Mapping[str, float], agreement: float = 0.0) -> Verdict:
    return Verdict(answer=None, text="", agreement=agreement, strategy=strategy, ballots=tuple(ballots), scores=scores, reason=reason)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)


def _most(strategy: str, ballots: Sequence[Ballot], scores: Mapping[str, float], whole: float, seed: int) -> Verdict:
    """The verdict for the highest score; `whole` is what a share of 1 would be."""
    if not scores or max(scores.values()) <= 0:
        return _none(strategy, ballots, "all abstained" if not scores else "no answer has a positive score", scores)
    here = _answered(ballots)
    top = max(scores.values())
    first = sorted(answer for answer, value in scores.items() if _close(value, top))
    winner = first[0] if len(first) == 1 else _draw(first, ballots, seed)
    return Verdict(
        answer=winner,
        text=_text_of(winner, here),
        agreement=min(1.0, top / whole) if whole > 0 else 0.0,
        strategy=strategy,
        ballots=tuple(ballots),
        scores=dict(sorted(scores.items(), key=lambda one: (-one[1], one[0]))),
        tied=tuple(first) if len(first) > 1 else (),
    )


def _tally(here: Sequence[Ballot], count: Callable[[Ballot], float]) -> dict[str, float]:
    terms: dict[str, list[float]] = {}
    for ballot in here:
        if ballot.answer is not None:
            terms.setdefault(ballot.answer, []).append(count(ballot))
    return {answer: math.fsum(values) for answer, values in terms.items()}


def majority(ballots: Sequence[Ballot], *, seed: int = 0) -> Verdict:
    """The answer most often given; `agreement` is its share of all who did not fail.

    Raises:
        InferenceError: no member answered or abstained.
    """
    here = _answered(ballots)
    return _most("majority", ballots, _tally(here, lambda _: 1.0), len(here), seed)


def weighted(ballots: Sequence[Ballot], *, seed: int = 0) -> Verdict:
    """The answer with the largest sum of `Ballot.weight`. Weights in proportion to accuracy change little: see `LogOdds`."""
    here = _answered(ballots)
    return _most("weighted", ballots, _tally(here, lambda b: b.weight), math.fsum(b.weight for b in here), seed)


def plurality(ballots: Sequence[Ballot], *, least: float = 0.5, seed: int = 0) -> Verdict:
    """As `majority`, but without an answer where the winner's share is not above `least`, or a draw would decide.

    Raises:
        ConfigError: `least` is not in [0, 1).
        InferenceError: no member answered or abstained.
    """
    if not 0 <= least < 1:
        raise ConfigError(f"The least share is {least!r}; expected a number in [0, 1). 0.5 asks for more than half.")
    found = replace(majority(ballots, seed=seed), strategy="plurality")
    if found.answer is None:
        return found
    if found.tied:
        return _none("plurality", ballots, f"{len(found.tied)} answers are tied", found.scores, found.agreement)
    if found.agreement <= least:
        return _none(
            "plurality", ballots, f"the most frequent answer has a share of {found.agreement:.3g}, not above {least:.3g}", found.scores, found.agreement
        )
    return found


def unanimous(ballots: Sequence[Ballot]) -> Verdict:
    """An answer only where every member that was asked gave it: a failure or an abstention is no agreement."""
    here = _answered(ballots)
    scores = _tally(here, lambda _: 1.0)
    share = max(scores.values(), default=0.0) / len(ballots)
    if len(scores) != 1 or share < 1:
        failed, silent = len(ballots) - len(here), sum(b.answer is None for b in here)
        return _none("unanimous", ballots, f"{len(scores)} different answers, {silent} abstained, {failed} failed of {len(ballots)} asked", scores, share)
    return replace(_most("unanimous", ballots, scores, len(ballots), 0), agreement=1.0)


def best_confidence(ballots: Sequence[Ballot], *, seed: int = 0) -> Verdict:
    """The answer of the most confident member. A ballot without a confidence cannot win; `agreement` is still the share of heads.

    Raises:
        InferenceError: no member answered or abstained.
    """
    here = _answered(ballots)
    known: dict[str, float] = {}
    for ballot in here:
        if ballot.answer is not None and ballot.confidence is not None:
            known[ballot.answer] = max(ballot.confidence, known.get(ballot.answer, 0.0))
    if not known:
        return _none("best_confidence", ballots, "no answer comes with a confidence; a sampler gives one with its log-probs", {})
    found = _most("best_confidence", ballots, known, 1.0, seed)
    heads = sum(b.answer == found.answer for b in here) if found.answer is not None else 0
    return replace(found, agreement=heads / len(here))


def _rankings(here: Sequence[Ballot]) -> list[tuple[str, ...]]:
    """Each ballot's distinct answers, best first."""
    return [tuple(dict.fromkeys((b.answer, *b.ranking) if b.ranking[:1] != (b.answer,) else b.ranking)) for b in here if b.answer is not None]


def borda(ballots: Sequence[Ballot], *, seed: int = 0) -> Verdict:
    """Points by place: with k answers in all, k − 1 for the first, k − 2 for the second; those not ranked share what is left evenly.

    Source: de Borda 1781; ties of unranked answers as in the averaged ("tournament") count, so that a short ballot has no less power.
    """
    here = _answered(ballots)
    orders = _rankings(here)
    every = sorted({answer for order in orders for answer in order})
    terms: dict[str, list[float]] = {answer: [] for answer in every}
    for order in orders:
        rest = len(every) - len(order)
        for answer in every:
            terms[answer].append(len(every) - 1 - order.index(answer) if answer in order else (rest - 1) / 2)
    if len(every) == 1:
        return replace(_most("borda", ballots, {every[0]: float(len(orders))}, len(here), seed))
    return _most("borda", ballots, {answer: math.fsum(points) for answer, points in terms.items()}, len(here) * (len(every) - 1), seed)


def instant_runoff(ballots: Sequence[Ballot], *, seed: int = 0) -> Verdict:
    """The answer with the fewest first places goes, and its ballots pass to their next choice, until one has more than half of those left.

    All answers tied for last go together, unless nothing would be left; then the tie is drawn. `scores` are the first places of the last
    round; exhausted ballots no longer count.
    """
    here = _answered(ballots)
    orders = _rankings(here)
    left = {answer for order in orders for answer in order}
    while left:
        firsts = [next((answer for answer in order if answer in left), None) for order in orders]
        scores = {answer: float(firsts.count(answer)) for answer in left}
        live, low = sum(first is not None for first in firsts), min(scores.values())
        last = {answer for answer in left if scores[answer] == low}
        if max(scores.values()) > live / 2 or last == left:
            return _most("instant_runoff", ballots, scores, len(here), seed)
        left -= last
    return _none("instant_runoff", ballots, "all abstained", {})


@record
class LogOdds:
    """The best vote of independent members: each counts by log(p (K − 1) / (1 − p)), where p is its accuracy and K the possible answers.

    The verdict's `probability` is the posterior of the winner if errors are independent and even over the wrong answers, which those of
    language models are not: calibrate it (`calibration.py`) before a promise rests on it. A member worse than chance counts against
    its answer. Weights learned from labels or without them: `reliability.py`.
    Source: Nitzan & Paroush 1982; Shapley & Grofman 1984; for K answers the naive Bayes posterior of Dawid & Skene 1979 with one coin.

    Attributes:
        accuracies: per member; a member that is not named has the mean of the others.
        answers: K, at least 2; where unknown, a guess of how many answers are plausible.
    """

    accuracies: Mapping[str, float]
    answers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        bad = {name: p for name, p in self.accuracies.items() if not 0 <= p <= 1}
        if bad or not self.accuracies:
            raise ConfigError(f"LogOdds.accuracies is {dict(self.accuracies)!r}; expected at least one member with a number in [0, 1].")
        if self.answers < 2:
            raise ConfigError(f"LogOdds.answers is {self.answers!r}; expected a whole number of at least 2.")

    def weight(self, member: str) -> float:
        """The log-odds weight in nats; accuracies are kept within [0.001, 0.999]."""
        p = self.accuracies.get(member, math.fsum(self.accuracies.values()) / len(self.accuracies))
        p = min(0.999, max(0.001, p))
        return math.log(p * (self.answers - 1) / (1 - p))

    def __call__(self, ballots: Sequence[Ballot]) -> Verdict:
        """Counts the ballots."""
        here = _answered(ballots)
        sums = _tally(here, lambda b: self.weight(b.member))
        if not sums:
            return _none("log_odds", ballots, "all abstained", {})
        top = max(sums.values())
        if top < 0 and len(sums) < self.answers:  # every given answer speaks against itself
            return _none("log_odds", ballots, "every given answer is less likely than one that nobody gave", sums)
        shifted = {answer: math.exp(value - max(top, 0.0)) for answer, value in sums.items()}
        whole = math.fsum(shifted.values()) + max(0, self.answers - len(sums)) * math.exp(-max(top, 0.0))
        found = _most("log_odds", ballots, {answer: value / whole for answer, value in shifted.items()}, 1.0, self.seed)
        heads = sum(b.answer == found.answer for b in here)
        return replace(found, agreement=heads / len(here), probability=found.scores[found.answer or ""], scores=found.scores)


_SETTLING = {majority, weighted, plurality, unanimous}


def settled(vote: Vote, ballots: Sequence[Ballot], waiting: Sequence[Ballot]) -> bool:
    """Whether no answer of the members still waiting can change the winner.

    For rules in which a vote more for an answer never hurts it (majority, weighted, plurality, unanimous, `LogOdds` with members better
    than chance) the worst case is that all who wait agree on one rival, or abstain; each such case is tried. Other rules, your own among
    them, are never settled early.

    Args:
        vote: the rule.
        ballots: those cast.
        waiting: a ballot for each member to come, with its name and weight; its answer does not matter.
    """
    rule = vote.func if isinstance(vote, functools.partial) else vote
    monotone = rule in _SETTLING if not isinstance(vote, LogOdds) else all(vote.weight(b.member) >= 0 for b in (*ballots, *waiting))
    if not waiting:
        return True
    if not monotone or all(b.error for b in ballots):
        return False
    now = vote(ballots)
    if now.tied:
        return False
    rivals: list[str | None] = [None, _NEW, *sorted({b.answer for b in ballots if b.answer is not None})]
    for rival in rivals:
        then = vote([*ballots, *(replace(b, answer=rival, text="", error="", ranking=()) for b in waiting)])
        if then.answer != now.answer or then.tied:
            return False
    lost = vote([*ballots, *(replace(b, answer=None, error="failed") for b in waiting)])
    return lost.answer == now.answer and not lost.tied

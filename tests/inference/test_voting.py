"""Voting rules: what they give, that order does not matter, and that a vote said to be settled is."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.errors import ConfigError, InferenceError, UnknownNameError
from crucible_framework.inference import LogOdds, best_confidence, borda, instant_runoff, majority, plurality, settled, unanimous, votes, weighted
from crucible_framework.protocols import Vote
from crucible_framework.records import Ballot


def cast(*answers: str | None) -> list[Ballot]:
    return [Ballot(member=f"m{i}", answer=answer, text=answer or "") for i, answer in enumerate(answers)]


def ranked(*orders: str) -> list[Ballot]:
    return [Ballot(member=f"m{i}", answer=order[0], ranking=tuple(order)) for i, order in enumerate(orders)]


FAILED = Ballot(member="away", answer=None, error="ServiceError: away")
RULES: list[Vote] = [majority, weighted, plurality, unanimous, best_confidence, borda, instant_runoff, LogOdds(accuracies={"m0": 0.9, "m1": 0.6}, answers=4)]


def test_majority() -> None:
    found = majority([*cast("4", "4", "5"), FAILED])
    assert (found.answer, found.scores, found.tied) == ("4", {"4": 2.0, "5": 1.0}, ())
    assert found.agreement == pytest.approx(2 / 3)
    assert majority(cast("a", "a", None, None)).agreement == 0.5
    assert majority(cast(None, None)).answer is None
    assert majority(cast(None)).reason == "all abstained"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "__name__", type(rule).__name__))
def test_no_ballot_is_an_error(rule: Vote) -> None:
    with pytest.raises(InferenceError, match="away"):
        rule([FAILED])
    with pytest.raises(InferenceError, match="no ballots"):
        rule([])


BALLOT = st.builds(
    lambda answer, confidence, weight, ranking, error: Ballot(
        member="", answer=None if error else answer, confidence=confidence, weight=weight,
        ranking=() if error or answer is None else tuple(ranking), error=error
    ),
    st.sampled_from(["a", "b", "c", None]), st.one_of(st.none(), st.floats(0, 1)), st.sampled_from([0.5, 1.0, 2.0]),
    st.lists(st.sampled_from("abcd"), max_size=3), st.sampled_from(["", "", "", "failed"]),
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "__name__", type(rule).__name__))
@given(ballots=st.lists(BALLOT, min_size=1, max_size=7), order=st.randoms(use_true_random=False))
def test_order_does_not_matter(rule: Vote, ballots: list[Ballot], order: random.Random) -> None:
    named = [replace(ballot, member=f"m{i}") for i, ballot in enumerate(ballots)]
    if all(ballot.error for ballot in named):
        return
    shuffled = order.sample(named, len(named))
    one, other = rule(named), rule(shuffled)
    assert (one.answer, one.text, one.scores, one.tied, one.reason) == (other.answer, other.text, other.scores, other.tied, other.reason)
    assert one.agreement == other.agreement
    assert 0 <= one.agreement <= 1
    assert one.answer is None or one.answer in {answer for b in named for answer in (b.answer, *b.ranking)}


@given(ballots=st.lists(BALLOT, min_size=1, max_size=7), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_the_scale_of_weights_does_not_matter(ballots: list[Ballot], factor: float) -> None:
    named = [replace(ballot, member=f"m{i}") for i, ballot in enumerate(ballots)]
    if not all(ballot.error for ballot in named):
        scaled = weighted([replace(b, weight=b.weight * factor) for b in named])
        assert scaled.answer == weighted(named).answer
        assert scaled.agreement == pytest.approx(weighted(named).agreement)


def test_ties_are_drawn_evenly_and_can_be_repeated() -> None:
    wins = 0
    for question in range(400):
        ballots = [Ballot(member="a", answer="yes", text=f"yes {question}"), Ballot(member="b", answer="no", text="no")]
        found = majority(ballots, seed=3)
        assert found.tied == ("no", "yes")
        assert majority(ballots, seed=3).answer == found.answer
        wins += found.answer == "yes"
    assert 150 < wins < 250
    assert {majority(cast("yes", "no"), seed=seed).answer for seed in range(20)} == {"yes", "no"}


def test_the_text_is_the_most_confident_supporters() -> None:
    ballots = [
        Ballot(member="a", answer="4", text="four"),
        Ballot(member="b", answer="4", text="4.0", confidence=0.2),
        Ballot(member="c", answer="5", text="5"),
    ]
    assert majority(ballots).text == "4.0"
    assert majority([Ballot(member="a", answer="4", text="four")]).text == "four"
    assert majority([Ballot(member="a", answer="4")]).text == "4"


def test_weighted_uses_weights() -> None:
    ballots = [replace(b, weight=w) for b, w in zip(cast("a", "b", "b"), (0.9, 0.6, 0.5), strict=True)]
    assert weighted(ballots).answer == "b"
    assert weighted(ballots).scores == {"b": 1.1, "a": 0.9}
    assert weighted([replace(b, weight=0.0) for b in cast("a", "b")]).answer is None


def test_plurality_abstains() -> None:
    assert plurality(cast("a", "a", "b")).answer == "a"
    assert plurality(cast("a", "b")).reason == "2 answers are tied"
    assert "not above 0.5" in plurality(cast("a", "a", "b", None)).reason
    assert plurality(cast(None)).strategy == "plurality"
    with pytest.raises(ConfigError, match="least share"):
        plurality(cast("a"), least=1.0)


def test_unanimous_counts_all_that_were_asked() -> None:
    assert unanimous(cast("a", "a")).answer == "a"
    assert unanimous(cast("4", "5", "4")).answer is None
    assert unanimous([*cast("a", "a"), FAILED]).answer is None
    assert unanimous(cast("a", None)).reason == "1 different answers, 1 abstained, 0 failed of 2 asked"


def test_best_confidence_takes_no_unknown_for_a_number() -> None:
    ballots = [replace(b, confidence=c) for b, c in zip(cast("a", "b", "c", "b"), (0.6, 0.9, None, None), strict=True)]
    found = best_confidence(ballots)
    assert (found.answer, found.agreement) == ("b", 0.5)
    assert best_confidence(cast("a", "b")).answer is None


def test_borda_and_runoff() -> None:
    # the text-book case: A wins the first places, B the points, and C's ballots decide the run-off
    ballots = ranked(*["ABC"] * 7, *["BCA"] * 5, *["CBA"] * 4)
    assert borda(ballots).answer == "B"
    assert instant_runoff(ballots).answer == "B"
    assert instant_runoff(ballots).scores == {"B": 9.0, "A": 7.0}
    assert majority(ballots).answer == "A"
    assert borda(cast("x", "x")).agreement == 1.0
    assert borda(ranked("AB", "A")).scores == {"A": 2.0, "B": 0.0}
    assert instant_runoff(cast(None, None)).answer is None
    assert set(instant_runoff(ranked("A", "B")).tied) == {"A", "B"}


def exact_accuracy(rule: Vote, accuracies: Sequence[float]) -> float:
    """Of independent members on yes/no questions, over all outcomes; a tie counts one half."""
    total = 0.0
    for right in itertools.product((True, False), repeat=len(accuracies)):
        chance = 1.0
        for ok, p in zip(right, accuracies, strict=True):
            chance *= p if ok else 1 - p
        found = rule(cast(*("yes" if ok else "no" for ok in right)))
        total += chance * (0.5 if found.tied else found.answer == "yes")
    return total


@pytest.mark.parametrize(
    ("accuracies", "heads", "best"),
    [([0.85] * 3, 0.93925, 0.93925), ([0.85] * 5, 0.97339, 0.97339), ([0.9, 0.6, 0.6, 0.6, 0.6], 0.78624, 0.9), ([0.95, 0.7, 0.7, 0.7, 0.7], 0.90307, 0.95431),
     ([0.8, 0.75, 0.7, 0.65, 0.6], 0.8401, 0.8537), ([0.9, *[0.55] * 6], 0.71441, 0.9), ([0.4, 0.9, 0.9], 0.882, 0.918)],
)  # fmt: skip
def test_log_odds_are_optimal(accuracies: list[float], heads: float, best: float) -> None:
    weights = LogOdds(accuracies={f"m{i}": p for i, p in enumerate(accuracies)})
    assert exact_accuracy(majority, accuracies) == pytest.approx(heads, abs=1e-5)
    assert exact_accuracy(weights, accuracies) == pytest.approx(best, abs=1e-5)


def test_log_odds_posterior() -> None:
    found = LogOdds(accuracies={"m0": 0.8, "m1": 0.8}, answers=5)(cast("a", "b"))
    assert found.probability == pytest.approx(16 / (16 + 16 + 3))
    assert LogOdds(accuracies={"m0": 0.1}, answers=2)(cast("a")).answer is None
    assert LogOdds(accuracies={"m0": 0.9})(cast(None)).answer is None
    assert LogOdds(accuracies={"x": 0.9}).weight("new") == LogOdds(accuracies={"x": 0.9}).weight("x")
    with pytest.raises(ConfigError, match="accuracies"):
        LogOdds(accuracies={})
    with pytest.raises(ConfigError, match="answers"):
        LogOdds(accuracies={"m0": 0.9}, answers=1)


SETTLING: list[Vote] = [majority, plurality, unanimous, functools.partial(majority, seed=5), LogOdds(accuracies={"m0": 0.9, "m1": 0.6, "m2": 0.7}, answers=3)]


@pytest.mark.parametrize("rule", SETTLING, ids=lambda rule: getattr(rule, "__name__", type(rule).__name__))
@given(ballots=st.lists(BALLOT, min_size=1, max_size=4), rest=st.lists(st.sampled_from(["a", "b", "c", "z", None]), min_size=1, max_size=3))
def test_what_is_settled_does_not_change(rule: Vote, ballots: list[Ballot], rest: list[str | None]) -> None:
    here = [replace(b, member=f"m{i}", weight=1.0, ranking=()) for i, b in enumerate(ballots)]
    to_come = [Ballot(member=f"m{len(here) + i}", answer=None) for i in range(len(rest))]
    if settled(rule, here, to_come):
        assert rule([*here, *(replace(b, answer=a) for b, a in zip(to_come, rest, strict=True))]).answer == rule(here).answer


def test_settled_early_and_not_too_early() -> None:
    waiting = [Ballot(member="m9", answer=None)]
    assert settled(majority, cast("a", "a", "a"), [*waiting, Ballot(member="m8", answer=None)])
    assert not settled(majority, cast("a", "a", "b"), waiting)
    assert settled(unanimous, cast("a", "b"), waiting)
    assert settled(borda, cast("a"), [])
    assert not settled(borda, cast("a", "a", "a"), waiting)
    assert not settled(majority, [FAILED], waiting)
    assert not settled(LogOdds(accuracies={"m0": 0.2, "m9": 0.9}), cast("a"), waiting)


def test_rules_have_names() -> None:
    assert votes.get("borda") is borda
    assert votes.get(majority) is majority
    with pytest.raises(UnknownNameError, match="majority"):
        votes.get("majorty")

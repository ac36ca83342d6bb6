"""Sentence by sentence: what `BySentence` asks a judge, and what it makes of the answers; the words alone are in test_validation."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.evaluation import BySentence, Inference, LexicalEntailment


class Drawn:
    """A judge whose verdict hangs on the pair alone and on nothing that it means."""

    name = "drawn"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Inference]:
        self.asked += pairs
        return [self.of(*pair) for pair in pairs]

    @staticmethod
    def of(premise: str, hypothesis: str) -> Inference:
        a, b, c = (1 + byte for byte in sha256(f"{premise}\0{hypothesis}".encode()).digest()[:3])
        return Inference(entailment=a / (a + b + c), neutral=b / (a + b + c), contradiction=c / (a + b + c))


sentence = st.from_regex(r"[A-Z][a-z]{2,5}( [a-z]{2,5}){0,2}\.", fullmatch=True)
sentences = st.lists(sentence, min_size=1, max_size=4)
pairs = st.lists(st.tuples(sentences, sentences), max_size=6)


@given(asked=pairs)
def test_shares_sum_to_one_and_keep_the_order(asked: list[tuple[list[str], list[str]]]) -> None:
    together = BySentence(Drawn())([(" ".join(premise), " ".join(hypothesis)) for premise, hypothesis in asked])
    assert len(together) == len(asked)
    for (premise, hypothesis), found in zip(asked, together, strict=True):
        verdicts = [min((Drawn.of(given, said) for given in premise), key=lambda one: one.neutral) for said in hypothesis]
        assert found.entailment == min(one.entailment for one in verdicts)
        assert found.contradiction == max(one.contradiction for one in verdicts)
        assert found.entailment + found.neutral + found.contradiction == pytest.approx(1, abs=1e-12)
        assert found.neutral >= 0


@given(premise=sentence, hypothesis=sentence)
def test_one_sentence_each_is_the_judges_own_answer(premise: str, hypothesis: str) -> None:
    inner = Drawn()
    assert BySentence(inner)([(premise, hypothesis)]) == [Drawn.of(premise, hypothesis)]
    assert inner.asked == [(premise, hypothesis)]


@given(premise=sentences, hypothesis=sentence)
def test_a_claim_of_one_sentence_gets_the_sentence_that_says_most(premise: list[str], hypothesis: str) -> None:
    (found,) = BySentence(Drawn())([(" ".join(premise), hypothesis)])
    assert found == min((Drawn.of(given, hypothesis) for given in premise), key=lambda one: one.neutral), "not a digit differs"


def test_two_sentences_of_a_premise_bear_out_two_of_a_claim() -> None:
    premise, claim = "Coffee delays sleep. Tea calms nerves. Milk helps nobody.", "Tea calms nerves. Coffee delays sleep."
    (found,) = BySentence(LexicalEntailment())([(premise, claim)])
    assert found == Inference(entailment=1.0, neutral=0.0, contradiction=0.0)
    (half,) = BySentence(LexicalEntailment())([(premise, "Tea calms nerves. Coffee does not delay sleep.")])
    assert half.entailment == 0.0
    assert half.contradiction == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("In S. cerevisiae, iron is toxic.", 1),
        ("Drug A vs. Drug B (E. coli) helps, e.g. TNF, as in Lee et al. 2009.", 1),
        ("It needs vitamin D. It is rare.", 2),
        ("it sleeps. it wakes! Does it? yes", 4),
        ("one\ntwo\n\nthree", 3),
        ("The share rose by 2.5 percent", 1),
        ("", 1),
    ],
)
def test_sentences_end_at_stops_that_end_them(text: str, parts: int) -> None:
    inner = Drawn()
    BySentence(inner)([("p", text), (text, "h")])
    assert len(inner.asked) == 2 * parts

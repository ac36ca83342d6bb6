"""Scorers on cases worked by hand, on properties, and on real data where it is there."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.errors import ConfigError, UnknownNameError
from crucible_framework.evaluation import (
    citation_accuracy,
    contains,
    exact_match,
    f1,
    label_accuracy,
    numeric,
    schema_compliance,
    scorers,
    stated_label,
    usual_scorers,
)
from crucible_framework.plugins import Registry
from crucible_framework.protocols import Scorer
from crucible_framework.records import Dataset, DatasetCard, Example, Json, Message, Score

from .samplers_for_tests import said

WORDS = st.lists(st.sampled_from(["the", "cat", "Cat", "sat.", "a", "mat", "mat", "an", ""]), max_size=8).map(" ".join)
TEXT = st.one_of(WORDS, st.text(max_size=60))
NAMES = ("citation_accuracy", "contains", "exact_match", "f1", "label_accuracy", "numeric", "schema_compliance")


def score(scorer: Scorer, completion: str, target: str, prompt: str | tuple[Message, ...] = "p", **meta: Json) -> Score:
    return scorer(Example(id="e", prompt=prompt, target=target, meta=meta), said(completion))


def value(scorer: Scorer, completion: str, target: str, prompt: str = "p", **meta: Json) -> float | None:
    return score(scorer, completion, target, prompt, **meta).value


def test_the_registry_knows_them() -> None:
    assert set(NAMES) <= set(scorers.names())
    assert [scorers.get(name) for name in NAMES] == [citation_accuracy, contains, exact_match, f1, label_accuracy, numeric, schema_compliance]
    with pytest.raises(UnknownNameError, match="Did you mean 'exact_match'"):
        scorers.get("exakt_match")
    with pytest.raises(ConfigError, match="exists already"):
        scorers.add("f1", contains)


def test_a_scorer_of_ones_own_is_one_line() -> None:
    registry: Registry[Scorer] = Registry("scorer", {})

    @registry.register("brief")
    def brief(example: Example, completion: object) -> Score:
        return Score(name="brief", value=1.0)

    assert registry.get("brief") is brief


@given(TEXT, TEXT)
def test_every_score_lies_in_the_unit_interval_and_says_its_name(completion: str, target: str) -> None:
    for name in NAMES:
        found = score(scorers.get(name), completion, target)
        assert found.name == name
        assert found.value is None or 0 <= found.value <= 1
        assert found == score(scorers.get(name), completion, target)


@given(TEXT)
def test_the_target_itself_is_right(text: str) -> None:
    assert value(exact_match, text, text) == 1
    assert value(f1, text, text) == 1
    assert value(contains, text, text) in (1, None)
    assert value(numeric, text, text) in (1, None)
    assert value(exact_match, f"  {text}\n", text) == 1


# ---------------------------------------------------------------------------------------------------------------- text
def test_exact_match_counts_case_and_marks_but_not_white_space() -> None:
    assert value(exact_match, "a  b\nc", "a b c") == 1
    assert value(exact_match, "A b c", "a b c") == 0
    assert value(exact_match, "a b c.", "a b c") == 0
    assert value(exact_match, "cafe\u0301", "caf\u00e9") == 1


@pytest.mark.parametrize(
    ("completion", "target", "expected"),
    [
        ("It is Paris.", "paris", 1),
        ("Parisian", "Paris", 0),
        ("x+y=2", "+y", 1),
        ("anything", "", None),
        ("the\nEiffel  Tower", "Eiffel Tower", 1),
        ("a Straße", "STRASSE", 1),
    ],
)
def test_contains(completion: str, target: str, expected: float | None) -> None:
    assert value(contains, completion, target) == expected


def squad(prediction: str, truth: str) -> float:
    """The official script's steps, written again: lower, punctuation, articles, white space; precision and recall."""

    def tokens(text: str) -> list[str]:
        text = re.sub(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]", "", text.lower())
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    left, right = tokens(prediction), tokens(truth)
    if not left or not right:
        return float(left == right)
    same = sum((Counter(left) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(left), same / len(right)
    return 2 * precision * recall / (precision + recall)


@given(TEXT, TEXT)
def test_f1_is_squads_and_symmetric(left: str, right: str) -> None:
    assert value(f1, left, right) == pytest.approx(squad(left, right))
    assert value(f1, left, right) == value(f1, right, left)


def test_f1_by_hand() -> None:
    assert value(f1, "The cat sat.", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert value(f1, "the", "an") == 1  # nothing is left of either
    assert value(f1, "", "cat") == 0


# ------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("completion", "target", "expected"),
    [
        ("The answer is 18.", "#### 18", 1),
        ("16 - 3 - 4 = 9, and 9 * 2 = $18", "#### 18", 1),
        ("18\n\nQuestion: another with 99", "#### 18", 0),
        ("#### 18\n\nQuestion: another with 99", "#### 18", 1),
        ("It is #### then 18", "#### 18", 1),
        ("####\n18", "#### 18", 1),
        ("#### none\n5 and 7", "7", 1),
        ("3,5", "5", 0),
        ("$70,000.00", "#### 70000", 1),
        ("-5", "5", 0),
        ("−5", "-5", 1),
        ("-$5", "-5", 1),
        ("Answer - 5", "5", 1),
        ("3.5", "35", 0),
        (".5", "0.5", 1),
        ("1.5e3", "1500", 1),
        ("12%", "12", 1),
        ("12%", "0.12", 1),
        ("12\\%", "0.12", 1),
        ("0.12", "12%", 1),
        ("12%", "12%", 1),
        ("12%", "0.12%", 0),
        ("Yes,18", "18", 1),
        ("so...18", "18", 1),
        ("x5 and v1.2", "5", 0),
        ("\\boxed{42}", "42", 1),
        ("range 5-10", "10", 1),
        ("none", "7", 0),
        ("7", "none", None),
        ("1234567890123456789", "1234567890123456789", 1),
    ],
)
def test_numeric(completion: str, target: str, expected: float | None) -> None:
    assert value(numeric, completion, target) == expected


def test_numeric_says_what_it_read() -> None:
    assert score(numeric, "so 1,234.5%", "1").detail == "1234.5%"
    assert score(numeric, "words", "1").detail == "no number"
    assert score(numeric, "1", "words").detail == "the target has no number"


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "The answer is {}.", "#### {:,}", "${:,}.00", "\\boxed{{{}}}", "= {}\n"]))
def test_numbers_are_read_in_any_usual_dress(number: int, frame: str) -> None:
    assert value(numeric, frame.format(number), f"#### {number}") == 1
    assert value(numeric, frame.format(number), f"#### {number + 1}") == 0


# -------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    ("completion", "target", "expected", "detail"),
    [
        ("The claim is supported.", "SUPPORT", 1, "SUPPORT"),
        ("The claim is supported.", "CONTRADICT", 0, "SUPPORT"),
        ("no idea", "SUPPORT", 0, "no label"),
        ("SUPPORT or CONTRADICT", "SUPPORT", 0, "ambiguous"),
        ("SUPPORT", "Berlin", None, "none of SUPPORT, CONTRADICT, NOT_ENOUGH_INFO"),
    ],
)
def test_label_accuracy(completion: str, target: str, expected: float | None, detail: str) -> None:
    found = score(label_accuracy, completion, target)
    assert found.value == expected
    assert detail in found.detail


def test_label_accuracy_with_labels_of_the_example() -> None:
    assert value(label_accuracy, "(B)", "B", labels=["A", "B"]) == 1
    assert value(label_accuracy, "yes", "no", labels=["yes", "no"]) == 0


# -------------------------------------------------------------------------------------------------------------- claims
GOOD = "CLAIM[c1]: One thing.\nCLAIM[c2] (Document 12): Another.\n\nRELATION: c2 supports c1"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD, ""),
        ("claim[C1]: x\nrelation: C1 refutes c1", ""),
        ("RELATION: c2 refutes c1\nCLAIM[c1]: x\nCLAIM[c2]: y", ""),
        ("", "no claim"),
        ("CLAIM[c2]: x", "the first claim is 'c2'"),
        ("CLAIM[c1]: x\nCLAIM[c1]: y", "'c1' comes twice"),
        ("CLAIM[c1]: x\nRELATION: c3 supports c1", "names 'c3'"),
        ("CLAIM[c1]: x\nRELATION: c1 implies c1", "neither CLAIM nor RELATION"),
        ("CLAIM[c1]:", "neither CLAIM nor RELATION: 'CLAIM[c1]:'"),
        ("Here they are:\nCLAIM[c1]: x", "neither CLAIM nor RELATION: 'Here"),
        ("CLAIM[c1]: x\nRELATION: c2 supp", "neither"),
    ],
)
def test_schema_compliance(text: str, fault: str) -> None:
    found = score(schema_compliance, text, GOOD)
    assert found.value == float(not fault)
    assert fault in found.detail


def test_citation_accuracy() -> None:
    prompt = "Passage:\nDocument 12: Title\n\nDocument 34: Other\n\nCLAIM[c#] (Document <doc_id>): <text>"
    assert value(citation_accuracy, GOOD, GOOD, prompt) == 1
    found = score(citation_accuracy, "(Document 12) (Document 99) (document 99)", GOOD, prompt)
    assert (found.value, found.detail) == (0.5, "not in the prompt: 99")
    assert score(citation_accuracy, "CLAIM[c1]: x", GOOD, prompt) == Score(name="citation_accuracy", value=0.0, detail="cites nothing, the target does")
    assert value(citation_accuracy, "CLAIM[c1]: x", "CLAIM[c1]: x", prompt) is None
    chat = (Message(role="system", content="s"), Message(role="user", content="Document 7: t"))
    assert score(citation_accuracy, "Document 7", GOOD, chat).value == 1


# ----------------------------------------------------------------------------------------------------------- real data
def test_the_targets_of_gsm8k_are_read(real_data: Path) -> None:
    rows = [json.loads(line) for line in (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        answer = row["answer"].rsplit("#### ", 1)[1]
        assert value(numeric, f"So the answer is {answer}.", row["answer"]) == 1
        assert value(numeric, row["answer"], answer) == 1
        assert value(numeric, f"{answer}1", row["answer"]) == 0
    assert len(rows) == 1319


def test_the_targets_of_scifact_follow_the_layout_and_cite_what_is_there(real_data: Path) -> None:
    rows = [json.loads(line) for line in (real_data / "scifact" / "scifact_claim_extractor_clean.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert score(schema_compliance, row["completion"], row["completion"]).detail == ""
        assert value(citation_accuracy, row["completion"], row["completion"], row["prompt"]) == 1
        invented = row["completion"].replace("(Document ", "(Document 9")
        assert value(citation_accuracy, invented, row["completion"], row["prompt"]) == 0
    assert len(rows) == 505


def test_no_label_is_read_out_of_a_question_of_scifact(real_data: Path) -> None:
    """The verification prompt, echoed, is no answer."""
    for line in (real_data / "scifact" / "claims_dev.jsonl").read_text(encoding="utf-8").splitlines():
        claim = json.loads(line)["claim"]
        echo = f"Claim: {claim}\n\nDoes the passage support the claim? Answer with one of: SUPPORT, CONTRADICT, NOT_ENOUGH_INFO."
        if not re.search(r"support|contradict|refut", claim, re.IGNORECASE):
            assert stated_label(echo)[0] is None, claim


def test_usual_scorers_depend_on_the_task() -> None:
    card = DatasetCard(name="x", split="dev", task="extract", rows=1, sha256="", licence="", source="")
    rows = Dataset(examples=(Example(id="a", prompt="p", target="CLAIM[c1]: x"),), card=card)
    asked = usual_scorers(rows)
    assert set(asked) <= set(scorers.names())
    assert {"schema_compliance", "invented_documents", "cyclic"} <= set(asked)
    assert usual_scorers(replace(rows, card=replace(card, task="verify"))) == ("label_accuracy",)

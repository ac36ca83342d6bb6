"""Four-stage validation: each outcome of each stage, invented ids, the antagonist's thresholds, scorers in `evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.data import load_dataset
from crucible_framework.errors import ConfigError
from crucible_framework.evaluation import (
    AntagonistThresholds,
    BySentence,
    Inference,
    IssueKind,
    LexicalEntailment,
    LexicalSimilarity,
    Outcome,
    Severity,
    Signals,
    Thresholds,
    attack,
    chirality,
    evaluate,
    format_claims,
    invented_documents,
    parse_claims,
    scorers,
    severity_of,
    summarise_issues,
    validate,
    validation_lexical,
    validation_scorers,
)
from crucible_framework.evaluation.validation import passages
from crucible_framework.records import Example, Message

from .samplers_for_tests import Scripted, dataset, said

PROMPT = (
    "Passage:\nDocument 11: Coffee and sleep\n\nCoffee delays sleep by forty minutes. Tea does not delay sleep.\n\n"
    "Document 12: Milk\n\nWarm milk has no effect on sleep.\n\nTask:\n1. Restate as CLAIM[c1].\n"
)
TARGET = "CLAIM[c1]: Coffee delays sleep.\nCLAIM[c2] (Document 11): Coffee delays sleep by forty minutes.\nRELATION: c2 supports c1"
EXAMPLE = Example(id="coffee", prompt=PROMPT, target=TARGET)
LOOSE = Thresholds(entailment=0.5, similarity=0.5)
ALL = (Outcome.PASSED,) * 4


def outcomes(text: str, example: Example = EXAMPLE, thresholds: Thresholds = LOOSE) -> tuple[Outcome, ...]:
    return tuple(stage.outcome for stage in validate(example, text, thresholds=thresholds).stages)


def test_documents_of_a_prompt_end_where_the_next_or_the_task_begins() -> None:
    assert passages(PROMPT) == {
        "11": "Coffee and sleep\n\nCoffee delays sleep by forty minutes. Tea does not delay sleep.",
        "12": "Milk\n\nWarm milk has no effect on sleep.",
    }
    assert passages("see Document 3: inline") == {}


def test_the_target_itself_passes_every_stage() -> None:
    found = validate(EXAMPLE, TARGET)
    assert [stage.outcome for stage in found.stages] == list(ALL)
    assert found.passed
    assert (found.invented, found.missing) == ((), ())
    assert {stage.judge for stage in found.stages} == {"", "lexical-baseline"}, "a baseline says that it is one"
    assert attack(found.signals) == ()
    chat = dataclasses.replace(EXAMPLE, prompt=(Message(role="system", content="Extract."), Message(role="user", content=PROMPT)))
    assert validate(chat, TARGET).passed


def test_garbage_beside_valid_claims_is_counted_and_the_claims_still_judged() -> None:
    found = validate(EXAMPLE, f"Sure, here you are:\n{TARGET}")
    assert [stage.outcome for stage in found.stages] == [Outcome.FAILED, *ALL[1:]]
    assert found["schema"].value == 0.75
    assert found["schema"].checks[0].subject == "line 1"
    assert not found.passed
    assert outcomes(f"Sure, here you are:\n{TARGET}", thresholds=dataclasses.replace(LOOSE, schema=0.7)) == ALL
    first = TARGET.replace("c1", "c7")
    assert outcomes(first, thresholds=dataclasses.replace(LOOSE, schema=0.0))[0] is Outcome.FAILED, "a wrong first claim is of no line, and always fails"


def test_nothing_said_fails_and_skips_what_it_leaves_nothing_for() -> None:
    assert outcomes("") == (Outcome.FAILED, Outcome.FAILED, Outcome.SKIPPED, Outcome.SKIPPED)
    assert outcomes("I do not know.") == (Outcome.FAILED, Outcome.FAILED, Outcome.SKIPPED, Outcome.SKIPPED)
    nothing = Example(id="n", prompt="Say something.", target="")
    assert outcomes("CLAIM[c1]: It rains.", nothing) == (Outcome.PASSED, *(Outcome.NOT_APPLICABLE,) * 3)
    assert validate(nothing, "CLAIM[c1]: It rains.").passed


@given(st.floats(0, 1), st.integers(0, 5))
def test_an_invented_document_fails_whatever_the_threshold_and_the_company(threshold: float, others: int) -> None:
    text = TARGET + "".join(f"\nCLAIM[c{i + 4}] (Document 12): Warm milk." for i in range(others)) + "\nCLAIM[c3] (Document 99): Coffee delays sleep."
    found = validate(EXAMPLE, text, thresholds=Thresholds(citation=threshold))
    assert found["citation"].outcome is Outcome.FAILED
    assert found.invented == ("99",)
    assert found["entailment"].outcome is Outcome.FAILED, "a document that is not there bears nothing out"
    assert not found.passed
    assert IssueKind.CITATION_INVALID in {issue.kind for issue in attack(found.signals)}
    assert invented_documents(EXAMPLE, said(text)).value == 1


def test_an_invented_id_in_the_words_of_a_claim_counts_too() -> None:
    text = TARGET.replace("Coffee delays sleep by forty minutes.", "As Document 77 says, coffee delays sleep by forty minutes.")
    assert validate(EXAMPLE, text).invented == ("77",)


def test_documents_that_ought_to_be_cited_are_missed() -> None:
    found = validate(EXAMPLE, "CLAIM[c1]: Coffee delays sleep.")
    assert (found["citation"].outcome, found["citation"].value, found.missing) == (Outcome.FAILED, 0.0, ("11",))
    assert attack(found.signals)[-1].kind is IssueKind.NOT_CHECKED
    other = TARGET.replace("Document 11", "Document 12")
    assert validate(EXAMPLE, other)["citation"].value == 0.5
    assert outcomes(other, thresholds=dataclasses.replace(LOOSE, citation=0.5))[1] is Outcome.PASSED


def test_entailment_looks_at_claims_and_relations_and_refutation_asks_for_contradiction() -> None:
    refuted = "CLAIM[c1]: Tea delays sleep.\nCLAIM[c2] (Document 11): Tea does not delay sleep.\nRELATION: c2 refutes c1"
    stage = validate(EXAMPLE, refuted, thresholds=LOOSE, relations=True)["entailment"]
    assert [check.subject for check in stage.checks] == ["c2", "c2 refutes c1"]
    assert stage.outcome is Outcome.PASSED
    stage = validate(EXAMPLE, refuted.replace("refutes", "supports"), thresholds=LOOSE, relations=True)["entailment"]
    assert [check.passed for check in stage.checks] == [True, False]
    assert stage.outcome is Outcome.FAILED, "one bad relation is not hidden by good claims"
    assert stage.value == 0.5
    assert [check.subject for check in validate(EXAMPLE, refuted)["entailment"].checks] == ["c2"], "word counts are not asked about relations"
    loop = validate(EXAMPLE, "CLAIM[c1]: Coffee delays sleep.\nRELATION: c1 supports c1\nRELATION: c1 supports c9", relations=True)
    assert loop["entailment"].outcome is Outcome.NOT_APPLICABLE, "nothing bears itself out"
    assert attack(loop.signals)[0].kind is IssueKind.CIRCULAR_SUPPORT


def test_similarity_finds_claims_that_are_missing_in_any_order() -> None:
    swapped = "CLAIM[c1]: Coffee delays sleep by forty minutes.\nCLAIM[c2] (Document 11): Coffee delays sleep.\nRELATION: c2 supports c1"
    assert validate(EXAMPLE, swapped)["similarity"].value == 1
    stage = validate(EXAMPLE, "CLAIM[c1]: Something else entirely.")["similarity"]
    assert stage.outcome is Outcome.FAILED
    assert [check.subject for check in stage.checks] == ["target c1", "target c2"]


def test_real_answers_pass_and_those_of_another_paper_do_not(real_data: Path) -> None:
    """Gold SciFact answers, and the same with the evidence sentences of the next example under this one's document."""
    rows = load_dataset("scifact", split="dev", task="extract", data=real_data).examples
    right = [validate(row, row.target, thresholds=LOOSE) for row in rows]
    assert sum(found.passed for found in right) >= 0.9 * len(rows)
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        if row.meta["document"] == other.meta["document"]:
            continue
        claims, theirs = parse_claims(row.target), parse_claims(other.target)
        swapped = [dataclasses.replace(claim, text=theirs.claims[-1].text) if claim.document else claim for claim in claims.claims]
        found = validate(row, format_claims(dataclasses.replace(claims, claims=tuple(swapped))), thresholds=LOOSE)
        assert found["schema"].outcome is found["citation"].outcome is Outcome.PASSED
        assert found["entailment"].outcome is Outcome.FAILED


# --------------------------------------------------------------------------------------------------------------- judges
class Fixed:
    """A judge with one answer, which keeps what it was asked."""

    name = "fixed"

    def __init__(self, answer: Inference, drop: int = 0) -> None:
        self.answer, self.drop, self.asked = answer, drop, list[tuple[str, str]]()

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Inference]:
        self.asked += pairs
        return [self.answer] * (len(pairs) - self.drop)


def test_judges_can_be_anything_that_fits() -> None:
    judge = Fixed(Inference(entailment=0.8, neutral=0.1, contradiction=0.1))
    found = validate(EXAMPLE, TARGET, entailment=judge, similarity=lambda_similarity(0.69))
    assert judge.asked[0] == (passages(PROMPT)["11"], "Coffee delays sleep by forty minutes.")
    assert (found["entailment"].outcome, found["entailment"].judge) == (Outcome.PASSED, "fixed")
    assert found["similarity"].outcome is Outcome.FAILED
    with pytest.raises(ConfigError, match="'fixed' gave 1 answers to 2 pairs"):
        validate(EXAMPLE, TARGET, entailment=Fixed(judge.answer, drop=1))
    with pytest.raises(ConfigError, match="No stage is called"):
        found["paraphrase"]
    with pytest.raises(ConfigError, match=r"Thresholds.entailment is 75"):
        Thresholds(entailment=75)


def lambda_similarity(value: float) -> LexicalSimilarity:
    class Constant(LexicalSimilarity):
        def __call__(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]:
            return [value] * len(pairs)

    return Constant()


@given(st.text(max_size=60), st.text(max_size=60))
def test_baselines_stay_in_their_range(a: str, b: str) -> None:
    (found,) = LexicalEntailment()([(a, b)])
    assert found.entailment + found.neutral + found.contradiction == pytest.approx(1)
    assert min(found.entailment, found.neutral, found.contradiction) >= 0
    (same, other, back) = LexicalSimilarity()([(a, a), (a, b), (b, a)])
    assert (same, 0 <= other <= 1) == (1, True)
    assert other == back


def test_by_sentence_takes_the_sentence_that_says_most() -> None:
    class Length:
        name = "length"

        def __call__(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Inference]:
            return [Inference(entailment=len(p) / 100, neutral=1 - len(p) / 100, contradiction=0) for p, _ in pairs]

    judge = BySentence(Length())
    assert judge.name == "length, by sentence"
    found = judge([("Short. A longer sentence.\nMid one", "h"), ("", "h")])
    assert [round(100 * one.entailment) for one in found] == [len("A longer sentence."), 0]
    assert judge([]) == []


# ----------------------------------------------------------------------------------------------------------- antagonist
CLEAN = Signals(citation_valid=True, entailment=1.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"chirality": 0.55}, [("polarity_contradiction", Severity.MEDIUM)]),
        ({"chirality": 0.54}, []),
        ({"chirality": 0.65, "overlap": 0.5}, [("polarity_contradiction", Severity.HIGH)]),
        ({"chirality": 0.65, "overlap": 0.1}, [("polarity_contradiction", Severity.MEDIUM)]),
        ({"entailment": 0.49}, [("weak_entailment", Severity.MEDIUM)]),
        ({"entailment": 0.5}, []),
        ({"entailment": float("nan")}, [("weak_entailment", Severity.MEDIUM)]),
        ({"entailment": None}, [("not_checked", Severity.LOW)]),
        ({"citation_valid": None}, []),
        ({"polarity_conflict": True}, [("polarity_conflict", Severity.HIGH)]),
        ({"circles": 2, "faults": 1}, [("circular_support", Severity.HIGH), ("schema_fault", Severity.MEDIUM)]),
        (
            {"citation_valid": False, "entailment": 0.0, "chirality": 0.6546, "overlap": 0.6},
            [("citation_invalid", Severity.HIGH), ("polarity_contradiction", Severity.HIGH), ("weak_entailment", Severity.MEDIUM)],
        ),
    ],
)
def test_issues_and_their_severity(changes: dict[str, float | None], expected: list[tuple[str, Severity]]) -> None:
    issues = attack(dataclasses.replace(CLEAN, **changes))  # type: ignore[arg-type]
    assert [(issue.kind.value, issue.severity) for issue in issues] == expected
    assert severity_of(issues) == (expected[0][1] if expected else None)


def test_thresholds_of_the_antagonist_are_data_and_are_checked() -> None:
    assert attack(dataclasses.replace(CLEAN, entailment=0.6), AntagonistThresholds(entailment=0.7))[0].kind is IssueKind.WEAK_ENTAILMENT
    with pytest.raises(ConfigError, match="entailment is 2"):
        AntagonistThresholds(entailment=2)
    with pytest.raises(ConfigError, match="at least chirality"):
        AntagonistThresholds(chirality=0.7)


def test_a_summary_counts_completions_once_and_issues_each() -> None:
    reports = (
        [attack(dataclasses.replace(CLEAN, entailment=0.1))] * 44 + [attack(dataclasses.replace(CLEAN, citation_valid=False, entailment=0.1))] * 2 + [()] * 4
    )
    found = summarise_issues(reports)
    assert (found.total, found.flagged, found.flag_rate) == (50, 46, 0.92)
    assert found.severities == {"medium": 44, "high": 2}
    assert found.kinds == {"citation_invalid": 2, "weak_entailment": 46}
    assert summarise_issues([]).flag_rate is None


# -------------------------------------------------------------------------------------------------------------- scorers
def test_scorers_run_in_evaluate_and_judge_each_answer_once() -> None:
    rows = dataset([dataclasses.replace(EXAMPLE, id=f"e{i}", prompt=f"{PROMPT}{i}", meta={"document": str(i)}) for i in range(3)])
    answers = {str(rows[0].prompt): TARGET, str(rows[1].prompt): "nonsense", str(rows[2].prompt): TARGET.replace("11", "99")}
    judge = Fixed(Inference(entailment=0.9, neutral=0.1, contradiction=0.0))
    found = evaluate(Scripted(answers), rows, [*validation_scorers(entailment=judge), "validation_lexical", "invented_documents", "cyclic", "chirality"])
    scores = [item.scores for item in found.items]
    assert [row["validation"] for row in scores] == [1, 0, 0]
    assert [row["entailment"] for row in scores] == [pytest.approx(0.9), 0.0, pytest.approx(0.45)], "skipped counts as 0"
    assert [row["schema"] for row in scores] == [1, 0, 1]
    assert [row["citation"] for row in scores] == [1, 0, 0]
    assert [row["invented_documents"] for row in scores] == [0, 0, 1]
    assert [row["validation_lexical"] for row in scores] == [1, 0, 0]
    assert [row["cyclic"] for row in scores] == [0, None, 0]
    assert scores[0]["chirality"] == pytest.approx(0, abs=1e-6)
    assert scores[1]["chirality"] is None
    assert len(judge.asked) == 3, "two questions about the first answer, one about the third, asked once for all scorers"
    assert 0 < found["validation"].value < 1


def test_details_say_what_failed_and_who_judged() -> None:
    by_name = {score.name: score for score in (scorer(EXAMPLE, said(TARGET.replace("11", "99"))) for scorer in validation_scorers())}
    assert by_name["citation"].detail == "failed: Document 99: not in the prompt; Document 11: not cited"
    assert by_name["entailment"].detail.startswith("failed (lexical-baseline): c2: the prompt has no text")
    assert by_name["validation"].detail == "schema passed, citation failed, entailment failed, similarity passed"
    assert {scorers.get(name) for name in ("chirality", "invented_documents", "validation_lexical")} == {chirality, invented_documents, validation_lexical}

"""Are claims really borne out: four stages, schema, citation, entailment and similarity.

Each stage ends in an `Outcome`, a value and the checks that it made; thresholds are data. Entailment and similarity are asked of whatever fits
the contracts of `entailment.py`; without any, of word counts that are labelled as baselines. This file does not know models or files.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from ..errors import ConfigError
from ..protocols import Scorer
from ..records import Completion, Example, Score, record
from .antagonist import Signals, lowest
from .claims import Claim, Claims, chirality_score, cited_documents, fisher_rao, parse_claims, topology, word_distribution
from .entailment import Entailment, Inference, LexicalEntailment, LexicalSimilarity, Similarity

__all__ = [
    "STAGES",
    "Check",
    "Outcome",
    "Stage",
    "Thresholds",
    "Validation",
    "chirality",
    "invented_documents",
    "passages",
    "validate",
    "validation_lexical",
    "validation_scorers",
]

T = TypeVar("T")
StageName = Literal["schema", "citation", "entailment", "similarity"]
_STAGE_NAMES: tuple[StageName, ...] = ("schema", "citation", "entailment", "similarity")
STAGES: tuple[str, ...] = _STAGE_NAMES
NOT_IN_PROMPT = "not in the prompt"
_PASSAGE = re.compile(r"^Document\s+#?([0-9]+)\s*:\s*", re.MULTILINE | re.IGNORECASE)


class Outcome(enum.StrEnum):
    """How a stage ended. SKIPPED: there was something to check, but an earlier failure left nothing to check it on."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    NOT_APPLICABLE = "not_applicable"


@record
class Thresholds:
    """What each stage asks at least, in [0, 1].

    Attributes:
        schema: share of lines that follow the layout; any fault that is of no line fails too.
        citation: right ids over all ids that are cited or ought to be. An invented id fails whatever this is.
        entailment: of each claim by its document (of each "refutes": contradiction).
        similarity: of each claim of the target to the nearest of the completion.
    """

    schema: float = 1.0
    citation: float = 1.0
    entailment: float = 0.75
    similarity: float = 0.70

    def __post_init__(self) -> None:
        for name in STAGES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"Thresholds.{name} is {getattr(self, name)!r}; expected a number in [0, 1].")


@record
class Check:
    """One thing that a stage looked at: a line, a document id, a claim or a relation."""

    subject: str
    score: float
    passed: bool
    detail: str = ""


@record
class Stage:
    """One stage's end. `value` is None where nothing was checked, else in [0, 1]: of entailment and similarity the mean over the checks.

    A stage passes where every check does, so that one bad claim is not hidden by good ones; `judge` names what gave the scores.
    """

    name: StageName
    outcome: Outcome
    value: float | None = None
    checks: tuple[Check, ...] = ()
    judge: str = ""


@record
class Validation:
    """All four stages of one completion, and what was parsed.

    Attributes:
        claims: what the completion says.
        stages: in order.
        invented: document ids that are cited and not in the prompt.
        missing: document ids that the target cites and the completion does not.
        signals: what the antagonist looks at.
    """

    claims: Claims
    stages: tuple[Stage, ...]
    invented: tuple[str, ...]
    missing: tuple[str, ...]
    signals: Signals

    @property
    def passed(self) -> bool:
        """Whether every stage passed or had nothing to look at."""
        return all(stage.outcome in (Outcome.PASSED, Outcome.NOT_APPLICABLE) for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"No stage is called {name!r}; expected one of {', '.join(STAGES)}.")


# --------------------------------------------------------------------------------------------------------------- stages
def passages(prompt: str) -> dict[str, str]:
    """The texts of the documents of a prompt by id: from "Document 12:" at the start of a line to the next one, or to a line "Task:"."""
    found: dict[str, str] = {}
    starts = list(_PASSAGE.finditer(prompt))
    ends = [*(start.start() for start in starts[1:]), len(prompt)]
    for start, end in zip(starts, ends, strict=False):
        text = prompt[start.end() : end]
        found[start[1]] = re.split(r"^Task:", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
    return found


def _prompt(example: Example) -> str:
    return example.prompt if isinstance(example.prompt, str) else "\n\n".join(message.content for message in example.prompt)


def _schema(claims: Claims, threshold: float) -> Stage:
    bad = {fault.line for fault in claims.faults if fault.line}
    share = (claims.lines - len(bad)) / claims.lines if claims.lines else 0.0
    whole = all(fault.line for fault in claims.faults)
    checks = tuple(Check(subject=f"line {fault.line}" if fault.line else "text", score=0.0, passed=False, detail=fault.text) for fault in claims.faults)
    return Stage(name="schema", outcome=Outcome.PASSED if whole and share >= threshold else Outcome.FAILED, value=share, checks=checks)


def _citation(cited: Sequence[str], known: Iterable[str], wanted: Sequence[str], threshold: float) -> Stage:
    have = set(known)
    every = tuple(dict.fromkeys([*cited, *wanted]))
    if not every:
        return Stage(name="citation", outcome=Outcome.NOT_APPLICABLE)
    checks: list[Check] = []
    for name in every:
        right = name in cited and name in have
        detail = "" if right else NOT_IN_PROMPT if name in cited else "not cited"
        checks.append(Check(subject=f"Document {name}", score=float(right), passed=right, detail=detail))
    share = sum(check.passed for check in checks) / len(checks)
    invented = any(name not in have for name in cited)
    outcome = Outcome.FAILED if invented or share < threshold else Outcome.PASSED
    return Stage(name="citation", outcome=outcome, value=share, checks=tuple(checks))


def _questions(claims: Claims, texts: dict[str, str], relations: bool) -> list[tuple[str, str, str, bool]]:
    """(subject, premise, hypothesis, whether contradiction is asked) for each claim with a document and, where asked, each relation."""
    known = claims.by_id
    found = [(claim.id, texts.get(claim.document or "", ""), claim.text, False) for claim in claims.claims if claim.document is not None]
    for link in claims.relations if relations else ():
        if link.source in known and link.target in known and link.source != link.target:
            subject = f"{link.source} {link.kind} {link.target}"
            found.append((subject, known[link.source].text, known[link.target].text, link.kind == "refutes"))
    return found


def _entailment(claims: Claims, texts: dict[str, str], judge: Entailment, threshold: float, relations: bool) -> Stage:
    asked = _questions(claims, texts, relations)
    if not asked:
        return Stage(name="entailment", outcome=Outcome.SKIPPED if not claims.claims else Outcome.NOT_APPLICABLE, judge=judge.name)
    there = [(premise, hypothesis) for _, premise, hypothesis, _ in asked if premise]
    answers = iter(_as_many(judge(there), there, judge.name) if there else ())
    checks: list[Check] = []
    for subject, premise, _, refutes in asked:
        if not premise:  # an invented document bears nothing out
            checks.append(Check(subject=subject, score=0.0, passed=False, detail="the prompt has no text of its document"))
            continue
        answer: Inference = next(answers)
        score = answer.contradiction if refutes else answer.entailment
        checks.append(Check(subject=subject, score=score, passed=score >= threshold))
    return _stage("entailment", checks, judge.name)


def _similarity(claims: Claims, target: Claims, judge: Similarity, threshold: float) -> Stage:
    if not target.claims:
        return Stage(name="similarity", outcome=Outcome.NOT_APPLICABLE, judge=judge.name)
    if not claims.claims:
        return Stage(name="similarity", outcome=Outcome.SKIPPED, judge=judge.name)
    pairs = [(said.text, wanted.text) for wanted in target.claims for said in claims.claims]
    scores = _as_many(judge(pairs), pairs, judge.name)
    checks: list[Check] = []
    for i, wanted in enumerate(target.claims):
        row = scores[i * len(claims.claims) : (i + 1) * len(claims.claims)]
        nearest = max(range(len(row)), key=row.__getitem__)
        score = min(1.0, max(0.0, row[nearest]))
        checks.append(Check(subject=f"target {wanted.id}", score=score, passed=score >= threshold, detail=f"nearest: {claims.claims[nearest].id}"))
    return _stage("similarity", checks, judge.name)


def _as_many(answers: Sequence[T], pairs: Sequence[tuple[str, str]], name: str) -> Sequence[T]:
    if len(answers) != len(pairs):
        raise ConfigError(f"The judge {name!r} gave {len(answers)} answers to {len(pairs)} pairs; expected one each, in order. Correct it.")
    return answers


def _stage(name: StageName, checks: Sequence[Check], judge: str) -> Stage:
    outcome = Outcome.PASSED if all(check.passed for check in checks) else Outcome.FAILED
    return Stage(name=name, outcome=outcome, value=math.fsum(check.score for check in checks) / len(checks), checks=tuple(checks), judge=judge)


def validate(
    example: Example,
    text: str,
    *,
    entailment: Entailment | None = None,
    similarity: Similarity | None = None,
    thresholds: Thresholds | None = None,
    relations: bool | None = None,
) -> Validation:
    """Validates the claims of a text against its example's prompt and target, all four stages even where one fails.

    1. schema: the layout of `claims.py`. Lines that do not fit fail the stage; the claims beside them go on.
    2. citation: ids that are cited anywhere in the text against those of the prompt ("Document 12: …") and of the target. An id that the prompt
       does not have always fails the stage and counts as 0, whatever else is right.
    3. entailment: every claim with a document from that document's text; "ck supports c1" as c1 from ck; "ck refutes c1" as their contradiction.
    4. similarity: for each claim of the target the nearest claim of the text.

    Args:
        example: its prompt holds the documents, its target the right claims ("" where none are known; then stage 4 does not apply).
        text: what a model said.
        entailment: a judge; None takes the word-count baseline, and the stage says so.
        similarity: likewise.
        thresholds: None takes the defaults, which suit NLI models and sentence embeddings; word counts need lower ones.
        relations: whether stage 3 asks about relations too; None asks where a judge is given. Of SciFact's own answers (321 of train and dev) the
            word counts, at 0.5, accept 99 % of the claims from their documents, but 24 % of "supports" and 4 % of "refutes".
    """
    limits, entails, alike = thresholds or Thresholds(), entailment or LexicalEntailment(), similarity or LexicalSimilarity()
    claims, target, texts = parse_claims(text), parse_claims(example.target), passages(_prompt(example))
    cited, wanted = cited_documents(text), cited_documents(example.target)
    known = {*texts, *cited_documents(_prompt(example))}
    stages = (
        _schema(claims, limits.schema),
        _citation(cited, known, wanted, limits.citation),
        _entailment(claims, texts, entails, limits.entailment, entailment is not None if relations is None else relations),
        _similarity(claims, target, alike, limits.similarity),
    )
    return Validation(
        claims=claims,
        stages=stages,
        invented=tuple(name for name in cited if name not in known),
        missing=tuple(name for name in wanted if name not in cited),
        signals=_signals(stages, claims, target, cited, wanted),
    )


def _text(claims: Iterable[Claim]) -> str:
    return " ".join(claim.text for claim in claims)


def _signals(stages: Sequence[Stage], claims: Claims, target: Claims, cited: Sequence[str], wanted: Sequence[str]) -> Signals:
    """What the antagonist looks at. Chirality is measured where both sides have words."""
    shape = topology(claims)
    said, right = word_distribution(_text(claims.claims)), word_distribution(_text(target.claims))
    overlap = len(set(cited).intersection(wanted)) / len(wanted) if wanted else None
    twist = None
    if said and right:
        twist = chirality_score(distance=fisher_rao(said, right), overlap=1.0 if overlap is None else overlap, conflict=bool(shape.conflicts))
    citation = next(stage for stage in stages if stage.name == "citation")
    entailment = next(stage for stage in stages if stage.name == "entailment")
    return Signals(
        citation_valid=None if not cited and not wanted else not any(check.detail == NOT_IN_PROMPT for check in citation.checks),
        entailment=lowest(check.score for check in entailment.checks),
        chirality=twist,
        overlap=overlap,
        polarity_conflict=bool(shape.conflicts),
        circles=len(shape.circles),
        faults=len(claims.faults),
    )


# -------------------------------------------------------------------------------------------------------------- scorers
def invented_documents(example: Example, completion: Completion) -> Score:
    """How many different document ids the completion cites that the prompt does not have: 0 is right, whatever else it cites."""
    known = cited_documents(_prompt(example))
    invented = [name for name in cited_documents(completion.text) if name not in known]
    return Score(name="invented_documents", value=float(len(invented)), detail=", ".join(invented))


def chirality(example: Example, completion: Completion) -> Score:
    """`chirality_score` of the completion's claims against the target's, by the Fisher–Rao distance of their words; None without either's."""
    signals = validate(example, completion.text).signals
    return Score(name="chirality", value=signals.chirality, detail="" if signals.chirality is not None else "no words to compare")


def _summary(validation: Validation) -> str:
    return ", ".join(f"{stage.name} {stage.outcome.value}" for stage in validation.stages)


def validation_lexical(example: Example, completion: Completion) -> Score:
    """1 where all four stages pass with the word-count baselines as judges and 0.5 as their threshold, else 0.

    A baseline, no judgement of meaning: relations are not looked at (see `validate`).
    """
    found = validate(example, completion.text, thresholds=Thresholds(entailment=0.5, similarity=0.5))
    return Score(name="validation_lexical", value=float(found.passed), detail=_summary(found))


def validation_scorers(
    *, entailment: Entailment | None = None, similarity: Similarity | None = None, thresholds: Thresholds | None = None, relations: bool | None = None
) -> tuple[Scorer, ...]:
    """Scorers "schema", "citation", "entailment" and "similarity" (each stage's value) and "validation" (1 where all pass), for `evaluate`.

    They share their work, so that each completion is judged once. A stage without a value scores None where it does not apply, and 0 where it was
    skipped. Args as of `validate`.
    """
    last: list[tuple[Example, str, Validation]] = []
    judges = ", ".join(judge.name for judge in (entailment or LexicalEntailment(), similarity or LexicalSimilarity()))
    told = f"({judges}; {thresholds or Thresholds()}, relations={relations})"  # the plan of an evaluation knows scorers by this

    def found(example: Example, text: str) -> Validation:
        for of, said, validation in last[:1]:
            if of is example and said == text:
                return validation
        new = validate(example, text, entailment=entailment, similarity=similarity, thresholds=thresholds, relations=relations)
        last[:] = [(example, text, new)]
        return new

    def of_stage(name: StageName) -> Scorer:
        def score(example: Example, completion: Completion) -> Score:
            stage = found(example, completion.text)[name]
            value = 0.0 if stage.outcome is Outcome.SKIPPED else stage.value
            bad = "; ".join(f"{check.subject}: {check.detail or f'{check.score:.3g}'}" for check in stage.checks if not check.passed)
            return Score(name=name, value=value, detail=f"{stage.outcome.value}{f' ({stage.judge})' if stage.judge else ''}{f': {bad}' if bad else ''}")

        score.__name__, score.__qualname__ = name, f"{name} {told}"
        return score

    def validation(example: Example, completion: Completion) -> Score:
        judged = found(example, completion.text)
        return Score(name="validation", value=float(judged.passed), detail=_summary(judged))

    validation.__qualname__ = f"validation {told}"
    return (*(of_stage(name) for name in _STAGE_NAMES), validation)

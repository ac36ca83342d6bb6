"""The antagonist: issues with a severity, from signals and thresholds. It looks for what is wrong and knows no models, files or texts."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from ..errors import ConfigError
from ..records import record

__all__ = ["AntagonistThresholds", "Issue", "IssueKind", "IssueSummary", "Severity", "Signals", "attack", "severity_of", "summarise_issues"]


class Severity(enum.IntEnum):
    """How bad an issue is; they compare."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3


class IssueKind(enum.StrEnum):
    """What can be wrong."""

    CITATION_INVALID = "citation_invalid"
    CIRCULAR_SUPPORT = "circular_support"
    POLARITY_CONFLICT = "polarity_conflict"
    POLARITY_CONTRADICTION = "polarity_contradiction"
    WEAK_ENTAILMENT = "weak_entailment"
    SCHEMA_FAULT = "schema_fault"
    NOT_CHECKED = "not_checked"


@record
class AntagonistThresholds:
    """From where on something is an issue.

    Attributes:
        chirality: from here on two accounts contradict (MEDIUM).
        chirality_high: from here on HIGH, where they also share evidence.
        overlap: the least share of common evidence for that.
        entailment: below it a claim is weak.
    """

    chirality: float = 0.55
    chirality_high: float = 0.65
    overlap: float = 0.2
    entailment: float = 0.5

    def __post_init__(self) -> None:
        for name in ("chirality", "chirality_high", "overlap", "entailment"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"AntagonistThresholds.{name} is {getattr(self, name)!r}; expected a number in [0, 1].")
        if self.chirality > self.chirality_high:
            raise ConfigError(f"AntagonistThresholds.chirality_high is {self.chirality_high!r}; expected at least chirality, {self.chirality!r}.")


@record
class Signals:
    """What is known of one completion. None means that it was not measured, which is an issue of its own where it could have been.

    Attributes:
        citation_valid: whether every cited id is in the prompt; None where nothing is cited or asked to be.
        entailment: of the weakest claim, in [0, 1].
        chirality: against the target's account, in [0, 1].
        overlap: share of the target's documents that are cited, in [0, 1].
        polarity_conflict: whether a claim is both supported and refuted.
        circles: sets of claims that support each other in a circle.
        faults: places that break the layout.
    """

    citation_valid: bool | None
    entailment: float | None
    chirality: float | None = None
    overlap: float | None = None
    polarity_conflict: bool = False
    circles: int = 0
    faults: int = 0


@record
class Issue:
    """One thing that is wrong."""

    kind: IssueKind
    severity: Severity
    detail: str


def attack(signals: Signals, thresholds: AntagonistThresholds | None = None) -> tuple[Issue, ...]:
    """The issues of one completion, gravest first; none where nothing was found, which proves nothing."""
    limits = thresholds or AntagonistThresholds()
    found: list[Issue] = []

    def add(kind: IssueKind, severity: Severity, detail: str) -> None:
        found.append(Issue(kind=kind, severity=severity, detail=detail))

    if signals.citation_valid is False:
        add(IssueKind.CITATION_INVALID, Severity.HIGH, "cites a document that the prompt does not have")
    if signals.circles:
        add(IssueKind.CIRCULAR_SUPPORT, Severity.HIGH, f"{signals.circles} set(s) of claims support each other in a circle")
    if signals.polarity_conflict:
        add(IssueKind.POLARITY_CONFLICT, Severity.HIGH, "a claim is both supported and refuted")
    if signals.chirality is not None and signals.chirality >= limits.chirality:
        grave = signals.chirality >= limits.chirality_high and (signals.overlap or 0.0) >= limits.overlap
        add(IssueKind.POLARITY_CONTRADICTION, Severity.HIGH if grave else Severity.MEDIUM, f"chirality {signals.chirality:.3g}")
    if signals.faults:
        add(IssueKind.SCHEMA_FAULT, Severity.MEDIUM, f"{signals.faults} place(s) break the layout")
    if signals.entailment is None:
        add(IssueKind.NOT_CHECKED, Severity.LOW, "no claim could be checked for entailment")
    elif not signals.entailment >= limits.entailment:
        add(IssueKind.WEAK_ENTAILMENT, Severity.MEDIUM, f"entailment {signals.entailment:.3g} is below {limits.entailment:g}")
    return tuple(sorted(found, key=lambda issue: -issue.severity))


def severity_of(issues: Iterable[Issue]) -> Severity | None:
    """The gravest severity, None without issues."""
    return max((issue.severity for issue in issues), default=None)


@record
class IssueSummary:
    """Issues over many completions: each completion counts once under its gravest severity, each issue under its kind."""

    total: int
    flagged: int
    flag_rate: float | None
    severities: dict[str, int]
    kinds: dict[str, int]


def summarise_issues(reports: Sequence[Sequence[Issue]]) -> IssueSummary:
    """Counts the issues of completions; the rate is None without completions."""
    gravest = [severity for issues in reports if (severity := severity_of(issues)) is not None]
    kinds = Counter(str(issue.kind) for issues in reports for issue in issues)
    rate = len(gravest) / len(reports) if reports else None
    severities = Counter(severity.name.lower() for severity in gravest)
    return IssueSummary(total=len(reports), flagged=len(gravest), flag_rate=rate, severities=dict(severities), kinds=dict(sorted(kinds.items())))


def lowest(scores: Iterable[float]) -> float | None:
    """The least score, None of none; NaN counts as 0, as nothing is known to bear it out."""
    return min((0.0 if math.isnan(score) else score for score in scores), default=None)

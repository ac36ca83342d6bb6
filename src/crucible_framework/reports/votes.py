"""What ensembles said, from their `ensemble.vote` events: who agrees with whom, who voted what, and whether confidence can be believed.

Where an evaluation on file asked the same prompts, its targets say which answers were right. This file draws nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from ..inference.answers import read_answer
from ..records import Json, record
from ..stats import wilson
from . import words
from .panels import Curve, HeatMap, XYPlot
from .parts import DotPlot, Interval
from .sources import as_list, as_number, as_table, as_text

__all__ = [
    "VOTE_EVENTS",
    "MemberTally",
    "Vote",
    "VoteBallot",
    "VoteSummary",
    "agreement_map",
    "member_plot",
    "read_votes",
    "reliability_plot",
    "summarise_votes",
]

VOTE_EVENTS = ("ensemble.vote",)
_BINS = 10


@record
class VoteBallot:
    """What a member said; `answer` None: it abstained, or failed as `error` says. `right` None: the truth is not on file."""

    member: str
    answer: str | None
    confidence: float | None
    error: str
    latency_s: float | None
    right: bool | None


@record
class Vote:
    """One question to an ensemble. `right` None: the truth is not on file, or there is no answer."""

    at_s: float
    run: str
    strategy: str
    mode: str
    question: str
    answer: str | None
    agreement: float
    probability: float | None
    ballots: tuple[VoteBallot, ...]
    skipped: tuple[str, ...]
    tied: tuple[str, ...]
    reason: str
    cost: float | None
    duration_s: float | None
    right: bool | None

    @property
    def split(self) -> bool:
        """Whether the members gave different answers."""
        return len({ballot.answer for ballot in self.ballots if ballot.answer is not None}) > 1


@record
class MemberTally:
    """One member over all votes. `with_verdict` counts its answers that the ensemble gave too; `right` of `judged` are those with a truth on file."""

    name: str
    asked: int
    answered: int
    abstained: int
    failed: int
    with_verdict: int
    right: int
    judged: int
    confidence: float | None
    latency_s: float | None


@record
class VoteSummary:
    """All votes and what they say together. `pairs` holds (agreed, both answered) of two members, under both orders."""

    votes: tuple[Vote, ...]
    members: tuple[MemberTally, ...]
    pairs: Mapping[tuple[str, str], tuple[int, int]]
    right: int
    judged: int

    @property
    def unanimous(self) -> int:
        """Votes in which at least two members answered, and all the same."""
        return sum(not vote.split and sum(b.answer is not None for b in vote.ballots) > 1 for vote in self.votes)


def _right(answer: str | None, target: str | None) -> bool | None:
    """Equal in the normal form in which answers are compared; None without an answer or a truth."""
    if answer is None or target is None:
        return None
    return answer == target or read_answer(answer, "auto") == read_answer(target, "auto")


def read_votes(events: Iterable[Mapping[str, Json]], targets: Mapping[str, str]) -> tuple[Vote, ...]:
    """The votes among some events, in their order. `targets` are right answers by the digest of their prompt (`asked_id`)."""
    found = []
    for event in events:
        if event.get("name") not in VOTE_EVENTS:
            continue
        target = targets.get(as_text(event.get("asked_id")))
        ballots = []
        for one in map(as_table, as_list(event.get("ballots"))):
            answer = one.get("answer")
            said = answer if isinstance(answer, str) else None
            ballots.append(
                VoteBallot(
                    member=as_text(one.get("member")), answer=said, confidence=as_number(one.get("confidence")), error=as_text(one.get("error")),
                    latency_s=as_number(one.get("latency_s")), right=_right(said, target),
                )
            )  # fmt: skip
        answer = event.get("answer")
        said = answer if isinstance(answer, str) else None
        found.append(
            Vote(
                at_s=as_number(event.get("ts")) or 0.0, run=as_text(event.get("run")), strategy=as_text(event.get("strategy")), mode=as_text(event.get("mode")),
                question=as_text(event.get("question")), answer=said, agreement=as_number(event.get("agreement")) or 0.0,
                probability=as_number(event.get("probability")), ballots=tuple(ballots), skipped=tuple(map(as_text, as_list(event.get("skipped")))),
                tied=tuple(map(as_text, as_list(event.get("tied")))), reason=as_text(event.get("reason")), cost=as_number(event.get("cost")),
                duration_s=as_number(event.get("duration_s")), right=_right(said, target),
            )
        )  # fmt: skip
    return tuple(found)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summarise_votes(votes: Sequence[Vote]) -> VoteSummary:
    """Counts over all votes, members in the order in which they first voted."""
    names = dict.fromkeys(ballot.member for vote in votes for ballot in vote.ballots)
    pairs: dict[tuple[str, str], tuple[int, int]] = {}
    for vote in votes:
        said = {ballot.member: ballot.answer for ballot in vote.ballots if ballot.answer is not None}
        for a, b in combinations(said, 2):
            agreed, both = pairs.get((a, b), (0, 0))
            pairs[a, b] = pairs[b, a] = (agreed + (said[a] == said[b]), both + 1)
    members = []
    for name in names:
        mine = [(vote, ballot) for vote in votes for ballot in vote.ballots if ballot.member == name]
        judged = [ballot.right for _, ballot in mine if ballot.right is not None]
        members.append(
            MemberTally(
                name=name, asked=len(mine), answered=sum(b.answer is not None for _, b in mine), failed=sum(bool(b.error) for _, b in mine),
                abstained=sum(b.answer is None and not b.error for _, b in mine), right=sum(judged), judged=len(judged),
                with_verdict=sum(b.answer is not None and b.answer == vote.answer for vote, b in mine),
                confidence=_median([b.confidence for _, b in mine]), latency_s=_median([b.latency_s for _, b in mine]),
            )
        )  # fmt: skip
    truths = [vote.right for vote in votes if vote.right is not None]
    return VoteSummary(votes=tuple(votes), members=tuple(members), pairs=pairs, right=sum(truths), judged=len(truths))


# --------------------------------------------------------------------------------------------------------------- plots
def agreement_map(summary: VoteSummary) -> HeatMap | None:
    """How often two members gave the same answer where both gave one, in percent; None with fewer than two members."""
    names = tuple(member.name for member in summary.members)
    if len(names) < 2:
        return None
    values = []
    for a in names:
        row = []
        for b in names:
            agreed, both = summary.pairs.get((a, b), (0, 0))
            row.append(100.0 if a == b else 100 * agreed / both if both else None)
        values.append(tuple(row))
    counts = [count for _, count in summary.pairs.values()] or [0]
    several = f"{min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else f"{counts[0]:,}"
    return HeatMap(
        title="Same answer", rows=names, columns=names, values=tuple(values), unit="% of questions", column_label="member", source="events.jsonl",
        numbers=len(names) <= 12, span=(0.0, 100.0), note=f"Of the questions that both answered ({several}).",
    )  # fmt: skip


def member_plot(summary: VoteSummary) -> DotPlot | None:
    """How often each member, and the ensemble, is right where the truth is on file; else how often a member's answer was the verdict."""
    rows = []
    if summary.judged:
        shown = [(m.name, m.right, m.judged) for m in summary.members if m.judged]
        everyone = [*shown, ("the ensemble", summary.right, summary.judged)]
        title, unit = "Right answers", "right, % of answers with a truth on file"
        note = "Wilson intervals, 95 %, each of one number alone; the truths are the targets of evaluations that asked the same prompts."
    else:
        everyone = [(m.name, m.with_verdict, m.answered) for m in summary.members if m.answered]
        title, unit = "On the winning side", "answer was the verdict, % of answers"
        note = "Wilson intervals, 95 %. A member's own vote is in the verdict. No evaluation on file asked these prompts, so what was right is not known."
    for name, count, n in everyone:
        low, high = wilson(count, n)
        tone = "adapter" if name == "the ensemble" else "base"
        rows.append(Interval(label=name, value=count / n, low=low, high=high, text=f"{words.percent(count / n, 1)} ({count} of {n})", tone=tone))  # type: ignore[arg-type] # one of the tones
    return DotPlot(title=title, rows=tuple(rows), unit=unit, source="events.jsonl", note=note, share=True) if rows else None


def _reliability(name: str, pairs: Sequence[tuple[float, bool]], hue: int) -> Curve | None:
    """Share right over confidence: at each value where there are few, else in ten bins of equal width."""
    if not pairs:
        return None
    few = len({said for said, _ in pairs}) <= _BINS
    bins: dict[float, list[tuple[float, bool]]] = {}
    for said, right in pairs:
        bins.setdefault(said if few else min(_BINS - 1, math.floor(said * _BINS)), []).append((said, right))
    xs, ys, lows, highs = [], [], [], []
    for _, inside in sorted(bins.items()):
        count = sum(right for _, right in inside)
        low, high = wilson(count, len(inside))
        xs.append(statistics.fmean(said for said, _ in inside))
        ys.append(count / len(inside))
        lows.append(low)
        highs.append(high)
    return Curve(name=f"{name} (n = {len(pairs):,})", x=tuple(xs), y=tuple(ys), low=tuple(lows), high=tuple(highs), look="points", hue=hue)


def reliability_plot(summary: VoteSummary) -> XYPlot | None:
    """How often answers are right over how sure the ensemble was: its calibrated probability, and its agreement; None without truths."""
    kinds = (
        ("calibrated probability", [(v.probability, v.right) for v in summary.votes if v.probability is not None and v.right is not None]),
        ("agreement", [(v.agreement, v.right) for v in summary.votes if v.right is not None]),
    )
    curves = [curve for hue, (name, pairs) in enumerate(kinds) if (curve := _reliability(name, pairs, hue)) is not None]
    if not curves:
        return None
    return XYPlot(
        title="Calibration", x_label="said, %", y_label="right, %", curves=tuple(curves), source="events.jsonl, eval/*/scores.jsonl", diagonal=True,
        percent_x=True, percent_y=True, x_span=(0.0, 1.0), y_span=(0.0, 1.0),
        note="On the dashed line confidence is as good as its word; below it promises too much. Wilson intervals, 95 %.",
    )  # fmt: skip

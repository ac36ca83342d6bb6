"""What a vote, a hedged request and a routed one say of themselves when they end: one event each, from which the dashboard draws its pages.

Texts are cut, so that a log does not grow with the answers; `asked` is the whole prompt's digest, by which an evaluation's rows find it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .. import events
from ..events import OpenSpan
from ..records import Ballot, HedgeDecision, HedgeOutcome, Json, Prompt, Verdict

__all__ = ["prompt_digest", "tell_fired", "tell_first", "tell_hedge", "tell_vote"]

_MOST_TEXT = 300


def _turns(prompt: Prompt) -> list[tuple[str, str]]:
    """(role, words) of each turn; a prompt of tokens has no words, only a length."""
    if isinstance(prompt, str):
        return [("user", prompt)]
    found: list[tuple[str, str]] = [(turn.role, turn.content) for turn in prompt if not isinstance(turn, int)]
    return found or [("user", f"({len(prompt)} tokens)")]


def _words(prompt: Prompt) -> str:
    if isinstance(prompt, str) or any(isinstance(turn, int) for turn in prompt):
        return prompt if isinstance(prompt, str) else repr(tuple(prompt))
    return "\n\n".join(f"{role}: {content}" for role, content in _turns(prompt))


def prompt_digest(words: str) -> str:
    """16 hex digits of a prompt as one text (the turns of a chat as "role: content", an empty line between them)."""
    return hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()[:16]


def _cut(text: str) -> str:
    """The end of a text, where the question stands."""
    return text if len(text) <= _MOST_TEXT else f"…{text[-_MOST_TEXT:]}"


def _ballot(ballot: Ballot) -> dict[str, Json]:
    told: dict[str, Json] = {"member": ballot.member, "answer": None if ballot.answer is None else ballot.answer[:_MOST_TEXT], "latency_s": ballot.latency_s}
    extra: dict[str, Json] = {"confidence": ballot.confidence, "error": ballot.error[:_MOST_TEXT], "cost": ballot.cost}
    return told | {key: value for key, value in extra.items() if value not in (None, "")}


def tell_vote(span: OpenSpan | None, prompt: Prompt, verdict: Verdict, mode: str, *, heard: int, causes: Sequence[str] = ()) -> str:
    """Emits `ensemble.vote` with every ballot; `heard` members answered or abstained. Gives its id."""
    if not events.listening():
        return ""
    words = _words(prompt)
    return events.linked(
        span,
        "ensemble.vote",
        causes,
        what="vote",
        chose="no answer" if verdict.answer is None else verdict.answer,
        among=list(dict.fromkeys(ballot.answer for ballot in verdict.ballots if ballot.answer is not None)),
        strategy=verdict.strategy,
        mode=mode,
        question=_cut(_turns(prompt)[-1][1]),
        asked_id=prompt_digest(words),
        answer=verdict.answer,
        agreement=verdict.agreement,
        probability=verdict.probability,
        asked=len(verdict.ballots),
        answered=heard,
        ballots=[_ballot(ballot) for ballot in verdict.ballots],
        skipped=list(verdict.skipped),
        tied=list(verdict.tied),
        reason=verdict.reason,
        because=verdict.reason or f"{sum(one.answer == verdict.answer for one in verdict.ballots)} of {heard} said so, by the rule {verdict.strategy}",
        cost=verdict.cost,
        duration_s=verdict.duration_s,
    )


def tell_first(span: OpenSpan | None, model: str, models: Sequence[str], *, order: str, plan: HedgeDecision | str, credit: float) -> str:
    """Emits `hedge.started`: whom the first call goes to, by what order, and when a second may follow, or as a text why never. Gives its id."""
    if isinstance(plan, str):
        wait, plan = "no second call", HedgeDecision(delay_s=None, reason=plan, probability=0.0)
    else:
        wait = "no second call by time" if plan.delay_s is None else f"a second call after {plan.delay_s:.4g} s"
    return events.linked(
        span, "hedge.started", what="first call", chose=model, among=list(dict.fromkeys(models)), leg=0, delay_s=plan.delay_s,
        hedge_probability=plan.probability, credit=credit, reason=f"{order}; {wait}: {plan.reason}",
    )  # fmt: skip


def tell_fired(
    span: OpenSpan | None, model: str, models: Sequence[str], causes: Sequence[str], *, probability: float, refused: str, reason: str, **fields: Json
) -> str:
    """Emits `hedge.fired`, or `hedge.refused` with why what the policy wanted was not allowed. Gives its id."""
    among: list[Json] = list(dict.fromkeys(models))
    if refused:
        none = "no further call"
        return events.linked(
            span, "hedge.refused", causes, what="hedge", chose=none, among=[*among, none], reason=f"{refused} ({reason})", model=model, **fields
        )  # fmt: skip
    return events.linked(span, "hedge.fired", causes, what="hedge", chose=model, among=among, probability=probability, reason=reason, model=model, **fields)


def tell_hedge(span: OpenSpan | None, outcome: HedgeOutcome, models: Sequence[str], causes: Sequence[str]) -> str:
    """Emits `hedge.ended`: how long the request took and how each of its calls went; `models` are those of the calls, in order. Gives its id."""
    legs: list[Json] = [
        {"model": model, "started_s": leg.started_s, "latency_s": leg.latency_s, "outcome": leg.outcome}
        for leg, model in zip(outcome.legs, models, strict=True)
    ]
    won = next((place for place, leg in enumerate(outcome.legs) if leg.outcome == "won"), None)
    chose = "no call" if won is None else f"call {won}: {models[won]}"
    reason = "no call gave an answer" if won is None else "the only call" if len(legs) == 1 else f"it was the first of {len(legs)} with a good answer"
    among: list[Json] = [f"call {place}: {model}" for place, model in enumerate(models)]
    return events.linked(
        span, "hedge.ended", causes, what="answer", chose=chose, among=among, reason=reason, ok=outcome.ok, latency_s=outcome.latency_s, legs=legs
    )  # fmt: skip

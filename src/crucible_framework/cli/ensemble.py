"""`crucible ensemble`: several models answer, a rule decides."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Literal

from cyclopts import App, Parameter

from ..backends import connect
from ..errors import ConfigError
from ..inference import Ensemble
from ..inference.answers import Kind
from ..records import SamplingParams, Verdict
from . import show
from .asking import pool_of
from .jobs import kept_events
from .reply import Reply

__all__ = ["ensemble", "register"]

Prompt = Annotated[str, Parameter(name=["--prompt", "-p"], allow_leading_hyphen=True)]
Models = Annotated[list[str], Parameter(help="Two or more: a base model, a run or checkpoint folder, or a registered model; the order is that of asking.")]


def ensemble(
    models: Models, /, *, prompt: Prompt, vote: str = "majority", mode: Literal["parallel", "sequential", "hedged"] = "parallel", read: Kind = "auto",
    quorum: int = 1, deadline_s: float | None = None, hedge_delay_s: float = 1.0, max_tokens: int = 128, temperature: float = 0.7, seed: int | None = None,
    backend: str = "local",
) -> Reply:  # fmt: skip
    """Ask several models and vote.

    Args:
        models: two or more.
        prompt: one user turn; `-` reads standard input.
        vote: majority, weighted, plurality, unanimous, best_confidence, borda, instant_runoff, or `module:function`.
        mode: parallel; sequential stops when the rest cannot change the outcome; hedged asks a further one when `quorum` are slow.
        read: how answers are read: auto, text, number, choice, boolean, date or json.
        quorum: models that must not fail.
        deadline_s: after it the vote is on what has come.
        hedge_delay_s: of the mode hedged.
        max_tokens: tokens per answer at the most.
        temperature: 0 is greedy.
        seed: the same seed gives the same answers.
        backend: local or fake.
    """
    if len(models) < 2:
        raise ConfigError(f"An ensemble got {len(models)} model; expected at least two. One model alone: crucible sample MODEL PROMPT")
    words = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with kept_events(), connect(backend) as engine:
        asked = Ensemble(pool_of(engine, models), vote, mode, read=read, quorum=quorum, deadline_s=deadline_s, hedge_delay_s=hedge_delay_s)
        verdict = asked.ask(words, params)
    return Reply(_plain(verdict), _text(verdict))


def _plain(verdict: Verdict) -> Mapping[str, object]:
    ballots = [
        {"member": b.member, "answer": b.answer, "text": b.text, "confidence": b.confidence, "error": b.error, "latency_s": b.latency_s}
        for b in verdict.ballots
    ]
    keys = ("answer", "text", "agreement", "probability", "strategy", "reason", "duration_s")
    lists = {"tied": list(verdict.tied), "skipped": list(verdict.skipped), "scores": dict(verdict.scores)}
    return {key: getattr(verdict, key) for key in keys} | lists | {"ballots": ballots}


def _text(verdict: Verdict) -> str:
    head = verdict.text if verdict.answer is not None else f"No answer: {verdict.reason}."
    lines = [f"  {b.member}: {b.error or (b.answer if b.answer is not None else 'abstains')}" for b in verdict.ballots]
    drawn = f", drawn from {len(verdict.tied)} tied answers" if verdict.tied else ""
    skipped = f"\n  not asked: {', '.join(verdict.skipped)}" if verdict.skipped else ""
    return f"{head}\n\n{verdict.strategy}: agreement {show.figure(verdict.agreement, 3)}{drawn}\n" + "\n".join(lines) + skipped


def register(app: App) -> None:
    """Adds the command to the tree."""
    app.command(ensemble)

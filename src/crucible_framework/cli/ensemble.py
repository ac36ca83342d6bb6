"""`crucible ensemble`: several models answer, a rule decides; and what `crucible sample --hedge --route` puts around a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from ..backends import connect
from ..errors import ConfigError
from ..inference import Ensemble, HedgedSampler, Member, Pool, RoutedSampler, load_router, routers, save_router
from ..inference.answers import Kind
from ..protocols import Backend, Sampler
from ..records import SamplingParams, Verdict
from . import show
from .jobs import kept_events, resolve_model
from .reply import Reply

__all__ = ["ensemble", "hedged", "register", "routed"]

Prompt = Annotated[str, Parameter(name=["--prompt", "-p"], allow_leading_hyphen=True)]
Models = Annotated[list[str], Parameter(help="Two or more: a base model, a run or checkpoint folder, or a registered model; the order is that of asking.")]


def pool_of(engine: Backend, models: list[str]) -> Pool:
    """The models by their names; one named twice is asked twice."""
    seen: dict[str, int] = {}
    members: list[Member] = []
    for reference in models:
        seen[reference] = seen.get(reference, 0) + 1
        name = reference if seen[reference] == 1 else f"{reference} ({seen[reference]})"
        members.append(Member(name=name, sampler=engine.sampler(resolve_model(reference))))
    return Pool(members)


def hedged(sampler: Sampler, service: str, *, delay_s: float | None = None) -> Sampler:
    """The sampler asked a second time when it is slow: after `delay_s`, or as learned; off on Tinker services unless a delay is given."""
    from ..inference import Fixed, default_policy

    if delay_s is not None:
        return HedgedSampler(sampler, Fixed(delay_s), budget=1.0)
    return HedgedSampler(sampler, default_policy(service))


def routed(engine: Backend, models: list[str], router: str, state: Path | None = None) -> tuple[Sampler, RoutedSampler]:
    """One sampler for several models. `state`, where it exists, is what the router learned before; `save_router(…)` keeps it again."""
    chosen = routers.get(router)()
    if state is not None and state.exists():
        load_router(chosen, state)
    made = RoutedSampler(pool_of(engine, models), chosen)
    return made, made


def keep(sampler: RoutedSampler, state: Path | None) -> None:
    """Saves what the router has learned, where a file was named."""
    if state is not None:
        save_router(sampler.router, state)


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

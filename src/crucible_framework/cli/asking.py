"""`crucible sample`: one model answers; asked twice where it is slow (`--hedge`), or one of several (`--route`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

from cyclopts import App, Parameter

from .. import events
from ..backends import connect
from ..errors import ConfigError
from ..inference import Fixed, HedgedSampler, Member, Pool, RoutedSampler, default_policy, load_router, routers, save_router
from ..plugins import load_attribute
from ..protocols import Backend, Router, Sampler
from ..records import Completion, Message, SamplingParams
from ..records import Prompt as AnyPrompt
from .jobs import chat, kept_events, resolve_model
from .live import BETWEEN, aloud, ask_aloud
from .reply import Reply

__all__ = ["register"]

Prompt = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
Interactive = Annotated[bool, Parameter(name=["--interactive", "-i"])]
Count = Annotated[int, Parameter(name=["--n", "-n"])]
Reward = Callable[[AnyPrompt, tuple[Completion, ...]], float]


def sample(
    model: str, prompt: Prompt = None, /, *, interactive: Interactive = False, system: str | None = None, n: Count = 1, max_tokens: int = 128,
    temperature: float = 0.7, top_k: int = 0, top_p: float = 1.0, stop: list[str] | None = None, seed: int | None = None, hedge: bool = False,
    hedge_after_s: float | None = None, route: list[str] | None = None, router: str = "thompson", router_state: Path | None = None,
    reward: str | None = None, stream: bool | None = None, backend: str = "local",
) -> Reply:  # fmt: skip
    """Ask a base model, a run, a checkpoint or a registered model.

    Args:
        model: a base model's name, a run or checkpoint folder, or `name`, `name:version`, `name@production`.
        prompt: one user turn; `-` reads standard input.
        interactive: chat; an empty line or Ctrl-D ends it.
        system: a system message before it.
        n: answers.
        max_tokens: tokens per answer at the most.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this mass.
        stop: a text that ends the answer; may be given again.
        seed: the same seed gives the same answers.
        hedge: ask again where an answer is slow, as learned within this command and at most 5 % more calls; the first answer counts.
        hedge_after_s: ask again after so many seconds; implies --hedge without its limit.
        route: a further model; may be given again. The router chooses which one answers.
        router: thompson, kl_ucb, exp3, sliding_window, round_robin, least_loaded, weighted or best_performing.
        router_state: a file with what the router learned; read where it exists, written after the answer.
        reward: `module:function` from (prompt, completions) to a number in [0, 1]; 1 for any answer where none is given.
        stream: print each token as it is drawn; on a terminal that is so anyway. With --json the answer comes whole.
        backend: local or fake.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=tuple(stop or ()), seed=seed)
    if prompt is None and not interactive:
        raise ConfigError("There is no prompt. Give one after the model, `-` for standard input, or -i for a chat.")
    if not route and (router_state is not None or reward is not None):
        raise ConfigError("--router-state and --reward are for several models and there is one. Name the others: --route MODEL")
    with kept_events(), connect(backend) as engine, events.collect() as seen:
        asked, hedges, routing = _asked(
            engine, [model, *(route or [])], hedge=hedge, after_s=hedge_after_s, router=_router(router, router_state), reward=reward
        )
        first = (Message(role="system", content=system),) if system else ()
        if interactive:
            answers = chat(asked, params, first)
            text = "" if sys.stdin.isatty() else "\n".join(answer.text for answer in answers)
        else:
            words = sys.stdin.read() if prompt == "-" else prompt or ""
            out = aloud(asked, stream)
            answers = ask_aloud(asked, (*first, Message(role="user", content=words)), params, n, out=out)
            text = "" if out is not None else BETWEEN.join(answer.text for answer in answers)
        if router_state is not None and routing is not None:
            save_router(routing.router, router_state)
    chosen = [event for event in seen if event["name"] == "route.chosen"]
    if routing is None and not hedges:
        return Reply(answers, text)
    return Reply(_data(answers, chosen, hedges), "\n\n".join(part for part in (text, _note(chosen, hedges)) if part))


def _asked(
    engine: Backend, models: list[str], *, hedge: bool, after_s: float | None, router: Router, reward: str | None
) -> tuple[Sampler, dict[str, HedgedSampler], RoutedSampler | None]:  # fmt: skip
    """What is asked, the hedged samplers in it by name, and the routed one."""
    pool = pool_of(engine, models)
    hedges: dict[str, HedgedSampler] = {}
    if hedge or after_s is not None:
        service = engine.capabilities.name
        for member in pool:
            policy = default_policy(service) if after_s is None else Fixed(after_s)
            hedges[member.name] = HedgedSampler(member.sampler, policy, budget=0.05 if after_s is None else 1.0)
        pool = Pool([Member(name=name, sampler=one) for name, one in hedges.items()])
    if len(models) == 1:
        return next(iter(pool)).sampler, hedges, None
    scored = None if reward is None else load_attribute(reward)
    if reward is not None and not callable(scored):
        raise ConfigError(f"--reward {reward!r} is {type(scored).__name__}; expected a function (prompt, completions) → [0, 1].")
    routed = RoutedSampler(pool, router, reward=cast("Reward | None", scored))
    return routed, hedges, routed


def _router(name: str, state: Path | None) -> Router:
    made = routers.get(name)()
    return load_router(made, state) if state is not None and state.exists() else made


def _data(answers: tuple[Completion, ...], chosen: list[events.Event], hedges: Mapping[str, HedgedSampler]) -> Mapping[str, object]:
    routes = [{key: event.get(key) for key in ("chose", "among", "probability", "reason")} for event in chosen]
    return {"answers": answers, "routes": routes, "hedges": {name: asdict(one.stats) for name, one in hedges.items()}}


def _note(chosen: list[events.Event], hedges: Mapping[str, HedgedSampler]) -> str:
    """One line about who answered and what was sent twice."""
    parts = [f"{chosen[-1]['chose']} answered, chosen by {chosen[-1]['reason']}"] if chosen else []
    fired = sum(one.stats.fired for one in hedges.values())
    won = sum(one.stats.wins for one in hedges.values())
    parts += [f"{fired} sent again, {won} answered first"] if hedges else []
    return f"({'; '.join(parts)})" if parts else ""


def pool_of(engine: Backend, models: list[str]) -> Pool:
    """The models by their names; one named twice is asked twice."""
    seen: dict[str, int] = {}
    members: list[Member] = []
    for reference in models:
        seen[reference] = seen.get(reference, 0) + 1
        name = reference if seen[reference] == 1 else f"{reference} ({seen[reference]})"
        members.append(Member(name=name, sampler=engine.sampler(resolve_model(reference))))
    return Pool(members)


def register(app: App) -> None:
    """Adds the command of this file."""
    app.command(sample)

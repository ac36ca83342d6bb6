"""How hedged and routed requests went, from their `hedge.ended`, `hedge.fired` and `route.ended` events.

What a request would have taken without its second call is not seen: the first call was given up when the other won. So the primary's
distribution is a Kaplan–Meier estimate, in which such a call counts as "longer than that". This file draws nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..errors import StatisticsError
from ..inference.latency import Survival
from ..records import Estimate, Json, record
from ..stats import mean_estimate
from .panels import Curve, XYPlot
from .sources import as_list, as_number, as_table, as_text

__all__ = [
    "REQUEST_EVENTS", "ArmTally", "HedgeSummary", "Leg", "ModelTally", "Percentile", "Request", "RouteSummary", "latency_plot", "read_requests", "share_plot",
    "summarise_hedges", "summarise_routes",
]  # fmt: skip

REQUEST_EVENTS = ("hedge.ended", "hedge.fired", "route.ended", "route.chosen")
QUANTILES = (0.5, 0.9, 0.95, 0.99)
_MOST_POINTS = 400


@record
class Leg:
    """One call of a request: to whom, when after the request, how long, and how it ended ("won", "lost", "cancelled", "failed")."""

    model: str
    started_s: float
    latency_s: float
    outcome: str


@record
class Request:
    """A request to a hedged sampler."""

    at_s: float
    run: str
    ok: bool
    latency_s: float
    legs: tuple[Leg, ...]


@record
class Percentile:
    """A quantile of the latency with hedging and, estimated, without; `bounded` where the latter was longer than anything seen."""

    q: float
    with_s: float
    without_s: float
    bounded: bool

    @property
    def saved_s(self) -> float:
        """What hedging saved there; at least that where `bounded`."""
        return self.without_s - self.with_s


@record
class ModelTally:
    """The calls to one model."""

    model: str
    calls: int
    won: int
    lost: int
    cancelled: int
    failed: int
    median_s: float | None


@record
class HedgeSummary:
    """All hedged requests together.

    Attributes:
        second: requests for which a second call was sent; `rescued` of them were answered by it.
        extra_calls: calls beyond one per request; `wasted_s` is how long calls ran whose answer was not used.
        reasons: why further calls were sent, with counts, the commonest first.
    """

    requests: tuple[Request, ...]
    second: int
    rescued: int
    failed: int
    extra_calls: int
    busy_s: float
    wasted_s: float
    percentiles: tuple[Percentile, ...]
    models: tuple[ModelTally, ...]
    reasons: tuple[tuple[str, int], ...]


@record
class ArmTally:
    """What one member of a router got. `reward` is None where nothing was learned of it."""

    name: str
    chosen: int
    ok: int
    reward: Estimate | None
    median_s: float | None
    cost: float | None


@record
class RouteSummary:
    """All routed requests together; `order` is who was asked, in time."""

    arms: tuple[ArmTally, ...]
    order: tuple[str, ...]
    reasons: tuple[tuple[str, int], ...]


def read_requests(events: Iterable[Mapping[str, Json]]) -> tuple[Request, ...]:
    """The hedged requests among some events, in their order."""
    found = []
    for event in events:
        if event.get("name") != "hedge.ended":
            continue
        legs = tuple(
            Leg(
                model=as_text(one.get("model")), started_s=as_number(one.get("started_s")) or 0.0, latency_s=as_number(one.get("latency_s")) or 0.0,
                outcome=as_text(one.get("outcome")),
            )
            for one in map(as_table, as_list(event.get("legs")))
        )  # fmt: skip
        if legs:
            found.append(
                Request(
                    at_s=as_number(event.get("ts")) or 0.0, run=as_text(event.get("run")), ok=event.get("ok") is True,
                    latency_s=as_number(event.get("latency_s")) or 0.0, legs=legs,
                )
            )  # fmt: skip
    return tuple(found)


def _counted(texts: Iterable[str]) -> tuple[tuple[str, int], ...]:
    found: dict[str, int] = {}
    for text in texts:
        found[text] = found.get(text, 0) + 1
    return tuple(sorted(found.items(), key=lambda one: (-one[1], one[0])))


def _survivals(requests: Sequence[Request]) -> tuple[Survival, Survival]:
    """With hedging, and of first calls alone (estimated). Failures count as ends: what they took, they took."""
    seen = Survival(np.array([one.latency_s for one in requests]))
    first = [one.legs[0] for one in requests]
    return seen, Survival(np.array([leg.latency_s for leg in first]), np.array([leg.outcome != "cancelled" for leg in first]))


def summarise_hedges(requests: Sequence[Request], events: Iterable[Mapping[str, Json]] = ()) -> HedgeSummary:
    """Counts, percentiles and what each model did; `events` tell why further calls were sent."""
    second = [one for one in requests if len(one.legs) > 1]
    percentiles: list[Percentile] = []
    if requests:
        seen, alone = _survivals(requests)
        for q in QUANTILES:
            bounded = float(alone.after[-1]) > 1 - q + 1e-12
            percentiles.append(Percentile(q=q, with_s=seen.quantile(q), without_s=alone.quantile(q), bounded=bounded))
    legs = [leg for one in requests for leg in one.legs]
    models = []
    for model in dict.fromkeys(leg.model for leg in legs):
        mine = [leg for leg in legs if leg.model == model]
        won, lost, cancelled, failed = (sum(leg.outcome == kind for leg in mine) for kind in ("won", "lost", "cancelled", "failed"))
        whole = [leg.latency_s for leg in mine if leg.outcome in ("won", "lost")]
        median_s = statistics.median(whole) if whole else None
        models.append(ModelTally(model=model, calls=len(mine), won=won, lost=lost, cancelled=cancelled, failed=failed, median_s=median_s))
    return HedgeSummary(
        requests=tuple(requests),
        second=len(second),
        rescued=sum(any(leg.outcome == "won" for leg in one.legs[1:]) for one in second),
        failed=sum(not one.ok for one in requests),
        extra_calls=len(legs) - len(requests),
        busy_s=sum(leg.latency_s for leg in legs),
        wasted_s=sum(leg.latency_s for leg in legs if leg.outcome != "won"),
        percentiles=tuple(percentiles),
        models=tuple(models),
        reasons=_counted(as_text(event.get("reason")) for event in events if event.get("name") == "hedge.fired"),
    )


def _staircase(survival: Survival) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Its points, thinned, without the end at zero."""
    places = np.flatnonzero(survival.after > 0)
    if len(places) > _MOST_POINTS:
        tail = places[-_MOST_POINTS // 2 :]  # the tail is what one looks at
        places = np.concatenate((places[np.linspace(0, len(places) - len(tail) - 1, _MOST_POINTS // 2).astype(int)], tail))
    return tuple(survival.times[places].tolist()), tuple(survival.after[places].tolist())


def latency_plot(summary: HedgeSummary) -> XYPlot | None:
    """How many requests take longer than t, with hedging and without; None with fewer than two requests."""
    if len(summary.requests) < 2:
        return None
    curves = []
    for hue, (name, survival) in enumerate(zip(("as answered", "first call alone (estimated)"), _survivals(summary.requests), strict=True)):
        x, y = _staircase(survival)
        if x:
            curves.append(Curve(name=name, x=x, y=y, look="steps", hue=hue))
    if not curves:
        return None
    return XYPlot(
        title="How many take longer", x_label="latency, seconds", y_label="requests that take longer, %", curves=tuple(curves), source="events.jsonl",
        log_x=True, log_y=True, percent_y=True,
        note="Lower is better; the tail is at the right. Given-up first calls count as “longer than that” (Kaplan–Meier).",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- routes
def _reward(values: Sequence[float]) -> Estimate | None:
    try:
        return mean_estimate("reward", list(values))
    except StatisticsError:
        return None


def summarise_routes(events: Sequence[Mapping[str, Json]]) -> RouteSummary:
    """What became of routed requests, per member in the order in which they were first chosen."""
    done = [event for event in events if event.get("name") == "route.ended"]
    names = tuple(as_text(event.get("chose")) for event in done)
    arms = []
    for name in dict.fromkeys(names):
        mine = [event for event in done if event.get("chose") == name]
        times = [value for event in mine if (value := as_number(event.get("latency_s"))) is not None]
        costs = [value for event in mine if (value := as_number(event.get("cost"))) is not None]
        rewards = [value for event in mine if (value := as_number(event.get("reward"))) is not None]
        arms.append(
            ArmTally(
                name=name, chosen=len(mine), ok=sum(event.get("ok") is True for event in mine), reward=_reward(rewards),
                median_s=statistics.median(times) if times else None, cost=statistics.fmean(costs) if costs else None,
            )
        )  # fmt: skip
    reasons = _counted(as_text(event.get("reason")) for event in events if event.get("name") == "route.chosen")
    return RouteSummary(arms=tuple(arms), order=names, reasons=reasons)


def share_plot(summary: RouteSummary) -> XYPlot | None:
    """Whom the router asked over time: of the last fifth of the requests so far (at least 20), each member's share."""
    total = len(summary.order)
    if total < 2:
        return None
    window = max(20, total // 5)
    places = sorted({round(1 + i * (total - 1) / min(total - 1, 199)) for i in range(min(total, 200))})
    curves = []
    for hue, arm in enumerate(summary.arms):
        hits = np.concatenate(([0], np.cumsum([name == arm.name for name in summary.order])))
        starts = [max(0, place - window) for place in places]
        shares = tuple(float(hits[place] - hits[start]) / (place - start) for place, start in zip(places, starts, strict=True))
        curves.append(Curve(name=arm.name, x=tuple(map(float, places)), y=shares, hue=hue))
    return XYPlot(
        title="Who is asked", x_label="requests so far", y_label=f"share of the last {window}, %", curves=tuple(curves), source="events.jsonl",
        percent_y=True, y_span=(0.0, 1.0),
    )  # fmt: skip

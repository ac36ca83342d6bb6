"""The page of hedged and routed requests: how long they take, what hedging saved and cost, whom routers ask and what they got."""

from __future__ import annotations

from collections.abc import Sequence

from ..reports import words
from ..reports.markup import Markup, element, join
from ..reports.requests import HedgeSummary, Request, RouteSummary, latency_plot, share_plot
from .figures import Plot, figure
from .frame import empty_state, estimate_words, page, part, table, url

__all__ = ["request_plots", "requests_page"]

BASE = ("requests",)
_MOST = 50


def request_plots(hedges: HedgeSummary, routes: RouteSummary) -> dict[str, Plot]:
    """The page's plots by key."""
    found = {"latency": latency_plot(hedges), "shares": share_plot(routes)}
    return {key: plot for key, plot in found.items() if plot is not None}


def _facts(hedges: HedgeSummary) -> Markup:
    n = len(hedges.requests)
    last = hedges.percentiles[-1]
    saved = last.saved_s / last.without_s if last.without_s > 0 else 0.0
    least = "at least " if last.bounded else ""
    shown = [
        ("Requests", f"{n:,}", f"{hedges.failed:,} failed"),
        ("Hedged", words.percent(hedges.second / n, 1), f"{hedges.second:,} got a second call"),
        ("Rescued", f"{hedges.rescued:,}", "answered by a later call"),
        ("Saved at p99", f"{least}{words.duration(last.saved_s)}", f"{words.percent(saved, 0)} of {words.duration(last.without_s)}"),
        ("Extra calls", words.percent(hedges.extra_calls / n, 1), f"{hedges.extra_calls:,} beyond one a request"),
        ("Wasted", words.percent(hedges.wasted_s / hedges.busy_s, 1) if hedges.busy_s else words.NOTHING, "of the time that calls ran"),
    ]
    cells = (element("div", None, element("dt", None, a), element("dd", None, b), element("dd", {"class": "detail"}, c)) for a, b, c in shown)
    return element("dl", {"class": "facts"}, *cells)


def _percentiles(hedges: HedgeSummary) -> Markup:
    rows = []
    for one in hedges.percentiles:
        least = "≥ " if one.bounded else ""
        share = words.percent(one.saved_s / one.without_s, 0) if one.without_s > 0 else words.NOTHING
        rows.append((
            f"p{100 * one.q:g}", words.duration(one.with_s), f"{least}{words.duration(one.without_s)}", f"{least}{words.duration(one.saved_s)}", share,
        ))  # fmt: skip
    columns = ("Percentile", "As answered", "First call alone (estimated)", "Saved", "Share")
    note = element(
        "p", {"class": "note"}, "≥: first calls were given up before they had taken that long, so the truth lies beyond. "
        "A negative saving is noise, or a first call that is slow because a second one runs beside it.",
    )  # fmt: skip
    return join(table(columns, rows, name="Percentiles", numeric=(1, 2, 3, 4)), note)


def _models(hedges: HedgeSummary) -> Markup:
    rows = [
        (one.model, f"{one.calls:,}", f"{one.won:,}", f"{one.lost:,}", f"{one.cancelled:,}", f"{one.failed:,}", words.duration(one.median_s))
        for one in hedges.models
    ]  # fmt: skip
    return table(("Model", "Calls", "Answered first", "Too late", "Given up", "Failed", "Median latency"), rows, name="Calls", numeric=range(1, 7))


def _timeline(one: Request, longest: float) -> Markup:
    """The calls of a request as bars over time."""
    bars = []
    for index, leg in enumerate(one.legs):
        start, width = min(238.5, 240 * leg.started_s / longest), max(1.5, 240 * leg.latency_s / longest)
        told = f"{leg.model}: {leg.outcome} after {words.duration(leg.latency_s)}"
        bars.append(
            element("rect", {"x": start, "y": 2 + 8 * index, "width": min(width, 240 - start), "height": 6, "class": f"leg {leg.outcome}"},
                    element("title", None, told))
        )  # fmt: skip
    label = "; ".join(f"{leg.model} {leg.outcome}" for leg in one.legs)
    return element("svg", {"viewBox": f"0 0 240 {4 + 8 * len(one.legs)}", "class": "legs", "role": "img", "aria-label": label}, *bars)


def _latest(hedges: HedgeSummary) -> Markup:
    shown = [one for one in reversed(hedges.requests) if len(one.legs) > 1][:_MOST]
    longest = max((leg.started_s + leg.latency_s for one in shown for leg in one.legs), default=1.0) or 1.0
    rows = []
    for one in shown:
        won = next((leg.model for leg in one.legs if leg.outcome == "won"), words.NOTHING)
        rows.append(
            (words.when(one.at_s), _timeline(one, longest), words.duration(one.latency_s), words.duration(one.legs[1].started_s), won, one.run or words.NOTHING)
        )
    key = element(
        "p", {"class": "legend keys-of-legs"}, *(element("span", {"class": f"leg-key {css}"}, text) for css, text in (
            ("won", "answered"), ("lost", "too late"), ("cancelled", "given up"), ("failed", "failed"))),
    )  # fmt: skip
    return join(
        key,
        table(
            ("When", "Calls", "Latency", "Second call after", "Answered by", "Run"),
            rows,
            name="Hedged requests",
            numeric=(2, 3),
            empty="No request was hedged.",
        ),
    )


def _reasons(reasons: Sequence[tuple[str, int]], name: str) -> Markup:
    return table(("Why", "Times"), [(why or words.NOTHING, f"{count:,}") for why, count in reasons[:12]], name=name, numeric=(1,))


def _routes(routes: RouteSummary) -> Markup:
    total = len(routes.order)
    rows = [
        (arm.name, f"{arm.chosen:,}", words.percent(arm.chosen / total, 0), words.percent(arm.ok / arm.chosen, 0),
         estimate_words(arm.reward) if arm.reward else words.NOTHING, words.duration(arm.median_s), words.number(arm.cost))
        for arm in routes.arms
    ]  # fmt: skip
    columns = ("Member", "Asked", "Share", "Answered", "Mean reward", "Median latency", "Mean cost")
    note = element("p", {"class": "note"}, "The router chose whom it asked, so the rewards are of the requests that each member got and no fair comparison.")
    return join(table(columns, rows, name="Members of routers", numeric=range(1, 7)), note)


def requests_page(hedges: HedgeSummary, routes: RouteSummary, stamp: str, tabs: Sequence[tuple[str, str]]) -> str:
    """The whole page."""
    top = element(
        "div", {"class": "top"}, element("h1", None, "Requests"), element("p", {"class": "subtitle"}, "hedged and routed: latency, what it saved, what it cost")
    )
    plots = request_plots(hedges, routes)
    parts: list[Markup] = []
    if hedges.requests:
        latency = element("div", {"class": "plots"}, figure(plots["latency"], "latency", BASE) if "latency" in plots else join(), _percentiles(hedges))
        parts += [
            part("hedge-facts", _facts(hedges)), part("hedging", latency, title="Hedging"), part("hedge-models", _models(hedges), title="Calls by model"),
            part("hedged", _latest(hedges), title="Latest hedged requests"),
        ]  # fmt: skip
        if hedges.reasons:
            parts.append(part("hedge-reasons", _reasons(hedges.reasons, "Why second calls were sent"), title="Why second calls were sent"))
    if routes.order:
        shares = figure(plots["shares"], "shares", BASE, wide=True) if "shares" in plots else join()
        parts.append(part("routing", join(shares, _routes(routes)), title="Routing"))
        if routes.reasons:
            parts.append(part("route-reasons", _reasons(routes.reasons, "Why they were chosen"), title="Why they were chosen"))
    if not parts:
        what = "A hedged sampler asks a second time when the first call is slow; a routed one learns whom to ask. Both tell how each request went."
        code = 'sampler = HedgedSampler(backend.sampler(model))\nsampler = RoutedSampler(pool, "thompson")'
        parts.append(part("requests", empty_state("No hedged or routed request yet.", what, code)))
    body = element("div", {"data-live": url("api", "asked", "live"), "data-stamp": stamp}, top, *parts)
    return page("Requests", body, tab="/requests", script="parts.js", tabs=tabs)

"""The table of runs: filter, order, rows. The same rows go out alone when a run changes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from ..reports import words
from ..reports.markup import Markup, element, join
from .frame import button, empty_state, estimate_words, field, link, page, spark, status, url
from .views import RunRow

__all__ = ["filtered", "ordered", "row_markup", "runs_page"]

_Key = Callable[[RunRow], "float | str | None"]
_COLUMNS: Mapping[str, tuple[str, _Key]] = {
    "name": ("Run", lambda row: row.name.lower()),
    "status": ("Status", lambda row: row.status),
    "model": ("Base model", lambda row: row.base_model.lower()),
    "steps": ("Steps", lambda row: row.steps),
    "loss": ("Loss", lambda row: row.loss),
    "dev": ("Held out", lambda row: row.dev_loss),
    "score": ("Score", lambda row: row.score.value if row.score else None),
    "made": ("Made (UTC)", lambda row: row.created_at),
    "took": ("Took", lambda row: row.duration_s),
}
_NUMERIC = ("steps", "loss", "dev", "score", "took")
_CONDITION = re.compile(r"(steps|loss|dev|score|took)(<=|>=|<|>|=)([-+.\deE]+)")


def filtered(rows: Sequence[RunRow], query: str) -> list[RunRow]:
    """The rows that every word of the query fits: part of a name, model or status; `status:done`; `loss<0.5`, `steps>=100`."""
    return [row for row in rows if all(_fits(row, word) for word in query.split())]


def _fits(row: RunRow, word: str) -> bool:
    condition = _CONDITION.fullmatch(word)
    if condition:
        value = _COLUMNS[condition[1]][1](row)
        try:
            limit = float(condition[3])
        except ValueError:
            return False
        if not isinstance(value, (int, float)):
            return False
        return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit, "=": value == limit}[condition[2]]
    key, colon, text = word.lower().partition(":")
    if colon and key in ("status", "model", "name"):
        return text in str(_COLUMNS[key][1](row))
    return any(word.lower() in text.lower() for text in (row.name, row.base_model, row.status))


def ordered(rows: Sequence[RunRow], by: str, *, descending: bool) -> list[RunRow]:
    """The rows by a column; those without a value stand last either way."""
    key = _COLUMNS.get(by, _COLUMNS["made"])[1]

    def missing(row: RunRow) -> bool:
        value = key(row)
        return value is None or (isinstance(value, float) and math.isnan(value))

    present = sorted((row for row in rows if not missing(row)), key=lambda row: (key(row), row.name), reverse=descending)
    return [*present, *(row for row in rows if missing(row))]


def _moment(seconds: float) -> str:
    """A moment in UTC, short enough for a table: "2026-11-24 21:31"."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M") if 0 < seconds < 1e11 else words.NOTHING


def row_markup(row: RunRow) -> Markup:
    """One row; `data-run` is what live updates find it by."""
    box = field({"type": "checkbox", "name": "run", "value": row.name, "aria-label": f"Choose {row.name} for comparison", "form": "choose"})
    error = element("span", {"class": "error"}, words.clip(row.error, 120)) if row.error else join()
    cells = {
        "name": join(link(row.name, url("runs", row.name), class_="run"), error),
        "status": status(row.status),
        "model": row.base_model or words.NOTHING,
        "steps": f"{row.steps:,}",
        "loss": join(spark(row.spark, "Training loss"), " ", element("span", {"class": "figure"}, words.number(row.loss))),
        "dev": words.number(row.dev_loss),
        "score": join(estimate_words(row.score), " ", element("span", {"class": "soft small"}, row.score.name.replace("_", " ")))
        if row.score
        else words.NOTHING,
        "made": _moment(row.created_at),
        "took": words.duration(row.duration_s),
    }
    shown = (
        element("td", {"data-label": _COLUMNS[key][0], "class": f"of-{key} number" if key in _NUMERIC else f"of-{key}"}, cell) for key, cell in cells.items()
    )
    return element("tr", {"data-run": row.name}, element("td", {"class": "pick"}, box), *shown)


def _head(query: str, by: str, *, descending: bool) -> Markup:
    cells = [element("th", {"scope": "col", "class": "pick"}, element("span", {"class": "hidden"}, "Choose"))]
    for key, (title, _) in _COLUMNS.items():
        turned = not descending if key == by else key in ("made", "score", "steps", "took")
        sorted_ = ("descending" if descending else "ascending") if key == by else "none"
        arrow = (" ↓" if descending else " ↑") if key == by else ""
        href = url("", query={"q": query, "sort": key, "desc": "1" if turned else "0"})
        cells.append(element("th", {"scope": "col", "aria-sort": sorted_, "class": "number" if key in _NUMERIC else None}, link(title + arrow, href)))
    return element("thead", None, element("tr", None, *cells))


def runs_page(rows: Sequence[RunRow], *, now_s: float, root: str, query: str, by: str, descending: bool, tabs: Sequence[tuple[str, str]]) -> str:
    """The whole page; `now_s` is a moment before the rows were read."""
    shown = ordered(filtered(rows, query), by, descending=descending)
    search = element(
        "form",
        {"id": "filter", "action": "/", "role": "search"},
        field({"type": "search", "name": "q", "value": query, "placeholder": "Filter: name, status:done, loss<0.5", "aria-label": "Filter runs", "id": "q"}),
        field({"type": "hidden", "name": "sort", "value": by}),
        field({"type": "hidden", "name": "desc", "value": "1" if descending else "0"}),
    )
    choose = element(
        "form", {"id": "choose", "action": "/compare"}, button("Compare chosen runs", type="submit", id="compare", title="Choose two or more runs first")
    )
    running = sum(row.status == "running" for row in rows)
    counted = f"{words.counted(len(rows), 'run')}, {running} running" + (f", {len(shown)} shown" if query else "")
    top = element(
        "div",
        {"class": "top"},
        element("h1", None, "Runs"),
        element("p", {"class": "subtitle"}, f"{counted} · {root}"),
        element("div", {"class": "tools"}, search, choose),
    )
    if rows:
        body = element("tbody", {"id": "rows", "data-now": f"{now_s:.3f}"}, *map(row_markup, shown))
        drawn = element("table", {"class": "cards runs", "aria-label": "Runs"}, _head(query, by, descending=descending), body)
        empty = element("p", {"class": "note"}, "No run fits the filter. ", link("Show all", "/")) if not shown else join()
        list_ = element("div", {"class": "scroll", "role": "region", "aria-label": "Runs", "tabindex": "0"}, drawn)
        content = join(list_, empty)
    else:
        what = "Each run is a folder with its settings, curves, checkpoints and events. It appears here while it trains."
        content = empty_state(
            "There are no runs here yet.", what, "crucible demo --quick\ncrucible train --base-model tiny --dataset minifact --folder runs/first"
        )
    keys = element("p", {"class": "keys"}, *_keys(("/", "filter"), ("j k", "move"), ("x", "choose"), ("Enter", "open"), ("c", "compare")))
    return page("Runs", top, content, keys, tab="/", script="runs.js", tabs=tabs)


def _keys(*pairs: tuple[str, str]) -> list[Markup]:
    return [element("span", None, element("kbd", None, key), f" {what}") for key, what in pairs]

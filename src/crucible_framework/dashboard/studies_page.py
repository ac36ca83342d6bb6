"""The experiments' pages: all studies with how far they are, and one study as a matrix of cells with its findings."""

from __future__ import annotations

from collections.abc import Sequence

from ..experiments import CellState, StudyOverview
from ..reports import words
from ..reports.markup import Markup, element, join
from ..reports.panels import HeatMap, level_of
from ..reports.parts import Document
from .figures import saves, section
from .frame import empty_state, link, page, part, table, url
from .reading import CELL

__all__ = ["matrix_map", "studies_page", "study_page"]

_STATES = ("done", "running", "failed", "broken", "dropped", "pending")


def _progress(one: StudyOverview) -> Markup:
    """A bar of cells by state; its title says the counts."""
    whole, at, parts = max(1, len(one.cells)), 0.0, []
    for state in _STATES:
        share = 100 * one.count(state) / whole
        if share:
            parts.append(element("rect", {"x": at, "y": 0, "width": share, "height": 8, "class": f"bar-{state}"}))
            at += share
    told = ", ".join(f"{one.count(state)} {state}" for state in _STATES if one.count(state))
    frame: dict[str, str | float | None] = {"viewBox": "0 0 100 8", "class": "progress", "role": "img", "aria-label": told, "preserveAspectRatio": "none"}
    return element("svg", frame, element("title", None, told), *parts)


def _state(one: StudyOverview) -> Markup:
    state = "running" if one.running else "done" if one.finished and one.analysed else "finished" if one.finished else "unfinished"
    return element("span", {"class": f"state {state}"}, {"finished": "not analysed"}.get(state, state))


def studies_page(studies: Sequence[tuple[str, StudyOverview]], broken: Sequence[str], tabs: Sequence[tuple[str, str]]) -> str:
    """All studies, the newest first."""
    rows = []
    for name, one in sorted(studies, key=lambda pair: -pair[1].created_at):
        seeds = len({seed for _, seed in one.columns})
        data = len({data for data, _ in one.columns})
        shape = f"{words.counted(len(one.arms), 'arm')} × {words.counted(seeds, 'seed')} × {words.counted(data, 'data set')}"
        rows.append((
            join(link(one.name, url("studies", name)), element("span", {"class": "soft small under"}, name)), _state(one), shape,
            join(_progress(one), " ", f"{one.count('done')} of {len(one.cells)}"), str(one.count("failed") + one.count("broken") or words.NOTHING),
            str(one.declared or words.NOTHING), words.duration(one.busy_s), words.when(one.created_at),
        ))  # fmt: skip
    columns = ("Experiment", "State", "Matrix", "Cells done", "Failed", "Declared", "Worked", "Begun")
    drawn = table(columns, rows, name="Experiments", numeric=(4, 5, 6))
    what = (
        "An experiment trains every arm with every seed on every data set, compares them in pairs and says what was shown. "
        "Describe one in a TOML file (examples/08_study.toml), look at its cost first, then run it:"
    )
    empty = empty_state("There is no experiment here yet.", what, "crucible run experiment.toml --dry-run\ncrucible run experiment.toml")
    notices = element("aside", {"class": "notices"}, element("ul", None, *(element("li", None, why) for why in broken))) if broken else join()
    top = element("div", {"class": "top"}, element("h1", None, "Experiments"), element("p", {"class": "subtitle"}, words.counted(len(studies), "experiment")))
    return page("Experiments", top, notices, part("studies", drawn if rows else empty), tab="/studies", script="parts.js", tabs=tabs)


def _cell(name: str, cell: CellState, one: StudyOverview, ends: tuple[float, float]) -> Markup:
    """A cell of the matrix: its score with a colour, or its state in words."""
    if cell.status == "done" and cell.score is not None:
        text, css = words.number(cell.score), f"heat h{level_of(cell.score, *ends)}"
        told = f"{one.primary} {words.number(cell.score)}" + (f" [{words.number(cell.low)}, {words.number(cell.high)}]" if cell.low is not None else "")
    else:
        text, css, told = ("done" if cell.status == "done" else cell.status), f"is-{cell.status}", cell.why or cell.status
    inner = link(text, url("runs", f"{name}{CELL}{cell.id}"), title=f"Open the run: {told}") if cell.run is not None else element("span", {"title": told}, text)
    return element("td", {"class": f"number {css}"}, inner)


def _matrix(name: str, one: StudyOverview) -> Markup:
    scores = [cell.score for cell in one.cells.values() if cell.score is not None]
    ends = (min(scores), max(scores)) if scores else (0.0, 1.0)
    data = list(dict.fromkeys(key for key, _ in one.columns))
    groups = (element("th", {"scope": "colgroup", "colspan": str(sum(d == key for d, _ in one.columns)), "class": "group"}, key) for key in data)
    seeds = (element("th", {"scope": "col", "class": "number"}, f"seed {seed}") for _, seed in one.columns)
    head = element("thead", None, element("tr", None, element("th", {"scope": "col", "rowspan": "2"}, "Arm"), *groups), element("tr", None, *seeds))
    body = (
        element(
            "tr", None, element("th", {"scope": "row"}, arm),
            *(_cell(name, one.cells[arm, key, seed], one, ends) for key, seed in one.columns),
        )
        for arm in one.arms
    )  # fmt: skip
    drawn = element("table", {"class": "matrix", "aria-label": "Cells"}, head, element("tbody", None, *body))
    caption = element(
        "figcaption", None, element("b", None, "Every cell"), " ", element("span", {"class": "unit"}, f"{one.primary}, the primary score"),
        saves(("studies", name), "matrix"),
    )  # fmt: skip
    scroll = element("div", {"class": "scroll", "role": "region", "aria-label": "Cells", "tabindex": "0"}, drawn)
    why = [f"{cell.arm}, seed {cell.seed}: {words.clip(cell.why, 300)}" for cell in one.cells.values() if cell.why]
    failures = element("ul", {"class": "note"}, *(element("li", None, text) for text in why)) if why else join()
    return element("figure", {"class": "plot"}, caption, scroll, failures)


def matrix_map(one: StudyOverview) -> HeatMap:
    """The matrix as a plot, for its files; cells without a score are missing."""
    values = tuple(tuple(one.cells[arm, key, seed].score for key, seed in one.columns) for arm in one.arms)
    return HeatMap(
        title=f"{one.name}: {one.primary}", rows=one.arms, columns=tuple(f"{key}, seed {seed}" for key, seed in one.columns), values=values,
        unit=one.primary, column_label="data set and seed",
        source="cells/*.json", numbers=len(one.columns) <= 10,
    )  # fmt: skip


def study_page(name: str, one: StudyOverview, document: Document | None, stamp: str, tabs: Sequence[tuple[str, str]]) -> str:
    """One study; `document` is its report where it was analysed, `stamp` what live updates begin from."""
    waiting = one.count("pending") + one.count("running")
    facts = [
        ("Cells", f"{one.count('done')} of {len(one.cells)}", ", ".join(f"{one.count(s)} {s}" for s in _STATES[1:] if one.count(s)) or "all done"),
        ("Matrix", f"{len(one.arms)} × {len(one.columns)}", "arms × data sets and seeds"),
        ("Declared", str(one.declared), "hypotheses before the start" if one.declared else "no hypothesis: exploratory"),
        ("Worked", words.duration(one.busy_s), "all workers together"),
        ("Tokens", words.number(one.tokens), "trained and asked"),
    ]
    cells = (element("div", None, element("dt", None, a), element("dd", None, b), element("dd", {"class": "detail"}, c)) for a, b, c in facts)
    notices = list(document.notices) if document is not None else []
    if document is None and one.finished:
        notices.append("Every cell has ended, and the study was not analysed yet: crucible run … --resume analyses it.")
    elif waiting and not one.running:
        notices.append(f"{words.counted(waiting, 'cell')} wait, and nobody works on them: crucible run … --resume goes on.")
    report = link("Report", url("studies", name, "report.html")) if (one.folder / "report.html").is_file() else join()
    head = part(
        "head",
        element("p", {"class": "kicker"}, link("Experiments", "/studies"), " / "),
        element("h1", None, one.name, " ", _state(one)),
        element("p", {"class": "subtitle"}, f"{name} · begun {words.when(one.created_at)}"),
        element("p", {"class": "verdict"}, document.verdict) if document is not None and document.verdict else join(),
        element("div", {"class": "progress-line"}, _progress(one)),
        element("dl", {"class": "facts"}, *cells),
        element("p", {"class": "links"}, report) if report else join(),
        *([element("aside", {"class": "notices"}, element("ul", None, *(element("li", None, text) for text in dict.fromkeys(notices))))] if notices else ()),
    )  # fmt: skip
    kept = [one for one in document.sections if one.key != "cells" and one.blocks] if document is not None else []
    shown = [("matrix", "Cells"), *((one.key, one.title) for one in kept)]
    contents = element("nav", {"class": "contents", "aria-label": "Contents"}, element("ul", None, *(element("li", None, link(b, f"#{a}")) for a, b in shown)))
    sections = part("sections", *(section(one, ("studies", name)) for one in kept))
    body = element("div", {"id": "study", "data-live": url("api", "studies", name, "live"), "data-stamp": stamp}, head, contents,
                   part("matrix", _matrix(name, one), title="Cells"), sections)  # fmt: skip
    return page(one.name, body, tab="/studies", script="parts.js", tabs=tabs)

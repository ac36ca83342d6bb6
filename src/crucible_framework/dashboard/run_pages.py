"""The page of one run and the page that compares several. Results, configuration and samples are the report's own sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..records import Json
from ..reports import words
from ..reports.charts import line_chart
from ..reports.document import build
from ..reports.evidence import is_baseline
from ..reports.markup import Markup, element, join
from ..reports.parts import Document, DotPlot, Interval, LineChart, Section, Series
from ..reports.parts import Table as ReportTable
from ..reports.web import render_block
from ..store import RunInfo
from .figures import Plot, figure, plot_svg, plots_in, section
from .frame import change_forms, choice, field, link, page, part, status, table, url
from .views import ChartView, Comparison, RunPage, smoothed

__all__ = ["MOST_COMPARED", "chart_svg", "compare_page", "compare_plots", "event_rows", "run_html", "run_plots"]

MOST_COMPARED = 16


def _as_line_chart(view: ChartView) -> LineChart:
    series = []
    for line in view.lines:
        series.append(Series(name=line.name, x=line.x, y=line.y, role="smooth" if line.role == "exact" else line.role))
        if line.role == "raw" and len(line.y) > 20:
            series.append(Series(name=f"{line.name}, smoothed", x=line.x, y=tuple(smoothed(line.y)), role="smooth"))
    nothing = ReportTable(title="", columns=(), rows=(), source="")
    return LineChart(title=view.title, x_label="step", y_label=view.unit, series=tuple(series), source=view.file, values=nothing, log=view.log)


def chart_svg(view: ChartView) -> str:
    """The chart as an SVG file of its own."""
    return plot_svg(_as_line_chart(view), f"chart-{view.key}")


def _plot(name: str, view: ChartView) -> Markup:
    files = [link(kind.upper(), url("runs", name, "charts", f"{view.key}.{kind}"), download=f"{name}-{view.key}.{kind}") for kind in ("svg", "csv")]
    caption = element(
        "figcaption", None, element("b", None, view.title), " ", element("span", {"class": "unit"}, view.unit), element("span", {"class": "save"}, *files)
    )
    return element(
        "figure", {"class": "plot", "data-chart": view.key}, caption, element("div", {"class": "canvas"}, line_chart(_as_line_chart(view), f"p{view.key}"))
    )


def event_rows(events: Sequence[Mapping[str, Json]]) -> list[Markup]:
    """Events as table rows, the newest first."""
    rows = []
    for event in reversed(events):
        known = ("ts", "name", "run", "span", "parent", "trace", "kind", "seq", "crc")
        rest = "  ".join(f"{key}={words.setting(value)}" for key, value in event.items() if key not in known and value not in ("", None))
        shown = (words.when(event.get("ts")), str(event.get("name", "")), words.clip(rest, 400))
        rows.append(
            element(
                "tr",
                None,
                element("td", {"class": "time"}, shown[0]),
                element("td", {"class": "event"}, shown[1]),
                element("td", {"class": "fields"}, shown[2]),
            )
        )
    return rows


def _sections(document: Document) -> list[Section]:
    """The report's sections without its curves, which the page draws live."""
    found = []
    for one in document.sections:
        blocks = tuple(block for block in one.blocks if not isinstance(block, LineChart))
        if blocks:
            found.append(replace(one, blocks=blocks))
    return found


def run_plots(view: RunPage) -> dict[str, Plot]:
    """The plots of the page that do not grow by rows, by key."""
    layers = {"layers": view.layers} if view.layers is not None else {}
    return {**layers, **plots_in(_sections(build(view.files)))}


def _layers(view: RunPage) -> Markup:
    """Gradients per layer and what the hook `health` counted; empty where no hook looked."""
    if view.layers is None and view.issues is None:
        return part("layers")
    drawn = figure(view.layers, "layers", ("runs", view.info.name), wide=True) if view.layers is not None else join()
    counted = render_block(view.issues, "issues") if view.issues is not None else join()
    return part("layers", drawn, counted, title="Gradient health")


def _watched(view: RunPage) -> Markup:
    """The same examples as the model answered them at one checkpoint after another; an answer that did not change is told once."""
    cards = []
    for one in view.watched:
        rows: list[Markup] = []
        before: str | None = None
        for step, text in one.answers:
            same = text == before
            told = element("td", {"class": "soft"}, "as before") if same else element("td", {"class": "said"}, words.clip(text, 600) or "(empty)")
            right = text.strip() == one.target.strip() and bool(one.target)
            mark = element("span", {"class": "mark-right", "title": "equals the target"}, " ✓") if right else ""
            rows.append(element("tr", None, element("th", {"scope": "row", "class": "number"}, f"{step:,}"), told, element("td", None, mark)))
            before = text
        prompt = element("details", None, element("summary", None, "Prompt"), element("div", {"class": "text"}, one.prompt))
        target = element("p", {"class": "small"}, element("span", {"class": "soft"}, "target "), words.clip(one.target, 300)) if one.target else join()
        head = element(
            "thead",
            None,
            element("tr", None, *(element("th", {"scope": "col", "class": css}, t) for t, css in (("step", "number"), ("answer", None), ("", None)))),
        )
        table_ = element("table", {"class": "watched", "aria-label": f"Answers to {one.id}"}, head, element("tbody", None, *rows))
        cards.append(element("article", {"class": "sample"}, element("h3", None, one.id), target, table_, prompt))
    if not cards:
        return part("watched")
    note = element("p", {"class": "note"}, "The same examples, answered at every checkpoint.")
    return part("watched", note, element("div", {"class": "plots"}, *cards), title="Samples as training goes")


def _head(view: RunPage, document: Document, *, report: bool) -> Markup:
    """The run's name, verdict, facts and links."""
    name = view.info.name
    facts = [(fact.label, fact.value, fact.detail) for fact in document.facts]
    cells = (element("div", None, element("dt", None, a), element("dd", None, b), element("dd", {"class": "detail"}, c)) for a, b, c in facts)
    notices = (*document.notices, *(p for p in view.problems if p not in document.notices), *((view.info.error,) if view.info.error else ()))
    links = [link("Trace", url("runs", name, "trace")), link("Metrics (CSV)", url("runs", name, "metrics.csv"), download=f"{name}.csv")]
    if report:
        links.append(link("Report", url("runs", name, "report.html")))
    return part(
        "head",
        element("p", {"class": "kicker"}, link("Runs", "/"), " / "),
        element("h1", None, name, " ", status(view.info.status)),
        element("p", {"class": "subtitle"}, document.subtitle),
        element("p", {"class": "verdict"}, document.verdict) if view.files.arms else join(),
        element("dl", {"class": "facts"}, *cells) if facts else join(),
        element("p", {"class": "links"}, *links),
        *([element("aside", {"class": "notices"}, element("ul", None, *(element("li", None, one) for one in notices)))] if notices else ()),
    )


def _curves(view: RunPage) -> Markup:
    """The plots with what steers them."""
    slider = field({"type": "range", "min": "0", "max": "0.99", "step": "0.01", "value": "0.9", "id": "smoothing", "aria-label": "Smoothing"})
    hint = element("span", {"class": "soft small"}, "drag to zoom, double-click or Esc to reset, ← → to read values")
    controls = element("div", {"class": "tools"}, element("label", None, "Smoothing ", slider), hint)
    plots = element("div", {"class": "plots", "id": "plots"}, *(_plot(view.info.name, one) for one in view.charts))
    heading = element("h2", {"id": "curves-heading"}, "Curves")
    return element("section", {"id": "curves", "aria-labelledby": "curves-heading"}, heading, controls if view.charts else join(), plots)


def _log(events: Sequence[Mapping[str, Json]]) -> Markup:
    """The last events."""
    rows = element("table", None, element("tbody", {"id": "log"}, *event_rows(events)))
    search = field({"type": "search", "id": "event-filter", "placeholder": "Filter events", "aria-label": "Filter events"})
    scroll = element("div", {"class": "scroll log", "role": "region", "aria-label": "Events", "tabindex": "0"}, rows)
    return element("section", {"id": "events", "aria-labelledby": "events-heading"}, element("h2", {"id": "events-heading"}, "Events"), search, scroll)


def _labels(info: RunInfo, *, write: bool) -> Markup:
    """What people said of the run, and where that is allowed the forms that change it."""
    told = table(("Tag", "Value"), sorted(info.tags.items()), name="Tags") if info.tags else join()
    notes = element("p", {"class": "text"}, info.notes) if info.notes else join()
    said = part("labels", told, notes, title="Tags and notes" if info.tags or info.notes or write else "")
    return join(said, change_forms(info.notes)) if write else said


def run_html(
    view: RunPage, events: Sequence[Mapping[str, Json]], cursor: str, parts: str, tabs: Sequence[tuple[str, str]], *, report: bool, token: str = ""
) -> str:  # fmt: skip
    """The whole page; `cursor` and `parts` are where its live updates begin. With a token, it may change the run's tags and notes."""
    name, document = view.info.name, build(view.files)
    kept = _sections(document)
    own = [("layers", "Gradient health", view.layers or view.issues), ("watched", "Samples as training goes", view.watched)]
    shown = [("curves", "Curves"), *((key, text) for key, text, there in own if there), *((one.key, one.title) for one in kept), ("events", "Events")]
    contents = element("nav", {"class": "contents", "aria-label": "Contents"}, element("ul", None, *(element("li", None, link(b, f"#{a}")) for a, b in shown)))
    empty = element("p", {"class": "note"}, "No metrics yet: they appear with the first step.") if not view.charts else join()
    sections = [element("div", {"data-part": f"part-{one.key}"}, section(one, ("runs", name))) for one in kept]
    about = {"id": "run", "data-run": name, "data-cursor": cursor, "data-parts": parts}
    body = element(
        "div", about, _head(view, document, report=report), contents, _curves(view), empty, _layers(view), _watched(view), *sections,
        _labels(view.info, write=bool(token)), _log(events)
    )  # fmt: skip
    return page(name, body, tab="/", script="run.js", tabs=tabs, token=token)


def _interval_rows(view: Comparison) -> list[DotPlot]:
    groups: dict[tuple[str, str], list[Interval]] = {}
    for run, where, one in view.estimates:
        if is_baseline(one.name):
            continue
        label, _, data = where.rpartition(" ")
        row = Interval(
            label=f"{run} · {label or data}",
            value=one.value,
            low=one.low,
            high=one.high,
            text=words.number(one.value),
            tone="adapter" if label == "adapter" else "base",
        )
        groups.setdefault((one.name, data), []).append(row)
    return [
        DotPlot(title=name.replace("_", " "), rows=tuple(rows), unit=f"{name.replace('_', ' ')} on data {data}", source="eval/*/evaluation.json")
        for (name, data), rows in groups.items()
    ]


def compare_plots(view: Comparison) -> dict[str, Plot]:
    """The plots of evaluations by key."""
    return {f"d{index}": one for index, one in enumerate(_interval_rows(view))}


def compare_page(view: Comparison, metric: str, tabs: Sequence[tuple[str, str]]) -> str:
    """Several runs over one metric, the settings that differ, last values, and evaluations with intervals per data set."""
    keep = (field({"type": "hidden", "name": "run", "value": name}) for name in view.names)
    pick = element("form", {"action": "/compare", "id": "pick"}, *keep, choice("metric", view.metrics or ("train/loss",), metric, "Metric", id="metric"))
    slider = field({"type": "range", "min": "0", "max": "0.99", "step": "0.01", "value": "0.6", "id": "smoothing", "aria-label": "Smoothing"})
    log = field({"type": "checkbox", "id": "log"})
    controls = element("div", {"class": "tools"}, pick, element("label", None, "Smoothing ", slider), element("label", None, log, " logarithmic"))
    data = link("CSV", url("compare.csv", query={"run": view.names, "metric": metric}), download="compare.csv", id="csv")
    caption = element(
        "figcaption",
        None,
        element("b", {"id": "chart-title"}, metric),
        element("span", {"class": "save"}, link("SVG", "#", id="svg", download="compare.svg"), data),
    )
    overlay = element(
        "figure",
        {"class": "plot wide", "id": "overlay"},
        caption,
        element("div", {"class": "canvas"}, element("p", {"class": "note"}, "The curves need JavaScript; the tables below do not.")),
    )
    titles = [join(link(name, url("runs", name)), " ", status(info.status)) for name, info in zip(view.names, view.infos, strict=True)]
    settings = table(
        ("Setting", *view.names),
        [(key, *(words.setting(value) if value is not None else words.NOTHING for value in values)) for key, values in view.settings],
        name="Settings that differ",
        empty="The runs' configurations are equal.",
    )
    last = table(
        ("Metric", *view.names),
        [(name, *(words.number(info.metrics.get(name)) for info in view.infos)) for name in view.metrics],
        name="Last values", numeric=range(1, len(view.names) + 1), empty="There are no metrics yet.",
    )  # fmt: skip
    plots = [figure(one, key, ("compare",), query={"run": view.names}) for key, one in compare_plots(view).items()]
    note = element(
        "p",
        {"class": "note"},
        "Each interval is of one number alone: overlap does not mean that two runs are equal. For a paired comparison: crucible eval --against.",
    )
    body = element(
        "div",
        {"id": "comparison", "data-metric": metric},
        element("p", {"class": "kicker"}, link("Runs", "/"), " / "),
        element("h1", None, f"{words.counted(len(view.names), 'run')} compared"),
        element(
            "p",
            {"class": "chosen"},
            *(element("span", {"class": f"chip c{i % 8}", "data-run": name}, title) for i, (name, title) in enumerate(zip(view.names, titles, strict=True))),
        ),
        controls,
        overlay,
        element("section", None, element("h2", None, "Settings that differ"), settings),
        element("section", None, element("h2", None, "Last values"), last),
        *([element("section", None, element("h2", None, "Evaluations"), note, element("div", {"class": "plots"}, *plots))] if plots else ()),
    )
    return page("Compare", body, tab="/", script="compare.js", tabs=tabs)

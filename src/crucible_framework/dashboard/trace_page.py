"""A trace as HTML: a nested list with bars over time, and each decision with what was chosen, among what and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..records import Json
from ..reports import words
from ..reports.markup import Markup, element, join, raw
from ..reports.sources import as_list, as_text
from ..traces import Trace, TraceNode
from .frame import empty_state, field, link, page, table, url

__all__ = ["render_trace", "trace_body", "trace_home", "trace_html", "trace_title", "traces_page"]

_MOST = 400
_OUTSIDE = ("traces", "outside")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def _decision(node: TraceNode, trace: Trace) -> Markup:
    chose = as_text(node.fields.get("chose"))
    among = [as_text(one) for one in as_list(node.fields.get("among"))]
    options = (element("span", {"class": "option chosen" if one == chose else "option"}, one) for one in among)
    sure = node.confidence
    facts = join(
        element("b", None, as_text(node.fields.get("what"))),
        " → ",
        element("b", {"class": "chose"}, chose),
        f"  confidence {words.number(sure)}" if sure is not None else "",
    )
    because = element("p", {"class": "because"}, "because ", node.because or "no reason was recorded")
    causes = [one.title for one in trace.why(node.id)]
    led = element("p", {"class": "soft small"}, "led to by: ", " ← ".join(causes)) if causes else join()
    return element("div", {"class": "decision"}, element("p", None, facts), element("p", {"class": "options"}, "among ", *options), because, led)


def _fields(node: TraceNode) -> str:
    return "  ".join(f"{key}={_short(value)}" for key, value in node.fields.items() if value not in ("", None))


def _short(value: Json) -> str:
    """A field's value; of a fraction six digits."""
    return f"{value:.6g}" if isinstance(value, float) else words.clip(words.setting(value), 80)


def _bar(node: TraceNode, start: float, length: float) -> Markup:
    left = 200 * (node.start_s - start) / length
    width = max(1.5, 200 * (node.end_s - node.start_s) / length)
    rect = element("rect", {"x": min(left, 198.5), "y": 3, "width": min(width, 200 - min(left, 198.5)), "height": 8, "rx": 2, "class": node.kind})
    return element("svg", {"viewBox": "0 0 200 14", "class": "timebar", "aria-hidden": "true"}, rect)


def trace_body(trace: Trace) -> Markup:
    """The list; spans unfold, the outermost are open."""
    if not trace.nodes:
        return element("p", {"class": "note"}, "There are no events yet.")
    start = min(node.start_s for node in trace.nodes)
    length = max(1e-9, max(node.end_s for node in trace.nodes) - start)
    below: dict[str, list[TraceNode]] = {}
    for node in trace.nodes[:_MOST]:
        below.setdefault(node.parent, []).append(node)
    known = {node.id for node in trace.nodes}
    tops = [node for node in trace.nodes[:_MOST] if not node.parent or node.parent not in known]

    def entry(node: TraceNode, depth: int, path: frozenset[str]) -> Markup:
        took = element("span", {"class": "took"}, words.duration(node.end_s - node.start_s) if node.end_s > node.start_s else "")
        head = join(element("span", {"class": f"kind {node.kind}"}, node.title), " ", took, " ", _bar(node, start, length))
        detail = _decision(node, trace) if node.kind == "decision" else element("span", {"class": "fields"}, _fields(node))
        inner = [one for one in below.get(node.id, ()) if one.id not in path]
        if not inner:
            return element("li", {"id": f"node-{node.id}"}, element("div", {"class": "line"}, head), detail)
        nested = element("ul", None, *(entry(one, depth + 1, path | {one.id}) for one in inner)) if depth < 40 else element("p", None, "…")
        summary = element("summary", {"class": "line"}, head, " ", element("span", {"class": "soft small"}, words.counted(len(inner), "part")))
        return element("li", {"id": f"node-{node.id}"}, element("details", {"open": "" if depth < 2 else None}, summary, detail, nested))

    cut = element("p", {"class": "note"}, f"The first {_MOST} of {len(trace.nodes):,} are shown.") if len(trace.nodes) > _MOST else join()
    return join(element("ul", {"class": "trace"}, *(entry(node, 0, frozenset((node.id,))) for node in tops)), cut)


def trace_title(run: str) -> str:
    """What the trace of a run is called; "" is what happened outside any."""
    return f"Trace of {run}" if run else "Trace of what was asked outside runs"


def trace_home(run: str) -> str:
    """The address of a run's trace; "" is what happened outside any."""
    return url("runs", run, "trace") if run else url(*_OUTSIDE)


def trace_html(name: str, trace: Trace, requests: Markup, *, text: str, kind: str, tabs: Sequence[tuple[str, str]]) -> str:
    """The page of a run's trace, with a table of its requests; without a name, of what happened outside any."""
    form = element(
        "form",
        {"class": "tools", "role": "search"},
        field({"type": "search", "name": "q", "value": text, "placeholder": "Find in the trace", "aria-label": "Find in the trace"}),
        element(
            "label",
            None,
            "Kind ",
            element(
                "select",
                {"name": "kind"},
                *(element("option", {"value": one, "selected": "" if one == kind else None}, one or "all") for one in ("", "decision", "span", "event")),
            ),
        ),
        element("button", {"type": "submit"}, "Find"),
    )
    counts = ", ".join(words.counted(count, kinds[:-1]) for kinds, count in trace.counts().items())
    shown = trace
    if text or kind:
        hits = trace.query(text=text, where=(lambda node: node.kind == kind) if kind else None)
        shown = Trace(nodes=hits)
    files = [
        link(label, url(*(("runs", name) if name else _OUTSIDE), f"trace.{suffix}"), download=f"{name or 'workspace'}-trace.{suffix}")
        for label, suffix in (("HTML", "html"), ("Mermaid", "mmd"), ("PROV-JSON", "json"))
    ]
    top = (
        element("p", {"class": "kicker"}, link("Traces", "/traces"), " / ", link(name, url("runs", name)) if name else join()),
        element("h1", None, trace_title(name)),
        element("p", {"class": "subtitle"}, counts),
        element("p", {"class": "links"}, *files),
        form,
    )
    listed = join() if text or kind else requests
    return page(trace_title(name), *top, listed, trace_body(shown), tab="/traces", tabs=tabs)


def traces_page(rows: Iterable[tuple[str, Mapping[str, int]]], tabs: Sequence[tuple[str, str]]) -> str:
    """What has events: a run's name, or "" for what happened outside runs, with how many spans, decisions and events."""
    cells = [(link(name or "outside runs", trace_home(name)), *(f"{count:,}" for count in counts.values())) for name, counts in rows]
    shown = table(("Run", "Spans", "Decisions", "Events"), cells, name="Traces", numeric=(1, 2, 3))
    if not cells:
        shown = empty_state("No run has recorded events yet.", "Every run keeps its own events; each stands here as a graph.", "crucible demo --quick")
    note = element(
        "p", {"class": "note"}, "A trace shows what a run did, inside what, and why: decisions with what was chosen, among what, and what led to them."
    )
    return page("Traces", element("div", {"class": "top"}, element("h1", None, "Traces"), note), shown, tab="/traces", tabs=tabs)


def render_trace(trace: Trace, title: str) -> str:
    """A trace as one HTML file with its style inside and no script."""
    folder = Path(__file__).parent
    style = (folder.parent / "reports" / "report.css").read_text(encoding="utf-8") + (folder / "static" / "app.css").read_text(encoding="utf-8")
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("title", None, title),
        element("style", None, raw(style)),
    )
    main = element("main", None, element("h1", None, title), trace_body(trace))
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, head, element('body', None, main))}\n"

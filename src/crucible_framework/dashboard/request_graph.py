"""One request's way as a picture: what was asked inside what, what was decided, and which answers led to which. Knows traces, no runs."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from ..reports import words
from ..reports.markup import Markup, element, join
from ..traces import Trace, TraceNode
from .frame import link, page, table
from .trace_page import trace_body

__all__ = ["graph_html", "graph_svg", "requests_table"]

REQUESTS = ("hedge.request", "route.request", "ensemble.request")
_MOST, _LISTED = 150, 50
_WIDTH, _HEIGHT, _ACROSS, _DOWN = 190, 44, 208, 84


def _tops(trace: Trace) -> list[TraceNode]:
    """The requests that no other request asked, the latest first."""
    by_id = {node.id: node for node in trace.nodes}

    def inside(node: TraceNode) -> bool:
        seen, at = {node.id}, by_id.get(node.parent)
        while at is not None and at.id not in seen:
            if at.name in REQUESTS:
                return True
            seen.add(at.id)
            at = by_id.get(at.parent)
        return False

    return [node for node in reversed(trace.nodes) if node.name in REQUESTS and not inside(node)]


def requests_table(trace: Trace, base: str) -> Markup:
    """The latest requests, each with a link to its graph at `base`; nothing where there is none."""
    tops = _tops(trace)
    if not tops:
        return join()
    rows = []
    for node in tops[:_LISTED]:
        decisions = [one for one in trace.within(node.id).nodes if one.kind == "decision"]
        vote = next((one.title for one in decisions if one.name == "ensemble.vote"), words.NOTHING)
        fired = sum(one.name == "hedge.fired" for one in decisions)
        took = words.duration(node.end_s - node.start_s)
        rows.append((link(words.when(node.start_s), f"{base}?request={quote(node.id, safe='')}"), node.name.split(".")[0], took, f"{fired:,}", vote))
    note = join() if len(tops) <= _LISTED else element("p", {"class": "note"}, f"The latest {_LISTED} of {len(tops):,}.")
    return join(
        element("h2", None, "Requests"),
        table(("Graph of the request at", "Asked by", "Took", "Calls sent again", "Vote"), rows, name="Requests", numeric=(2, 3)),
        note,
    )


def _layers(nodes: Sequence[TraceNode], edges: Sequence[tuple[str, str, str]]) -> list[list[TraceNode]]:
    """Each node below all that it comes from; a circle is cut after as many rounds as there are nodes."""
    depth = {node.id: 0 for node in nodes}
    for _ in nodes:
        before = dict(depth)
        for start, end, _kind in edges:
            depth[end] = max(depth[end], min(depth[start] + 1, len(nodes)))
        if depth == before:
            break
    found: dict[int, list[TraceNode]] = {}
    for node in nodes:
        found.setdefault(depth[node.id], []).append(node)
    return [found[level] for level in sorted(found)]


def _second_line(node: TraceNode) -> str:
    if node.kind == "decision":
        return node.because
    took = words.duration(node.end_s - node.start_s) if node.end_s > node.start_s else ""
    who = next((str(value) for key in ("member", "model", "chose") if (value := node.fields.get(key))), "")
    how = next((str(value) for key in ("error", "answer_read", "outcome") if (value := node.fields.get(key))), "")
    return " · ".join(part for part in (who, how, took) if part)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def graph_svg(trace: Trace) -> Markup:
    """The graph from above to below: dashed from a cause to what it led to, solid from a span to what happened in it without one."""
    nodes = trace.nodes[:_MOST]
    known = {node.id for node in nodes}
    edges = [edge for edge in trace.edges() if edge[0] in known and edge[1] in known and edge[0] != edge[1]]
    layers = _layers(nodes, edges)
    across = max(map(len, layers), default=1)
    width, height = across * _ACROSS, len(layers) * _DOWN
    places = {
        node.id: ((width - len(layer) * _ACROSS) / 2 + column * _ACROSS + 9, level * _DOWN + 6)
        for level, layer in enumerate(layers)
        for column, node in enumerate(layer)
    }
    caused = {end for _, end, kind in edges if kind == "because"}
    lines = []
    for start, end, kind in edges:
        if kind == "in" and end in caused:
            continue  # its causes say more; the list says where it happened
        (x1, y1), (x2, y2) = places[start], places[end]
        x1, y1, x2 = x1 + _WIDTH / 2, y1 + _HEIGHT, x2 + _WIDTH / 2
        bend = max(18.0, (y2 - y1) / 2)
        path = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"
        lines.append(element("path", {"d": path, "class": f"edge {kind}", "marker-end": "url(#arrow)"}))
    boxes = []
    for node in nodes:
        x, y = places[node.id]
        told = f"{node.title}: {_second_line(node)}" if _second_line(node) else node.title
        boxes.append(
            element(
                "g", {"class": f"node {node.kind}"}, element("title", None, told),
                element("rect", {"x": x, "y": y, "width": _WIDTH, "height": _HEIGHT, "rx": 6}),
                element("text", {"x": x + 8, "y": y + 18, "class": "name"}, _short(node.title, 24)),
                element("text", {"x": x + 8, "y": y + 34, "class": "detail"}, _short(_second_line(node), 28)),
            )
        )  # fmt: skip
    arrow = element("marker", {"id": "arrow", "viewBox": "0 0 8 8", "refX": 7, "refY": 4, "markerWidth": 7, "markerHeight": 7, "orient": "auto"},
                    element("path", {"d": "M0 0L8 4L0 8z"}))  # fmt: skip
    label = f"Causal graph of a request: {len(nodes)} nodes, {len(edges)} links; the list below says the same."
    picture = element(
        "svg", {"viewBox": f"0 0 {width} {height}", "width": width, "height": height, "class": "graph", "role": "img", "aria-label": label},
        element("defs", None, arrow), *lines, *boxes,
    )  # fmt: skip
    return element("div", {"class": "scroll graph-box", "tabindex": "0", "role": "region", "aria-label": "Causal graph"}, picture)


def graph_html(name: str, trace: Trace, request: str, *, base: str, tabs: Sequence[tuple[str, str]]) -> str:
    """The page of one request.

    Raises:
        NotFoundError: the trace has no such node.
    """
    shown = trace.within(request)
    decisions = sum(node.kind == "decision" for node in shown.nodes)
    top = (
        element("p", {"class": "kicker"}, link("Traces", "/traces"), " / ", link(name, base)),
        element("h1", None, "A request's way"),
        element("p", {"class": "subtitle"}, f"{words.when(trace[request].start_s)}, {words.counted(decisions, 'decision')}"),
        element("p", {"class": "legend graph-key"}, "Dashed: led to. Solid: happened inside. Framed in colour: a decision, with its reason."),
    )
    return page("A request's way", *top, graph_svg(shown), element("h2", None, "Step by step"), trace_body(shown), tab="/traces", tabs=tabs)

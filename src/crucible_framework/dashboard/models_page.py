"""The registry's pages: all versions, and one version with the graph of what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from ..records import ModelVersion
from ..reports import words
from ..reports.markup import Markup, element, join
from ..store import Stage
from ..store.lineage import Ancestor
from .frame import change_forms, empty_state, link, page, status, table, url

__all__ = ["lineage_svg", "model_page", "models_page"]

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 190.0, 46.0, 46.0, 18.0


def models_page(versions: Sequence[ModelVersion], broken: Sequence[str], tabs: Sequence[tuple[str, str]]) -> str:
    """All versions, the newest of each name first."""
    rows = []
    for one in sorted(versions, key=lambda v: (v.name, -v.version)):
        shown = list(one.metrics.items())[:3]
        metrics = "  ".join(f"{key} {words.number(value)}" for key, value in shown)
        tags = [element("span", {"class": "chip"}, words.clip(f"{key}={value}", 40)) for key, value in list(one.tags.items())[:4]]
        rows.append((
            link(f"{one.name}:{one.version}", url("models", one.name, str(one.version))), status(one.stage), one.checkpoint.base_model,
            metrics or words.NOTHING, join(*tags), words.size(one.checkpoint.size_bytes), words.when(one.created_at),
        ))  # fmt: skip
    drawn = table(("Version", "Stage", "Base model", "Metrics", "Tags", "Size", "Made"), rows, name="Models", numeric=(5,))
    if not rows:
        what = "A registered version is a checkpoint with a name, a stage, tags, metrics and its lineage."
        drawn = empty_state("No model is registered yet.", what, "crucible models register runs/demo judge\ncrucible models promote judge:1")
    notices = element("aside", {"class": "notices"}, element("ul", None, *(element("li", None, why) for why in broken))) if broken else join()
    top = element("div", {"class": "top"}, element("h1", None, "Models"), element("p", {"class": "subtitle"}, words.counted(len(versions), "version")))
    return page("Models", top, notices, drawn, tab="/models", tabs=tabs)


def _depths(nodes: Sequence[Ancestor]) -> dict[str, int]:
    """How many steps lie between a node and the version at the end; a circle (which no registry makes) ends the walk."""
    by_id = {node.id: node for node in nodes}
    depths: dict[str, int] = {}

    def walk(node: str, depth: int, path: frozenset[str]) -> None:
        if node in path or node not in by_id or depths.get(node, -1) >= depth:
            return
        depths[node] = depth
        for parent in by_id[node].made_from:
            walk(parent, depth + 1, path | {node})

    if nodes:
        walk(nodes[0].id, 0, frozenset())
    return depths


def _href(node: Ancestor) -> str | None:
    if node.run:
        return url("runs", node.run)
    name, _, version = node.id.rpartition(":")
    return url("models", name, version) if node.kind == "model" else None


def lineage_svg(nodes: Sequence[Ancestor]) -> Markup:
    """The graph from left (data, base model) to right (the version itself), as SVG with links."""
    depths = _depths(nodes)
    if not depths:
        return join()
    deepest = max(depths.values())
    columns: dict[int, list[Ancestor]] = {}
    for node in nodes:
        if node.id in depths:
            columns.setdefault(deepest - depths[node.id], []).append(node)
    height = max(len(column) for column in columns.values()) * (_HEIGHT + _GAP_Y) + _GAP_Y
    width = (deepest + 1) * (_WIDTH + _GAP_X) - _GAP_X
    at: dict[str, tuple[float, float]] = {}
    for index, column in columns.items():
        top = (height - len(column) * (_HEIGHT + _GAP_Y) + _GAP_Y) / 2
        for place, node in enumerate(column):
            at[node.id] = (index * (_WIDTH + _GAP_X), top + place * (_HEIGHT + _GAP_Y))
    edges = []
    for node in nodes:
        for parent in node.made_from:
            if parent in at and node.id in at:
                (x1, y1), (x2, y2) = at[parent], at[node.id]
                x1, y1, y2 = x1 + _WIDTH, y1 + _HEIGHT / 2, y2 + _HEIGHT / 2
                middle = (x1 + x2) / 2
                edges.append(element("path", {"d": f"M{x1:.0f} {y1:.0f}C{middle:.0f} {y1:.0f} {middle:.0f} {y2:.0f} {x2:.0f} {y2:.0f}", "class": "edge"}))
    boxes = []
    for node in nodes:
        if node.id in at:
            x, y = at[node.id]
            box = join(
                element("title", None, f"{node.kind}: {node.title}"),
                element("rect", {"x": x, "y": y, "width": _WIDTH, "height": _HEIGHT, "rx": 6, "class": f"node {node.kind.replace(' ', '-')}"}),
                element("text", {"x": x + 10, "y": y + 18, "class": "unit"}, node.kind),
                element("text", {"x": x + 10, "y": y + 36, "class": "name"}, words.clip(node.title, 26).partition(" … [")[0]),
            )
            href = _href(node)
            boxes.append(element("a", {"href": href}, box) if href else element("g", None, box))
    told = "; ".join(f"{node.title} from {', '.join(node.made_from)}" for node in nodes if node.made_from)
    frame: dict[str, str | float | None] = {
        "viewBox": f"-1 -1 {width + 2:.0f} {height + 2:.0f}",
        "class": "chart lineage",
        "role": "group",
        "aria-label": f"Lineage: {told}",
        "width": width,
    }
    return element("div", {"class": "scroll"}, element("svg", frame, *edges, *boxes))


def _section(title: str, content: Markup) -> Markup:
    return element("section", None, element("h2", None, title), content)


def _changes(version: ModelVersion) -> Markup:
    """The forms of a dashboard that may write."""
    stages = (element("option", {"value": one, "selected": "" if one == version.stage else None}, one) for one in get_args(Stage))
    stage = element(
        "form", {"class": "tools change", "data-change": "stage"}, element("label", None, "Stage ", element("select", {"name": "stage"}, *stages)),
        element("button", {"type": "submit"}, "Set"),
    )  # fmt: skip
    return element("section", {"id": "change"}, element("h2", None, "Change"), stage, change_forms())


def model_page(version: ModelVersion, nodes: Sequence[Ancestor], tabs: Sequence[tuple[str, str]], token: str = "") -> str:
    """One version; with a token, the page may change its stage and tags."""
    name, checkpoint = f"{version.name}:{version.version}", version.checkpoint
    facts = [
        ("Base model", checkpoint.base_model),
        ("LoRA", f"rank {checkpoint.lora.rank}, alpha {checkpoint.lora.alpha:g}, on {', '.join(checkpoint.lora.target_modules)}"),
        ("Steps", f"{checkpoint.step:,}"),
        ("Size", words.size(checkpoint.size_bytes)),
        ("Made", words.when(version.created_at)),
        ("sha256", checkpoint.sha256),
    ]
    card = link("Model card (Markdown)", url("models", version.name, str(version.version), "card.md"), download=f"{version.name}-{version.version}.md")
    metrics = [(key, words.number(value)) for key, value in sorted(version.metrics.items())]
    body = (
        element("p", {"class": "kicker"}, link("Models", "/models"), " / "),
        element("h1", None, name, " ", status(version.stage)),
        element("p", {"class": "subtitle"}, version.description) if version.description else join(),
        element("p", {"class": "links"}, card),
        _section("Made from", lineage_svg(nodes)),
        _section("Facts", table(("Fact", "Value"), facts, name="Facts")),
        _section("Metrics", table(("Metric", "Value"), metrics, name="Metrics", numeric=(1,), empty="None were given.")),
        _section("Tags", table(("Tag", "Value"), sorted(version.tags.items()), name="Tags", empty="None.")),
    )
    changes = _changes(version) if token else join()
    return page(name, *body, changes, tab="/models", tabs=tabs, script="change.js" if token else "", token=token)

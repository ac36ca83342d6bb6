"""A document as one HTML file: style, drawings and text inside it, nothing loaded from anywhere, no script.

All text goes through `element`, which escapes it. This file knows no run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .charts import dot_plot, line_chart
from .diagrams import rank_diagram, scatter_plot
from .markup import Markup, element, join, raw
from .parts import Block, Document, DotPlot, LineChart, Listing, Note, Ranks, Sample, Samples, Scatter, Section, Table

__all__ = ["render_block", "render_html", "render_section"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_GROUPS = {"fixed": "only the adapter is right", "broken": "only the base is right"}


def render_html(document: Document) -> str:
    """The whole file."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, f"{document.title} – {'training report' if document.of == 'run' else 'study'}"),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("style", None, raw(style)),
    )
    sections = (render_section(section) for section in document.sections)
    footer = element(
        "footer", None, element("p", None, f"Made by Crucible Framework. Every number is read from the files of the {document.of} named beside it.")
    )
    page = element("html", {"lang": "en"}, head, element("body", None, element("main", None, _top(document), *sections, footer)))
    return f"<!doctype html>\n{page}\n"


def _top(document: Document) -> Markup:
    header = element(
        "header",
        None,
        element(
            "p",
            {"class": "kicker"},
            "Training report " if document.of == "run" else "Study ",
            element("span", {"class": f"status {'done' if document.finished else 'open'}"}, document.status),
        ),
        element("h1", None, document.title),
        element("p", {"class": "subtitle"}, document.subtitle),
    )
    summary = element(
        "section",
        {"class": "summary", "aria-label": "Summary"},
        element("p", {"class": "lead"}, document.summary),
        element("p", {"class": "verdict"}, document.verdict),
    )
    facts = element(
        "dl",
        {"class": "facts"},
        *(
            element("div", None, element("dt", None, fact.label), element("dd", None, fact.value), element("dd", {"class": "detail"}, fact.detail))
            for fact in document.facts
        ),
    )
    links = (element("li", None, element("a", {"href": f"#{section.key}"}, section.title)) for section in document.sections)
    contents = element("nav", {"aria-label": "Contents"}, element("ul", None, *links))
    return join(header, summary, facts if document.facts else "", _notices(document), contents)


def _notices(document: Document) -> Markup:
    if not document.notices:
        return join()
    items = (element("li", None, notice) for notice in document.notices)
    return element(
        "aside", {"class": "notices", "aria-label": "Notices"}, element("p", {"class": "heading"}, "Know before you read on"), element("ul", None, *items)
    )


def render_section(section: Section) -> Markup:
    """One section with its heading; other pages show it under the same style sheet."""
    heading = element("h2", {"id": f"{section.key}-heading"}, section.title)
    blocks = (_block(block, f"{section.key}{index}") for index, block in enumerate(section.blocks))
    return element("section", {"id": section.key, "aria-labelledby": f"{section.key}-heading"}, heading, *blocks)


def _block(block: Block, key: str) -> Markup:
    match block:
        case Table():
            return _table(block, key)
        case LineChart():
            values = element("details", None, element("summary", None, "Values"), _table(block.values, f"{key}-values"))
            return _figure(block, key, line_chart(block, key), values)
        case Scatter() | Ranks():
            drawn = scatter_plot(block, key) if isinstance(block, Scatter) else rank_diagram(block, key)
            values = element("details", None, element("summary", None, "Values"), _table(block.values, f"{key}-values"))
            return _figure(block, key, drawn, values)
        case DotPlot():
            return _figure(block, key, dot_plot(block, key))
        case Samples():
            rule = element("p", {"class": "note"}, block.rule, " ", _source(block.source))
            return join(rule, *(_sample(sample) for sample in block.items))
        case Listing():
            caption = _caption(block.title, "", block.source, f"{key}-caption")
            return element("figure", None, caption, element("div", {"class": "code", "tabindex": "0"}, block.text))
        case Note():
            return element("p", {"class": "note"}, block.text, *((" ", _source(block.source)) if block.source else ()))


def render_block(block: Block, key: str) -> Markup:
    """One block by itself; `key` (a-z, 0-9) makes its ids unique on the page."""
    return _block(block, key)


def _source(source: str) -> Markup:
    return element("span", {"class": "source"}, f"from {source}")


def _caption(title: str, note: str, source: str, key: str) -> Markup:
    return element("figcaption", {"id": key}, element("b", None, title), *((" ", element("span", None, note)) if note else ()), " ", _source(source))


def _figure(block: LineChart | DotPlot | Scatter | Ranks, key: str, *body: Markup) -> Markup:
    return element("figure", None, _caption(block.title, block.note, block.source, f"{key}-caption"), *body)


def _table(table: Table, key: str) -> Markup:
    def cells(row: tuple[str, ...], *, head: bool) -> Iterator[Markup]:
        for index, text in enumerate(row):
            kind = "number" if index in table.numeric else None
            if head or index == 0:
                yield element("th", {"scope": "col" if head else "row", "class": kind}, text)
            else:
                yield element("td", {"class": kind}, text)

    # where pairs have no heading of their own, "Value" above them says nothing
    bare = len(table.columns) == 2 and not table.columns[0]
    head = join() if bare else element("thead", None, element("tr", None, *cells(table.columns, head=True)))
    body = element("tbody", None, *(element("tr", None, *cells(row, head=False)) for row in table.rows))
    drawn = element("table", {"class": "pairs" if len(table.columns) == 2 else None, "aria-labelledby": f"{key}-caption"}, head, body)
    scroll = element("div", {"class": "scroll", "role": "region", "aria-labelledby": f"{key}-caption", "tabindex": "0"}, drawn)
    return element("figure", None, _caption(table.title, table.note, table.source, f"{key}-caption"), scroll)


def _mark(right: bool | None, score: str) -> Markup:
    if right is None:
        return element("span", {"class": "mark-none"}, "not scored" if score == "–" else f"score {score}")
    return element("span", {"class": "mark-right" if right else "mark-wrong"}, "✓ right" if right else "✗ wrong")


def _answer(who: str, text: str, mark: Markup | None = None) -> Markup:
    head = element("p", {"class": "who"}, element("b", None, who), *((" ", mark) if mark else ()))
    body = element("div", {"class": "text"}, text) if text else element("div", {"class": "text empty"}, "(empty)")
    return element("div", {"class": f"answer {who.lower()}"}, head, body)


def _sample(sample: Sample) -> Markup:
    about = [sample.id or "no id", *([f"document {sample.document}"] if sample.document else []), *([_GROUPS[sample.group]] if sample.group in _GROUPS else [])]
    prompt = element("details", None, element("summary", None, "Prompt"), element("div", {"class": "text"}, sample.prompt)) if sample.prompt else join()
    answers = element(
        "div",
        {"class": "answers"},
        _answer("Target", sample.target),
        _answer("Base", sample.base, _mark(sample.base_right, sample.base_score)),
        _answer("Adapter", sample.adapter, _mark(sample.adapter_right, sample.adapter_score)),
    )
    return element("article", {"class": "sample"}, element("h3", None, " · ".join(about)), answers, prompt)

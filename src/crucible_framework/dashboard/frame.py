"""What all pages share: the frame with its navigation, and small pieces. Text is escaped by `element`; no page has inline script or style."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from urllib.parse import quote, urlencode

from ..records import Estimate
from ..reports import words
from ..reports.markup import Markup, element, join

__all__ = [
    "button",
    "change_forms",
    "changed_parts",
    "choice",
    "empty_state",
    "estimate_words",
    "field",
    "link",
    "page",
    "part",
    "spark",
    "status",
    "table",
    "url",
]

_TABS = (
    ("Runs", "/"), ("Experiments", "/studies"), ("Ensembles", "/ensembles"), ("Requests", "/requests"), ("Models", "/models"), ("Traces", "/traces"),
)  # fmt: skip


def url(*parts: str, query: Mapping[str, str | Sequence[str]] | None = None) -> str:
    """A path of the dashboard from raw parts, each quoted whole."""
    path = "/" + "/".join(quote(part, safe="") for part in parts)
    return f"{path}?{urlencode(query, doseq=True)}" if query else path


def _name(key: str) -> str:
    return key.strip("_").replace("_", "-")


def link(text: str, href: str, **attributes: str) -> Markup:
    """A link inside the dashboard."""
    return element("a", {"href": href, **{_name(key): value for key, value in attributes.items()}}, text)


def field(attributes: Mapping[str, str | None]) -> Markup:
    """An input element."""
    return Markup(element("input", attributes).removesuffix("</input>"))


def button(text: str, **attributes: str | None) -> Markup:
    """A button."""
    return element("button", {"type": "button", **{_name(key): value for key, value in attributes.items()}}, text)


def choice(name: str, options: Sequence[str], chosen: str, label: str, **attributes: str) -> Markup:
    """A labelled list to choose from."""
    shown = (element("option", {"value": one, "selected": "" if one == chosen else None}, one) for one in options)
    return element("label", None, label, " ", element("select", {"name": name, **attributes}, *shown))


def status(text: str) -> Markup:
    """A run's status, told by its word and a colour."""
    return element("span", {"class": f"state {text}"}, text)


_drawn: ContextVar[dict[str, tuple[str, str]] | None] = ContextVar("crucible_parts", default=None)


def part(key: str, *children: str, title: str = "") -> Markup:
    """A section that live updates replace as a whole; its digest says whether a browser has it already."""
    heading = element("h2", {"id": f"{key}-heading"}, title) if title else join()
    digest = hashlib.blake2b("\0".join((title, *children)).encode("utf-8", "replace"), digest_size=6).hexdigest()
    about = {"id": key, "data-part": key, "data-digest": digest, "aria-labelledby": f"{key}-heading" if title else None}
    made = element("section", about, heading, *children)
    if (drawn := _drawn.get()) is not None:
        drawn[key] = digest, made
    return made


def changed_parts(make: Callable[[], object], known: str) -> dict[str, object]:
    """What a browser needs to bring its page up to date: the keys of all parts in `order`, and those `parts` that it has otherwise or not at all.

    Args:
        make: draws the page.
        known: "key:digest" of each part that the browser has, with commas between.
    """
    drawn: dict[str, tuple[str, str]] = {}
    token = _drawn.set(drawn)
    try:
        make()
    finally:
        _drawn.reset(token)
    have = {key: digest for key, _, digest in (one.rpartition(":") for one in known.split(","))}
    return {"order": list(drawn), "parts": {key: made for key, (digest, made) in drawn.items() if have.get(key) != digest}}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, name: str, numeric: Sequence[int] = (), empty: str = "") -> Markup:
    """A table whose cells may be markup; each cell knows its column's title, so that it can be shown as a card on a narrow screen."""
    if not rows:
        return element("p", {"class": "note"}, empty)
    head = element("tr", None, *(element("th", {"scope": "col", "class": "number" if i in numeric else None}, c) for i, c in enumerate(columns)))
    body = (
        element("tr", None, *(element("td", {"data-label": columns[i], "class": "number" if i in numeric else None}, cell) for i, cell in enumerate(row)))
        for row in rows
    )
    drawn = element("table", {"class": "cards", "aria-label": name}, element("thead", None, head), element("tbody", None, *body))
    return element("div", {"class": "scroll", "role": "region", "aria-label": name, "tabindex": "0"}, drawn)


def empty_state(what: str, text: str, code: str) -> Markup:
    """What a page shows before it has anything to show: what is missing, what would be here, and how to get it."""
    return element(
        "div", {"class": "empty"}, element("p", None, what), element("p", {"class": "soft"}, text), element("pre", None, code)
    )  # fmt: skip


def spark(points: Sequence[tuple[float, float]], label: str) -> Markup:
    """A curve in the size of a word, on a logarithmic scale of its own where it can be."""
    if len(points) < 2:
        return element("span", {"class": "soft"}, words.NOTHING)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    width, height = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    at = " ".join(f"{2 + 116 * (x - min(xs)) / width:.1f},{2 + 24 * (max(ys) - y) / height:.1f}" for x, y in points)
    told = f"{label}: from {words.number(ys[0])} to {words.number(ys[-1])}"
    return element("svg", {"viewBox": "0 0 120 28", "class": "spark", "role": "img", "aria-label": told}, element("polyline", {"points": at}))


def estimate_words(estimate: Estimate) -> str:
    """ "0.73 [0.64, 0.81]"."""
    ends = f" [{words.number(estimate.low, 2)}, {words.number(estimate.high, 2)}]" if math.isfinite(estimate.low + estimate.high) else ""
    return words.number(estimate.value) + ends


def change_forms(notes: str | None = None) -> Markup:
    """The forms that set a tag and, unless None, the notes of what the page shows; for a dashboard that may write."""
    submit = element("button", {"type": "submit"}, "Set")
    one = element(
        "form", {"class": "tools change", "data-change": "tag"},
        element("label", None, "Tag ", field({"type": "text", "name": "key", "required": "", "maxlength": "64", "autocomplete": "off"})),
        element("label", None, "Value ", field({"type": "text", "name": "value", "maxlength": "256", "placeholder": "empty takes it away"})), submit,
    )  # fmt: skip
    area = element("textarea", {"name": "notes", "rows": "3", "maxlength": "20000", "aria-label": "Notes"}, notes or "")
    text = join() if notes is None else element("form", {"class": "tools change", "data-change": "notes"}, element("label", None, "Notes ", area), submit)
    return join(one, text, element("p", {"id": "said", "class": "note", "role": "status", "aria-live": "polite"}))


def page(title: str, *body: str, tab: str = "", script: str = "", tabs: Sequence[tuple[str, str]] = (), token: str = "") -> str:
    """A whole page. `script` is a module below /static; `token` goes along with what asks or changes something."""
    links = (element("a", {"href": href, "aria-current": "page" if href == tab else None}, text) for text, href in (*_TABS, *tabs))
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        *([element("meta", {"name": "crucible-token", "content": token})] if token else ()),
        element("title", None, f"{title} – Crucible"),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("link", {"rel": "stylesheet", "href": "/static/report.css"}),
        element("link", {"rel": "stylesheet", "href": "/static/app.css"}),
        element("script", {"src": "/static/theme.js"}),
        *([element("script", {"src": f"/static/{script}", "type": "module"})] if script else ()),
    )
    bar = element(
        "header",
        {"class": "bar"},
        element("a", {"class": "skip", "href": "#main"}, "Skip to content"),
        element("a", {"class": "brand", "href": "/"}, "Crucible"),
        element("nav", {"aria-label": "Pages"}, *links),
        element("span", {"id": "live", "class": "live", "role": "status", "aria-live": "polite"}, ""),
        button("Theme", id="theme", class_="quiet", title="Light, dark, or as the system says"),
    )
    document = element("html", {"lang": "en"}, head, element("body", None, bar, element("main", {"id": "main"}, *body)))
    return f"<!doctype html>\n{document}\n"

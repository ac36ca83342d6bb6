"""The playground's page: a question, and each model's answer beside the others."""

from __future__ import annotations

from collections.abc import Sequence

from ..inference.voting import votes
from ..reports.markup import element
from .frame import button, field, page

__all__ = ["play_page"]


def play_page(names: Sequence[str], token: str, tabs: Sequence[tuple[str, str]]) -> str:
    """The page; answers come by script."""
    boxes = (
        element("label", {"class": "chip"}, field({"type": "checkbox", "name": "model", "value": name, "checked": "" if i < 3 else None}), " ", name)
        for i, name in enumerate(names)
    )
    numbers = (("max_tokens", "Tokens", "64", "1", "1024", "1"), ("temperature", "Temperature", "0", "0", "2", "0.1"), ("seed", "Seed", "", "0", "", "1"))
    settings = (
        element("label", None, f"{title} ", field({"type": "number", "name": key, "value": value, "min": low, "max": high or None, "step": step}))
        for key, title, value, low, high, step in numbers
    )
    rules = (element("option", {"value": name}, name.replace("_", " ") or "none") for name in ("", *votes.names()))
    form = element(
        "form",
        {"id": "ask"},
        element("label", None, "System ", element("textarea", {"name": "system", "rows": "2", "placeholder": "optional"})),
        element("label", None, "Question ", element("textarea", {"name": "prompt", "rows": "5", "required": ""})),
        element("fieldset", None, element("legend", None, "Models"), *boxes),
        element(
            "div",
            {"class": "tools"},
            *settings,
            element("label", None, field({"type": "checkbox", "id": "probabilities"}), " show token probabilities"),
            element("label", None, "Vote ", element("select", {"name": "vote"}, *rules)),
        ),
        button("Ask", type="submit", id="send", title="Ctrl+Enter"),
    )
    note = element("p", {"class": "note"}, "All chosen models get the same question, settings and seed; a vote then says what they say together.")
    answers = element("div", {"id": "answers", "class": "play", "aria-live": "polite"})
    return page(
        "Playground",
        element("div", {"class": "top"}, element("h1", None, "Playground"), note),
        form,
        answers,
        tab="/playground",
        script="play.js",
        tabs=tabs,
        token=token,
    )

"""The only place that writes HTML and SVG: elements whose text and attributes are escaped by construction.

A plain string is always text. Only what `element` or `raw` made counts as markup, and `raw` is for constants of this folder.
"""

from __future__ import annotations

import html
from collections.abc import Mapping

from .words import visible

__all__ = ["Markup", "element", "join", "raw"]

_VOID = frozenset(("br", "col", "hr", "link", "meta"))


class Markup(str):
    """Text that is markup already; nothing else may be one."""

    __slots__ = ()


def raw(constant: str) -> Markup:
    """A constant of this folder as markup (style sheet, doctype)."""
    return Markup(constant)


def _text(value: str) -> str:
    return value if isinstance(value, Markup) else html.escape(visible(value), quote=True)


def join(*children: str) -> Markup:
    """Pieces of markup and text beside each other."""
    return Markup("".join(map(_text, children)))


def element(name: str, attributes: Mapping[str, str | float | None] | None = None, *children: str) -> Markup:
    """An element; attributes of None are left out, numbers are written with at most two decimals."""
    written = [name]
    for key, value in (attributes or {}).items():
        if value is not None:
            shown = value if isinstance(value, str) else f"{round(value, 2):g}" if abs(value) < 1e5 else f"{value:.0f}"
            written.append(f'{key}="{html.escape(visible(shown), quote=True)}"')
    start = f"<{' '.join(written)}>"
    return Markup(start) if name in _VOID else Markup(f"{start}{join(*children)}</{name}>")

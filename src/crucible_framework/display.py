"""Small HTML tables for notebooks. Every text is escaped; what cannot be seen is shown as a sign. Knows no record."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

__all__ = ["table_html"]

_MOST_ROWS, _MOST_SIGNS = 50, 300


def _text(value: object) -> str:
    """A value in a cell: numbers with four digits, nothing as a dash, invisible characters as U+FFFD."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    shown = str(value)
    if len(shown) > _MOST_SIGNS:
        shown = f"{shown[:_MOST_SIGNS]}… [{len(shown) - _MOST_SIGNS:,} more]"
    return html.escape("".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in shown), quote=True)


def table_html(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """A titled table; rows beyond fifty are counted. The style is the notebook's own."""
    found = [list(row) for row in rows]
    head = "".join(f"<th>{_text(one)}</th>" for one in headers)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in found[:_MOST_ROWS])
    more = f"<tr><td>… and {len(found) - _MOST_ROWS:,} more</td></tr>" if len(found) > _MOST_ROWS else ""
    below = f"<p>{_text(note)}</p>" if note else ""
    return f"<div><p><b>{_text(title)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}{more}</tbody></table>{below}</div>"

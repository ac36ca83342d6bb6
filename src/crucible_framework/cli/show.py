"""Records as tables for a terminal. It computes nothing but the width of a number."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table

from ..records import Estimate, Finding

__all__ = ["estimates", "figure", "finding_text", "size", "table", "when"]


def figure(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def size(count_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"


def when(seconds: float | None) -> str:
    """Local date and time."""
    return "–" if not seconds else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> RenderableType:
    """A plain table, or the sentence `empty` where there are no rows."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        shown.add_column(header, overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(cell) for cell in row))
    return shown if shown.row_count else empty


def _cell(value: object) -> str:
    from rich.markup import escape

    return escape(str(value))


def estimates(found: Iterable[Estimate]) -> RenderableType:
    """Each estimate with its interval, its method and what it rests on."""
    rows = []
    for one in found:
        rests = f"{one.n}" + (f" in {one.clusters} documents" if one.clusters else "")
        rows.append((one.name, figure(one.value), f"[{figure(one.low)}, {figure(one.high)}]", f"{one.level:.0%}", rests, one.method))
    return table(("measure", "value", "interval", "level", "examples", "method"), rows, "Nothing could be estimated.")


def finding_text(found: Finding) -> str:
    """A comparison in one line."""
    low, high = found.interval
    verdict = "better" if low > 0 else "worse" if high < 0 else "not shown to differ"
    return f"{found.name}: difference {found.effect:+.3f}, {found.level:.0%} interval [{low:+.3f}, {high:+.3f}], n = {found.n}: {verdict} ({found.test})."

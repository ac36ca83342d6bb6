"""Gradient norms per layer over the steps of a run as a heat map: where the signal vanishes, explodes or is not finite.

The numbers are those that the hooks `norms` and `flow` report under `grad/norm/` and `grad/flow/`. This file draws nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from . import words
from .panels import HeatMap
from .parts import Table

__all__ = ["issue_table", "layer_map"]

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_MOST_ROWS, _MOST_COLUMNS = 48, 60
_LIMITS = (1e-7, 1e3)
"""Those of the hook `health` where it is given none."""
_PREFIXES = ("grad/norm/", "grad/flow/")


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)


def _by_block(rows: Mapping[str, Mapping[float, float]]) -> dict[str, dict[float, float]]:
    """The layers of each block together: the root of the sum of their squares."""
    squares: dict[str, dict[float, float]] = {}
    for layer, values in rows.items():
        number = _BLOCK.search(layer)
        block = squares.setdefault(f"block {int(number[1])}" if number else "other", {})
        for step, value in values.items():
            block[step] = block.get(step, 0.0) + value * value
    return {block: {step: math.sqrt(value) for step, value in values.items()} for block, values in squares.items()}


def layer_map(columns: Mapping[str, Sequence[tuple[float, float]]]) -> HeatMap | None:
    """The map of a run's metrics, (step, value) pairs by name; None where no hook reported norms.

    More than 48 layers are joined by block. Where there are more steps than cells, a cell shows the largest norm of its steps, so that no
    peak is lost.
    """
    prefix = next((one for one in _PREFIXES if any(name.startswith(one) for name in columns)), "")
    if not prefix:
        return None
    rows: Mapping[str, Mapping[float, float]] = {name.removeprefix(prefix): dict(points) for name, points in columns.items() if name.startswith(prefix)}
    if prefix == "grad/flow/":
        rows = _by_block(rows)
    joined = len(rows) > _MOST_ROWS
    rows = _by_block(rows) if joined else rows
    steps = sorted({step for values in rows.values() for step in values})
    if not steps:
        return None
    size = math.ceil(len(steps) / _MOST_COLUMNS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    names = sorted(rows, key=_natural)

    def cell(values: Mapping[float, float], part: Sequence[float]) -> float | None:
        inside = [values[step] for step in part if step in values]
        return max(inside) if inside else None

    several = f" Each cell is the largest norm of {size} steps." if size > 1 else ""
    return HeatMap(
        title="Gradient norm per layer", rows=tuple(names), columns=tuple(f"{part[0]:,.0f}" for part in parts),
        values=tuple(tuple(cell(rows[name], part) for part in parts) for name in names), unit="L2 norm, before clipping", column_label="step",
        source="metrics.jsonl", log=True, limits=_LIMITS, note=f"{'Layers of a block together. ' if joined else ''}Before anything changes them.{several}",
    )  # fmt: skip


def issue_table(columns: Mapping[str, Sequence[tuple[float, float]]]) -> Table | None:
    """How often the hook `health` saw layers whose gradient vanished, exploded or was not finite; None where it did not run."""
    found = {name.removeprefix("grad/health/"): points for name, points in columns.items() if name.startswith("grad/health/")}
    if not found:
        return None
    rows = []
    for kind, points in found.items():
        hits = [(step, count) for step, count in points if count > 0]
        last = f"{hits[0][0]:,.0f} … {hits[-1][0]:,.0f}" if hits else words.NOTHING
        most = f"{max(count for _, count in hits):,.0f}" if hits else "0"
        rows.append((kind.replace("_", " "), f"{len(hits):,} of {len(points):,}", most, last))
    columns_ = ("Issue", "Steps with it", "Layers at once, at most", "From … to step")
    return Table(title="Issues", columns=columns_, rows=tuple(rows), source="metrics.jsonl", numeric=(1, 2, 3))

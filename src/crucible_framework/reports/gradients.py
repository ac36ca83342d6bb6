"""What gradient hooks recorded, as charts and tables of a run's report; and how a metric is read from a run's rows.

A metric of many layers is drawn as its greatest, median and least, with a table of layers beside it. This file does not know hooks: it reads names under
`grad/` in metrics.jsonl, so hooks of other packages that use these names are shown too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Literal

from . import words
from .parts import Block, LineChart, Series, Table
from .sources import RunFiles, as_number

__all__ = ["gradient_blocks", "points", "values"]

_SHOWN_STEPS = 10
_SHOWN_LAYERS = 24
_FILE = "metrics.jsonl"
_ROLES: Mapping[str, Literal["raw", "smooth", "held_out"]] = {"greatest": "raw", "median": "smooth", "least": "held_out"}
_LAYERED = {"grad/norm/": "Gradient norm by layer", "grad/flow/": "Gradient norm by block, in the model's order"}
_SINGLE = {
    "grad/cosine/all": ("Cosine between steps", "cosine with the step before"),
    "grad/noise_scale": ("Gradient noise scale", "examples"),
    "grad/flow_ratio": ("Gradient norm of the first block over the last one's", "ratio"),
}
_HEALTH = {"grad/health/vanishing": "Vanishing", "grad/health/exploding": "Exploding", "grad/health/not_finite": "Not finite"}
_EXAMPLES = {"grad/example_norm/max": "greatest", "grad/example_norm/median": "median"}


def points(run: RunFiles, name: str) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """Steps and values of a metric; a value that is not finite is a gap. Rows without the metric are left out."""
    rows = [(step, as_number(row.get(name))) for row in run.metrics if name in row and (step := as_number(row.get("step"))) is not None]
    rows.sort(key=lambda row: row[0])
    return tuple(x for x, _ in rows), tuple(y for _, y in rows)


def values(title: str, names: Mapping[str, str], run: RunFiles, source: str) -> Table:
    """Some steps in words: the first, the last and some between, and those of a metric that few steps have."""
    at: dict[float, dict[str, float | None]] = {}
    for name in names:
        for x, y in zip(*points(run, name), strict=True):
            at.setdefault(x, {})[name] = y
    steps = sorted(at)
    every = max(1, math.ceil((len(steps) - 1) / (_SHOWN_STEPS - 1))) if len(steps) > 1 else 1
    sparse = {x for name in names if len(points(run, name)[0]) <= _SHOWN_STEPS for x in points(run, name)[0]}
    chosen = sorted({*steps[:-1][::every], *steps[-1:], *sparse})
    rows = tuple((f"{step:,.0f}", *(words.number(at[step].get(name)) for name in names)) for step in chosen)
    note = f"{len(chosen)} of {len(steps):,} steps; all are in {source}." if len(chosen) < len(steps) else ""
    return Table(title=title, columns=("Step", *names.values()), rows=rows, source=source, numeric=tuple(range(len(names) + 1)), note=note)


def gradient_blocks(run: RunFiles) -> list[Block]:
    """Charts and tables of what is on file; empty where no hook recorded anything."""
    found: list[Block | None] = []
    for prefix, title in _LAYERED.items():
        found += _layers(run, prefix, title)
    found += [_single(run, name, title, unit) for name, (title, unit) in _SINGLE.items()]
    found += [_examples(run), _histogram(run), _health(run)]
    return [block for block in found if block is not None]


def _named(run: RunFiles, prefix: str) -> list[str]:
    return sorted({name for row in run.metrics for name in row if name.startswith(prefix)})


def _layers(run: RunFiles, prefix: str, title: str) -> Iterator[Block]:
    names = _named(run, prefix)
    if not names:
        return
    at: dict[float, dict[str, float]] = {}
    for name in names:
        for x, y in zip(*points(run, name), strict=True):
            if y is not None:
                at.setdefault(x, {})[name] = y
    steps = sorted(at)
    chosen = steps[:: max(1, math.ceil((len(steps) - 1) / 5))] if len(steps) > 1 else steps
    chosen = sorted({*chosen, *steps[-1:]})
    shown = names[:: max(1, math.ceil(len(names) / _SHOWN_LAYERS))]
    rows = tuple((name.removeprefix(prefix), *(words.number(at[step].get(name)) for step in chosen)) for name in shown)
    parts = [note for few, all_, note in (
        (shown, names, f"{len(shown)} of {len(names)} layers"), (chosen, steps, f"{len(chosen)} of {len(steps):,} steps"),
    ) if len(few) < len(all_)]  # fmt: skip
    table = Table(
        title=f"{title}, at some steps", columns=("Layer", *(f"step {step:,.0f}" for step in chosen)), rows=rows, source=_FILE,
        numeric=tuple(range(1, len(chosen) + 1)), note=f"{' and '.join(parts)}; all are in {_FILE}." if parts else "",
    )  # fmt: skip
    if len(names) == 1 or len(steps) == 1:
        yield table
        return
    series = [
        Series(name=f"{kind} of {len(names)}", x=tuple(steps), y=tuple(_of(kind, at[step]) for step in steps), role=role) for kind, role in _ROLES.items()
    ]
    yield LineChart(title=title, x_label="optimizer step", y_label="L2 norm before clipping", series=tuple(series), source=_FILE, values=table, log=True)


def _of(kind: str, found: Mapping[str, float]) -> float:
    return statistics.median(found.values()) if kind == "median" else max(found.values()) if kind == "greatest" else min(found.values())


def _single(run: RunFiles, name: str, title: str, unit: str) -> Block | None:
    x, y = points(run, name)
    if not x:
        return None
    few = len(x) < 2 * _SHOWN_STEPS
    line = Series(name=unit, x=x, y=y, role="held_out" if few else "raw")
    table = values(f"{title} at some steps", {name: title}, run, _FILE)
    return LineChart(title=title, x_label="optimizer step", y_label=unit, series=(line,), source=_FILE, values=table)


def _examples(run: RunFiles) -> Block | None:
    if not points(run, "grad/example_norm/max")[0]:
        return None
    title = "Gradient norms of single examples"
    series = [Series(name=kind, x=points(run, name)[0], y=points(run, name)[1], role=_ROLES[kind]) for name, kind in _EXAMPLES.items()]
    table = values(f"{title}, at some steps", {**_EXAMPLES, "grad/example_norm/top_share": "share of the greatest"}, run, _FILE)
    return LineChart(
        title=title, x_label="optimizer step", y_label="L2 norm, of each example's part of the step", series=tuple(series), source=_FILE, values=table
    )


def _histogram(run: RunFiles) -> Table | None:
    names = _named(run, "grad/magnitude/")
    rows = [row for row in run.metrics if any(name in row for name in names)]
    if not rows:
        return None
    chosen = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
    order = sorted(names, key=lambda name: {"below": -math.inf, "above": math.inf}.get(label := name.rpartition("/")[2]) or float(label))
    shown = [name for name in order if any(as_number(row.get(name)) for row in chosen)]
    cells = tuple((name.rpartition("/")[2], *(words.percent(as_number(row.get(name)) or 0.0, 1) for row in chosen)) for name in shown)
    columns = ("Entries from", *(f"step {as_number(row.get('step')) or 0:,.0f}" for row in chosen))
    return Table(title="Magnitudes of gradient entries", columns=columns, rows=cells, source=_FILE, numeric=tuple(range(1, len(columns))),
                 note="Shares of all entries by decade; decades without entries are left out.")  # fmt: skip


def _health(run: RunFiles) -> Table | None:
    seen = [name for name in _HEALTH if points(run, name)[0]]
    if not seen:
        return None
    rows = []
    for name in seen:
        x, y = points(run, name)
        hit = [(step, value) for step, value in zip(x, y, strict=True) if value]
        worst = f"{max(value for _, value in hit):,.0f}" if hit else "0"
        rows.append((_HEALTH[name], f"{len(hit):,} of {len(x):,}", worst, f"{hit[0][0]:,.0f}" if hit else words.NOTHING))
    columns = ("Layers whose gradient is", "Steps", "Most layers at once", "First step")
    return Table(title="Gradient health", columns=columns, rows=tuple(rows), source=_FILE, numeric=(1, 2, 3))

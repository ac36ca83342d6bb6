"""Figures of a study: learning curves, differences item by item, cost against quality, and ranks. Reads its files; sums and means, no tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, cast

from ..files import read_lines
from ..records import Json
from . import words
from .diagrams import undominated
from .parts import Block, LineChart, Point, Ranks, Scatter, Series, Table
from .sources import as_list, as_number, as_table, as_text

__all__ = ["costs", "curves", "item_differences", "ranks"]

Rows = Sequence[Mapping[str, Json]]
_HUES = ("hue0", "hue1", "hue2", "hue3", "hue4", "hue5")
_SHOWN, _SHOWN_ITEMS = 8, 12


def _steps(folder: Path, cells: Rows, name: str) -> dict[str, dict[float, list[float]]]:
    """arm → step → the metric in each seed and data set."""
    found: dict[str, dict[float, list[float]]] = {}
    for cell in cells:
        path = folder / "cells" / as_text(cell.get("id")) / "run" / "metrics.jsonl"
        for row in read_lines(path) if path.is_file() else ():
            step, value = as_number(row.get("step")), as_number(row.get(name))
            if step is not None and value is not None and math.isfinite(value):
                found.setdefault(as_text(cell.get("arm")), {}).setdefault(step, []).append(value)
    return found


def curves(folder: Path, cells: Rows) -> Iterator[Block]:
    """Loss over steps, the mean of each arm over its seeds, a figure for each data set and for training and held-out data."""
    for data in dict.fromkeys(as_text(cell.get("data")) for cell in cells):
        here = [cell for cell in cells if cell.get("data") == data]
        for name, title in (("train/loss", "training batches"), ("dev/loss", "held-out data")):
            arms = _steps(folder, here, name)
            if not arms:
                continue
            shown = list(arms.items())[: len(_HUES)]
            series = tuple(
                Series(
                    name=arm,
                    x=tuple(sorted(steps)),
                    y=tuple(fmean(steps[step]) for step in sorted(steps)),
                    role=cast("Literal['hue0', 'hue1', 'hue2', 'hue3', 'hue4', 'hue5']", hue),
                )
                for (arm, steps), hue in zip(shown, _HUES, strict=False)
            )
            at = sorted({step for steps in arms.values() for step in steps})
            every = max(1, math.ceil(len(at) / _SHOWN))
            picked = sorted({*at[::every], at[-1]})
            rows = tuple(
                (f"{step:,.0f}", *(words.number(fmean(steps[step])) if step in steps else words.NOTHING for steps in arms.values())) for step in picked
            )
            source, count = "cells/*/run/metrics.jsonl", len(arms)
            values = Table(title=f"Loss on {title} at some steps, {data}", columns=("Step", *arms), rows=rows, source=source, numeric=tuple(range(count + 1)))
            left = f" The first {len(_HUES)} of {count} arms; all are in the values." if count > len(_HUES) else ""
            yield LineChart(
                title=f"Learning curves on {data}: {title}", x_label="optimizer step", y_label="loss, nats per weight", series=series, source=source,
                values=values, note=f"The mean over seeds. Arms with different losses are not comparable in height.{left}", log=False,
            )  # fmt: skip


def item_differences(contrasts: Rows, shares: frozenset[str]) -> Iterator[Block]:
    """For each declared comparison, how every example changed, sorted."""
    for one in contrasts:
        each = {item: value for item, raw in as_table(one.get("per_item")).items() if (value := as_number(raw)) is not None}
        if len(each) < 2:
            continue
        metric, name = as_text(one.get("metric")), f"{as_text(one.get('name'))} on {as_text(one.get('data'))}"
        ordered = sorted(each.items(), key=lambda pair: (pair[1], pair[0]))
        ups, downs = sum(value > 0 for value in each.values()), sum(value < 0 for value in each.values())
        scale = 100.0 if metric in shares else 1.0
        ends = [*ordered[: _SHOWN_ITEMS // 2], *ordered[-(_SHOWN_ITEMS // 2) :]] if len(ordered) > _SHOWN_ITEMS else ordered
        rows = tuple((item, words.signed(scale * value)) for item, value in ends)
        unit = f"difference in {metric}{', points' if metric in shares else ''}"
        note = f"{ups} of {len(each)} examples rose, {downs} fell, {len(each) - ups - downs} stayed; each is the mean over seeds and other settings."
        yield LineChart(
            title=f"Example by example: {name}", x_label="examples, sorted by their difference", y_label=unit, source="findings.json", note=note,
            series=(Series(name=unit, x=tuple(map(float, range(1, len(ordered) + 1))), y=tuple(scale * value for _, value in ordered), role="points"),),
            values=Table(title=f"The largest falls and rises: {name}", columns=("Example", unit), rows=rows, source="findings.json", numeric=(1,)),
        )  # fmt: skip


def costs(arms: Rows, cells: Rows, timings: Rows, shares: frozenset[str], primary: str) -> Iterator[Block]:
    """Seconds of one cell (training and asking) against the primary score of its arm, a figure for each data set."""
    seconds: dict[str, float] = {}
    for row in timings:
        total = sum(as_number(row.get(key)) or 0.0 for key in ("train_s", "eval_s"))
        seconds[as_text(row.get("id"))] = seconds.get(as_text(row.get("id")), 0.0) + total
    for cell in cells:  # an ensemble costs what its members cost
        members = [as_text(one) for one in as_table(as_table(cell.get("ensemble")).get("members")).values()]
        if members and as_text(cell.get("id")) in seconds:
            seconds[as_text(cell.get("id"))] += sum(seconds.get(one, 0.0) for one in members)
    less = primary == "target_nll"
    for data in dict.fromkeys(as_text(one.get("data")) for one in arms):
        spent: dict[str, list[float]] = {}
        for cell in cells:
            if cell.get("data") == data and as_text(cell.get("id")) in seconds:
                spent.setdefault(as_text(cell.get("arm")), []).append(seconds[as_text(cell.get("id"))])
        points = []
        for one in arms:
            estimate, name = as_table(one.get("estimate")), as_text(one.get("arm"))
            numbers = [as_number(estimate.get(key)) for key in ("value", "low", "high")]
            if one.get("data") == data and one.get("metric") == primary and name in spent and None not in numbers:
                value, low, high = cast("list[float]", numbers)
                points.append(Point(label=name, x=fmean(spent[name]), y=value, low=low, high=high))
        if len(points) < 2:
            continue
        best = undominated([(p.x, p.y) for p in points], less_is_better=less)
        drawn = tuple(Point(label=p.label, x=p.x, y=p.y, low=p.low, high=p.high, best=top) for p, top in zip(points, best, strict=True))
        scale = 100.0 if primary in shares else 1.0
        rows = tuple((p.label, words.duration(p.x), words.number(scale * p.y), "yes" if p.best else "no") for p in drawn)
        source, label = "timings.jsonl, findings.json", f"{primary}{', %' if primary in shares else ''}"
        table = Table(title=f"Cost and quality on {data}", columns=("Arm", "Time of a cell", label, "Undominated"), rows=rows, source=source, numeric=(1, 2))
        yield Scatter(
            title=f"Cost against quality on {data}", x_label="seconds of one cell, training and asking", y_label=primary, points=drawn, source=source,
            values=table, share=primary in shares,
            note="Joined are the arms that no other beats in both; whether they truly differ is for the findings to say. An ensemble's time "
            "is that of its members. Times are of this machine.",
        )  # fmt: skip


def ensembles(cells: Rows, shares: frozenset[str], primary: str) -> Iterator[Block]:
    """How the members of each ensemble agreed and what became of it, beside the best member of the same seed."""
    scores = {as_text(cell.get("id")): as_number(as_table(as_table(cell.get("estimates")).get(primary)).get("value")) for cell in cells}
    less, share, rows = primary == "target_nll", primary in shares, []
    for cell in cells:
        told = as_table(cell.get("ensemble"))
        if not told:
            continue
        known = {arm: value for arm, one in as_table(told.get("members")).items() if (value := scores.get(as_text(one))) is not None}
        best = (min if less else max)(known, key=lambda arm: known[arm], default="")
        shown = [words.NOTHING if v is None else words.percent(v) if share else words.number(v) for v in (scores.get(as_text(cell.get("id"))), known.get(best))]
        rows.append((
            as_text(cell.get("arm")), words.setting(cell.get("seed")), as_text(cell.get("data")), as_text(told.get("vote")),
            ", ".join(as_table(told.get("members"))), shown[0], f"{shown[1]} ({best})" if best else words.NOTHING,
            words.percent(as_number(told.get("agreement")) or 0.0), *(words.number(as_number(told.get(key))) for key in ("tied", "abstained")),
        ))  # fmt: skip
    if rows:
        columns = ("Ensemble", "Seed", "Data", "Vote", "Members", primary, "Best member", "Agreement", "Tied", "No winner")
        note = (
            "Agreement: the winner's mean share of the votes. The best member is chosen by this score itself, so it looks better than it is; whether the "
            "ensemble beats a member is for the findings to say."
        )
        yield Table(title="Ensembles", columns=columns, rows=tuple(rows), source="cells/*.json", numeric=(1, 5, 7, 8, 9), note=note)


def ranks(rankings: Rows) -> Iterator[Block]:
    """The critical-difference diagram of each data set."""
    for one in rankings:
        places = {name: value for name, raw in as_table(one.get("mean_ranks")).items() if (value := as_number(raw)) is not None}
        range_of = {as_text(rank.get("name")): rank for rank in map(as_table, as_list(one.get("ranks")))}
        overall, distance = as_table(one.get("overall")), as_number(one.get("critical_difference"))
        rows = tuple(
            (name, f"{value:.2f}", *(words.setting(as_table(range_of.get(name)).get(key)) for key in ("best", "worst")),
             ", ".join(map(as_text, as_list(as_table(range_of.get(name)).get("tied")))) or words.NOTHING)
            for name, value in sorted(places.items(), key=lambda pair: pair[1])
        )  # fmt: skip
        columns = ("Arm", "Mean rank", "Best possible", "Worst possible", "Not shown to differ from")
        title, p = f"Ranks in {as_text(one.get('metric'))} on {as_text(one.get('data'))}", as_number(overall.get("p_value"))
        count, unit = as_number(one.get("rows")) or 0.0, as_text(one.get("unit"))
        note = (
            f"Mean ranks over {words.counted(int(count), unit)}, seeds averaged. Whether any differ (Friedman): p {words.number(p, 2)}. "
            f"Arms under one bar are not shown to differ (Nemenyi, all pairs together). For the adapters at hand: other {unit}s, not other seeds."
        )
        yield Ranks(
            title=title, places=tuple(places.items()), sets=tuple(tuple(map(as_text, as_list(names))) for names in as_list(one.get("sets"))),
            distance=distance if distance is not None else math.nan, source="findings.json", note=note,
            values=Table(title=f"{title}: what each arm's rank may be", columns=columns, rows=rows, source="findings.json", numeric=(1, 2, 3)),
        )  # fmt: skip

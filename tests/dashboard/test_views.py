"""What the pages show, before any HTML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.dashboard.reading import Workspace
from crucible_framework.dashboard.runs_page import filtered, ordered
from crucible_framework.dashboard.views import RunRow, chart_views, compare_runs, estimates_of, run_page, run_row, run_rows, smoothed
from crucible_framework.errors import NotFoundError
from crucible_framework.files import write_json
from crucible_framework.records import Estimate


def test_a_row_says_what_the_run_did(workspace: Path) -> None:
    row = run_row(Workspace(workspace), "run-0")
    assert (row.name, row.status, row.base_model, row.steps, row.dev_loss) == ("run-0", "done", "smollm2-135m", 40, 0.6)
    assert row.loss == pytest.approx(0.5 + 2 * math.exp(-4))
    assert row.score is not None
    assert (row.score.name, row.score.value) == ("label_accuracy", 0.7)
    assert row.spark[0] == pytest.approx((1.0, 0.5 + 2 * math.exp(-0.1)))
    assert row.duration_s is not None
    assert [one.name for one in run_rows(Workspace(workspace))] == ["run-2", "run-1", "run-0"]


def test_charts_show_known_fields_first_and_every_other_number(workspace: Path) -> None:
    views = chart_views(Workspace(workspace), "run-0")
    assert [view.title for view in views] == ["Loss", "Gradient norm", "Learning rate", "Speed", "Memory", "train/extra"]
    assert [(line.field, line.role) for line in views[0].lines] == [("train/loss", "raw"), ("dev/loss", "held_out")]
    assert views[3].lines[0].y[-1] == 840.0
    assert [view.lines[0].role for view in views] == ["raw", "raw", "exact", "raw", "exact", "raw"], "a schedule is not smoothed"
    zoomed = chart_views(Workspace(workspace), "run-0", low=5, high=9)
    assert zoomed[0].lines[0].x == (5, 6, 7, 8, 9)


def test_comparison_names_only_settings_that_differ(workspace: Path) -> None:
    found = compare_runs(Workspace(workspace), ["run-0", "run-1", "run-0"])
    assert found.names == ("run-0", "run-1")
    assert dict(found.settings) == {"adam.lr": (1e-4, 2e-4), "max_steps": (40, 50)}
    assert found.metrics[:3] == ("train/loss", "dev/loss", "grad/global_norm")
    assert [(run, one.value) for run, _, one in found.estimates] == [("run-0", 0.7), ("run-0", 0.4), ("run-1", 0.7), ("run-1", 0.4)]
    with pytest.raises(NotFoundError):
        compare_runs(Workspace(workspace), ["run-0", "run-9"])


def test_a_setting_that_one_run_lacks_is_shown_as_missing(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, steps=2)
    config = tmp_path / "b" / "config.json"
    write_json(config, {"base_model": "smollm2-135m", "extra": {"deep": 1}})
    settings = dict(compare_runs(Workspace(tmp_path), ["a", "b"]).settings)
    assert settings["extra.deep"] == (None, 1)
    assert settings["max_steps"] == (2, None)
    config.write_text("{")
    assert dict(compare_runs(Workspace(tmp_path), ["a", "b"]).settings)["base_model"] == ("smollm2-135m", None)


def test_damage_is_left_out_and_named(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "a", steps=3, evaluated=True)
    (folder / "eval" / "adapter" / "evaluation.json").write_text("{")
    write_json(folder / "eval" / "base" / "evaluation.json", {"label": "base", "estimates": [{"name": "x"}, 3, {"name": "y", "value": 1}]})
    found = estimates_of(folder)
    assert [(label, one.name, one.value) for label, _, one in found] == [("base", "y", 1.0)]
    assert math.isnan(found[0][2].low)
    page = run_page(Workspace(tmp_path), "a")
    assert any("evaluation.json" in problem for problem in page.problems)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 0.99))
def test_smoothing_starts_at_the_first_value_and_stays_within_all(values: list[float], weight: float) -> None:
    found = smoothed(values, weight)
    assert len(found) == len(values)
    assert found[0] == pytest.approx(values[0], rel=1e-6, abs=1e-6)
    assert min(values) - 1e-3 <= min(found) <= max(found) <= max(values) + 1e-3
    if weight == 0:
        assert found == pytest.approx(values)


def row(name: str, loss: float | None = None, score: float | None = None, status: str = "done", model: str = "tiny") -> RunRow:
    estimate = None if score is None else Estimate(name="accuracy", value=score, low=0, high=1, n=3)
    return RunRow(
        name=name, status=status, base_model=model, steps=10, loss=loss, dev_loss=None, score=estimate, created_at=1.0, duration_s=5.0, spark=(), error=""
    )


ROWS = [row("alpha", 0.5, 0.9), row("beta", 0.1, status="failed"), row("gamma", None, model="smollm2")]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["alpha", "beta", "gamma"]),
        ("AL", ["alpha"]),
        ("status:done", ["alpha", "gamma"]),
        ("status:done smol", ["gamma"]),
        ("model:tiny loss<0.3", ["beta"]),
        ("loss>=0.5", ["alpha"]),
        ("score=0.9", ["alpha"]),
        ("steps<=10 name:a", ["alpha", "beta", "gamma"]),
        ("loss<e", []),
        ("loss>0.5", []),
        ("nothing", []),
    ],
)
def test_the_filter_means_every_word(query: str, names: list[str]) -> None:
    assert [one.name for one in filtered(ROWS, query)] == names


@given(st.lists(st.one_of(st.none(), st.floats(allow_infinity=False)), max_size=20), st.booleans())
def test_order_keeps_every_row_and_puts_missing_values_last(losses: list[float | None], descending: bool) -> None:
    rows = [dataclasses.replace(row(f"r{i}"), loss=loss) for i, loss in enumerate(losses)]
    found = [one.loss for one in ordered(rows, "loss", descending=descending)]
    there = [loss for loss in losses if loss is not None and not math.isnan(loss)]
    assert found[: len(there)] == sorted(there, reverse=descending)
    assert len(found) == len(rows)


def test_an_unknown_column_orders_by_time() -> None:
    rows = [dataclasses.replace(row("old"), created_at=1.0), dataclasses.replace(row("new"), created_at=2.0)]
    assert [one.name for one in ordered(rows, "no such", descending=True)] == ["new", "old"]

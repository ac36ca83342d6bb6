"""Runs that lack parts, have broken ones or hold any JSON at all: there is a report, it names what is missing and invents nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_framework.files import lock, write_json
from crucible_framework.records import Json
from crucible_framework.reports import write_report
from crucible_framework.reports.document import build
from crucible_framework.reports.sources import read_run
from crucible_framework.reports.text import render_markdown
from crucible_framework.reports.web import render_html

if TYPE_CHECKING:
    from tests.reports.conftest import Page

MakeRun = Callable[..., Path]
Report: TypeAlias = "Callable[[Path], tuple[Page, str]]"
Parsed: TypeAlias = "Callable[[str], Page]"
Change: TypeAlias = Callable[[Path, str, object], None]


# --------------------------------------------------------------------------------------------------------- missing parts
def test_without_an_evaluation_nothing_is_claimed(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    page, markdown = report(make_run(tmp_path / "few", steps=2, evaluated=False, command=""))
    for text in (page.text(), markdown):
        assert "Whether the adapter answers better is not known: nothing was evaluated." in text
        assert "No evaluation is on file" in text
        assert "No answers of base and adapter to the same items are on file." in text
        assert "So few steps show no trend." in text
        assert "The command was not recorded." in text
    assert not any("accuracy" in text for text in page.inside("facts"))


def test_only_one_side_evaluated(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "half", compared=False)
    for path in (folder / "eval/base").iterdir():
        path.unlink()
    page, _ = report(folder)
    assert "the base model was not evaluated" in page.text()
    assert re.search(r"Adapter has label accuracy [\d.]+ % \(95 % interval [\d.]+ to [\d.]+ %\) on 96 claims\.", page.text())


def test_no_common_score(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "apart")
    body = json.loads((folder / "eval/base/evaluation.json").read_text())
    body["estimates"] = [{"name": "only_here", "value": 3.5, "low": None, "high": None, "n": 4}]
    write_json(folder / "eval/base/evaluation.json", body)
    page, _ = report(folder)
    assert "the two were not scored by a common measure" in page.text()
    assert "only here 3.50 (no interval on file)" in page.text()


def test_an_unfinished_evaluation_is_said(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "cut")
    (folder / "eval/adapter/evaluation.json").unlink()
    page, _ = report(folder)
    assert "eval/adapter is unfinished: 96 rows are there, evaluation.json is not, so it has no estimates." in page.text()


@pytest.mark.parametrize("name", ["config.json", "data.json", "metrics.jsonl", "timings.jsonl", "findings.json", "run.json", "eval/base/scores.jsonl"])
@pytest.mark.parametrize("damage", [b"{broken\n{}\n", b"[1, 2]\nnull\n\n", b"\xff\xfe\x00", None])
def test_a_missing_or_damaged_part_is_named_and_the_rest_stays(report: Report, make_run: MakeRun, tmp_path: Path, name: str, damage: bytes | None) -> None:
    folder = make_run(tmp_path / "first", steps=5)
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage)
    page, markdown = report(folder)
    torn = damage == b"\xff\xfe\x00" and name.endswith(".jsonl")  # the last line of a log may be torn: it never was a row
    if name in ("config.json", "data.json", "metrics.jsonl", "run.json") or (damage is not None and not torn):
        assert name in " ".join(page.inside("notices"))
        assert name in markdown
    assert "CC0-1.0" in page.text()
    assert str(tmp_path) not in page.text(), "a report may leave the machine"


def test_a_damaged_checkpoint_is_named(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=5)
    (folder / "checkpoints/00000005-final/adapter_model.safetensors").write_bytes(b"short")
    page, _ = report(folder)
    assert "checkpoints/00000005-final cannot be used" in " ".join(page.inside("notices"))
    assert any(text.startswith("cannot be used") for text in page.inside("td"))
    assert str(tmp_path) not in page.text()


def test_a_run_that_was_killed_is_interrupted_and_one_that_works_is_running(report: Report, change: Change, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=30, evaluated=False)
    change(folder / "run.json", "status", "running")
    change(folder / "run.json", "result", None)
    change(folder / "config.json", "max_steps", 500)
    page, _ = report(folder)
    assert page.inside("status") == ["interrupted"]
    assert "was trained for 30 steps of 500 planned on minifact" in page.text()
    assert "The run is interrupted. Its numbers are those so far." in page.text()
    with lock(folder / ".lock"):
        assert report(folder)[0].inside("status") == ["still running"]


def test_a_failed_run_says_why(report: Report, change: Change, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=3, evaluated=False)
    change(folder / "run.json", "status", "failed")
    change(folder / "run.json", "error", "NumericError: the loss is nan at step 4")
    assert "The run is failed: NumericError: the loss is nan at step 4." in report(folder)[0].text()


def test_values_that_are_not_finite_are_gaps(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=4, evaluated=False)
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None}, {"step": 3, "train/loss": 1.0}, {"train/loss": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = report(folder)
    assert "Gaps are values that are not finite." in page.text()
    assert sum(tag == "circle" for tag, _ in page.tags) == 2  # both sides of the gap stand alone
    assert "9" not in page.inside("td")


def test_losses_are_said_to_be_of_fixed_examples_only_where_the_metrics_tell(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=4, evaluated=False)
    assert "Loss before, fixed training examples" in report(folder)[0].text()
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    page, _ = report(folder)
    assert "fixed training examples" not in page.text()
    assert "Loss before" in page.inside("th")


def test_metrics_without_loss_or_gradient(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=4, evaluated=False)
    (folder / "metrics.jsonl").write_text('{"step": 1, "other": 2}\n')
    assert "metrics.jsonl holds neither a loss nor a gradient norm." in report(folder)[0].text()


def test_a_folder_with_only_a_broken_run_json_still_gives_a_report(report: Report, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    page, markdown = report(tmp_path)
    for said in ("no training step is on file", "Missing or empty: config.json, data.json, metrics.jsonl.", "run.json was left out"):
        assert said in page.text()
        assert said in markdown
    assert page.inside("status") == ["status unknown"]


# ------------------------------------------------------------------------------------------------------------------ fuzz
NAMES = (
    "name", "status", "result", "environment", "lora", "rank", "adam", "train", "dev", "truncated", "completions", "card", "estimates", "params", "omitted",
    "value", "low", "high", "n", "clusters", "level", "findings", "samples", "effect", "interval", "id", "scores", "target", "completion", "prompt", "files",
    "step", "train/loss", "probe/loss", "grad/global_norm", "label_accuracy", "initial_loss", "final_loss", "duration_s", "created_at", "labels", "command",
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8), st.sampled_from(NAMES)
)
TREES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES), inner, max_size=8)), max_leaves=10)
TABLES = st.dictionaries(st.sampled_from(NAMES), TREES, max_size=8)
FILES = ("run.json", "config.json", "data.json", "findings.json", "samples.json", "eval/base/evaluation.json", "eval/adapter/evaluation.json")
LOGS = ("metrics.jsonl", "timings.jsonl", "eval/base/scores.jsonl", "eval/adapter/scores.jsonl")


def test_many_steps_stay_small_and_keep_their_peak(parsed: Parsed, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", steps=4, evaluated=False)
    rows = [{"step": step, "train/loss": 50.0 if step == 7777 else 1.0 + (step % 10) / 10} for step in range(1, 20001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(folder, ("html",))[0].read_text()
    lines = [a["points"] or "" for tag, a in parsed(html).tags if tag == "polyline"]
    assert len(lines) == 2
    assert max(line.count(" ") for line in lines) < 800
    heights = [float(point.split(",")[1]) for point in lines[0].split()]
    assert sorted(heights)[1] - min(heights) > 100, "the one peak stands out"
    assert "mean of the last 50 batches" in html


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25)
@given(bodies=st.tuples(*[st.one_of(TABLES, TREES) for _ in FILES]), rows=st.tuples(*[st.lists(TABLES, max_size=3) for _ in LOGS]))
def test_any_json_in_any_file_gives_a_sound_report(parsed: Parsed, tmp_path: Path, bodies: tuple[Json, ...], rows: tuple[list[Json], ...]) -> None:
    for name, body in zip(FILES, bodies, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(body))
    for name, lines in zip(LOGS, rows, strict=True):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = build(read_run(tmp_path))
    page = parsed(render_html(document))
    assert render_markdown(document).startswith("# ")
    for _, attributes in page.tags:
        for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
            assert math.isfinite(float(attributes.get(key) or 0))

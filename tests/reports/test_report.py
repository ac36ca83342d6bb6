"""What a report says of a run: the right facts, honestly, with nothing invented and everything missing named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

from crucible_framework import events
from crucible_framework.errors import ConfigError, NotFoundError, UnknownNameError
from crucible_framework.files import read_json, read_lines, write_json
from crucible_framework.records import Json
from crucible_framework.reports import FORMATS, write_report

if TYPE_CHECKING:
    from tests.reports.conftest import Page

MakeRun = Callable[..., Path]
Report: TypeAlias = "Callable[[Path], tuple[Page, str]]"
Parsed: TypeAlias = "Callable[[str], Page]"
Change: TypeAlias = Callable[[Path, str, object], None]


# ---------------------------------------------------------------------------------------------------------- golden facts
def test_both_formats_state_the_golden_facts(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    page, markdown = report(folder)
    rows = {label: read_lines(folder / "eval" / label / "scores.jsonl") for label in ("base", "adapter")}
    right = {label: sum(row["scores"]["label_accuracy"] == 1.0 for row in found) for label, found in rows.items()}  # type: ignore[index, call-overload]
    before, after = (f"{100 * right[label] / 96:.1f} %" for label in ("base", "adapter"))
    findings = json.loads((folder / "findings.json").read_text())["findings"]
    low, high = (100 * end for end in findings[1]["interval"])
    sentence = (
        f"A rank-8 LoRA adapter of smollm2-135m was trained for 120 steps on minifact (240 examples). Label accuracy on 96 claims went from {before}",
        f"before to {after}",
        f"a paired difference of {100 * (right['adapter'] - right['base']) / 96:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, ",
        "clustered by 32 documents)",
        "The adapter is better than the base model on this data: the interval of the difference excludes 0.",
        "Always giving the commonest label would score 33.3 %, below the adapter's interval.",
        "crucible train --data minifact --set lora.rank=8", "CC0-1.0", "a" * 64, "c" * 64, "Example CPU", "2.13.0", "1 min 02 s", "q_proj, v_proj",
        str(json.loads((folder / "run.json").read_text())["fingerprint"]), "2.41 nats per weight", "00000120-final", "max_steps", "1.2 GB",
        "Prompts cut at their start", "Training completions that were longer than max_length and lost their ends: 1.", "lora.dropout",
    )  # fmt: skip
    for fact in sentence:
        assert fact in page.text(), fact
        assert fact in markdown, fact
    both = sum(a["scores"]["label_accuracy"] == b["scores"]["label_accuracy"] == 1.0 for a, b in zip(rows["base"], rows["adapter"], strict=True))  # type: ignore[index, call-overload]
    assert f"Only adapter right (fixed): {right['adapter'] - both}; only base right (broken): {right['base'] - both}." in page.text()


def test_the_file_needs_nothing_from_anywhere(parsed: Parsed, make_run: MakeRun, tmp_path: Path) -> None:
    source = write_report(make_run(tmp_path / "first"), ("html",))[0].read_text(encoding="utf-8")
    page = parsed(source)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "form", "base", "audio", "video", "use", "image"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "action", "srcset", "style"):
                assert value == "data:," or (value or "").startswith("#")
    style = "".join(page.inside("style"))
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    policy = next(attributes["content"] for tag, attributes in page.tags if tag == "meta" and attributes.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_has_its_target(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    page, _ = report(make_run(tmp_path / "first"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [part for _, a in page.tags for name in ("aria-labelledby", "aria-describedby") for part in (a.get(name) or "").split()]
    wanted += [(a["href"] or "")[1:] for tag, a in page.tags if tag == "a"]
    assert len(wanted) > 20
    assert set(wanted) <= set(ids)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert all(a.get("role") == "img" for tag, a in page.tags if tag == "svg")
    assert [text for path, text in page.texts if path[-1].startswith("h1")] == ["first"]


# ------------------------------------------------------------------------------------------------------------- traceable
def numbers_in(value: Json) -> Iterator[float]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(found) for found in re.findall(r"\d+(?:\.\d+)?", value))
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)


def numbers_on_file(folder: Path) -> list[float]:
    found = [number for path in folder.rglob("*.json") for number in numbers_in(read_json(path))]
    for path in folder.rglob("*.jsonl"):
        if path.name != "events.jsonl":
            rows = read_lines(path)
            found += [float(len(rows)), *(number for row in rows for number in numbers_in(list(row.values())))]
    return [*found, *(float(path.stat().st_size) for path in folder.rglob("*") if path.is_file())]


def traceable(token: str, known: list[float]) -> bool:
    """Whether some number on file, as it is, in percent, in thousands, minutes or a power of ten, rounds to the token."""
    digits = len(token.partition(".")[2])
    value = float(token.replace(",", ""))
    scales = (1.0, 100.0, 1e-3, 1e-6, 1e-9, *(10.0**e for e in range(1, 7)))
    return any(round(abs(number) * scale, digits) == value for number in known for scale in scales)


def test_every_number_of_summary_and_tables_is_on_file(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    known = numbers_on_file(folder)
    page, _ = report(folder)
    shown = [text for name in ("summary", "facts", "notices", "td", "th") for text in page.inside(name)]
    shown = [text for text in shown if not re.search(r"[0-9a-f]{64}|10[⁻⁰¹-⁹]|rank-|UTC", text)]
    tokens = {token for text in shown for token in re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?", text.replace("\u00a0", " "))}
    derived = {
        "1",
        "02",
        "9",
        "10",
        "26",
        "27",
        "42",
        "44",
        "19",
        "20",
        "35",
        "36",
        "61",
        "64",
        "68",
        "71",
        "28",
        "29",
        "95",
        "135",
    }  # counts of outcomes, levels
    median = round(sum(sorted(float(row["tokens_per_s"]) for row in read_lines(folder / "timings.jsonl"))[59:61]) / 2)  # type: ignore[arg-type]
    untraced = {token for token in tokens - derived - {str(median)} if not traceable(token, known)}
    assert len(tokens) > 60
    assert not untraced
    assert not traceable("0.73146", known), "the test must be able to refuse a number"


def test_a_changed_file_changes_the_report(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    before = write_report(folder)[1].read_text()
    body = json.loads((folder / "eval/adapter/evaluation.json").read_text())
    body["estimates"][0].update(value=0.4321, low=0.4111, high=0.4562)
    write_json(folder / "eval/adapter/evaluation.json", body)
    after = write_report(folder)[1].read_text()
    assert "43.2" not in before
    assert after.count("43.2\u00a0%") == 2  # summary and table
    assert "41.1 to 45.6" in after


def test_the_same_files_give_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    first = [path.read_bytes() for path in write_report(folder)]
    assert [path.read_bytes() for path in write_report(folder)] == first


# --------------------------------------------------------------------------------------------------------------- honesty
def test_an_interval_with_zero_is_not_shown_to_be_better(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    page, markdown = report(make_run(tmp_path / "same", chances=(0.5, 0.52)))
    for text in (page.text(), markdown):
        assert "The adapter is not shown to be better or worse: the interval of the difference includes 0." in text
        assert "is better than" not in text


def test_a_worse_adapter_is_called_worse(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    page, _ = report(make_run(tmp_path / "worse", chances=(0.8, 0.3)))
    assert "The adapter is worse than the base model on this data" in page.text()
    assert "a paired difference of −" in page.text()


def test_less_perplexity_is_better(report: Report, change: Change, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "low")
    for label, value in (("base", 9.0), ("adapter", 7.5)):
        estimate = {"name": "perplexity", "value": value, "low": value - 0.5, "high": value + 0.5, "n": 96}
        change(folder / "eval" / label / "evaluation.json", "estimates", [estimate])
    finding = {"name": "perplexity", "test": "paired t test", "statistic": -3, "p_value": 0.01, "effect": -1.5, "interval": [-2.5, -0.5], "n": 96}
    write_json(folder / "findings.json", {"findings": [finding]})
    page, _ = report(folder)
    assert "Perplexity on 96 claims went from 9 (95 % interval 8.50 to 9.50) before to 7.50" in page.text()
    assert "The adapter is better than the base model" in page.text()


@pytest.mark.parametrize("flip", [False, True])
def test_a_finding_of_base_minus_adapter_is_turned_round(report: Report, make_run: MakeRun, tmp_path: Path, flip: bool) -> None:
    folder = make_run(tmp_path / "turned")
    finding = json.loads((folder / "findings.json").read_text())["findings"][1]
    low, high = finding["interval"]
    if flip:
        finding |= {"name": "label_accuracy", "effect": -finding["effect"], "interval": [-high, -low]}
    write_json(folder / "findings.json", {"findings": [finding]})
    assert f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}" in report(folder)[0].text()


@pytest.mark.parametrize(
    ("name", "effect"), [("f1: adapter − base", None), ("label_accuracy against majority", None), ("label_accuracy", 0.123), ("label_accuracy", "x")]
)
def test_a_finding_about_something_else_is_not_taken_for_the_difference(report: Report, make_run: MakeRun, tmp_path: Path, name: str, effect: object) -> None:
    folder = make_run(tmp_path / "other")
    finding = json.loads((folder / "findings.json").read_text())["findings"][1] | {"name": name}
    write_json(folder / "findings.json", {"findings": [finding | ({} if effect is None else {"effect": effect})]})
    page, _ = report(folder)
    assert "no comparison of the two is on file, so the difference has no interval" in page.text()
    assert "is better than" not in page.text()


def test_a_finding_without_an_interval_shows_nothing(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "open")
    finding = json.loads((folder / "findings.json").read_text())["findings"][1] | {"interval": []}
    write_json(folder / "findings.json", {"findings": [finding]})
    page, _ = report(folder)
    assert "The adapter is not shown to be better: its difference has no interval on file." in page.text()


def test_different_data_is_not_compared(report: Report, change: Change, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "apart")
    change(folder / "eval/adapter/evaluation.json", "card", {"name": "other", "sha256": "d" * 64})
    change(folder / "eval/adapter/evaluation.json", "params", {"max_tokens": 8})
    page, _ = report(folder)
    assert "Whether the adapter is better is not known: the two were evaluated on different data." in page.text()
    assert "sampled with different settings: max_tokens, stop, temperature" in page.text()
    assert "Difference" not in page.inside("facts")


def test_evaluating_on_the_training_data_is_said(report: Report, change: Change, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "leak")
    for label in ("base", "adapter"):
        change(folder / "eval" / label / "evaluation.json", "card", {"name": "minifact", "sha256": "a" * 64, "task": "verify"})
    page, _ = report(folder)
    assert "Evaluated on the training data itself (same sha256): base, adapter. This shows memory, not generalisation." in page.text()
    assert "Not on file: Split, Licence." in page.text()


def test_a_commonest_label_above_the_adapter_is_said(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "floor")
    body = json.loads((folder / "eval/adapter/evaluation.json").read_text())
    for value, where in ((0.99, "above the adapter's interval"), (body["estimates"][0]["value"], "which lies inside the adapter's interval")):
        body["estimates"][2]["value"] = value
        write_json(folder / "eval/adapter/evaluation.json", body)
        assert where in report(folder)[0].text()


# -------------------------------------------------------------------------------------------------------- samples.json
def test_samples_are_marked_only_where_this_answer_was_scored(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "shown")
    rows = [read_lines(folder / "eval" / label / "scores.jsonl")[4] for label in ("base", "adapter")]
    one = {
        "id": "claim-4",
        "document": "doc-4",
        "prompt": "Asked?",
        "target": rows[0]["target"],
        "base": rows[0]["completion"],
        "adapter": rows[1]["completion"],
    }
    two = {**one, "adapter": "something never scored"}
    write_json(folder / "samples.json", {"samples": [one, two, {"id": "unknown", "prompt": [{"role": "user", "content": "Hi"}]}, 7]})
    page, markdown = report(folder)
    marks = ["✓ right" if row["scores"]["label_accuracy"] == 1.0 else "✗ wrong" for row in rows]  # type: ignore[index, call-overload]
    shown = page.inside("sample")
    assert [text for text in shown if text in ("✓ right", "✗ wrong", "not scored")] == [*marks, marks[0], "not scored", "not scored", "not scored"]
    assert "something never scored" in page.inside("answer")
    assert "user:\nHi" in page.inside("text")
    assert page.inside("empty") == ["(empty)"] * 3
    assert "3 items chosen by whoever made the run (samples.json)" in page.text()
    assert "samples.json: 1 entries were left out" in page.text()
    assert f"Adapter ({marks[1][2:]}):\n\n```text\n{rows[1]['completion']}\n```" in markdown


def test_many_and_long_samples_are_cut_and_counted(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    entry = {"id": "i", "document": "", "prompt": "p" * 9000, "target": "t", "base": "b" * 2000, "adapter": "a"}
    page, _ = report(make_run(tmp_path / "many", evaluated=False, samples=(entry,) * 30))
    assert "The first 24 of 30 are shown." in page.text()
    assert "… [800 more characters]" in page.text()
    assert "… [5,000 more characters]" in page.text()
    assert "They were not scored." in page.text()


def test_answers_are_chosen_by_rule_without_samples(report: Report, make_run: MakeRun, tmp_path: Path) -> None:
    page, _ = report(make_run(tmp_path / "rule"))
    heads = [text for path, text in page.texts if path[-1].startswith("h3")]
    assert [sum("only the adapter" in head for head in heads), sum("only the base" in head for head in heads), len(heads)] == [4, 4, 12]
    assert "Chosen by rule, not by hand" in page.text()


# ------------------------------------------------------------------------------------------------------------ the call
def test_paths_events_and_formats(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=3, evaluated=False)
    with events.collect() as seen:
        assert write_report(str(folder), ["markdown", "html", "markdown"]) == (folder / "report.md", folder / "report.html")
    sizes = [(event["format"], event["size_bytes"]) for event in seen if event["name"] == "report.written"]
    assert sizes == [("markdown", (folder / "report.md").stat().st_size), ("html", (folder / "report.html").stat().st_size)]
    assert write_report(folder, "html") == (folder / "report.html",)
    assert tuple(FORMATS) == ("html", "markdown", "latex", "json", "csv", "jupyter")


def test_wrong_calls(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", steps=3, evaluated=False)
    with pytest.raises(UnknownNameError, match=r"No report format is called 'htm'\. Did you mean 'html'"):
        write_report(folder, ("html", "htm"))
    assert not (folder / "report.html").exists(), "nothing is written before all formats are known"
    with pytest.raises(ConfigError, match="at least one of html, markdown"):
        write_report(folder, ())
    with pytest.raises(NotFoundError, match="There is no run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="holds no run"):
        write_report(tmp_path / "empty")

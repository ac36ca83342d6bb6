"""Traces from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import crucible_framework as cf
from crucible_framework import events
from crucible_framework.cli.app import run
from crucible_framework.sinks import to_jsonl
from crucible_framework.traces import load_trace


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, and a question outside any of them whose text would colour a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CRUCIBLE_RUNS", raising=False)
    data = cf.load_dataset("minifact", split="train", limit=8)
    with cf.connect("fake") as backend:
        for name, lr in {"a": 1e-4, "b": 2e-4}.items():
            config = cf.TrainConfig(base_model="tiny", max_steps=2, adam=cf.AdamConfig(lr=lr))
            with cf.Trainer(backend, config, folder=f"runs/{name}") as trainer:
                trainer.train(data)
    end = to_jsonl("runs/events.jsonl")
    with events.span("ask", prompt="\x1b[31mred\x07"):
        hedge = events.decision("hedge", chose="fire", among=["wait", "fire"], because="slow", confidence=0.8)
        events.decision("route", chose="small", among=["small", "large"], because="cheap", causes=[hedge])
    end()
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert run([*words]) == code
    return capsys.readouterr().out


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(said(capsys, *words, "--json", "--quiet"))


def test_what_has_a_trace_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "trace")["traces"]
    assert [row["source"] for row in found] == [".", "a", "b"]
    assert found[0] == {"source": ".", "spans": 1, "decisions": 2, "events": 0, "problems": 0}
    assert found[1]["spans"] == load_trace("runs/a").counts()["spans"] > 4
    assert "Nothing has recorded" in said(capsys, "trace", "list", "runs/a/checkpoints")
    assert "no folder" in said(capsys, "trace", "list", "nowhere", "--json", "--quiet", code=2)


def test_a_trace_is_shown_as_a_tree_a_chart_a_page_and_prov(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    tree = said(capsys, "trace", "show", "a").splitlines()
    (top,) = (line for line in tree if line.startswith("training.run"))
    inside = tree[tree.index(top) + 1]
    assert inside.startswith("  ")
    assert sum("training.step" in line and "epoch=" in line for line in tree) == 2
    asked = said(capsys, "trace", "show", "runs")
    assert "\x1b" not in asked
    assert "\x07" not in asked
    assert "  hedge: fire" in asked
    assert said(capsys, "trace", "show", "runs", "--format", "mermaid").startswith("flowchart LR")
    assert set(answer(capsys, "trace", "show", "a", "--format", "prov")) >= {"prefix", "activity"}
    assert answer(capsys, "trace", "show", "a", "--format", "html", "--out", "a.html")["path"] == "a.html"
    assert (here / "a.html").read_text().startswith("<!doctype html>")
    assert [node["name"] for node in answer(capsys, "trace", "show", "a", "--find", "training.step")["nodes"]] == ["training.step"] * 2
    assert {node["kind"] for node in answer(capsys, "trace", "show", "runs", "--kind", "decision")["nodes"]} == {"decision"}
    assert said(capsys, "trace", "show", "a", "--most", "1").splitlines()[1].startswith("… and ")
    assert "no events" in said(capsys, "trace", "show", "nothing", "--json", "--quiet", code=2)


def test_two_traces_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "trace", "diff", "a", "a")["changed"] == []
    found = said(capsys, "trace", "diff", "a", "b", "--ignore", "fingerprint")
    assert "lr: 0.0001 → 0.0002" in found
    assert "fingerprint" not in found
    assert found.splitlines()[-1].startswith("0 added, 0 removed, ")


def test_damage_is_told(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    with (here / "runs" / "a" / "events.jsonl").open("a") as file:
        file.write("not json\n")
    assert "left out: " in said(capsys, "trace", "show", "a")

"""Runs, the registry and the workspace's indexes from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import crucible_framework as cf
from crucible_framework.cli.app import run
from crucible_framework.store import Tracker


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CRUCIBLE_RUNS", raising=False)
    data = cf.load_dataset("minifact", split="train", limit=8)
    with cf.connect("fake") as backend:
        for rank in (4, 8):
            config = cf.TrainConfig(base_model="tiny", max_steps=2, lora=cf.LoraConfig(rank=rank))
            with cf.Trainer(backend, config, folder=f"runs/r{rank}") as trainer:
                trainer.train(data)
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert run([*words, "--json", "--quiet"]) == code
    return json.loads(capsys.readouterr().out)


def test_runs_are_found_labelled_and_compared(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "plot.svg").write_text("<svg/>")
    assert [one["name"] for one in answer(capsys, "runs")] == ["r4", "r8"]
    answer(capsys, "runs", "tag", "r4", "owner=ada", "x=1")
    answer(capsys, "runs", "tag", "r4", "x=")
    answer(capsys, "runs", "note", "r4", "half the rank")
    answer(capsys, "runs", "attach", "r4", "plot.svg")
    found = answer(capsys, "runs", "list", "--where", "lora.rank < 8", "--tag", "owner=ada", "--order-by", "train/loss")
    assert [(one["name"], one["tags"], one["notes"], list(one["artifacts"])) for one in found] == [("r4", {"owner": "ada"}, "half the rank", ["plot.svg"])]
    assert answer(capsys, "runs", "compare", "r4", "r8")["params"] == {"lora.rank": [4, 8]}
    assert answer(capsys, "runs", "show", "r8")["steps"] == answer(capsys, "runs", "runs/r8")["steps"] == 2
    assert run(["runs", "list", "--where", "lora.rnk < 8"]) == 2
    assert "Did you mean 'lora.rank'" in capsys.readouterr().err


def test_runs_go_out_and_come_back(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(capsys, "runs", "export", "table.csv", "r4")
    assert answer(capsys, "runs", "import", "table.csv", "--workspace", "other") == {"runs": ["r4"]}
    assert Tracker("other").get("r4").params == Tracker("runs").get("r4").params
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (here / "mlruns").as_uri())
    answer(capsys, "runs", "export", "mlflow:study", "--where", "lora.rank = 8")
    assert answer(capsys, "runs", "import", "mlflow:study", "--workspace", "third") == {"runs": ["r8"]}


def test_the_registry_orders_names_and_describes(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for rank in (4, 8):
        answer(capsys, "models", "register", f"runs/r{rank}", "judge")
    assert answer(capsys, "models", "alias", "judge", "champion", "1")["aliases"] == {"champion": 1}
    assert answer(capsys, "models", "show", "judge@champion")["model"]["version"] == 1
    best = answer(capsys, "models", "list", "--order-by", "train/loss", "--limit", "1")["models"]
    losses = {one.version: one.metrics["train/loss"] for one in Tracker("runs").models.list()}
    assert best[0]["version"] == min(losses, key=lambda version: losses[version])
    answer(capsys, "models", "card", "judge", "--out", "card.md")
    assert "# judge:2" in (here / "card.md").read_text()
    kinds = [node["kind"] for node in answer(capsys, "runs", "lineage", "judge:1")["nodes"]]
    assert kinds == ["model", "checkpoint", "run", "base model", "data set"]
    assert answer(capsys, "models", "alias", "judge", "champion")["aliases"] == {}


def test_a_model_goes_out_and_comes_back(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    answer(capsys, "models", "register", "runs/r4", "judge")
    assert answer(capsys, "models", "push", "judge", "shared") == {"to": "shared"}
    assert "# judge:1" in (here / "shared" / "README.md").read_text()
    assert answer(capsys, "models", "pull", "shared", "copy")["parents"][0] == f"file:{here / 'shared'}"
    assert run(["models", "export", "tiny", "out"]) == 2
    assert "has nothing to merge" in capsys.readouterr().err


def test_the_workspace_is_rebuilt_verified_and_pruned(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert answer(capsys, "db", "rebuild") == {"runs": 2, "models": 0, "artifacts": 0}
    assert answer(capsys, "db", "verify") == {"problems": []}
    Tracker("runs").artifacts.put(b"x" * 2000)
    assert answer(capsys, "db", "prune", "--max-size", "1kB")["freed_bytes"] == 2000
    assert run(["db", "prune", "--max-size", "lots"]) == 2
    weights = next((here / "runs" / "r4" / "checkpoints").glob("*/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    assert len(answer(capsys, "db", "verify", code=65)["problems"]) == 1

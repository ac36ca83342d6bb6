"""`crucible eval --shots` and `--unsafe-local`, and `crucible leaks`: what they do to the rows, to the disk and to the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.test_commands import asked, failed
from tests.data.test_questions import PROBLEM, write

from crucible_framework.cli import run
from crucible_framework.data import load_dataset
from crucible_framework.evaluation import sandbox
from crucible_framework.files import read_lines

EVAL = ("eval", "fake", "--backend", "fake", "--max-tokens", "1")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "data"))


# --------------------------------------------------------------------------------------------------------------- shots
def test_shots_are_solved_training_examples_of_other_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked(capsys, *EVAL, "--limit", "4", "--shots", "2", "--folder", str(tmp_path / "with"))
    asked(capsys, *EVAL, "--limit", "4", "--folder", str(tmp_path / "without"))
    rows, plain = (read_lines(tmp_path / name / "model" / "scores.jsonl") for name in ("with", "without"))
    train = load_dataset("minifact", split="train")
    assert [row["id"] for row in rows] == [row["id"] for row in plain]
    for row, bare in zip(rows, plain, strict=True):
        shown = [example for example in train if str(example.meta["claim"]) in str(row["prompt"])]
        assert len(shown) == 2
        assert not any(str(example.meta["claim"]) in str(bare["prompt"]) for example in train)
        assert row["document"] not in {example.meta["document"] for example in shown}
        assert all(example.target in str(row["prompt"]) for example in shown)
        assert len(str(row["prompt"])) > len(str(bare["prompt"]))
    assert "has" in failed(capsys, *EVAL, "--limit", "4", "--shots", "100000", code=2)


def test_without_a_train_split_shots_come_from_dev(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, claim: str, key: str, label: str = "SUPPORTS") -> dict[str, object]:
        return {"id": name, "claim": claim, key: f"{claim} indeed .", "label": label}

    folder = tmp_path / "data" / "fever_symmetric"
    write(folder / "symmetric_v0.2_fever_symmetric_dev.jsonl", [row("7", "Snow is white .", "evidence"), row("8", "Coal is white .", "evidence", "REFUTES")])  # type: ignore[list-item]
    write(folder / "symmetric_v0.1_fever_symmetric_full.jsonl", [row("9", "Milk is white .", "evidence_sentence")])  # type: ignore[list-item]
    asked(capsys, *EVAL, "--dataset", "fever_symmetric", "--shots", "2", "--folder", str(tmp_path / "kept"))
    (shown,) = read_lines(tmp_path / "kept" / "model" / "scores.jsonl")
    assert all(claim in str(shown["prompt"]) for claim in ("Snow is white .", "Coal is white .", "Milk is white ."))


# -------------------------------------------------------------------------------------------------------- unsafe local
def written(tmp_path: Path) -> Path:
    """A problem whose tests leave a mark on the disk; the model can only add to a comment, so it is solved."""
    mark = tmp_path / "mark.txt"
    problem = {
        "task_id": "HumanEval/0", "prompt": "def one():\n    return 1  # ", "entry_point": "one", "canonical_solution": "the one",
        "test": f"def check(c):\n    open({str(mark)!r}, 'w').write('ran')\n    assert c() == 1",
    }  # fmt: skip
    write(tmp_path / "data" / "humaneval" / "HumanEval.jsonl.gz", [problem])  # type: ignore[list-item]
    return mark


def test_without_a_sandbox_nothing_runs_and_the_exit_code_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mark = written(tmp_path)
    monkeypatch.setattr(sandbox, "sandbox_missing", lambda: "'bwrap' is not installed")
    message = failed(capsys, *EVAL, "--dataset", "humaneval", "--scorers", "passes_tests", code=78)
    assert "'bwrap' is not installed" in message
    assert "--unsafe-local" in message
    assert not mark.exists()


def test_unsafe_local_runs_the_code_as_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mark = written(tmp_path)
    monkeypatch.setattr(sandbox, "sandbox_missing", lambda: "'bwrap' is not installed")
    asked(capsys, *EVAL, "--dataset", "humaneval", "--scorers", "passes_tests", "--unsafe-local", "--folder", str(tmp_path / "kept"))
    (row,) = read_lines(tmp_path / "kept" / "model" / "scores.jsonl")
    assert row["scores"] == {"passes_tests": 1.0}, row
    assert mark.read_text() == "ran", "a sandbox would have kept it from the disk"


def test_with_a_sandbox_the_code_does_not_reach_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if why := sandbox.sandbox_missing():
        pytest.skip(why)
    mark = written(tmp_path)
    asked(capsys, *EVAL, "--dataset", "humaneval", "--scorers", "passes_tests", "--folder", str(tmp_path / "kept"))
    (row,) = read_lines(tmp_path / "kept" / "model" / "scores.jsonl")
    assert row["scores"] == {"passes_tests": 0.0}
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------------------- leaks
def test_leaks_names_the_test_examples_that_training_data_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    write(tmp_path / "data/gsm8k/train.jsonl", [{**PROBLEM, "question": f"Count {words}!"}, {**PROBLEM, "question": "A hen lays eggs."}])
    write(tmp_path / "data/gsm8k/test.jsonl", [{**PROBLEM, "question": f"Please count {words}."}, {**PROBLEM, "question": "A cow gives milk."}])
    found = asked(capsys, "leaks", "gsm8k")
    assert found["of"] == 2
    leaks = found["leaks"]
    assert isinstance(leaks, list)
    assert [(one["test"], one["train"]) for one in leaks] == [("test-1", "train-1")]
    assert 0.5 < leaks[0]["share"] < 1
    assert asked(capsys, "leaks", "gsm8k", "--least", "1")["leaks"] == []
    assert len(asked(capsys, "leaks", "gsm8k", "--n", "2", "--least", "0.1")["leaks"]) == 1  # type: ignore[arg-type]
    assert run(["leaks", "gsm8k"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 test examples of gsm8k share a document or text with train" in shown
    assert "train-1" in shown
    assert asked(capsys, "leaks", "minifact") == {"leaks": [], "of": len(load_dataset("minifact", split="test"))}
    assert "least" in failed(capsys, "leaks", "minifact", "--least", "0", code=2)

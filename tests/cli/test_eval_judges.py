"""`crucible eval --nli` and `--similarity`: who judged stands with the scores, and another judge is another evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.test_commands import asked, failed
from tests.data.test_datasets import claim, document, evidence, make
from tests.evaluation.encoders_for_tests import save, save_headless, save_sentence_encoder

from crucible_framework.files import read_lines
from crucible_framework.records import Json

EVAL = ("eval", "fake", "--backend", "fake", "--dataset", "scifact", "--task", "extract", "--max-tokens", "4")
STAGES = {"schema", "citation", "entailment", "similarity", "validation"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "data"))
    make(tmp_path / "data" / "scifact", [claim(9, [2])], [claim(1, [7], {"7": [evidence("SUPPORT", 0)]})], [document(n) for n in (2, 7)])


def scored(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Json]]:
    asked(capsys, *EVAL, "--folder", "kept", *words)
    (row,) = read_lines(Path("kept/model/scores.jsonl"))
    assert isinstance(row["scores"], dict)
    assert isinstance(row["details"], dict)
    return {"scores": row["scores"], "details": row["details"]}


def test_both_judges_add_five_scores_that_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nli, encoder = save(tmp_path / "nli"), save_sentence_encoder(tmp_path / "encoder", {"pooling_mode_cls_token": True})
    plain = set(asked_names(capsys))
    row = scored(capsys, "--nli", str(nli), "--similarity", str(encoder))
    assert set(row["scores"]) == plain | STAGES, "scores of persistence are judged by the encoder, not asked twice"
    assert f"({nli}, by sentence)" in str(row["details"]["entailment"])
    assert f"({encoder})" in str(row["details"]["similarity"])
    assert scored(capsys, "--nli", str(nli), "--similarity", str(encoder)) == row
    other = save(tmp_path / "other")
    assert "another plan; different: scorers" in failed(capsys, *EVAL, "--folder", "kept", "--nli", str(other), "--similarity", str(encoder), code=2)


def asked_names(capsys: pytest.CaptureFixture[str]) -> list[str]:
    asked(capsys, *EVAL, "--folder", "plain")
    (row,) = read_lines(Path("plain/model/scores.jsonl"))
    assert isinstance(row["scores"], dict)
    return list(row["scores"])


def test_without_a_model_word_counts_judge_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = save_headless(tmp_path / "encoder")
    row = scored(capsys, "--similarity", str(encoder), "--scorers", "schema_compliance")
    assert set(row["scores"]) == STAGES | {"schema_compliance"}
    assert "(lexical-baseline)" in str(row["details"]["entailment"])
    assert f"({encoder})" in str(row["details"]["similarity"])


def test_a_model_that_cannot_judge_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    headless = save_headless(tmp_path / "headless")
    assert "no trained 'classifier.bias'" in failed(capsys, *EVAL, "--nli", str(headless), code=2)
    assert "cannot be loaded" in failed(capsys, *EVAL, "--nli", "nobody/nothing", code=2)
    assert "is not in the cache" in failed(capsys, *EVAL, "--similarity", "nobody/nothing", code=2)

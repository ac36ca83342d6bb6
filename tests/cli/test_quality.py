"""`crucible claims` and `crucible gate`, registered on an app of their own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from cyclopts import App
from tests.evaluation.samplers_for_tests import Scripted, labelled, right

from crucible_framework.cli.quality import register
from crucible_framework.cli.reply import Reply
from crucible_framework.errors import ConfigError, FormatError, NotFoundError
from crucible_framework.evaluation import Gate, Topology, evaluate

TEXT = "CLAIM[c1]: a\nCLAIM[c2]: b\nRELATION: c2 supports c1\nRELATION: c1 supports c2\nhello\n"


def call(*words: str) -> Reply:
    app = App(name="crucible", result_action="return_value")
    register(app)
    reply = app(list(words), exit_on_error=False, print_error=False)
    assert isinstance(reply, Reply)
    return reply


@pytest.mark.parametrize("where", ["file", "-"])
def test_claims_says_what_is_wrong_with_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "answer.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    reply = call("claims", "-" if where == "-" else str(tmp_path / "answer.txt"))
    text = str(reply.text)
    assert "circle: c1 ↔ c2" in text
    assert "line 5: neither CLAIM nor RELATION: 'hello'" in text
    assert reply.exit_code == 0
    assert isinstance(reply.data, dict)
    shape = reply.data["topology"]
    assert isinstance(shape, Topology)
    assert shape.support_rank == 1


def test_claims_needs_a_text_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        call("claims", str(tmp_path / "nowhere.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"CLAIM[c1]: \xff")
    with pytest.raises(FormatError, match="at byte 11"):
        call("claims", str(tmp_path / "bytes.txt"))


def test_gate_says_what_falls_short_and_exits_with_one(tmp_path: Path) -> None:
    rows = labelled(40)
    evaluate(Scripted(right(rows, wrong=[1, 2])), rows, folder=tmp_path / "scored" / "model")
    for folder in (tmp_path / "scored", tmp_path / "scored" / "model"):
        passed = call("gate", str(folder), "label_accuracy>=0.9")
        assert (passed.exit_code, passed.text) == (0, "All targets are met.")
    missed = call("gate", str(tmp_path / "scored"), "label_accuracy>=0.9", "cyclic<=0", "--bound")
    assert missed.exit_code == 1
    assert isinstance(missed.data, Gate)
    assert [str(short.target) for short in missed.data.shortfalls] == ["label_accuracy>=0.9", "cyclic<=0"]
    with pytest.raises(ConfigError, match="no targets"):
        call("gate", str(tmp_path / "scored"))

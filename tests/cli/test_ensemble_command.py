"""`crucible ensemble` as a user types it, and what `crucible sample` puts around a model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from cyclopts import App

from crucible_framework.cli.asking import sample
from crucible_framework.cli.ensemble import register
from crucible_framework.cli.reply import Reply
from crucible_framework.config import to_dict
from crucible_framework.errors import ConfigError


def typed(*words: str) -> Reply:
    app = App(result_action="return_value")
    register(app)
    reply = app(["ensemble", *words, "--backend", "fake", "--max-tokens", "6", "--seed", "1"], exit_on_error=False, print_error=False)
    assert isinstance(reply, Reply)
    return reply


def test_members_and_votes_are_shown() -> None:
    reply = typed("fake", "tiny", "--prompt", "Is water wet?", "--vote", "plurality")
    data = to_dict(reply.data)
    assert json.loads(json.dumps(data)) == data
    assert isinstance(data, dict)
    assert {"answer", "agreement", "ballots", "reason"} <= data.keys()
    assert "fake:" in str(reply.text)
    assert "tiny:" in str(reply.text)
    assert "plurality: agreement" in str(reply.text)


def test_one_model_twice_answers_alike_with_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Is water wet?"))
    reply = typed("fake", "fake", "fake", "--prompt", "-", "--mode", "sequential")
    data = to_dict(reply.data)
    assert isinstance(data, dict)
    assert data["skipped"] == ["fake (3)"]
    assert "not asked: fake (3)" in str(reply.text)
    assert data["agreement"] == 1.0


def test_one_model_is_no_ensemble() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        typed("fake", "--prompt", "x")


def sampled(*words: str) -> Reply:
    app = App(result_action="return_value")
    app.command(sample)
    reply = app(["sample", *words, "--backend", "fake", "--max-tokens", "4", "--seed", "1"], exit_on_error=False, print_error=False)
    assert isinstance(reply, Reply)
    return reply


def test_one_model_answers_as_before() -> None:
    reply = sampled("fake", "Is water wet?", "-n", "2")
    assert isinstance(reply.data, tuple)
    assert str(reply.text) == "\n---\n".join(answer.text for answer in reply.data)


def test_a_hedged_model_says_what_was_sent_twice() -> None:
    plain, reply = sampled("fake", "Is water wet?"), sampled("fake", "Is water wet?", "--hedge")
    data = to_dict(reply.data)
    assert isinstance(data, dict)
    assert data["answers"] == [to_dict(plain.data[0])] or data["answers"][0]["text"] == plain.data[0].text  # type: ignore[index,call-overload]
    assert data["hedges"]["fake"]["calls"] == 1  # type: ignore[index,call-overload]
    assert "(0 sent again, 0 answered first)" in str(reply.text)
    at_once = to_dict(sampled("fake", "Is water wet?", "--hedge-after-s", "0").data)
    assert at_once["hedges"]["fake"]["requests"] == 1  # type: ignore[index,call-overload]


def test_a_router_chooses_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "liking.py").write_text("def longest(prompt, answers):\n    return min(1.0, len(answers[0].tokens) / 4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    state = tmp_path / "router.json"
    words = ("fake", "Is water wet?", "--route", "tiny", "--router", "round_robin", "--router-state", str(state), "--reward", "liking:longest")
    for asked in (1, 2):
        sampled(*words)
        assert sum(json.loads(state.read_text())["state"]["asked"].values()) == asked
    reply = sampled(*words)
    data = to_dict(reply.data)
    assert isinstance(data, dict)
    assert data["routes"] == [{"chose": "fake", "among": ["fake", "tiny"], "probability": 1.0, "reason": "RoundRobin"}]
    assert "fake answered, chosen by RoundRobin" in str(reply.text)


def test_hedge_and_route_together() -> None:
    data = to_dict(sampled("fake", "Is water wet?", "--route", "tiny", "--router", "thompson", "--hedge").data)
    assert isinstance(data, dict)
    assert set(data["hedges"]) == {"fake", "tiny"}  # type: ignore[arg-type]
    assert sum(one["requests"] for one in data["hedges"].values()) == 1  # type: ignore[union-attr,index,call-overload,misc]


def test_settings_of_routing_need_several_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--route MODEL"):
        sampled("fake", "x", "--router-state", str(tmp_path / "r.json"))
    with pytest.raises(ConfigError, match="expected a function"):
        sampled("fake", "x", "--route", "tiny", "--reward", "math:pi")
    with pytest.raises(ConfigError, match="no prompt"):
        sampled("fake")

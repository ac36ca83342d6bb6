"""`crucible ensemble` as a user types it, and what `crucible sample` puts around a model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from cyclopts import App

from crucible_framework.backends import connect
from crucible_framework.cli.ensemble import hedged, keep, register, routed
from crucible_framework.cli.reply import Reply
from crucible_framework.config import to_dict
from crucible_framework.errors import ConfigError
from crucible_framework.inference import HedgedSampler
from crucible_framework.records import SamplingParams


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


def test_hedge_and_route_around_a_model(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=4, seed=1)
    with connect("fake") as engine:
        one = hedged(engine.sampler("fake"), "fake", delay_s=5.0)
        assert len(one.sample("?", params).result()) == 1
        assert isinstance(hedged(engine.sampler("fake"), "tinker"), HedgedSampler)
        state = tmp_path / "router.json"
        sampler, router = routed(engine, ["fake", "tiny"], "thompson", state)
        sampler.sample("?", params).result()
        keep(router, state)
        again, kept = routed(engine, ["fake", "tiny"], "thompson", state)
        assert kept.router.state() == router.router.state()
        keep(kept, None)
        assert again.model == "routed(fake, tiny)"

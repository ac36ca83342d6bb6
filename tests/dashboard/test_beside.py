"""The dashboard at a server's address: each answers to its own paths, and nobody from elsewhere reads the pages. What commands ask is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crucible_framework.backends import connect
from crucible_framework.cli.app import run
from crucible_framework.cli.serve import _shown
from crucible_framework.dashboard import beside
from crucible_framework.dashboard.asked import AskedEvents
from crucible_framework.errors import NotFoundError, UnsafeError
from crucible_framework.server import ServeConfig, keys_of, serve

from .conftest import Client


def test_server_and_dashboard_share_an_address(workspace: Path, tmp_path: Path) -> None:
    ends = []

    def front(api: Callable[..., Any]) -> Callable[..., Any]:
        both, end = beside(api, workspace)
        ends.append(end)
        return both

    with connect("fake") as engine, serve(engine, ServeConfig(port=0, folder=tmp_path / "serve"), front=front) as server:
        client = Client(server.url)
        assert "run-0" in client.text("/")
        assert "Ranks" in client.text("/studies")
        assert json.loads(client.text("/api/v1/healthz"))["status"] == "ok"
        assert json.loads(client.ask("/v1/models", x_api_key="any")[2])["object"] == "list"
        assert client.ask("/v1/models")[0] == 401, "the server's own door still stands"
        assert client.ask("/", host="evil.example")[0] == 421
        assert client.ask("/", origin="http://evil.example")[0] == 403
        assert client.ask("/v1x")[0] == 404
        ends[0]()
    with pytest.raises(NotFoundError):
        beside(lambda: None, tmp_path / "none")  # type: ignore[arg-type, return-value] # never called


def test_it_is_served_only_where_nobody_else_can_ask(tmp_path: Path) -> None:
    own = ServeConfig(folder=tmp_path)
    assert _shown(None, own)
    assert not _shown(False, own)
    elsewhere = ServeConfig(folder=tmp_path, host="0.0.0.0")
    assert not _shown(None, elsewhere)
    with pytest.raises(UnsafeError, match="knows no keys"):
        _shown(True, elsewhere)
    keys_of(own).add("somebody")
    assert not _shown(None, own)
    assert _shown(True, own)


def test_what_the_command_asks_is_kept_where_there_is_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_RUNS", str(tmp_path / "runs"))
    words = ["ensemble", "tiny", "tiny", "--prompt", "What is water?", "--backend", "fake", "--max-tokens", "4", "--quiet"]
    assert run(words) == 0
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    assert run(words) == 0
    (vote,) = AskedEvents(tmp_path / "runs").events()
    assert vote["question"] == "What is water?"
    assert len(vote["ballots"]) == 2  # type: ignore[arg-type] # a list

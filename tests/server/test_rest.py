"""Runs, checkpoints and files: through the SDK's REST client, its command line, and by hand."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from click.testing import CliRunner
from safetensors.numpy import load_file
from tinker import types

from crucible_framework.server import Serving

from .conftest import Raw, Start
from .test_sdk import losses


@pytest.fixture
def rest(serving: Serving) -> tinker.RestClient:
    return tinker.RestClient(base_url=serving.url, api_key="tml-local")


@pytest.fixture
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    made = service.create_lora_training_client("tiny", rank=4, seed=1, train_unembed=False, user_metadata={"for": "tests"}).result()
    losses(made, 2)
    return made


def test_everything_about_checkpoints(serving: Serving, training: tinker.TrainingClient, rest: tinker.RestClient) -> None:
    state = training.save_state("state", user_metadata={"step": "2"}).result().path
    training.save_weights_for_sampler("weights").result()
    external = training.save_weights_external("files").result().path
    run = rest.get_training_run(training.model_id).result()
    assert (run.base_model, run.lora_rank, run.corrupted, run.user_metadata) == ("tiny", 4, False, {"for": "tests"})
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == state
    assert rest.get_training_run_by_tinker_path(state).result().training_run_id == training.model_id
    listed = rest.list_checkpoints(training.model_id).result().checkpoints
    assert {(one.checkpoint_type, one.checkpoint_id) for one in listed} == {
        ("training", "weights/state"), ("sampler", "sampler_weights/weights"), ("external", "external_weights/files")
    }  # fmt: skip
    page = rest.list_user_checkpoints(limit=2, offset=1).result()
    assert len(page.checkpoints) == 2
    assert page.cursor is not None
    assert page.cursor.total_count == 3
    assert [one.training_run_id for one in rest.list_training_runs().result().training_runs] == [training.model_id]
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.lora_rank, info.train_attn, info.train_unembed) == ("tiny", 4, True, False)

    rest.publish_checkpoint_from_tinker_path(state).result()
    rest.set_checkpoint_ttl_from_tinker_path(state, 3600).result()
    (one,) = (one for one in rest.list_checkpoints(training.model_id).result().checkpoints if one.tinker_path == state)
    assert one.public
    assert one.expires_at is not None
    assert one.user_metadata == {"step": "2"}
    rest.unpublish_checkpoint_from_tinker_path(state).result()
    rest.set_checkpoint_ttl_from_tinker_path(state, None).result()
    (one,) = (one for one in rest.list_checkpoints(training.model_id).result().checkpoints if one.tinker_path == state)
    assert not one.public
    assert one.expires_at is None

    links = rest.get_external_weights_urls(external).result().urls
    link = links["adapter_config.json"]
    assert set(links) == {"adapter_config.json", "adapter_model.safetensors"}
    assert httpx.get(link).json()["r"] == 4
    for bad in (
        link[:-1] + ("1" if link.endswith("0") else "0"),
        link.replace("adapter_config", "manifest"),
        link.partition("?")[0],
    ):
        assert httpx.get(bad).status_code == 403
    with httpx.Client(base_url=serving.url, headers={"X-API-Key": "tml-local"}) as http:
        assert http.get(f"/api/v1/training_runs/{training.model_id}/checkpoints/weights/state/external_weights_urls").status_code == 400

    rest.delete_checkpoint_from_tinker_path(external).result()
    assert httpx.get(link).status_code == 404
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint(training.model_id, "external_weights/files").result()


def test_sessions_and_models(service: tinker.ServiceClient, training: tinker.TrainingClient, rest: tinker.RestClient) -> None:
    sampler = training.save_weights_and_get_sampling_client().result()
    session = training.model_id.partition(":")[0]
    assert rest.list_sessions().result().sessions == [session]
    found = rest.get_session(session).result()
    assert found.training_run_ids == [training.model_id]
    assert rest.get_sampler(found.sampler_ids[0]).result().base_model == "tiny"
    assert sampler.get_base_model() == "tiny"
    assert [one.model_name for one in rest.get_server_capabilities().result().supported_models] == ["tiny", "fake"]


def test_expired_checkpoints_are_gone(raw: Raw) -> None:
    model = raw.model(raw.session())
    raw.result(raw.post("save_weights", {"model_id": model, "path": "short", "seq_id": 1, "ttl_seconds": 3600}).json()["request_id"])
    base = f"/api/v1/training_runs/{model}/checkpoints/weights/short"
    assert raw.http.put(f"{base}/ttl", json={"ttl_seconds": -1}).status_code == 400
    assert raw.http.put(f"{base}/ttl", json={"ttl_seconds": 1e-6}).status_code == 204
    assert raw.http.put(f"{base}/ttl", json={"ttl_seconds": None}).status_code == 404
    assert raw.get(f"training_runs/{model}/checkpoints").json()["checkpoints"] == []
    for limit in ("-1", "x", "99999999999"):
        assert raw.get("checkpoints", limit=limit).status_code == 400
    assert raw.http.delete(f"/api/v1/training_runs/{model}/checkpoints/nothing/short").status_code == 404
    assert raw.get("training_runs/..%2F..").status_code == 404
    assert raw.post("sessions/search", {}).json()["sessions"][0]["checkpoints_count"] == 0
    ready = raw.get(f"sessions/{model.partition(':')[0]}/trace_export").json()
    assert ready["status"] == "ready"
    names = [row["name"] for row in httpx.get(ready["url"]).json()["traceEvents"]]
    assert names == ["create_model", "save_weights"]
    assert httpx.get(ready["url"][:-1]).status_code == 403
    assert raw.get("sessions/s-none/trace_export").status_code == 404


def command(url: str, folder: Path, *words: str, key: str | None = "tml-local", form: str = "json", given: str | None = None) -> str:
    """What the SDK's command prints; run here, because starting it takes longer than what it does."""
    from tinker.cli.__main__ import main_cli as cli

    env = {"TINKER_BASE_URL": url, "TINKER_API_KEY": key, "HOME": str(folder), "TINKER_TELEMETRY": "0"}
    done = CliRunner().invoke(cli, ["-f", form, *words], env=env, input=given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def test_command_line(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of `tinker` but push-hf, which needs the hub."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    serving = start(client={"pjwt_auth_enabled": True})
    service = tinker.ServiceClient(base_url=serving.url, api_key="tml-local", user_metadata={"a": "b"})
    training = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    losses(training, 1)
    state = training.save_state("state", user_metadata={"step": "1"}).result().path
    weights = training.save_weights_for_sampler("weights").result().path
    run, session = training.model_id, training.model_id.partition(":")[0]

    def ask(*words: str) -> Any:
        return json.loads(command(serving.url, tmp_path, *words) or "null")

    assert "0.38" in command(serving.url, tmp_path, "version", form="table")
    assert ask("auth", "whoami")["user_urn"] == "crucible:user:local"
    assert {one["model_name"] for one in ask("model", "list")["models"]} == {"tiny", "fake"}
    assert ask("run", "list")["runs"][0]["training_run_id"] == run
    assert ask("run", "info", run)["base_model"] == "tiny"
    assert {one["tinker_path"] for one in ask("checkpoint", "list")["checkpoints"]} == {state, weights}
    assert state in command(serving.url, tmp_path, "checkpoint", "list", "--run-id", run)
    assert state in command(serving.url, tmp_path, "checkpoint", "info", state)
    command(serving.url, tmp_path, "checkpoint", "publish", state)
    assert '"public": true' in command(serving.url, tmp_path, "checkpoint", "info", state).lower().replace("yes", "true")
    command(serving.url, tmp_path, "checkpoint", "unpublish", state)
    command(serving.url, tmp_path, "checkpoint", "set-ttl", state, "--ttl", "3600")
    command(serving.url, tmp_path, "checkpoint", "set-ttl", state, "--remove")
    command(serving.url, tmp_path, "checkpoint", "download", state, "--output", str(tmp_path / "got"))
    (adapter,) = (tmp_path / "got").rglob("adapter_model.safetensors")
    assert all(".lora_" in name for name in load_file(adapter))
    assert ask("session", "export-trace", session, "--url-only")["url"].startswith(serving.url)
    command(serving.url, tmp_path, "session", "export-trace", session, "--output", str(tmp_path / "trace.json"))
    assert {row["name"] for row in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]} >= {"create_model", "optim_step"}
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    used = command(serving.url, tmp_path, "billing", "usage", hour.isoformat(), (hour + timedelta(hours=1)).isoformat())
    assert "training" in used
    assert "2" in command(serving.url, tmp_path, "billing", "checkpoint-storage")
    command(serving.url, tmp_path, "checkpoint", "delete", state, "-y")
    assert state not in command(serving.url, tmp_path, "checkpoint", "list")
    command(serving.url, tmp_path, "checkpoint", "delete", "--run-id", run, "-y")
    assert ask("checkpoint", "list")["checkpoints"] == []
    command(serving.url, tmp_path, "auth", "login", form="table", key=None, given="tml-local\n")
    assert ask("run", "list")["runs"]
    command(serving.url, tmp_path, "auth", "logout", form="table", key=None)
    service.close("success").result()


def test_weights_that_are_loaded_into_a_model(training: tinker.TrainingClient) -> None:
    """The SDK's older call: into the client's own model."""
    path = training.save_state("here").result().path
    expected = losses(training, 2)
    with pytest.warns(FutureWarning):
        training.load_state_with_optimizer(path).result()
    assert losses(training, 2) == expected
    assert isinstance(training.get_info(), types.GetInfoResponse)

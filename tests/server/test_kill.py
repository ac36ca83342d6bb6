"""A server that is durable per step is killed again and again; the unmodified SDK notices nothing but the wait."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path

import pytest
import tinker
from safetensors.numpy import load_file
from tinker import types

from .conftest import Raw
from .serving_for_tests import ServerProcess
from .test_sdk import PROMPT, plain

STEP = types.AdamParams(learning_rate=1e-2)


class Killed:
    """A server that is killed and started again on the same port, `times` times, each after some requests more."""

    def __init__(self, backend: str, folder: Path) -> None:
        self._backend, self._folder, self.kills = backend, folder, 0
        self.process = ServerProcess(backend, folder, durable="step")
        self.url = self.process.url

    def kill(self) -> None:
        self.process.end(signal.SIGKILL)
        self.kills += 1
        self.process = ServerProcess(self._backend, self._folder, int(self.url.rsplit(":", 1)[1]), durable="step")


def trained(url: str, steps: int, between: dict[int, list[threading.Event]] | None = None) -> tuple[list[float], list[float], list[int], Path]:
    """Losses, step numbers, a seeded answer and the folder of the last checkpoint's adapter, by the SDK with submit-ahead."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    training = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    losses, numbers, ahead = list[float](), list[float](), []
    for step in range(steps):
        ahead.append((training.forward_backward([plain()] * 2, "cross_entropy"), training.optim_step(STEP)))
        if step == steps // 2:
            training.save_state("middle").result()
        while len(ahead) > 2 or (step == steps - 1 and ahead):
            passed, stepped = ahead.pop(0)
            losses.append(passed.result().metrics["loss:sum"])
            metrics = stepped.result().metrics or {}
            numbers.append(metrics["optimizer_steps"])
            for event in (between or {}).get(step, []):
                event.set()
    sampler = training.save_weights_and_get_sampling_client().result()
    for event in (between or {}).get(steps, []):
        event.set()
    answer = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=8, seed=3)).result().sequences[0]
    path = Path(training.save_state("last").result().path)
    service.close("success").result()
    return losses, numbers, list(answer.tokens), path


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of the last checkpoint's adapter and optimizer."""
    (last,) = folder.glob("runs/*/weights/last")
    return {f"{file}:{name}": values.tobytes() for file in ("adapter_model", "optimizer") for name, values in load_file(last / f"{file}.safetensors").items()}


def killed_run(backend: str, folder: Path, steps: int, kills: int, seed: int) -> None:
    """The undisturbed run and the killed one give the same losses, numbers, answer and bytes."""
    process = ServerProcess(backend, folder / "calm")
    try:
        expected = trained(process.url, steps)
    finally:
        process.end()
    draws = random.Random(seed)
    events = dict[int, list[threading.Event]]()
    for _ in range(kills):
        events.setdefault(draws.randrange(2, steps), []).append(threading.Event())
    server = Killed(backend, folder / "killed")
    order = [event for step in sorted(events) for event in events[step]]

    def killer() -> None:
        for event in order:
            event.wait(300)
            server.kill()

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    try:
        seen = trained(server.url, steps, events)
        thread.join(120)
        assert server.kills == kills
        assert seen[:3] == expected[:3]
        assert seen[1] == [float(number) for number in range(1, steps + 1)], "each step was taken once"
        assert weights(folder / "killed") == weights(folder / "calm")
    finally:
        server.process.end()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill(tmp_path: Path) -> None:
    killed_run("fake", tmp_path, steps=6, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["fake", "local"])
def test_twenty_kills_in_a_hundred_steps(backend: str, tmp_path: Path) -> None:
    killed_run(backend, tmp_path, steps=100, kills=20, seed=2)


def test_what_was_sent_before_a_kill_is_answered_after_it(tmp_path: Path) -> None:
    """By hand: requests that were acknowledged, answered ones and those still waiting for an earlier one; a sampler without a name; a save."""
    server = Killed("fake", tmp_path)
    raw = Raw(server.url)
    try:
        session = raw.session()
        model = raw.model(session)
        first = raw.passed(model, 1).json()["request_id"]
        step = raw.step(model, 2).json()["request_id"]
        loss, metrics = raw.loss(first), raw.result(step).json()["metrics"]
        assert metrics["durable"] == 1.0
        second = raw.passed(model, 3).json()["request_id"]
        answered = raw.loss(second)
        saved = raw.post("save_weights", {"model_id": model, "path": "kept", "seq_id": 4}).json()["request_id"]
        path = raw.result(saved).json()["path"]
        named = raw.post("save_weights_for_sampler", {"model_id": model, "sampling_session_seq_id": 7, "kind": "snapshot", "seq_id": 5}).json()["request_id"]
        sampler = raw.result(named).json()["sampling_session_id"]
        raw.post("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 8, "model_path": path})
        early = raw.step(model, 7).json()["request_id"]
        raw.http.close()
        server.kill()
        raw = Raw(server.url)
        assert raw.loss(first) == loss
        assert raw.result(step).json()["metrics"] == metrics
        assert raw.loss(second) == answered
        assert raw.result(saved).json()["path"] == path
        assert raw.post("retrieve_future", {"request_id": early}).status_code == 408 or raw.passed(model, 6).status_code == 200
        assert raw.passed(model, 6).status_code == 200
        assert raw.result(early).json()["metrics"]["optimizer_steps"] == 2.0
        assert raw.get(f"samplers/{session}:sample:8").json()["model_path"] == path
        body = {"prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}, "sampling_params": {"max_tokens": 3}, "seq_id": 0}
        for each in (sampler, f"{session}:sample:8"):
            asked = raw.post("asample", {**body, "sampling_session_id": each}).json()["request_id"]
            assert raw.result(asked).headers["content-type"] == "application/x-protobuf"
        assert raw.post(f"sessions/{session}/finish", {"reason": {"type": "success"}}).status_code == 204
        assert list((tmp_path / "live").glob("s-*")) == [], "a session that ended leaves nothing"
    finally:
        raw.http.close()
        server.process.end()

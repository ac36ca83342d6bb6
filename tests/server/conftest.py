"""A server in this process on the fake backend, the unmodified SDK, and plain HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
import torch
from tinker.proto import tinker_public_pb2 as pb

from crucible_framework.backends.fake import FakeBackend
from crucible_framework.server import ServeConfig, Serving, serve

torch.set_num_threads(1)

Start = Callable[..., Serving]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers with the settings that are given; they end with the test."""
    with ExitStack() as stack:

        def begin(*, latency_s: float = 0.0, folder: str = "serve", **settings: Any) -> Serving:
            backend = stack.enter_context(FakeBackend(latency_s))
            given = {"port": 0, "poll_s": 2.0, "models": ("tiny", "fake"), **settings}
            return stack.enter_context(serve(backend, ServeConfig(folder=tmp_path / folder, **given)))

        yield begin


@pytest.fixture
def serving(start: Start) -> Serving:
    return start()


@pytest.fixture
def service(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=serving.url, api_key="tml-local")
    yield client
    client.close("success").result()


class Raw:
    """The protocol by hand."""

    def __init__(self, url: str, key: str = "tml-local") -> None:
        self.http = httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=30)

    def post(self, path: str, body: dict[str, Any] | bytes | None = None, **headers: str) -> httpx.Response:
        if isinstance(body, bytes):
            return self.http.post(f"/api/v1/{path}", content=body, headers=headers)
        return self.http.post(f"/api/v1/{path}", json=body or {}, headers=headers)

    def get(self, path: str, **params: Any) -> httpx.Response:
        return self.http.get(f"/api/v1/{path}", params=params)

    def session(self) -> str:
        return str(self.post("create_session", {"tags": [], "sdk_version": "0.38.0", "user_metadata": None}).json()["session_id"])

    def model(self, session: str, number: int = 0, **settings: Any) -> str:
        lora = {"rank": 4, "seed": 1, **settings}
        made = self.post("create_model", {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": lora})
        assert made.status_code == 200, made.text
        return str(self.result(made.json()["request_id"]).json()["model_id"])

    def result(self, request: str) -> httpx.Response:
        for _ in range(20):
            found = self.post("retrieve_future", {"request_id": request})
            if found.status_code != 408:
                return found
        raise AssertionError("the request hangs")

    def passed(self, model: str, seq: int, tokens: bytes = b"hello world", **fields: Any) -> httpx.Response:
        return self.post("forward_backward", pass_body(model, seq, tokens, **fields))

    def step(self, model: str, seq: int, lr: float = 0.01) -> httpx.Response:
        return self.post("optim_step", {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": lr}})

    def loss(self, request: str) -> float:
        found = self.result(request)
        assert found.headers["content-type"] == "application/x-protobuf", found.text
        return float(pb.ForwardBackwardOutput.FromString(found.content).metrics["loss:sum"])


def pass_body(model: str, seq: int, tokens: bytes = b"hello world", *, loss: str = "cross_entropy", forward: bool = False) -> bytes:
    import numpy as np

    message = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss, forward_only=forward)
    datum = message.data.add()
    ids = np.frombuffer(tokens, dtype=np.uint8)
    datum.model_input.add().encoded_text.tokens = ids[:-1].astype("<i4").tobytes()
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = ids[1:].astype("<i8").tobytes(), pb.DTYPE_INT64
    targets.shape.append(len(ids) - 1)
    return message.SerializeToString()


@pytest.fixture
def raw(serving: Serving) -> Iterator[Raw]:
    made = Raw(serving.url)
    yield made
    made.http.close()


@pytest.fixture
def as_tenant(serving: Serving) -> Iterator[Callable[[str], Raw]]:
    """Plain HTTP with a key."""
    made: list[Raw] = []

    def make(key: str) -> Raw:
        made.append(Raw(serving.url, key))
        return made[-1]

    yield make
    for one in made:
        one.http.close()

"""Requests that nobody thought of: by the OpenAPI document, and as sequences of session, model, save, sample and delete."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule, run_state_machine_as_test
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from tinker.proto import tinker_public_pb2 as pb

from crucible_framework.backends.fake import FakeBackend
from crucible_framework.server import ServeConfig, Serving, serve

from .conftest import Raw, pass_body

HELD = ("retrieve_future", "retrieve_futures")
REFUSED = (400, 401, 403, 404, 405, 408, 410, 413, 429)


def fuzz(raw: Raw, examples: int) -> int:
    """So many requests of every operation, half of them invalid; returns how many were sent."""
    document = raw.http.get("/openapi.json").json()
    sent = 0
    config = schemathesis.Config.from_dict({"generation": {"mode": "all", "allow-x00": False}})
    schema = schemathesis.openapi.from_dict(document, config=config)
    for operation in [each.ok() for each in schema.get_all_operations() if isinstance(each, Ok)]:
        if operation.path.endswith("/forward_backward"):
            continue  # protobuf, below

        def one(case: Any) -> None:
            nonlocal sent
            sent += 1
            found = case.call(base_url=str(raw.http.base_url), session=None, headers={"X-API-Key": "tml-local"}, timeout=60)
            assert found.status_code < 500, (case.method, case.formatted_path, case.body, found.text)
            wrong = case.meta is not None and case.meta.generation.mode is GenerationMode.NEGATIVE and _body_is_wrong(case)
            if wrong:
                assert found.status_code in REFUSED, (case.method, case.formatted_path, case.body, found.status_code)

        strategy = st.one_of(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
        run = settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        run(given(case=strategy)(one))()
    return sent


def _body_is_wrong(case: Any) -> bool:
    component = next((part for kind, part in case.meta.components.items() if kind.value == "body"), None)
    return component is not None and component.mode is GenerationMode.NEGATIVE


def test_requests_by_the_document(raw: Raw) -> None:
    """No internal error, and no body is taken that the document calls invalid."""
    assert fuzz(raw, 2) > 80


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_thousand_requests_by_the_document(raw: Raw) -> None:
    assert fuzz(raw, 110) >= 5000


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_passes_that_make_no_sense(raw: Raw, data: st.DataObject) -> None:
    """Protobuf with any tensors: refused when it is read, or failed as the user's; never an internal error, and the model goes on."""
    session = raw.session()
    model = raw.model(session)
    message = pb.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn=data.draw(st.sampled_from(["cross_entropy", "ppo", "gspo", "custom", "", "x"])))
    for _ in range(data.draw(st.integers(0, 2))):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = data.draw(st.binary(max_size=24))
        for name in data.draw(st.sets(st.sampled_from(["target_tokens", "weights", "logprobs", "advantages", "odd"]))):
            tensor: Any = datum.loss_fn_inputs[name]
            tensor.dtype = data.draw(st.sampled_from([0, 1, 2, 3, 4]))
            tensor.dense = data.draw(
                st.one_of(st.binary(max_size=40), st.lists(st.integers(-5, 400), max_size=6).map(lambda row: np.array(row, "<i8").tobytes()))
            )
            tensor.shape.extend(data.draw(st.lists(st.integers(-2, 6), max_size=3)))
    sent = raw.post("forward_backward", message.SerializeToString())
    assert sent.status_code in (200, 400), sent.text
    if sent.status_code == 200:
        found = raw.result(sent.json()["request_id"])
        assert found.headers["content-type"] == "application/x-protobuf" or found.json()["category"] == "user", found.text
    raw.passed(model, 2 if sent.status_code == 200 else 1)
    raw.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})


class Life(RuleBasedStateMachine):
    """Sessions, models, checkpoints and samplers in any order, also of those that are gone; the server is compared with what must be."""

    url = ""
    sessions = Bundle("sessions")
    models = Bundle("models")
    paths = Bundle("paths")
    samplers = Bundle("samplers")

    @initialize()
    def begin(self) -> None:
        self.raw = Raw(self.url)
        self.next: dict[str, int] = {}
        self.live: set[str] = set()
        self.kept: set[str] = set()
        self.saved: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "raw"):
            self.raw.http.close()

    def number(self, owner: str) -> int:
        self.next[owner] = self.next.get(owner, 0) + 1
        return self.next[owner]

    def alive(self, name: str) -> bool:
        return name.partition(":")[0] in self.live

    @rule(target=sessions)
    def open(self) -> str:
        session = self.raw.session()
        self.live.add(session)
        return session

    @rule(target=models, session=sessions)
    def create(self, session: str) -> Any:
        number = self.counts.setdefault(session, 0)
        sent = self.raw.post("create_model", {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 2, "seed": 1}})
        if not self.alive(session):
            assert sent.status_code == 410
            return multiple()
        self.counts[session] += 1
        model = str(self.raw.result(sent.json()["request_id"]).json()["model_id"])
        self.steps[model] = 0
        return model

    @rule(model=models)
    def train(self, model: str) -> None:
        sent = self.raw.passed(model, self.number(model))
        if not self.alive(model):
            assert sent.status_code == 410
            return
        assert self.raw.loss(sent.json()["request_id"]) > 0
        stepped = self.raw.result(self.raw.step(model, self.number(model)).json()["request_id"]).json()
        self.steps[model] += 1
        assert stepped["metrics"]["optimizer_steps"] == self.steps[model]

    @rule(target=paths, model=models, kind=st.sampled_from(["save_weights", "save_weights_for_sampler"]), name=st.sampled_from(["a", "b"]))
    def save(self, model: str, kind: str, name: str) -> Any:
        sent = self.raw.post(kind, {"model_id": model, "path": name, "seq_id": self.number(model)})
        if not self.alive(model):
            assert sent.status_code == 410
            return multiple()
        found = self.raw.result(sent.json()["request_id"]).json()
        path = f"tinker://{model}/{'weights' if kind == 'save_weights' else 'sampler_weights'}/{name}"
        if path in self.kept:
            assert "exists already" in found["error"]
            return multiple()
        self.kept.add(path)
        self.saved[path] = self.steps[model]
        assert found["path"] == path
        return path

    @rule(target=models, session=sessions, path=paths)
    def load(self, session: str, path: str) -> Any:
        number = self.counts.get(session, 0)
        sent = self.raw.post("load_weights", {"session_id": session, "model_seq_id": number, "path": path, "optimizer": True})
        if not self.alive(session) or path not in self.kept:
            assert sent.status_code in (404, 410)
            return multiple()
        self.counts[session] = number + 1
        found = self.raw.result(sent.json()["request_id"]).json()
        if "sampler_weights" in path:
            assert found["category"] == "user"
            return multiple()
        model = str(found["model_id"])
        self.steps[model] = self.saved[path]
        return model

    @rule(target=samplers, session=sessions, path=paths)
    def sampler(self, session: str, path: str) -> Any:
        number = self.number(session)
        sent = self.raw.post("create_sampling_session", {"session_id": session, "sampling_session_seq_id": number, "model_path": path})
        if not self.alive(session) or path not in self.kept:
            assert sent.status_code in (404, 410)
            return multiple()
        return str(sent.json()["sampling_session_id"])

    @rule(sampler=samplers)
    def sample(self, sampler: str) -> None:
        body = {"prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]}, "sampling_params": {"max_tokens": 2}, "sampling_session_id": sampler}
        sent = self.raw.post("asample", {**body, "seq_id": self.number(sampler)})
        if not self.alive(sampler):
            assert sent.status_code == 410
            return
        assert self.raw.result(sent.json()["request_id"]).headers["content-type"] == "application/x-protobuf"

    @rule(path=paths)
    def delete(self, path: str) -> None:
        run, kind, name = path.removeprefix("tinker://").split("/")
        found = self.raw.http.delete(f"/api/v1/training_runs/{run}/checkpoints/{kind}/{name}")
        assert found.status_code == (204 if path in self.kept else 404)
        self.kept.discard(path)

    @rule(session=consumes(sessions))
    def finish(self, session: str) -> None:
        assert self.raw.post(f"sessions/{session}/finish", {"reason": {"type": "success"}}).status_code == 204
        self.live.discard(session)

    @invariant()
    def what_is_listed_is_what_is_kept(self) -> None:
        if hasattr(self, "raw"):
            listed = {one["tinker_path"] for one in self.raw.get("checkpoints", limit=1000).json()["checkpoints"]}
            mine = {path for path in listed if path.removeprefix("tinker://").split("/")[0] in self.steps}
            assert mine == self.kept


def live(serving: Serving, examples: int, steps: int) -> None:
    class Here(Life):
        url = serving.url

    run_state_machine_as_test(Here, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)))


def test_lives(serving: Serving) -> None:
    live(serving, 2, 12)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_lives(serving: Serving) -> None:
    live(serving, 50, 40)


def test_the_document_lists_every_route(raw: Raw) -> None:
    """Each route of the application, with a body where it reads one; and it is behind the door."""
    document = raw.http.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    operations = [(path, method) for path, item in document["paths"].items() for method in item]
    assert len(operations) > 45
    without = [path for path, item in document["paths"].items() for method, one in item.items() if method in ("post", "put") and "requestBody" not in one]
    assert sorted(without) == ["/api/v1/auth/token", "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/publish"]
    assert raw.http.get("/openapi.json", headers={"X-API-Key": ""}).status_code == 401
    assert pass_body("m", 1)
    with FakeBackend() as backend, pytest.raises(Exception, match="durable"), serve(backend, ServeConfig(durable="x")):  # type: ignore[arg-type]
        pass

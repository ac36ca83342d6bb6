"""Order, exactly once, limits and tenants, by plain HTTP."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tinker import types

from crucible_framework import events
from crucible_framework.backends.fake import FakeBackend
from crucible_framework.errors import LockedError, UnsafeError
from crucible_framework.records import LoraConfig
from crucible_framework.server import Keys, ServeConfig, Serving, keys_of, serve
from crucible_framework.server.desk import Desk
from crucible_framework.server.ledger import GoneError
from crucible_framework.server.shelf import Shelf
from crucible_framework.server.steps import KINDS

from .conftest import Raw, Start, pass_body


def trained(raw: Raw, order: list[int], repeat: int = 1) -> list[float]:
    """Three passes with steps and a last pass, sent in any order and as often as is said; the losses."""
    model = raw.model(raw.session())
    found: dict[int, str] = {}
    for seq in order:
        for _ in range(repeat):
            sent = raw.step(model, seq) if seq % 2 == 0 else raw.passed(model, seq)
            assert sent.status_code == 200, sent.text
            assert found.setdefault(seq, sent.json()["request_id"]) == sent.json()["request_id"]
    return [raw.loss(found[seq]) for seq in (1, 3, 5, 7)]


def test_any_order_and_any_repetition_give_the_same_weights(raw: Raw) -> None:
    expected = trained(raw, [1, 2, 3, 4, 5, 6, 7])
    assert len(set(expected)) == 4
    assert trained(raw, [7, 6, 5, 4, 3, 2, 1], repeat=3) == expected


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations([1, 2, 3, 4, 5, 6, 7]))
def test_permutations(raw: Raw, order: list[int]) -> None:
    assert trained(raw, order, repeat=2) == trained(raw, [1, 2, 3, 4, 5, 6, 7])


def test_results_can_be_asked_again(raw: Raw) -> None:
    """A response that was lost is there a second time, and the step was taken once."""
    model = raw.model(raw.session())
    raw.passed(model, 1)
    request = raw.step(model, 2).json()["request_id"]
    answers = [raw.result(request).json() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["metrics"]["optimizer_steps"] == 1.0
    raw.passed(model, 3)
    assert raw.result(raw.step(model, 4).json()["request_id"]).json()["metrics"]["optimizer_steps"] == 2.0


def test_what_is_not_there_yet(start: Start) -> None:
    """A request whose turn has not come is held, then the client is told to try again."""
    raw = Raw(start(poll_s=0.2).url)
    model = raw.model(raw.session())
    request = raw.passed(model, 2).json()["request_id"]
    found = raw.post("retrieve_future", {"request_id": request})
    assert found.status_code == 408
    assert found.json() == {"type": "try_again", "request_id": request, "queue_state": "active"}
    raw.passed(model, 1)
    assert raw.loss(request) > 0
    raw.http.close()


def test_old_results_are_dropped_when_they_take_too_much_room(start: Start) -> None:
    raw = Raw(start(answers_bytes=300).url)
    model = raw.model(raw.session())
    requests = [raw.passed(model, seq).json()["request_id"] for seq in range(1, 8)]
    for request in requests:
        raw.loss(request)
    assert raw.post("retrieve_future", {"request_id": requests[0]}).status_code == 410
    assert raw.post("retrieve_future", {"request_id": requests[-1]}).status_code == 200
    assert raw.passed(model, 1).status_code == 410, "it must not run twice"
    raw.http.close()


def test_silent_clients_are_dropped(backend: FakeBackend, tmp_path: Path) -> None:
    """After a minute their requests, models and samplers go, and their checkpoints stay; one that was heard of lives on."""
    config, clock = ServeConfig(folder=tmp_path), [0.0]

    async def go() -> None:
        desk = Desk(backend, config, Shelf(config.folder), now=lambda: clock[0])
        dead, alive = desk.open("ann", None, None), desk.open("ann", None, None)
        model = desk.add_model(dead, 0, "tiny", lora=LoraConfig(rank=4, dropout=0.0, target_modules=("q_proj",)), train={}, meta=None)
        made = await desk.turns.submit(model, 0, "create_model", KINDS["create_model"].begin(desk, model, None), b"")
        await made.answer
        asked = types.SaveWeightsRequest(model_id=model.run.id, path="kept", seq_id=1)
        saved = await desk.turns.submit(model, 1, "save_weights", KINDS["save_weights"].begin(desk, model, asked), b"")
        await saved.answer
        waiting = await desk.turns.submit(model, 3, "save_weights", KINDS["save_weights"].begin(desk, model, asked), b"")
        clock[0] = 59.0
        desk.drop_silent()
        assert desk.session(alive.id, "ann") is alive
        clock[0] = 61.0
        desk.drop_silent()
        assert list(desk.sessions) == [alive.id]
        await asyncio.sleep(0)
        assert waiting.answer.done()
        with pytest.raises(GoneError):
            desk.ledger.find(waiting.id, "ann")
        with pytest.raises(GoneError, match="durable per checkpoint"):
            desk.model(model.run.id, "ann")
        assert [one.name for one in desk.shelf.checkpoints(model.run.id)] == ["kept"]
        assert desk.ledger.waiting == {}
        await desk.close()

    asyncio.run(go())


def test_too_much_is_refused(start: Start) -> None:
    """Bodies, also those that grow when unpacked; waiting requests; requests far ahead."""
    raw = Raw(start(body_bytes=20_000, waiting=8).url)
    model = raw.model(raw.session())
    huge = b"\0" * 10_000_000
    assert raw.post("telemetry", huge[:30_000]).status_code == 413
    for name, packed in {"gzip": gzip.compress(huge), "zstd": zstandard.compress(huge)}.items():
        assert len(packed) < 20_000
        assert raw.post("telemetry", packed, **{"Content-Encoding": name}).status_code == 413
        assert raw.post("telemetry", b"no such thing", **{"Content-Encoding": name}).status_code == 400
    assert raw.post("telemetry", b"{}", **{"Content-Encoding": "br"}).status_code == 400
    assert raw.passed(model, 5000).status_code == 429
    sent = [raw.passed(model, seq).status_code for seq in range(2, 14)]
    assert sent == [200] * 8 + [429] * 4
    busy = raw.passed(model, 13)
    assert busy.headers["retry-after"] == "1"
    raw.http.close()


def test_packed_bodies_are_read(raw: Raw) -> None:
    model = raw.model(raw.session())
    packed = zstandard.compress(pass_body(model, 1))
    sent = raw.post("forward_backward", packed, **{"Content-Encoding": "zstd", "Content-Type": "application/x-protobuf"})
    assert raw.loss(sent.json()["request_id"]) > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("create_model", {"session_id": "s", "model_seq_id": 0}),
        ("create_model", {"session_id": "s-none", "model_seq_id": 0, "base_model": "tiny"}),
        ("forward_backward", b"\xff\xff\xff"),
        ("forward_backward", b""),
        ("optim_step", {"model_id": "none:train:0", "seq_id": 1}),
        ("optim_step", b"not json"),
        ("asample", {"prompt": {"chunks": []}, "sampling_params": {}}),
        ("retrieve_future", {"request_id": "none"}),
        ("load_weights", {"path": "tinker://x", "optimizer": True}),
        ("load_weights", {"path": "tinker://x/weights/y", "optimizer": True, "session_id": "s", "model_seq_id": 0}),
        ("weights_info", {"tinker_path": 5}),
        ("create_custom_loss", {}),
        ("copy_weights", {}),
        ("cancel_future", b"[]"),
        ("sessions/search", b"7"),
    ],
)
def test_bodies_that_make_no_sense(raw: Raw, path: str, body: dict[str, object] | bytes) -> None:
    """Each is refused with one sentence, and never by an internal error."""
    found = raw.post(path, body)
    assert found.status_code in (400, 404, 410), found.text
    assert len(found.json()["detail"]) > 10


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["create_session", "create_model", "optim_step", "asample", "save_weights", "load_weights", "retrieve_future", "weights_info"]),
    body=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from(["session_id", "model_id", "seq_id", "path", "request_id", "model_seq_id", "base_model", "prompt", "adam_params", "lora_config"]),
            st.one_of(st.none(), st.integers(), st.text(max_size=8), st.lists(st.integers(), max_size=2), st.floats(allow_nan=False, allow_infinity=False)),
        ),
    ),
)
def test_fuzz(raw: Raw, path: str, body: dict[str, object] | bytes) -> None:
    assert raw.post(path, body).status_code < 500


def test_samples_are_answered_once_and_can_be_cancelled(start: Start) -> None:
    raw = Raw(start(latency_s=0.05).url)
    session = raw.session()
    sampler = raw.post("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}).json()["sampling_session_id"]
    body = {"prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}, "sampling_params": {"max_tokens": 3}, "sampling_session_id": sampler}
    first, again = (raw.post("asample", {**body, "seq_id": 0, "num_samples": 2}).json() for _ in range(2))
    assert first == again
    assert len(first["sample_sequence_ids"]) == 2
    assert raw.result(first["request_id"]).content == raw.result(first["request_id"]).content
    last = [raw.post("asample", {**body, "seq_id": seq}).json()["request_id"] for seq in range(1, 6)][-1]
    assert raw.post("cancel_future", {"request_id": last}).status_code == 204
    assert raw.result(last).json() == {"error": "The request was cancelled.", "category": "user"}
    assert raw.post("join_sampling_session", {"sampling_session_id": sampler}).json() == {"client_counter": 1}
    assert raw.post("asample", {**body, "seq_id": 9, "num_samples": 0}).status_code == 400
    raw.http.close()


# ------------------------------------------------------------------------------------------------------------- tenants
@pytest.fixture
def keys(serving: Serving, tmp_path: Path) -> Keys:
    return keys_of(ServeConfig(folder=tmp_path / "serve"))


def test_every_route_wants_a_key(serving: Serving, keys: Keys) -> None:
    """Without one, with a wrong one and with one that was revoked: 401 on every route but health."""
    secret = keys.add("ann")
    keys.add("bob")
    with httpx.Client(base_url=serving.url) as http:
        assert http.get("/api/v1/healthz").json() == {"status": "ok"}
        from crucible_framework.server.app import make_app

        with FakeBackend() as backend:
            app = make_app(Desk(backend, ServeConfig(), Shelf(keys.path.parent / "other")), keys)
        closed = 0
        for route in app.routes:
            path, methods = getattr(route, "path"), getattr(route, "methods") - {"HEAD"}  # noqa: B009
            if path.endswith("/healthz") or "/files/" in path or "/traces/" in path:
                continue
            for method, headers in itertools.product(methods, ({}, {"X-API-Key": "tml-wrong"}, {"Authorization": "Bearer tml-local"})):
                found = http.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                assert found.status_code == 401, (method, path)
                closed += 1
        assert closed > 100
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
        keys.revoke("ann")
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 401


def test_tenants_do_not_see_each_other(serving: Serving, keys: Keys, as_tenant: Callable[[str], Raw]) -> None:
    """Sessions, results, runs and checkpoints are the key's own, until a checkpoint is published."""
    ann, bob = as_tenant(keys.add("ann")), as_tenant(keys.add("bob"))
    session = ann.session()
    model = ann.model(session)
    saved = ann.post("save_weights", {"model_id": model, "path": "mine", "seq_id": 1}).json()["request_id"]
    path = ann.result(saved).json()["path"]
    assert bob.post("retrieve_future", {"request_id": saved}).status_code == 410
    assert bob.passed(model, 2).status_code == 410
    assert bob.post("session_heartbeat", {"session_id": session}).status_code == 410
    assert bob.post(f"sessions/{session}/finish", {"reason": {"type": "success"}}).status_code == 204
    assert ann.post("session_heartbeat", {"session_id": session}).status_code == 200, "bob's call ended nothing"
    assert bob.get("training_runs").json()["training_runs"] == []
    for url in (f"training_runs/{model}", f"training_runs/{model}/checkpoints", f"sessions/{session}"):
        assert bob.get(url).status_code == 404
    assert bob.http.delete(f"/api/v1/training_runs/{model}/checkpoints/weights/mine").status_code == 404
    load = {"session_id": bob.session(), "model_seq_id": 0, "path": path, "optimizer": True}
    assert bob.post("load_weights", load).status_code == 404
    assert bob.post("weights_info", {"tinker_path": path}).status_code == 404
    assert ann.http.post(f"/api/v1/training_runs/{model}/checkpoints/weights/mine/publish").status_code == 204
    assert bob.post("weights_info", {"tinker_path": path}).json()["base_model"] == "tiny"
    assert bob.post("load_weights", load).status_code == 200
    assert bob.http.delete(f"/api/v1/training_runs/{model}/checkpoints/weights/mine").status_code == 404


def test_an_open_server_is_for_this_machine_only(serving: Serving) -> None:
    """A page of another site reaches it under that site's name, and cannot send a key."""
    with httpx.Client(base_url=serving.url, headers={"X-API-Key": "tml-any"}) as http:
        assert http.get("/api/v1/sessions").status_code == 200
        assert http.get("/api/v1/sessions", headers={"Host": "evil.example:80"}).status_code == 403
        assert http.get("/api/v1/sessions", headers={"X-API-Key": ""}).status_code == 401


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as made:
        yield made


def test_another_host_needs_keys(backend: FakeBackend, tmp_path: Path) -> None:
    config = ServeConfig(folder=tmp_path / "far", host="0.0.0.0", port=0)
    with pytest.raises(UnsafeError, match="keys add"), serve(backend, config):
        pass
    keys_of(config).add("ann")
    with serve(backend, config, background=False) as server:
        assert server.url.startswith("http://0.0.0.0:")


def test_a_folder_has_one_server(serving: Serving, backend: FakeBackend, tmp_path: Path) -> None:
    with pytest.raises(LockedError), serve(backend, ServeConfig(folder=tmp_path / "serve", port=0)):
        pass


def test_turns_are_fair(backend: FakeBackend, tmp_path: Path) -> None:
    """One key's sixty requests do not keep another's three, which came after them, from being served between them."""
    config, held = ServeConfig(folder=tmp_path / "serve", port=0, poll_s=5.0), threading.Event()
    keys = keys_of(config)
    with serve(backend, config) as serving, events.collect() as seen:
        busy, quiet = Raw(serving.url, keys.add("busy")), Raw(serving.url, keys.add("quiet"))
        model, other = busy.model(busy.session()), quiet.model(quiet.session())
        backend.submit(held.wait, 60)
        sent = [busy.passed(model, seq, forward=True).json()["request_id"] for seq in range(1, 61)]
        asked = [quiet.passed(other, seq, forward=True).json()["request_id"] for seq in range(1, 4)]
        held.set()
        busy.loss(sent[-1])
        quiet.loss(asked[-1])
        order = [event["request"] for event in seen if event["name"] == "server.request" and event["kind"] == "forward_backward"]
        for one in (busy, quiet):
            one.http.close()
    assert len(order) == 63
    assert max(order.index(request) for request in asked) < 15


def test_metrics(serving: Serving, raw: Raw) -> None:
    model = raw.model(raw.session())
    raw.loss(raw.passed(model, 1).json()["request_id"])
    text = raw.http.get("/metrics").text
    assert 'crucible_requests_total{kind="forward_backward"} 1' in text
    assert "# TYPE crucible_sessions gauge\ncrucible_sessions 1" in text
    assert 'crucible_tokens_total{kind="training"} 10' in text
    line = serving.status()
    assert line.startswith("local: sessions 1 · models 1 · samplers 0 · waiting 0 · trained ")
    assert line.endswith(" tokens/s")
    with events.collect() as seen:
        found = raw.http.get("/api/v1/sessions", headers={"X-Request-Id": "mine-1"})
        odd = raw.http.get("/api/v1/sessions", headers={"X-Request-Id": "a b"})
        assert raw.get("sessions", limit="x").status_code == 400
    assert found.headers["x-request-id"] == "mine-1"
    assert odd.headers["x-request-id"] not in ("", "a b")
    told = [event for event in seen if event["name"] == "server.http"]
    assert [(event["request_id"], event["status"], event["tenant"]) for event in told[:1]] == [("mine-1", 200, "local")]
    assert "limit" in str(told[-1]["error"])

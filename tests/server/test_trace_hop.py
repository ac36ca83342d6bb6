"""A trace goes on behind an HTTP request, whoever sends it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from tests.server.conftest import Start

from crucible_framework import events
from crucible_framework.backends import connect
from crucible_framework.losses import resolve
from crucible_framework.records import AdamConfig, LoraConfig, SamplingParams
from crucible_framework.server import Serving
from crucible_framework.testing import make_batch
from crucible_framework.traces import Trace


def test_what_a_request_causes_hangs_below_its_callers_span(serving: Serving) -> None:
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "seed": 1}
    with events.collect() as seen, httpx.Client(base_url=serving.url, headers={"X-API-Key": "any"}) as client:
        with events.span("evaluation.request"):
            header = events.traceparent()
            assert client.post("/v1/completions", json=ask, headers={"traceparent": header}).status_code == 200
        assert client.post("/v1/completions", json=ask).status_code == 200
    _, trace, span, _ = header.split("-")
    below, alone = (event for event in seen if event["name"] == "inference.sample")
    assert (below["trace"], below["parent"]) == (trace, span)
    assert alone.get("trace") != trace


@pytest.mark.parametrize("durable", ["checkpoint", "step"])
def test_the_servers_spans_hang_below_those_of_a_client_of_the_sdk(start: Start, monkeypatch: pytest.MonkeyPatch, durable: str) -> None:
    """Each request of a session below the span in which it was submitted, not below the one in which the session was made."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    loss, server = resolve("cross_entropy"), start(durable=durable)
    with connect("tinker", base_url=server.url) as backend, events.collect() as seen:
        headers = {}
        with events.span("client.made"):
            session = backend.train("tiny", LoraConfig(rank=4, dropout=0.0))
        batch = make_batch()
        for name in ("client.first", "client.second"):
            with events.span(name):
                headers[name] = events.traceparent()
                futures: list[Future[Any]] = [session.forward_backward(batch, loss), session.optim_step(AdamConfig())]
                for future in futures:
                    future.result()
        with events.span("client.asks"):
            headers["client.asks"] = events.traceparent()
            session.sampler().sample("hello", SamplingParams(max_tokens=2)).result()
        session.forward_backward(batch, loss).result()
    at_server = [event for event in seen if event.get("kind") == "span" and not str(event["name"]).startswith("client.")]
    passes = [event for event in at_server if event["name"] == "training.forward_backward"]
    steps = [event for event in at_server if event["name"] == "training.optim_step"]
    samples = [event for event in at_server if event["name"] == "inference.sample"]
    for name, caused in {"client.first": (passes[0], steps[0]), "client.second": (passes[1], steps[1]), "client.asks": (samples[-1],)}.items():
        _, trace, span, _ = headers[name].split("-")
        for event in caused:
            assert (event["trace"], event["parent"]) == (trace, span), (name, event["name"])
    assert passes[2]["parent"] == "", "outside any span nothing is sent"
    answered = [event for event in seen if event["name"] == "server.request" and event["kind"] == "forward_backward"]
    assert [event["span"] for event in answered] == [*(headers[name].split("-")[2] for name in ("client.first", "client.second")), ""]
    tree = Trace.of(seen)
    assert {tree[str(one["span"])].parent for one in (passes[0], steps[0])} == {headers["client.first"].split("-")[2]}

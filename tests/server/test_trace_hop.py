"""A trace goes on behind an HTTP request."""

from __future__ import annotations

import httpx

from crucible_framework import events
from crucible_framework.server import Serving


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

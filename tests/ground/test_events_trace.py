"""Spans keep their trace across threads, processes and headers; decisions know their causes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.events import collect, continued, decision, emit, span, traceparent


def test_a_header_carries_the_open_span_and_its_trace() -> None:
    assert traceparent() == ""
    with collect() as seen, span("request"):
        header = traceparent()
        with span("inner"):
            assert traceparent().split("-")[1] == header.split("-")[1]
            assert traceparent() != header
    inner, request = seen
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", header)
    assert header.split("-")[1:3] == [request["trace"], request["span"]]
    assert (inner["trace"], inner["parent"]) == (request["trace"], request["span"])
    assert (request["kind"], inner["kind"]) == ("span", "span")


def test_two_roots_have_two_traces_and_events_outside_none() -> None:
    with collect() as seen:
        for _ in range(2):
            with span("root"):
                emit("point")
        emit("outside")
    traces = [event.get("trace") for event in seen]
    assert traces[0] == traces[1] != traces[2] == traces[3]
    assert "trace" not in seen[4]
    assert "kind" not in seen[0]


def test_a_span_goes_on_in_another_process() -> None:
    code = (
        "import json, sys\n"
        "from crucible_framework.events import collect, continued, span\n"
        "with collect() as seen, continued(sys.argv[1]), span('child'):\n    pass\n"
        "print(json.dumps([seen[0]['trace'], seen[0]['parent'], seen[0]['span']]))"
    )
    with collect() as seen, span("parent"):
        out = subprocess.run([sys.executable, "-c", code, traceparent()], capture_output=True, text=True, check=True).stdout
    trace, parent, child = re.findall(r'"([0-9a-f]+)"', out)
    assert (trace, parent) == (seen[0]["trace"], seen[0]["span"])
    assert child != parent


def test_a_forked_child_gives_out_other_ids() -> None:
    read, write = os.pipe()
    with collect() as seen:
        with span("before"):
            pass
        child = os.fork()
        if child == 0:
            with collect() as own, span("in the child"):
                pass
            os.write(write, str(own[0]["span"]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        with span("after"):
            pass
    other = os.read(read, 64).decode()
    os.close(read)
    os.close(write)
    assert len(other) == 16
    assert other[:8] != str(seen[-1]["span"])[:8]


@given(st.one_of(st.text(max_size=80), st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True)))
def test_only_a_whole_header_continues_a_trace(header: str) -> None:
    with collect() as seen, continued(header), span("root"):
        pass
    parts = header.strip().split("-")
    whole = bool(re.fullmatch(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", header.strip()))
    assert seen[0]["parent"] == (parts[2] if whole else "")
    assert len(str(seen[0]["trace"])) == 32
    assert traceparent() == ""


@pytest.mark.parametrize(
    "header", ["", "00-", "ff-" + "1" * 32 + "-" + "2" * 16 + "-01", "00-" + "0" * 32 + "-" + "2" * 16 + "-01", "00-" + "1" * 32 + "-" + "0" * 16 + "-01"]
)
def test_a_bad_header_starts_a_new_trace(header: str) -> None:
    with collect() as seen, continued(header), span("root"):
        pass
    assert seen[0]["parent"] == ""


def test_decisions_are_linked_to_their_causes() -> None:
    assert decision("hedge", chose="wait", among=("wait", "fire"), because="nobody listens") == ""
    with collect() as seen:
        first = decision("hedge", chose="fire", among=("wait", "fire"), because="slower than the 95th percentile", confidence=0.75)
        second = decision("route", chose="a", among=("a", "b"), because="it was right before", causes=(first, ""), cost=2)
    assert first != second
    assert (seen[0]["id"], seen[0]["confidence"]) == (first, 0.75)
    assert "causes" not in seen[0]
    assert (seen[1]["causes"], seen[1]["cost"]) == ([first], 2)
    assert "confidence" not in seen[1]

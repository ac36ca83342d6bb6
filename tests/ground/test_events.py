"""Events are flat, carry the run and the span they belong to, and no sink can break the work."""

from __future__ import annotations

import contextvars
import logging
import threading
import time

import pytest

from crucible_framework import events
from crucible_framework.events import Event, collect, current_run, decision, emit, in_run, span, subscribe, to_logging


def test_emit_without_a_sink_does_nothing() -> None:
    emit("nobody.listens", step=1)
    with span("nobody.listens") as opened:
        opened.set(step=2)
    assert opened.fields == {"step": 2}


def test_event_is_flat_with_time_name_and_fields() -> None:
    before = time.time()
    with collect() as seen:
        emit("checkpoint.saved", step=100, size_bytes=7)
    emit("after.the.block")
    assert len(seen) == 1
    event = dict(seen[0])
    assert before <= float(str(event.pop("ts"))) <= time.time()
    assert event == {"name": "checkpoint.saved", "run": "", "span": "", "parent": "", "step": 100, "size_bytes": 7}


def test_every_sink_hears_and_ending_one_leaves_the_others() -> None:
    first: list[Event] = []
    with collect() as second:
        end = subscribe(first.append)
        emit("one")
        end()
        end()
        emit("two")
    assert [e["name"] for e in first] == ["one"]
    assert [e["name"] for e in second] == ["one", "two"]


def test_a_sink_subscribed_twice_is_ended_once_at_a_time() -> None:
    seen: list[Event] = []
    sink = seen.append
    end_first, end_second = subscribe(sink), subscribe(sink)
    try:
        emit("both")
        end_first()
        emit("second")
    finally:
        end_first()
        end_second()
    emit("none")
    assert [e["name"] for e in seen] == ["both", "both", "second"]


def test_a_sink_that_raises_is_logged_and_the_next_one_still_hears(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("sink is full")

    end = subscribe(broken)
    try:
        with collect() as seen, caplog.at_level(logging.ERROR), span("work"):
            emit("inside")
    finally:
        end()
    assert [e["name"] for e in seen] == ["inside", "work"]
    assert caplog.text.count("sink is full") >= 2
    assert "an event sink failed on 'inside'" in caplog.text


def test_spans_nest_and_time_their_block() -> None:
    with collect() as seen:
        with span("outer", model="m"), span("inner") as inner:
            inner.set(tokens=3)
            emit("point")
        emit("outside")
    point, inner_end, outer_end, outside = seen
    assert (outer_end["name"], outer_end["model"], outer_end["parent"]) == ("outer", "m", "")
    assert (inner_end["name"], inner_end["tokens"], inner_end["parent"]) == ("inner", 3, outer_end["span"])
    assert point["span"] == inner_end["span"] != outer_end["span"]
    assert outside["span"] == ""
    assert 0 <= float(str(inner_end["duration_s"])) <= float(str(outer_end["duration_s"]))


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_span_that_raises_says_which_error_and_lets_it_through(error: BaseException) -> None:
    with collect() as seen, pytest.raises(type(error)), span("work"):
        raise error
    assert seen[0]["error"] == type(error).__name__
    with collect() as seen:
        emit("next")
    assert seen[0]["span"] == ""


def test_spans_of_threads_are_apart_unless_the_context_goes_along() -> None:
    context: contextvars.Context | None = None

    def work(name: str) -> None:
        with span(name):
            emit(f"{name}.point")

    with collect() as seen:
        with in_run("first"), span("outer"):
            context = contextvars.copy_context()
            for thread in (threading.Thread(target=work, args=("alone",)), threading.Thread(target=context.run, args=(work, "child"))):
                thread.start()
                thread.join()
        by_name = {e["name"]: e for e in seen}
    assert (by_name["alone"]["parent"], by_name["alone"]["run"]) == ("", "")
    assert (by_name["child"]["parent"], by_name["child"]["run"]) == (by_name["outer"]["span"], "first")
    assert by_name["child.point"]["span"] == by_name["child"]["span"]


def test_many_threads_lose_no_event_and_share_no_span() -> None:
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(50):
            with span("work"):
                pass

    with collect() as seen:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 400
    assert len({str(e["span"]) for e in seen}) == 400


def test_in_run_nests_and_ends_with_its_block() -> None:
    assert current_run() == ""
    with collect() as seen, in_run("a"):
        emit("one")
        with in_run("b"):
            assert current_run() == "b"
            emit("two")
        emit("three")
    assert [e["run"] for e in seen] == ["a", "b", "a"]
    with pytest.raises(ValueError, match="bad"), in_run("c"):
        raise ValueError("bad")
    assert current_run() == ""


def test_decision_records_choice_alternatives_and_reason() -> None:
    with collect() as seen:
        decision("route", chose="small", among=("small", "large"), because="it was right before", cost=0.1)
    event = seen[0]
    assert (event["name"], event["what"], event["chose"], event["among"]) == ("decision", "route", "small", ["small", "large"])
    assert (event["because"], event["cost"]) == ("it was right before", 0.1)


def test_collect_ends_when_its_block_raises() -> None:
    with pytest.raises(ValueError, match="bad"), collect():
        raise ValueError("bad")
    assert events._sinks == []


def test_to_logging_writes_name_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="crucible_framework"):
        end = to_logging(logging.DEBUG)
        emit("training.step", step=3)
        end()
        emit("training.step", step=4)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.DEBUG
    assert caplog.records[0].getMessage() == "training.step {'run': '', 'span': '', 'parent': '', 'step': 3}"

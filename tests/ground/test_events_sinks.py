"""Sinks never slow or block the work; what they wrote is found again, and what was damaged is named."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.errors import ConfigError, NotFoundError, StoreError
from crucible_framework.events import Event, emit, span
from crucible_framework.sinks import Queued, event_file, read_events, to_jsonl


def wait_until(true: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
    assert true()  # type: ignore[operator]


def test_a_file_holds_every_event_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    end = to_jsonl(path)
    for step in range(2000):
        emit("training.step", step=step)
    with span("work"):
        pass
    end()
    end()
    emit("after")
    log = read_events(path)
    assert log.problems == ()
    assert [event["seq"] for event in log.events] == list(range(1, 2002))
    assert [event["step"] for event in log.events[:-1]] == list(range(2000))
    assert log.events[-1]["kind"] == "span"


def test_each_damaged_line_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    end = to_jsonl(path)
    for step in range(4):
        emit("training.step", step=step, loss=0.5)
    end()
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b'"loss":0.5', b'"loss":0.4')
    lines[2] = b"[1]"
    path.write_bytes(b"\n".join(lines[:4]) + b'\n{"ts":1,"name":"to')
    log = read_events(path)
    assert [event["step"] for event in log.events] == [0, 3]
    assert [problem.split(": ", 1)[0] for problem in log.problems] == ["events.jsonl:2", "events.jsonl:3", "events.jsonl:5"]
    assert "checksum differs" in log.problems[0]
    assert "no JSON object" in log.problems[1]
    assert "torn" in log.problems[2]
    with pytest.raises(NotFoundError, match="no events file"):
        read_events(tmp_path / "none")


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda key: key not in ("crc", "seq", "name")),
        st.one_of(st.text(max_size=40), st.integers(-(2**53), 2**53), st.booleans()),
        max_size=5,
    ),
    st.data(),
)
def test_any_changed_byte_of_a_line_is_found(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, str | int | bool], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("crc") / "events.jsonl"
    end = to_jsonl(path)
    try:
        events._send({"name": "x", **fields})
    finally:
        end()
    raw = path.read_bytes()
    assert read_events(path).events[0] == {"name": "x", **fields, "seq": 1}
    at = data.draw(st.integers(0, len(raw) - 2))
    changed = bytes([raw[at] ^ data.draw(st.integers(1, 127))])
    path.write_bytes(raw[:at] + changed + raw[at + 1 :])
    assert read_events(path).events == ()
    assert read_events(path).problems


def test_kill_loses_no_more_than_a_tenth_of_a_second(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = (
        "import os, sys, time\nfrom crucible_framework import events, sinks\nsinks.to_jsonl(sys.argv[1])\n"
        "for step in range(50):\n    events.emit('step', step=step)\ntime.sleep(0.1)\nprint('now', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    log = read_events(path)
    assert [event["step"] for event in log.events] == list(range(50))
    assert log.problems == ()


def test_the_end_of_a_process_writes_what_waits_and_does_not_hang_on_a_dead_target(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom crucible_framework import events, sinks\nsinks.to_jsonl(sys.argv[1])\n"
        "sinks.Queued(lambda batch: time.sleep(600), exit_s=0.2).listen()\nevents.emit('last', step=7)\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "e.jsonl")], check=True, timeout=60)
    assert time.monotonic() - start < 20
    assert [event["step"] for event in read_events(tmp_path / "e.jsonl").events] == [7]


def test_eight_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = "import sys\nfrom crucible_framework import events, sinks\nsinks.to_jsonl(sys.argv[1])\nfor i in range(300): events.emit('x', who=sys.argv[2], i=i)"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(who)]) for who in range(8)]
    assert [process.wait(60) for process in running] == [0] * 8
    log = read_events(path)
    assert log.problems == ()
    for who in range(8):
        assert [event["i"] for event in log.events if event["who"] == str(who)] == list(range(300))


def test_a_forked_child_writes_its_own_events_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    end = to_jsonl(path)
    emit("parent")
    child = os.fork()
    if child == 0:
        emit("child")
        end()
        os._exit(0)
    os.waitpid(child, 0)
    end()
    assert sorted(str(event["name"]) for event in read_events(path).events) == ["child", "parent"]


def test_a_full_queue_drops_counts_and_says_so() -> None:
    gate, seen = threading.Event(), list[Event]()

    def slow(batch: Sequence[Event]) -> None:
        gate.wait(10)
        seen.extend(batch)

    sink = Queued(slow, limit=10)
    end = sink.listen()
    start = time.perf_counter()
    for step in range(1000):
        emit("x", step=step)
    assert time.perf_counter() - start < 10
    gate.set()
    end()
    told = [event for event in seen if event["name"] == "events.dropped"]
    assert sum(int(str(event["count"])) for event in told) == sink.dropped > 0
    assert len(seen) - len(told) + sink.dropped == 1000


def test_a_target_that_fails_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    def broken(batch: Sequence[Event]) -> None:
        raise OSError("the disk is full")

    sink = Queued(broken)
    end = sink.listen()
    with caplog.at_level(logging.ERROR):
        emit("one")
        wait_until(lambda: sink.failed == 1)
        emit("two")
        end()
    assert sink.failed == 2
    assert caplog.text.count("further failures are only counted") == 1
    assert "the disk is full" in caplog.text


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit is 0"):
        Queued(lambda batch: None, limit=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Cannot"):
        to_jsonl(tmp_path / "file" / "events.jsonl")


def test_a_torn_end_spoils_no_later_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"ts":1,"name":"tor')
    sink = event_file(path)
    sink({"name": "next"})
    sink.close()
    log = read_events(path)
    assert [event["name"] for event in log.events] == ["next"]
    assert [problem.split(": ", 1)[0] for problem in log.problems] == ["events.jsonl:1"]


def test_what_ends_a_target_is_called_once_and_in_time() -> None:
    gate, closed = threading.Event(), list[str]()

    def close() -> None:
        closed.append(threading.current_thread().name)

    sink = Queued(lambda batch: None, close=close)
    sink.close()
    sink.close()
    assert closed == ["crucible-events"]
    stuck = Queued(lambda batch: None, exit_s=0.05, close=lambda: wait_until(gate.is_set, 30))
    stuck({"name": "x"})
    stuck.close()  # comes back although the target does not
    assert not gate.is_set()
    gate.set()


def test_a_target_that_cannot_be_closed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise OSError("gone")

    with caplog.at_level(logging.ERROR):
        Queued(lambda batch: None, close=broken).close()
    assert "could not be closed" in caplog.text

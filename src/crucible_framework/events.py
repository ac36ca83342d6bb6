"""What happens, as flat dicts: `emit`, `span`, `decision`, and sinks that listen.

An event is `{"ts": seconds since the epoch, "name": …, "run": …, "span": …, "parent": …}` plus fields with units in their names. With no
sink an event costs one list test. A sink that raises is logged and never breaks the work. This file does not know where events go.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from .records import Json

__all__ = ["Event", "collect", "current_run", "decision", "emit", "in_run", "span", "subscribe", "to_logging"]

Event: TypeAlias = Mapping[str, Json]
Sink: TypeAlias = Callable[[Event], None]

_log = logging.getLogger("crucible_framework")
_sinks: list[tuple[Sink]] = []
_lock = threading.Lock()
_run: contextvars.ContextVar[str] = contextvars.ContextVar("crucible_run", default="")
_span: contextvars.ContextVar[str] = contextvars.ContextVar("crucible_span", default="")
_ids = itertools.count(1)


def subscribe(sink: Sink) -> Callable[[], None]:
    """Every event from now on goes to `sink`; returns a function that ends it."""
    global _sinks
    entry = (sink,)  # its own identity, so that a sink subscribed twice is ended once at a time
    with _lock:
        _sinks = [*_sinks, entry]

    def end() -> None:
        global _sinks
        with _lock:
            _sinks = [e for e in _sinks if e is not entry]

    return end


@contextmanager
def collect() -> Iterator[list[Event]]:
    """Gathers the events of the block in a list."""
    events: list[Event] = []
    end = subscribe(events.append)
    try:
        yield events
    finally:
        end()


def to_logging(level: int = logging.INFO) -> Callable[[], None]:
    """Sends every event to the standard logger `crucible_framework`; returns a function that ends it."""
    return subscribe(lambda event: _log.log(level, "%s %s", event["name"], {k: v for k, v in event.items() if k not in ("ts", "name")}))


def _send(event: Event) -> None:
    for (sink,) in _sinks:
        try:
            sink(event)
        except Exception:
            _log.exception("an event sink failed on %r", event.get("name"))


def emit(name: str, **fields: Json) -> None:
    """Sends one event."""
    if _sinks:
        _send({"ts": time.time(), "name": name, "run": _run.get(), "span": _span.get(), "parent": "", **fields})


class Span:
    """An open span; `set(...)` adds fields to the event that its end emits."""

    __slots__ = ("fields",)

    def __init__(self, fields: dict[str, Json]) -> None:
        self.fields = fields

    def set(self, **fields: Json) -> None:
        """Adds or replaces fields."""
        self.fields.update(fields)


@contextmanager
def span(name: str, **fields: Json) -> Iterator[Span]:
    """Times the block and emits one event at its end, with `duration_s`, and `error` where it raised. Spans nest by context."""
    opened = Span(dict(fields))
    if not _sinks:
        yield opened
        return
    parent = _span.get()
    identity = f"{os.getpid():x}-{next(_ids):x}"
    token = _span.set(identity)
    start = time.perf_counter()
    try:
        yield opened
    except BaseException as error:
        opened.fields["error"] = type(error).__name__
        raise
    finally:
        _span.reset(token)
        duration_s = time.perf_counter() - start
        _send({"ts": time.time(), "name": name, "run": _run.get(), "span": identity, "parent": parent, "duration_s": duration_s, **opened.fields})


def decision(what: str, *, chose: str, among: Sequence[str], because: str, **fields: Json) -> None:
    """Records a choice: what was chosen, among what, and why."""
    emit("decision", what=what, chose=chose, among=list(among), because=because, **fields)


@contextmanager
def in_run(run: str) -> Iterator[None]:
    """Events of the block carry that run's name."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def current_run() -> str:
    """The name of the run that the caller is in, "" outside any."""
    return _run.get()

"""What happens, as flat dicts: `emit`, `span`, `decision`, and sinks that listen.

An event is `{"ts": seconds since the epoch, "name": …, "run": …, "span": …, "parent": …}` plus fields with units in their names; inside a
span it has `trace` too, the id that all spans below one root share. The event of a span that ended has `kind` "span", its own id under
`span` and the enclosing one under `parent`. With no sink an event costs one list test. A sink that raises is logged and never breaks the
work. This file does not know where events go; see `sinks`.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeAlias

from .records import Json

__all__ = [
    "Event",
    "OpenSpan",
    "Sink",
    "collect",
    "continued",
    "current_run",
    "decision",
    "emit",
    "in_run",
    "linked",
    "listening",
    "opened",
    "past",
    "span",
    "subscribe",
    "to_logging",
    "traceparent",
    "within",
]

Event: TypeAlias = Mapping[str, Json]
Sink: TypeAlias = Callable[[Event], None]

_log = logging.getLogger("crucible_framework")
_sinks: list[tuple[Sink]] = []
_lock = threading.Lock()
_run: contextvars.ContextVar[str] = contextvars.ContextVar("crucible_run", default="")
_span: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar("crucible_span", default=("", ""))
"""(trace, span): 32 and 16 hex digits, as W3C Trace Context has them."""
_above: contextvars.ContextVar[tuple[OpenSpan | None, str]] = contextvars.ContextVar("crucible_above", default=(None, ""))
"""The open span that the work is done for, and the decision in it that asked for the work."""
_ids = itertools.count(1)
_process = os.urandom(4).hex()
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


def _forked() -> None:
    """A child process must not give out its parent's ids."""
    global _process
    _process = os.urandom(4).hex()


os.register_at_fork(after_in_child=_forked)


def _new_id() -> str:
    return f"{_process}{next(_ids) & 0xFFFFFFFF:08x}"


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


def listening() -> bool:
    """Whether there is a sink, for fields that cost time to make."""
    return bool(_sinks)


def emit(name: str, **fields: Json) -> None:
    """Sends one event."""
    if _sinks:
        trace, inside = _span.get()
        event: dict[str, Json] = {"ts": time.time(), "name": name, "run": _run.get(), "span": inside, "parent": ""}
        if trace:
            event["trace"] = trace
        event.update(fields)
        _send(event)


class Span:
    """A span of a block; `set(...)` adds fields to the event that its end emits. Made by `span`."""

    __slots__ = ("_name", "_start", "_token", "fields")

    def __init__(self, name: str, fields: dict[str, Json]) -> None:
        self._name, self.fields = name, fields
        self._token: contextvars.Token[tuple[str, str]] | None = None

    def set(self, **fields: Json) -> None:
        """Adds or replaces fields."""
        self.fields.update(fields)

    def __enter__(self) -> Self:
        if _sinks:
            trace, _ = _span.get()
            self._token = _span.set((trace or os.urandom(16).hex(), _new_id()))
            self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._token is None:
            return
        duration_s = time.perf_counter() - self._start
        trace, identity = _span.get()
        before = self._token.old_value
        parent = "" if before is contextvars.Token.MISSING else before[1]
        _span.reset(self._token)
        event: dict[str, Json] = {"ts": time.time(), "name": self._name, "run": _run.get(), "span": identity, "parent": parent, "trace": trace,
                                  "kind": "span", "duration_s": duration_s}  # fmt: skip
        if kind is not None:
            event["error"] = kind.__name__
        _link(event, identity, parent)
        event.update(self.fields)
        _send(event)


def _link(event: dict[str, Json], identity: str, parent: str) -> None:
    """A span directly below an open one was caused by what that decided, and may be what its answer comes from."""
    above, cause = _above.get()
    if above is not None and above.id == parent:
        above.found.append(identity)
        if cause:
            event["causes"] = [cause]


def span(name: str, **fields: Json) -> Span:
    """Times a `with` block and emits one event at its end, with `duration_s`, and `error` where it raised. Spans nest by context."""
    return Span(name, fields)


def past(name: str, duration_s: float, **fields: Json) -> None:
    """A span that is over: what `span` would have emitted for a block that took so long and ends now."""
    if _sinks:
        (trace, parent), identity = _span.get(), _new_id()
        event: dict[str, Json] = {"ts": time.time(), "name": name, "run": _run.get(), "span": identity, "parent": parent,
                                  "trace": trace or os.urandom(16).hex(), "kind": "span", "duration_s": duration_s}  # fmt: skip
        _link(event, identity, parent)
        event.update(fields)
        _send(event)


class OpenSpan:
    """A span of work that goes on in futures and callbacks and ends once, wherever that is. Made by `opened`.

    Attributes:
        id: of the span.
        found: ids of what was done directly below it: what an answer comes from.
    """

    __slots__ = ("_above", "_cause", "_name", "_open", "_parent", "_run", "_start_s", "_trace", "fields", "found", "id")

    def __init__(self, name: str, fields: dict[str, Json]) -> None:
        trace, self._parent = _span.get()
        self._above, self._cause = _above.get()
        self._name, self._trace, self._run, self._start_s, self._open = name, trace or os.urandom(16).hex(), _run.get(), time.perf_counter(), True
        self.id, self.found, self.fields = _new_id(), list[str](), fields

    def end(self, answer: str = "", **fields: Json) -> None:
        """Emits the span; later calls do nothing. `answer` is the id of the decision in it that gave its result."""
        with _lock:
            open_, self._open = self._open, False
        if open_:
            event: dict[str, Json] = {"ts": time.time(), "name": self._name, "run": self._run, "span": self.id, "parent": self._parent, "trace": self._trace,
                                      "kind": "span", "duration_s": time.perf_counter() - self._start_s}  # fmt: skip
            if self._above is not None and self._above.id == self._parent:
                self._above.found.append(answer or self.id)
            if self._cause:
                event["causes"] = [self._cause]
            event |= self.fields | fields
            _send(event)

    def emit(self, name: str, **fields: Json) -> None:
        """An event in the span, from any thread."""
        _send({"ts": time.time(), "name": name, "run": self._run, "span": self.id, "parent": "", "trace": self._trace, **fields})


def opened(name: str, **fields: Json) -> OpenSpan | None:
    """Begins a span that `OpenSpan.end` ends; None where nobody listens."""
    return OpenSpan(name, fields) if _sinks else None


def within(open_span: OpenSpan | None, cause: str = "") -> Within:
    """What is asked in the block is done for an open span, because of a decision in it. None for the span does nothing."""
    return Within(open_span, cause)


class Within:
    """The block that `within` makes."""

    __slots__ = ("_cause", "_open", "_tokens")

    def __init__(self, open_span: OpenSpan | None, cause: str = "") -> None:
        self._open, self._cause = open_span, cause

    def __enter__(self) -> None:
        if self._open is not None:
            one = self._open  # the run too: a timer's thread is in none
            self._tokens = _span.set((one._trace, one.id)), _above.set((one, self._cause)), _run.set(one._run)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._open is not None:
            _span.reset(self._tokens[0])
            _above.reset(self._tokens[1])
            _run.reset(self._tokens[2])


def linked(open_span: OpenSpan | None, name: str, causes: Sequence[str] = (), **fields: Json) -> str:
    """An event in an open span that others can name as their cause, with its own; gives its id, "" where nobody listens.

    With the fields `what`, `chose` and `among` it is a decision, whose `reason` and `probability` say why and how surely.
    """
    if not _sinks:
        return ""
    identity = f"d{_new_id()}"
    link: dict[str, Json] = {"id": identity}
    if found := [cause for cause in causes if cause]:
        link["causes"] = list[Json](found)
    (emit if open_span is None else open_span.emit)(name, **(link | fields))
    return identity


def decision(what: str, *, chose: str, among: Sequence[str], because: str, confidence: float | None = None, causes: Sequence[str] = (), **fields: Json) -> str:
    """Records a choice and returns its id, "" where nobody listens.

    Args:
        what: the question ("route").
        chose: the answer.
        among: all that could have been chosen.
        because: why, in words.
        confidence: how sure, in [0, 1], where that is known.
        causes: ids of earlier decisions that led to this one; "" among them is left out.
    """
    if not _sinks:
        return ""
    identity = f"d{_new_id()}"
    known: dict[str, Json] = {"what": what, "chose": chose, "among": list(among), "because": because, "id": identity}
    if confidence is not None:
        known["confidence"] = confidence
    if found := [cause for cause in causes if cause]:
        known["causes"] = list[Json](found)
    emit("decision", **(known | fields))
    return identity


def traceparent() -> str:
    """The open span as a W3C `traceparent` header, "" outside any: what to hand to another process or service.

    Source: https://www.w3.org/TR/trace-context/
    """
    trace, inside = _span.get()
    return f"00-{trace}-{inside}-01" if trace else ""


@contextmanager
def continued(header: str) -> Iterator[None]:
    """Spans of the block go below the span that a `traceparent` names; a header that is none starts a trace of its own, as its standard says."""
    parts = _TRACEPARENT.fullmatch(header.strip())
    token = _span.set((parts[1], parts[2]) if parts and not header.startswith("ff") else ("", ""))
    try:
        yield
    finally:
        _span.reset(token)


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

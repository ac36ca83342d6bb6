"""A run: one folder, one writer, append-only rows. Readers, which need no lock, are in `run_files`.

`open_run` holds the folder's lock for a block and leaves a status behind however the block ends; a process that was killed leaves
"running" without a lock, which readers show as "interrupted". What the rows and results mean is the trainer's business: this file does
not know a loss from a learning rate.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import orjson

from .. import events, files
from ..config import differing_keys, fingerprint, to_dict
from ..errors import ConfigError, CrucibleError, NotFoundError, StoreError
from ..records import Json
from ..sinks import event_file
from .checkpoints import Checkpoints
from .names import safe_name
from .run_files import CONFIG, EVENTS, LABELS, LOCK, METRICS, RUN, SYSTEM, TIMINGS, Status, read_object
from .system import SystemWatch

__all__ = ["Run", "open_run"]

_log = logging.getLogger("crucible_framework")
_RESERVED = frozenset({RUN, CONFIG, METRICS, TIMINGS, EVENTS, SYSTEM, LABELS})
_current: contextvars.ContextVar[Run | None] = contextvars.ContextVar("crucible_open_run", default=None)
_open: list[Run] = []
_guard = threading.Lock()


class Run:
    """An open run; made by `open_run`. Its methods may be called from any thread."""

    def __init__(self, folder: Path, state: dict[str, Json], *, resumed: bool) -> None:
        self.folder = folder
        self.name = folder.name
        self.resumed = resumed
        self._state = state
        self._rows = threading.RLock()
        self._stopped = self._closed = False
        self._step = 0
        self._logs: dict[str, files.JsonLines] = {}
        self._events = event_file(folder / EVENTS)
        self.checkpoints = Checkpoints(folder / "checkpoints", before_publish=self._sync)

    @property
    def fingerprint(self) -> str:
        """The sha256 of the run's configuration."""
        return str(self._state["fingerprint"])

    def _append(self, name: str, row: Mapping[str, Json], *, sync: bool = False) -> None:
        with self._rows:
            if self._closed:
                raise StoreError(f"Run {self.name!r} is closed; nothing more can be written to {name!r}. Open it again with resume=True.")
            if name not in self._logs:
                self._logs[name] = files.JsonLines(self.folder / name)
            self._logs[name].append(row, sync=sync)

    def _sync(self) -> None:
        with self._rows:
            for log in self._logs.values():
                log.sync()

    def _close(self) -> None:
        with self._rows:
            for log in self._logs.values():
                log.close()
            self._logs.clear()
            self._closed = True
        self._events.close()

    def log_metrics(self, row: Mapping[str, Json]) -> None:
        """Adds a row to metrics.jsonl: only what the same settings give again, no times.

        Raises:
            ConfigError: the row has no whole "step". StorageFullError: no room; the row is not there in part.
        """
        self._append(METRICS, _with_step(row))
        self._step = int(cast("int", row["step"]))

    def log_timing(self, row: Mapping[str, Json]) -> None:
        """Adds a row to timings.jsonl: seconds, rates and bytes of a step. Raises as `log_metrics`."""
        self._append(TIMINGS, _with_step(row))

    def log_system(self, row: Mapping[str, Json]) -> None:
        """Adds a row to system.jsonl, under the step that was logged last: what the machine does meanwhile."""
        self._append(SYSTEM, {"step": self._step, **row})

    def metrics(self) -> list[dict[str, Json]]:
        """All rows of metrics.jsonl."""
        return files.read_lines(self.folder / METRICS)

    def rewind(self, step: int) -> None:
        """Forgets the rows of metrics and timings after a step, before training continues from that step's checkpoint."""
        with self._rows:
            for name in (METRICS, TIMINGS):
                rows = files.read_lines(self.folder / name)
                kept = [row for row in rows if not isinstance(at := row.get("step"), int) or at <= step]
                if len(kept) != len(rows):
                    if name in self._logs:
                        self._logs.pop(name).close()
                    files.write_atomic(self.folder / name, b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in kept))

    def write_json(self, name: str, value: object) -> None:
        """Writes or replaces a JSON file of the run ("data.json").

        Raises:
            ConfigError: the name is not safe, or is that of a file that the run keeps itself.
        """
        if name in _RESERVED:
            raise ConfigError(f"{name!r} is kept by the run itself. Choose another name.")
        files.write_json(self.folder / safe_name("file", name), value)

    def stop(self) -> None:
        """Says that the run ends before its time: its status becomes "stopped" and it can be resumed."""
        self._stopped = True

    def finish(self, result: Mapping[str, Json], status: Literal["done", "failed", "stopped"] = "done") -> None:
        """Writes the result and how the run ended; an exception later in the block still makes it "failed"."""
        self._state["result"] = to_dict(result)
        self._end(status)

    def _end(self, status: Status, error: str = "") -> None:
        self._state.update(status=status, error=error, finished_at=time.time())
        files.write_json(self.folder / RUN, self._state)
        events.emit("run.ended", status=status, path=str(self.folder), error=error)

    def _end_normally(self) -> None:
        if self._stopped and self._state["status"] != "failed":
            self._end("stopped")
        elif self._state["status"] == "running":
            self._end("done")

    def _end_with(self, error: BaseException) -> None:
        """Never hides the error that ended the run."""
        try:
            if isinstance(error, Exception):
                self._end("failed", f"{type(error).__name__}: {error}")
            else:
                self._end("stopped", type(error).__name__)
        except CrucibleError:
            _log.exception("the end of run %r could not be written", self.name)

    def _listen(self, event: events.Event) -> None:
        """Takes the run's own events; those of engine threads, which are in no run, only where no other run is open in this process."""
        owner = _current.get()
        if owner is self or (owner is None and len(_open) == 1):
            self._events({**event, "run": self.name})


def _with_step(row: Mapping[str, Json]) -> Mapping[str, Json]:
    if not isinstance(row.get("step"), int):
        raise ConfigError(f"A row has step {row.get('step')!r}; expected a whole number under 'step'.")
    return row


@contextmanager
def open_run(folder: Path, config: Mapping[str, Json], *, resume: bool = False, environment: Mapping[str, Json] | None = None) -> Iterator[Run]:
    """Holds a run folder for the block; events of the block go to its events.jsonl.

    Args:
        folder: made if need be; its last part is the run's name.
        config: everything that decides the run's result; written to config.json.
        resume: continue the run that is there; where there is none, start one.
        environment: versions and machine, for the record.

    At the end of the block the status becomes "done", "stopped" after `stop()` or an interrupt, "failed" (with the error's text) after an
    exception, unless `finish` has set it.

    Raises:
        LockedError: another process has the folder open.
        ConfigError: there is a run already and `resume` is off; or it has another configuration (the differing keys are named).
        StoreError: the folder cannot be written.
    """
    folder = Path(folder)
    plain = cast("dict[str, Json]", orjson.loads(orjson.dumps(to_dict(config))))
    with files.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder / LOCK, "run folder", timeout_s=0.2):
        run = _enter(folder, plain, resume=resume, environment=environment or {})
        token = _current.set(run)
        with _guard:
            _open.append(run)
        end = events.subscribe(run._listen)
        watch = SystemWatch(folder, run.log_system)
        try:
            with events.in_run(run.name):
                events.emit("run.started", path=str(folder), resumed=run.resumed, fingerprint=run.fingerprint)
                yield run
                run._end_normally()
        except BaseException as error:
            with events.in_run(run.name):
                run._end_with(error)
            raise
        finally:
            end()
            watch.close()
            with _guard:
                _open.remove(run)
            with contextlib.suppress(ValueError):  # closed from another context (an abandoned generator)
                _current.reset(token)
            run._close()


def _enter(folder: Path, config: dict[str, Json], *, resume: bool, environment: Mapping[str, Json]) -> Run:
    files.sweep(folder)
    Checkpoints(folder / "checkpoints").sweep()
    old: dict[str, Json] = {}
    exists = any((folder / name).exists() for name in (RUN, METRICS)) or bool(Checkpoints(folder / "checkpoints").list())
    if exists and not resume:
        raise ConfigError(f"{str(folder)!r} holds a run already; expected a new folder. Choose another one, or continue this run with resume (--resume).")
    if exists:
        _check_same(folder, config)
        with contextlib.suppress(NotFoundError):
            old = read_object(folder / RUN)
    else:
        files.write_json(folder / CONFIG, config)
    now = time.time()
    state: dict[str, Json] = {
        "name": folder.name,
        "status": "running",
        "created_at": old.get("created_at", now),
        "finished_at": None,
        "fingerprint": fingerprint(config),
        "environment": to_dict(environment),
        "result": None,
        "error": "",
    }
    if exists:
        state["resumed_at"] = now
    files.write_json(folder / RUN, state)
    return Run(folder, state, resumed=exists)


def _check_same(folder: Path, config: Mapping[str, Json]) -> None:
    old = read_object(folder / CONFIG)
    keys = differing_keys(old, config)
    if not keys:
        return
    changes = ", ".join(f"{key} was {_at(old, key)!r} and is {_at(config, key)!r}" for key in keys[:8])
    more = f", and {len(keys) - 8} more" if len(keys) > 8 else ""
    raise ConfigError(f"Run {folder.name!r} cannot be resumed with another configuration: {changes}{more}. Undo the change, or choose another folder.")


def _at(tree: Mapping[str, Json], dotted: str) -> Json:
    """The value under a dotted key; a key of the tree may hold dots itself."""
    if dotted in tree:
        return tree[dotted]
    for match in re.finditer(r"\.", dotted):
        inner = tree.get(dotted[: match.start()])
        if isinstance(inner, dict):
            return _at(inner, dotted[match.end() :])
    return None

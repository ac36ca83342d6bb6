"""A disk that fails or crashes at a chosen operation, processes that share a folder, and a checkpoint to save."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crucible_framework.records import Checkpoint, LoraConfig
from crucible_framework.store import Checkpoints, index

PATCHED = ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "open", "ftruncate", "sendfile", "utime")
GROWING = frozenset({"write", "fsync", "mkdir", "create", "sendfile"})
"""What a full disk goes on refusing; removing and renaming still work there."""
KILLED = 9


class Disk:
    """Counts what is asked of the file system, and fails or ends the process at the n-th."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self._at, self._sticky, self._armed = 0, False, False
        self._fail: Callable[[], object] = lambda: None
        for name in PATCHED:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        self._open = io.open
        patch.setattr(io, "open", self._opened)
        patch.setattr(shutil, "open", self._opened, raising=False)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step(name, args[0])
            return None if name == "fsync" else real(*args, **kwargs)  # a process that dies loses nothing unsynced, and tests stay quick

        return call

    def step(self, name: str, what: object) -> None:
        if not self._armed:
            return
        if isinstance(what, int):
            link = Path(f"/proc/self/fd/{what}")
            what = link.readlink() if link.exists() else what
        self.calls.append((name, str(what)))
        if len(self.calls) == self._at or (self._sticky and len(self.calls) > self._at > 0 and name in GROWING):
            self._fail()

    def _opened(self, path: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(path, (str, os.PathLike)):
            return self._open(path, mode, buffering, *args, **kwargs)
        writing = mode in ("wb", "ab")
        self.step("create" if writing else "read", path)
        if not writing:
            return self._open(path, mode, buffering, *args, **kwargs)
        disk = self

        class Torn(io.FileIO):
            def write(self, data: Any) -> Any:
                try:
                    disk.step("write", self.name)
                except OSError:
                    super().write(memoryview(data)[: len(data) // 2])  # a full disk takes a part
                    raise
                return super().write(data)

        raw = Torn(os.fspath(path), mode)
        return raw if buffering == 0 else io.BufferedWriter(raw)

    @contextlib.contextmanager
    def failing(self, at: int, code: int, *, sticky: bool = False) -> Iterator[Callable[[], bool]]:
        """The operation `at` (from 1) raises; with `sticky`, later ones that need space too. Gives whether it came to that."""

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        self.calls, self._at, self._sticky, self._armed, self._fail = [], at, sticky, True, fail
        try:
            yield lambda: len(self.calls) >= at
        finally:
            self._armed = False

    @contextlib.contextmanager
    def crashing(self, at: int) -> Iterator[None]:
        """The process ends at once at the operation `at`, as a kill -9 would end it."""
        self.calls, self._at, self._sticky, self._armed, self._fail = [], at, False, True, lambda: os._exit(KILLED)
        try:
            yield
        finally:
            self._armed = False

    def recording(self) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        """Only writes down what is asked."""
        return self.failing(0, 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: for tests in which no power fails."""
    monkeypatch.setattr(index, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(index, "SYNCHRONOUS", "OFF")
    return Disk(monkeypatch)


class Children:
    """Forked processes: quick, because nothing is imported again; a child never returns into pytest."""

    def __init__(self) -> None:
        self.pids: set[int] = set()

    def start(self, work: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the child only touches files
            pid = os.fork()
        if pid == 0:
            code = 70
            try:
                work()
                code = 0
            except BaseException as error:
                code = int(getattr(error, "exit_code", 70))
                with contextlib.suppress(Exception):
                    os.write(2, f"child: {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(code)
        self.pids.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """The exit code; that of a signal is negative."""
        self.pids.discard(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def run(self, work: Callable[[], object]) -> int:
        return self.wait(self.start(work))


@pytest.fixture
def children() -> Iterator[Children]:
    made = Children()
    yield made
    for pid in made.pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


@pytest.fixture(name="until")
def _until() -> Callable[[Callable[[], bool]], None]:
    return until


def save_checkpoint(store: Checkpoints, step: int, *, name: str = "", metrics: dict[str, float] | None = None, parent: str = "", size: int = 300) -> Checkpoint:
    """Publishes two files whose bytes follow from the step."""

    def write(folder: Path) -> None:
        (folder / "adapter.bin").write_bytes(bytes((step + i) % 251 for i in range(size)))
        (folder / "state").mkdir()
        (folder / "state" / "optimizer.json").write_bytes(b'{"step": %d}' % step)

    new = Checkpoint(name=name or f"{step:08d}", uri="", kind="state", step=step, base_model="tiny", lora=LoraConfig(rank=4))
    return store.publish(new, write, metrics=metrics or {}, fingerprint="f" * 64, parent=parent)


@pytest.fixture
def save() -> Callable[..., Checkpoint]:
    return save_checkpoint

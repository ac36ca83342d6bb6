"""What the machine does while a run goes on: a row every few seconds, from the operating system alone.

Rows go to system.jsonl beside the metrics, which stay free of everything that a second run would write differently.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..records import Json

__all__ = ["EVERY_S", "SystemWatch", "system_row"]

EVERY_S = 10.0
_PAGE_BYTES = resource.getpagesize()


def _memory_bytes() -> int | None:
    """The memory that this process holds now; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _device_bytes() -> int | None:
    """Memory in use on the first GPU, where torch is loaded already and has one; nothing is imported for it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.memory_allocated())


def system_row(folder: Path) -> dict[str, Json]:
    """The machine now: processor seconds of this process so far, load, memory and the free disk under a folder; what is not known is left out."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        disk: int | None = shutil.disk_usage(folder).free
    except OSError:
        disk = None
    row: dict[str, Json | None] = {
        "ts": time.time(),
        "cpu_s": used.ru_utime + used.ru_stime,
        "load": os.getloadavg()[0],
        "threads": threading.active_count(),
        "memory_bytes": _memory_bytes(),
        "available_bytes": _available_bytes(),
        "device_memory_bytes": _device_bytes(),
        "disk_free_bytes": disk,
    }
    return {key: value for key, value in row.items() if value is not None}


class SystemWatch:
    """Calls `write` with a row every `every_s` seconds, in a thread of its own, until `close`. `cpu_share` is 1.0 for one busy core."""

    def __init__(self, folder: Path, write: Callable[[dict[str, Json]], object], every_s: float = EVERY_S) -> None:
        self._folder, self._write, self._every_s = folder, write, every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="crucible-system", daemon=True)
        self._before = (time.monotonic(), time.process_time())
        self._thread.start()

    def sample(self) -> None:
        """Writes one row now."""
        now = (time.monotonic(), time.process_time())
        share = (now[1] - self._before[1]) / max(1e-9, now[0] - self._before[0])
        self._before = now
        self._write(system_row(self._folder) | {"cpu_share": share})

    def _work(self) -> None:
        while not self._end.wait(self._every_s):
            try:
                self.sample()
            except Exception:  # a full disk or a closed run: the work goes on without a picture of the machine
                return

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self._thread.join()

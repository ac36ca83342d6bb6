"""A server in a process of its own, as `crucible serve` runs it: what it emits and how it crashes stays there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = """
import sys
import torch
from pathlib import Path
from crucible_framework.backends import connect
from crucible_framework.server import ServeConfig, serve

torch.set_num_threads(1)
name, folder, port, durable = sys.argv[1:]
config = ServeConfig(folder=Path(folder), port=int(port), poll_s=5.0, models=("tiny",), durable=durable)
with connect(name) as backend, serve(backend, config, background=False) as server:
    print(server.url, flush=True)
    server.run()
"""


class ServerProcess:
    """Its address, and how to kill it."""

    def __init__(self, backend: str, folder: Path, port: int = 0, durable: str = "checkpoint") -> None:
        command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, backend, str(folder), str(port), durable]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), "the server did not start"

    @property
    def peak_bytes(self) -> int:
        """The most memory that it held at once."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def end(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal to this process and waits."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def server_process(backend: str, folder: Path) -> Iterator[str]:
    """A server for the block; gives its address."""
    process = ServerProcess(backend, folder)
    try:
        yield process.url
    finally:
        process.end()

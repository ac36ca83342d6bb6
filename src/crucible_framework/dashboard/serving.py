"""The dashboard on a port of this machine, in a thread, until it is closed. Knows no page."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import ConfigError
from .playground import Playground
from .server import build

if TYPE_CHECKING:
    from uvicorn import Server

__all__ = ["Dashboard"]


class Dashboard:
    """The dashboard on this machine: `with Dashboard("runs") as dashboard: print(dashboard.url)`; it stops at the end of the block.

    Args:
        root: the folder of runs.
        port: 0 takes a free one.
        playground: models that may be asked; the caller closes their backend.
        every_s: how often files are looked at for live pages.
        write: whether stages and tags of models may be changed.

    It listens on the loopback address only: from elsewhere, use a tunnel (ssh -L).

    Raises:
        NotFoundError: there is no such folder. ConfigError: the port is taken, or the web libraries are not installed.
    """

    def __init__(self, root: str | Path, *, port: int = 0, playground: Playground | None = None, every_s: float = 0.5, write: bool = False) -> None:
        app, self._end_streams = build(Path(root), playground, (), secrets.token_urlsafe(24), every_s, write=write)
        try:
            import uvicorn
        except ImportError as error:
            raise ConfigError("The dashboard needs uvicorn, which is not installed. Install it: pip install 'crucible-framework[serve]'") from error
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"Port {port} cannot be used: {error.strerror}. Choose another one, or 0 for any free one.") from error
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2, server_header=False, date_header=False)
        self._server: Server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="crucible-dashboard", daemon=True)

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._server.run(sockets=[self._socket])

    def start(self) -> Self:
        """Serves in a thread; returns once requests are answered."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until it is closed, or for that long."""
        self._thread.join(timeout_s)

    def close(self) -> None:
        """Ends all streams and stops; a second call does nothing."""
        self._end_streams()
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(10)
        self._socket.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

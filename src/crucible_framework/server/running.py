"""A server that runs: in the foreground for the command, in a thread for `with` blocks. This file knows no protocol."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsafeError
from ..files import lock
from ..protocols import Backend
from .hosts import is_loopback
from .keys import Keys
from .settings import ServeConfig

if TYPE_CHECKING:
    import uvicorn

__all__ = ["Serving", "keys_of", "serve"]


def keys_of(config: ServeConfig) -> Keys:
    """The keys of a server's folder."""
    return Keys(config.folder / "keys.json")


class Serving:
    """A running server; `url` is its address, `status()` says who is there."""

    def __init__(self, server: uvicorn.Server, bound: socket.socket, host: str, tenants: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        self._server, self._tenants = server, tenants
        self._before, self._told = dict[str, float](), time.monotonic()
        port = int(bound.getsockname()[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._thread: threading.Thread | None = None
        self._bound = bound

    def status(self) -> str:
        """A line per tenant who is there: sessions, adapters, samplers, waiting requests, and tokens a second since the last call."""
        now, lines, seen = time.monotonic(), list[str](), dict[str, float]()
        passed_s = max(now - self._told, 1e-3)
        for owner, shares in sorted(self._tenants().items()):
            rates = dict[str, float]()
            for name, kind in (("trained", "training"), ("sampled", "sampling_sample")):
                seen[key := f"{owner}:{kind}"] = shares.get(f"tokens_total:{kind}", 0.0)
                rates[name] = (seen[key] - self._before.get(key, 0.0)) / passed_s
            counts = " · ".join(f"{name} {shares.get(name, 0):g}" for name in ("sessions", "models", "samplers", "waiting"))
            lines.append(f"{owner}: {counts} · " + " · ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()))
        self._before, self._told = seen, now
        return "\n".join(lines) or "Nobody is there."

    def run(self) -> None:
        """Serves until a signal comes."""
        self._server.run(sockets=[self._bound])

    def start(self, ready: threading.Event) -> None:
        """Serves in a thread."""
        self._thread = threading.Thread(target=self.run, name="crucible-serve", daemon=True)
        self._thread.start()
        if not ready.wait(60):
            raise ConfigError("The server did not start within 60 s. Look at its log.")

    def stop(self) -> None:
        """Ends the thread; open requests are dropped."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(30)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)  # who connects before the loop runs waits instead of being refused
    except OSError as error:
        bound.close()
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror or error}. Choose another port; 0 takes a free one.") from error
    return bound


@contextmanager
def serve(
    backend: Backend, config: ServeConfig | None = None, *, background: bool = True, front: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> Iterator[Serving]:  # fmt: skip
    """Serves a backend over the Tinker protocol and an OpenAI-compatible one: `with serve(backend) as server: server.url`.

    Args:
        backend: trains and samples; the caller closes it, after the block.
        config: the server's settings.
        background: whether it serves in a thread for the block; else call `run()` in it.
        front: gets the ASGI application and gives what is served in its place, for example with pages beside it.

    Raises:
        ConfigError: the address cannot be had, or the libraries are not installed.
        UnsafeError: another host than this machine, and there is no key.
        LockedError: another server uses the folder.
    """
    config = config or ServeConfig()
    keys = keys_of(config)
    if not is_loopback(config.host) and not keys.active():
        raise UnsafeError(f"The host {config.host!r} can be reached from elsewhere, and there is no key. Make one: crucible serve keys add <name>.")
    try:
        import uvicorn

        from .app import make_app
        from .desk import Desk
        from .shelf import Shelf
    except ImportError as error:
        raise ConfigError(f"Serving needs {error.name}. Install crucible-framework[serve].") from error
    ready = threading.Event()
    with lock(config.folder / "serve.lock", "server folder"), contextlib.closing(_bind(config.host, config.port)) as bound:
        desk = Desk(backend, config, Shelf(config.folder))
        made = make_app(desk, keys, ready.set)
        app = made if front is None else front(made)
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, ws="none", lifespan="on", timeout_graceful_shutdown=2, timeout_keep_alive=75, server_header=False
        )
        serving = Serving(uvicorn.Server(settings), bound, config.host, desk.tenants)
        if background:
            serving.start(ready)
        try:
            yield serving
        finally:
            serving.stop()

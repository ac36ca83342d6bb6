"""`crucible serve` and its keys."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from ..backends import connect
from ..config import from_dict, load_toml, merge, places
from ..dashboard import beside
from ..errors import UnsafeError
from ..server import ServeConfig, keys_of
from ..server import serve as run_server
from ..server.hosts import is_loopback
from ..sinks import to_jsonl
from .reply import Reply

__all__ = ["register"]

FOLDER = Path("runs/serve")
Models = Annotated[list[str] | None, Parameter(name="--model", help="A base model to list; may be given again.")]


def serve(
    config: Path | None = None, /, *, host: str | None = None, port: int | None = None, folder: Path | None = None, model: Models = None,
    backend: str = "local", verbose: bool = False, ui: bool | None = None, registry: Path | None = None,
    durable: Literal["checkpoint", "step"] | None = None,
) -> Reply:  # fmt: skip
    """Serve models over the Tinker protocol and an OpenAI-compatible one, until Ctrl-C.

    Args:
        config: TOML with keys of ServeConfig, `[aliases]`, and `[options]` of the backend (`dtype = "float32"`).
        host: any address but this machine's own needs keys.
        port: 0 takes a free one.
        folder: runs, checkpoints and keys.
        backend: local or fake.
        ui: the dashboard at the same address; by default where only this machine can ask and no key is needed.
        verbose: says every few seconds who is there, what waits, and how many tokens a second are trained and drawn.
        registry: the folder of a model registry whose versions OpenAI clients may ask.
        durable: "step": live sessions survive a kill of the server; "checkpoint": checkpoints do.
    """
    flags: dict[str, object] = {
        "host": host,
        "port": port,
        "folder": folder,
        "models": tuple(model) if model else None,
        "registry": registry,
        "durable": durable,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    chosen = from_dict(ServeConfig, merge(load_toml(config) if config else {}, given))
    shown, ends = _shown(ui, chosen), list[Callable[[], None]]()

    def front(api: Callable[..., Any]) -> Callable[..., Any]:
        if not shown:
            return api
        root = places().runs
        root.mkdir(parents=True, exist_ok=True)
        both, end = beside(api, root)
        ends.append(end)
        return both

    with logged(chosen.folder / "log.jsonl"), connect(backend, **chosen.options) as engine, run_server(engine, chosen, background=False, front=front) as server:
        keys = "keys are needed" if keys_of(chosen).list() else "open to programs on this machine"
        print(f"Serving {backend} at {server.url} ({keys}; durable per {chosen.durable}). Ctrl-C ends it.", file=sys.stderr, flush=True)
        if shown:
            print(f"  Dashboard: {server.url}/", file=sys.stderr, flush=True)
        print(f"  export TINKER_BASE_URL={server.url} TINKER_API_KEY=tml-local", file=sys.stderr, flush=True)
        done = threading.Event()
        if verbose:
            threading.Thread(target=_watch, args=(server.status, done), daemon=True).start()
        try:
            server.run()
        finally:
            done.set()
            for end in ends:
                end()
    return Reply({"url": server.url}, "Stopped. Checkpoints are kept.")


def _shown(ui: bool | None, chosen: ServeConfig) -> bool:
    """Whether the dashboard is served too; it knows no keys, so only where nobody else can ask.

    Raises:
        UnsafeError: it was asked for where others can reach it.
    """
    own = is_loopback(chosen.host)
    if ui and not own:
        raise UnsafeError(
            f"The dashboard was asked for on {chosen.host!r}, which others can reach, and it knows no keys. Serve on 127.0.0.1, or leave out --ui."
        )
    return own and not keys_of(chosen).active() if ui is None else ui


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """The server's events of the block as JSON lines, with the id of each request."""
    end = to_jsonl(path)
    try:
        yield
    finally:
        end()


def _watch(status: Callable[[], str], done: threading.Event) -> None:
    while not done.wait(5.0):
        print(status(), file=sys.stderr, flush=True)


def add(name: str, /, *, folder: Path = FOLDER) -> Reply:
    """Make a key; it is shown once.

    Args:
        name: whose it is; runs and checkpoints belong to it.
        folder: the server's.
    """
    secret = keys_of(ServeConfig(folder=folder)).add(name)
    return Reply({"name": name, "key": secret}, f"{secret}\nKeep it now: only its hash is stored.")


def show(*, folder: Path = FOLDER) -> Reply:
    """List keys, without their secrets.

    Args:
        folder: the server's.
    """
    rows = [{"name": key.name, "created_at": key.created_at, "revoked": key.revoked} for key in keys_of(ServeConfig(folder=folder)).list()]
    return Reply(rows, "\n".join(f"{row['name']}{' (revoked)' if row['revoked'] else ''}" for row in rows) or "No keys.")


def revoke(name: str, /, *, folder: Path = FOLDER) -> Reply:
    """End a key at once; its runs stay.

    Args:
        name: the key's.
        folder: the server's.
    """
    keys_of(ServeConfig(folder=folder)).revoke(name)
    return Reply({"name": name, "revoked": True}, f"The key {name!r} no longer works.")


def register(app: App) -> None:
    """Adds the command and its own."""
    group = App(name="serve", help="Serve models over the Tinker protocol and an OpenAI-compatible one.")
    group.default(serve)
    keys = App(name="keys", help="Who may use a server that others can reach.")
    keys.command(add, name="add")
    keys.command(show, name="list")
    keys.command(revoke, name="revoke")
    group.command(keys)
    app.command(group)

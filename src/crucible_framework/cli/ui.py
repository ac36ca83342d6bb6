"""`crucible ui`: the dashboard in the browser."""

from __future__ import annotations

import contextlib
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from ..backends import connect
from ..config import places
from ..dashboard import Dashboard, Playground
from .jobs import resolve_model
from .reply import Reply

__all__ = ["register"]

Models = Annotated[list[str] | None, Parameter(help="A model that the page may ask: a base model, a run or a registered model; may be given again.")]


def ui(
    folder: Path | None = None,
    /,
    *,
    port: int = 0,
    browser: bool = True,
    playground: Models = None,
    backend: str = "local",
    write: bool = False,
    seconds: float | None = None,
) -> Reply:
    """Show the runs of the workspace in the browser, live, until Ctrl-C.

    Args:
        folder: the workspace (`runs`).
        port: 0 takes a free one; it listens on this machine only.
        browser: open one.
        playground: models to ask.
        backend: what runs the models of the playground: local or fake.
        write: let the page change stages and tags of models; else it only reads.
        seconds: end by itself after that long.
    """
    root = folder or places().runs
    engine = connect(backend) if playground else None
    try:
        asked = Playground(engine, {name: resolve_model(name) for name in playground}) if engine and playground else None
        with Dashboard(root, port=port, playground=asked, write=write) as dashboard, contextlib.suppress(KeyboardInterrupt):
            print(f"Dashboard: {dashboard.url}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
            if browser:
                webbrowser.open(dashboard.url)
            dashboard.wait(seconds)
        return Reply({"url": dashboard.url, "runs": str(root)}, "The dashboard has ended.")
    finally:
        if engine is not None:
            engine.close()


def register(app: App) -> None:
    """Adds the command."""
    app.command(ui)

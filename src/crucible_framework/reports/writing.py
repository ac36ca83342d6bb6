"""The way in: a run folder, and the formats to write. It knows neither what a report says nor how it looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import events
from ..errors import ConfigError, UnknownNameError
from ..files import write_atomic
from .document import build
from .latex import render_latex
from .notebook import render_notebook
from .parts import Document
from .sources import read_run
from .tables import render_csv, render_json
from .text import render_markdown
from .web import render_html

__all__ = ["FORMATS", "chosen", "publish", "write_report"]

FORMATS: Mapping[str, tuple[str, Callable[[Document], str]]] = {
    "html": ("report.html", render_html),
    "markdown": ("report.md", render_markdown),
    "latex": ("report.tex", render_latex),
    "json": ("report.json", render_json),
    "csv": ("report.csv", render_csv),
    "jupyter": ("report.ipynb", render_notebook),
}
"""Format → the file's name and what writes it."""


def write_report(folder: str | Path, formats: Sequence[str] = ("html", "markdown")) -> tuple[Path, ...]:
    """Writes the report of a run beside its files; an older report is replaced.

    The same files give the same bytes. Needs no lock: a run that is still training can be reported on.

    Args:
        folder: of the run.
        formats: names in `FORMATS`.

    Returns:
        The paths, in the order of `formats`.

    Raises:
        NotFoundError: there is no such folder, or it holds none of a run's files.
        UnknownNameError: no such format.
        StoreError: the folder cannot be written.
    """
    names, folder = chosen(formats), Path(folder)
    return publish(build(read_run(folder)), folder, names)


def chosen(formats: str | Sequence[str]) -> tuple[str, ...]:
    """The names of formats, each once.

    Raises:
        ConfigError: none. UnknownNameError: an unknown one.
    """
    asked = (formats,) if isinstance(formats, str) else tuple(dict.fromkeys(formats))
    if not asked:
        raise ConfigError(f"formats is {formats!r}; expected at least one of {', '.join(FORMATS)}.")
    for name in asked:
        if name not in FORMATS:
            raise UnknownNameError("report format", name, FORMATS)
    return asked


def publish(document: Document, folder: Path, formats: Sequence[str]) -> tuple[Path, ...]:
    """Writes a document in these formats into a folder; older files are replaced.

    Emits:
        `report.written` for each.
    """
    written = []
    for name in formats:
        filename, render = FORMATS[name]
        data = render(document).encode()
        write_atomic(folder / filename, data)
        events.emit("report.written", format=name, path=str(folder / filename), size_bytes=len(data))
        written.append(folder / filename)
    return tuple(written)

"""What changes, as server-sent events: only new rows of a run, only changed lines of the table.

A stream looks at file stamps a few times a second, which costs some microseconds, and reads only what was added. Its cursor goes out as
the event's id, so that a browser that reconnects continues where it was. Streams end when the server does.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import orjson

from ..errors import CrucibleError
from ..files import held
from ..records import Json
from .reading import Tail, Workspace
from .runs_page import row_markup
from .views import run_row

__all__ = ["FILES", "cursor_now", "last_rows", "message", "parts_now", "run_stream", "stamp_stream", "study_stamp", "table_stream"]

FILES = ("metrics.jsonl", "timings.jsonl", "events.jsonl")
_KEEP_ALIVE = 15.0
_MARGIN_S = 0.1
"""The file system's clock may be that much behind."""


def message(event: str, data: object, identity: str = "") -> bytes:
    """One server-sent event; the data are JSON, in which no line end is left."""
    head = f"id: {identity}\n" if identity else ""
    return f"{head}event: {event}\ndata: ".encode() + orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY, default=str) + b"\n\n"


def last_rows(path: Path, most_bytes: int = 128 * 1024, most: int = 200) -> list[dict[str, Json]]:
    """The last rows of a file; it is not read from its start."""
    try:
        stat = path.stat()
    except OSError:
        return []
    start = max(0, stat.st_size - most_bytes)
    tail = Tail(path, f"{stat.st_ino}-{start}" if start else "")
    return list(tail.read().rows)[-most:]  # a row that the start cuts does not parse, and is left out


def cursor_now(folder: Path) -> str:
    """The ends of a run's files as they are now."""
    ends = []
    for name in FILES:
        try:
            stat = (folder / name).stat()
        except OSError:
            ends.append("")
        else:
            ends.append(f"{stat.st_ino}-{_whole(folder / name, stat.st_size)}")
    return ",".join(ends)


def _whole(path: Path, size: int) -> int:
    """The end of the last whole line at or before `size`."""
    with path.open("rb") as file:
        start = max(0, size - 65536)
        file.seek(start)
        data = file.read(size - start)
    end = data.rfind(b"\n") + 1
    return start + end if end or not start else size


def parts_now(folder: Path, status: str) -> str:
    """A digest of what the run page shows besides rows; it changes when one of its files does."""
    watched = [folder / name for name in ("run.json", "data.json", "findings.json", "samples.json", "watched.jsonl", "labels.json", "checkpoints")]
    watched += sorted(folder.glob("checkpoints/*")) + sorted(folder.glob("eval/*/evaluation.json"))
    found: list[object] = [status]
    for path in watched:
        try:
            found.append((path.name, path.stat().st_mtime_ns))
        except OSError:
            continue
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


async def run_stream(workspace: Workspace, name: str, *, cursor: str, parts: str, closing: Callable[[], bool], every_s: float) -> AsyncIterator[bytes]:
    """New rows of one run (`rows`), word that other parts changed (`parts`), or that the page must start anew (`again`).

    `cursor` and `parts` are what the page has seen, so that nothing between its making and this call is missed.
    """
    folder = workspace.folder(name)
    cursors = [*cursor.split(","), "", "", ""][: len(FILES)]
    tails = {file: Tail(folder / file, at) for file, at in zip(FILES, cursors, strict=True)}
    status = workspace.info(name).status
    parts = parts or parts_now(folder, status)
    yield message("hello", {"status": status})
    quiet = 0.0
    while not closing():
        try:
            chunks = {file: tail.read() for file, tail in tails.items()}
            if any(chunk.again for chunk in chunks.values()):
                yield message("again", {})
                return
            rows = {file.removesuffix(".jsonl"): list(chunk.rows) for file, chunk in chunks.items() if chunk.rows}
            now = workspace.info(name).status
            found = parts_now(folder, now)
        except CrucibleError as error:  # the run was removed, or cannot be read any more
            yield message("gone", {"error": str(error)})
            return
        if rows:
            yield message("rows", rows, ",".join(tail.cursor for tail in tails.values()))
        if found != parts:
            parts = found
            yield message("parts", {"status": now})
        quiet = 0.0 if rows else quiet + every_s
        if quiet >= _KEEP_ALIVE:
            quiet = 0.0
            yield b": still here\n\n"
        await asyncio.sleep(every_s)


def study_stamp(folder: Path) -> str:
    """Changes when a cell of the study begins or ends, or when the study is analysed."""
    watched = [folder / name for name in ("findings.json", "timings.jsonl")] + sorted(folder.glob("cells/*.json")) + sorted(folder.glob("cells/*/run/run.json"))
    found: list[object] = [held(folder / ".lock")]
    for path in watched:
        try:
            found.append((path.name, path.stat().st_mtime_ns))
        except OSError:
            continue
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


async def stamp_stream(stamp: Callable[[], str], *, after: str, closing: Callable[[], bool], every_s: float) -> AsyncIterator[bytes]:
    """Word (`parts`) whenever a stamp changes; `after` is the one that the page was made from."""
    yield message("hello", {})
    known, quiet = after, 0.0
    while not closing():
        try:
            now = await asyncio.to_thread(stamp)
        except (CrucibleError, OSError) as error:
            yield message("gone", {"error": str(error)})
            return
        if now != known:
            known, quiet = now, 0.0
            yield message("parts", {"stamp": now})
        quiet += every_s
        if quiet >= _KEEP_ALIVE:
            quiet = 0.0
            yield b": still here\n\n"
        await asyncio.sleep(every_s)


async def table_stream(workspace: Workspace, *, after_s: float, closing: Callable[[], bool], every_s: float) -> AsyncIterator[bytes]:
    """The lines of the runs table that changed since `after_s` (`row`), and the names of runs that are gone (`gone`)."""

    def stamps() -> dict[str, tuple[object, ...]]:
        return {name: (*workspace.signature(name), workspace.info(name).status) for name in workspace.names()}

    def safe_stamps(old: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
        try:
            return stamps()
        except CrucibleError:  # a run was removed between two looks
            return old

    first = safe_stamps({})
    yield message("hello", {"runs": len(first)})
    known = {name: stamp for name, stamp in first.items() if workspace.changed_s(name) < after_s - _MARGIN_S}
    quiet = 0.0
    while not closing():
        now = await asyncio.to_thread(safe_stamps, known)
        for name in [one for one in now if now[one] != known.get(one)]:
            try:
                row = await asyncio.to_thread(run_row, workspace, name)
            except CrucibleError:
                continue
            yield message("row", {"name": name, "html": row_markup(row), "new": name not in known})
        gone = [name for name in known if name not in now]
        if gone:
            yield message("gone", {"names": gone})
        quiet = quiet + every_s if now == known else 0.0
        if quiet >= _KEEP_ALIVE:
            quiet = 0.0
            yield b": still here\n\n"
        known = now
        await asyncio.sleep(every_s)

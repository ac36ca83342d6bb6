"""What models were asked anywhere in a workspace: the votes, hedges and routes in its runs' events and in its own events.jsonl.

Files are read on from where the last look ended; lines of other events are not even parsed. The targets of evaluations are kept by the
digest of their prompts, so that a vote on the same prompt can be judged.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import orjson

from ..inference.telling import prompt_digest
from ..records import Json
from ..reports.requests import REQUEST_EVENTS
from ..reports.votes import VOTE_EVENTS
from .reading import Tail

__all__ = ["AskedEvents"]

_NAMES = (*VOTE_EVENTS, *REQUEST_EVENTS)
_ONLY = tuple(f'"{name}"'.encode() for name in _NAMES)
_MOST = 20_000
"""Events kept of one file; the oldest go first."""


class AskedEvents:
    """The events of votes and requests below a workspace. Threads may share one."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._lock = threading.Lock()
        self._tails: dict[Path, tuple[Tail, deque[dict[str, Json]]]] = {}
        self._targets: dict[Path, tuple[tuple[int, int], dict[str, str]]] = {}

    def _files(self) -> Iterator[Path]:
        yield self.root / "events.jsonl"
        yield from self.root.glob("*/events.jsonl")
        yield from self.root.glob("*/cells/*/run/events.jsonl")

    def events(self) -> list[Mapping[str, Json]]:
        """All of them, the oldest first.

        Raises:
            StoreError: a file cannot be read.
        """
        with self._lock:
            for path in self._files():
                if path not in self._tails:
                    self._tails[path] = (Tail(path, only=_ONLY), deque(maxlen=_MOST))
            for path, (tail, kept) in list(self._tails.items()):
                if not path.exists():
                    del self._tails[path]
                    continue
                self._read(tail, kept)
            return sorted((event for _, kept in self._tails.values() for event in kept), key=lambda event: _seconds(event.get("ts")))

    @staticmethod
    def _read(tail: Tail, kept: deque[dict[str, Json]]) -> None:
        before = None
        while before != tail.cursor:
            before = tail.cursor
            chunk = tail.read()
            if chunk.again:
                kept.clear()
            kept.extend(event for event in chunk.rows if event.get("name") in _NAMES)

    def signature(self) -> str:
        """Changes when one of the files does."""
        stamps = []
        for path in sorted(self._files()):
            try:
                stat = path.stat()
            except OSError:
                continue
            stamps.append((str(path), stat.st_ino, stat.st_size))
        return hashlib.blake2b(repr(stamps).encode(), digest_size=8).hexdigest()

    def targets(self) -> dict[str, str]:
        """Right answers by the digest of their prompt, from every evaluation's rows."""
        found: dict[str, str] = {}
        paths = [*self.root.glob("*/eval/*/scores.jsonl"), *self.root.glob("*/cells/*/eval/scores.jsonl"), *self.root.glob("*/bases/*/eval/scores.jsonl")]
        with self._lock:
            for path in paths:
                try:
                    stat = path.stat()
                except OSError:
                    continue
                stamp = (stat.st_size, stat.st_mtime_ns)
                kept = self._targets.get(path)
                if kept is None or kept[0] != stamp:
                    kept = (stamp, _targets(path))
                    self._targets[path] = kept
                found |= kept[1]
        return found


def _seconds(value: Json) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _targets(path: Path) -> dict[str, str]:
    found = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = orjson.loads(line) if line else None
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("target"), str) and row["target"]:
            found[prompt_digest(row["prompt"])] = row["target"]
    return found

"""What a live model needs to survive a kill: its requests, their answers, and its state after the last step.

    <folder>/live/<session>/session.json             whose it is
    <folder>/live/<session>/samplers.jsonl           samplers of base models and checkpoints
    <folder>/live/<session>/sampler-<n>/             weights of a sampler that has no name
    <folder>/live/<session>/train-<n>/log.jsonl      requests and answers, in the order in which they came
    <folder>/live/<session>/train-<n>/state-<seq>/   published: the state after request <seq>, and its answer

A request is in the log before its client is told that it was taken; a step's state is published before the client gets its answer. This
file does not know what a request asks or how weights are written.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import orjson

from ..errors import NotFoundError, StoreError
from ..files import JsonLines, discard, publish, read_lines, read_manifest, sweep, write_atomic
from ..records import Json, record
from .ledger import Answer

__all__ = ["Journal", "Recorded", "Snapshot"]

ROOM = 16 * 2**20
"""Bytes of a log that are not worth tidying."""


@record
class Snapshot:
    """A state on disk: after which request, where, and what was put beside it."""

    seq: int
    folder: Path
    meta: Mapping[str, Json]


@record
class Recorded:
    """What a journal holds: requests by number as (kind, body), answers by number, and the last whole state."""

    requests: Mapping[int, tuple[str, bytes]]
    answers: Mapping[int, Answer]
    snapshot: Snapshot | None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(value: Json) -> bytes:
    return base64.b64decode(str(value))


def _row(answer: Answer) -> dict[str, Json]:
    return {"answer": _text(answer.body), "type": answer.type, "failed": answer.failed}


def _answer(row: Mapping[str, Json]) -> Answer:
    return Answer(_bytes(row["answer"]), str(row["type"]), bool(row["failed"]))


class Journal:
    """The journal of one model; threads may share it.

    Args:
        folder: made where it is missing; the caller holds the server folder's lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path, self._lock = folder / "log.jsonl", threading.Lock()
        self._log = JsonLines(self._path)
        self._tidied = self._path.stat().st_size

    def _add(self, row: Mapping[str, Json]) -> None:
        with self._lock:
            self._log.append(row, sync=True)

    def request(self, seq: int, kind: str, body: bytes) -> None:
        """A request was taken; on disk when this returns."""
        self._add({"seq": seq, "kind": kind, "body": _text(body)})

    def answer(self, seq: int, answer: Answer) -> None:
        """A request was answered; on disk when this returns."""
        self._add({"seq": seq, **_row(answer)})

    def snapshot(self, seq: int, answer: Answer, write: Callable[[Path], object], meta: Mapping[str, Json]) -> None:
        """The state after a request, with its answer; older states go. On disk when this returns.

        Raises:
            StorageFullError, StoreError: the disk; the older state is still there.
        """
        target = self.folder / f"state-{seq:08}"
        publish(target, write, {**meta, "seq": seq, **_row(answer)})
        for old in self.folder.glob("state-*"):
            if old != target:
                discard(old)
        self._add({"seq": seq, **_row(answer)})
        self._tidy(seq)

    def _tidy(self, after: int) -> None:
        """Rewrites a long log without the bodies that nobody needs again; the first request says what the model is."""
        with self._lock:
            if self._path.stat().st_size < max(ROOM, 4 * self._tidied):
                return
            kept = [row for row in read_lines(self._path) if "answer" in row or cast("int", row["seq"]) > after or row["seq"] == 0]
            answers = [row for row in kept if "answer" in row]
            while answers and sum(len(str(row["answer"])) for row in answers) > ROOM // 4:
                answers = answers[len(answers) // 2 :]
            rows = [row for row in kept if "answer" not in row] + answers
            self._log.close()
            write_atomic(self._path, b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
            self._log = JsonLines(self._path)
            self._tidied = self._path.stat().st_size

    def read(self) -> Recorded:
        """All that is there. A damaged state is passed over for an older one.

        Raises:
            CorruptError: the log has a damaged line before its last.
        """
        sweep(self.folder)
        requests, answers = dict[int, tuple[str, bytes]](), dict[int, Answer]()
        for row in read_lines(self._path):
            seq = cast("int", row["seq"])
            if "answer" in row:
                answers.setdefault(seq, _answer(row))
            else:
                requests.setdefault(seq, (str(row["kind"]), _bytes(row["body"])))
        found: Snapshot | None = None
        for folder in sorted(self.folder.glob("state-*"), reverse=True):
            with contextlib.suppress(NotFoundError, StoreError):
                meta = read_manifest(folder).meta
                found = Snapshot(seq=cast("int", meta["seq"]), folder=folder, meta=meta)
                answers[found.seq] = _answer(meta)
                break
        return Recorded(requests=requests, answers=answers, snapshot=found)

    def close(self) -> None:
        """Closes the log."""
        self._log.close()

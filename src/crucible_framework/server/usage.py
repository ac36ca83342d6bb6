"""What each tenant used, by the hour: tokens trained, read and drawn, and checkpoints. Kept in a file, so that a restart loses nothing but seconds.

This file does not know prices or HTTP.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias, cast

from ..files import JsonLines, read_lines
from ..records import record

__all__ = ["Usage", "Used", "What"]

What: TypeAlias = Literal["training", "sampling_prefill", "sampling_sample", "checkpoint"]
HOUR_S = 3600


@record
class Used:
    """One hour's use of one thing by one session. `hour` is seconds since the epoch at its start."""

    hour: int
    owner: str
    session: str
    base_model: str
    what: What
    amount: int


class Usage:
    """Adds up.

    Args:
        path: JSON lines; sums are appended by `flush`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[tuple[int, str, str, str, What], int] = {}
        self._new: dict[tuple[int, str, str, str, What], int] = {}
        for row in read_lines(path):
            key = (cast("int", row["hour"]), str(row["owner"]), str(row["session"]), str(row["base_model"]), cast("What", row["what"]))
            self._sums[key] = self._sums.get(key, 0) + cast("int", row["amount"])

    def add(self, owner: str, session: str, base_model: str, what: What, amount: int) -> None:
        """Adds to this hour."""
        key = (int(time.time()) // HOUR_S * HOUR_S, owner, session, base_model, what)
        for sums in (self._sums, self._new):
            sums[key] = sums.get(key, 0) + amount

    def flush(self) -> None:
        """Writes what is new."""
        new, self._new = self._new, {}
        if new:
            with contextlib.closing(JsonLines(self._path)) as rows:
                for (hour, owner, session, base_model, what), amount in new.items():
                    rows.append({"hour": hour, "owner": owner, "session": session, "base_model": base_model, "what": what, "amount": amount})
                rows.sync()

    def rows(self, owner: str, start: float, end: float) -> Iterator[Used]:
        """A tenant's hours that begin in [start, end), by hour, the largest amount first."""
        mine = [(key, amount) for key, amount in self._sums.items() if key[1] == owner and start <= key[0] < end]
        for (hour, who, session, base_model, what), amount in sorted(mine, key=lambda row: (row[0][0], -row[1])):
            yield Used(hour=hour, owner=who, session=session, base_model=base_model, what=what, amount=amount)

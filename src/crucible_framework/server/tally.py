"""Counts of what was done, in all and by tenant. This file does not know what is counted."""

from __future__ import annotations

__all__ = ["Tally"]


class Tally:
    """Counters that only grow."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self._shares: dict[str, dict[str, float]] = {}

    def add(self, name: str, amount: float = 1, owner: str = "") -> None:
        """Adds to a counter and, where an owner is named, to its share."""
        self.counts[name] = self.counts.get(name, 0) + amount
        if owner:
            mine = self._shares.setdefault(owner, {})
            mine[name] = mine.get(name, 0) + amount

    def shares(self, owner: str) -> dict[str, float]:
        """What an owner has of each counter."""
        return dict(self._shares.get(owner, {}))

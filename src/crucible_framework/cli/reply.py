"""What every command gives back: data for `--json`, text for people, and the exit code."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from rich.console import RenderableType

__all__ = ["Reply", "typed"]

typed: ContextVar[str] = ContextVar("typed", default="crucible")
"""The command as it was typed, for the record of a run."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a command."""

    data: object
    text: RenderableType
    exit_code: int = 0

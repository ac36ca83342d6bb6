"""Which names are safe as file names, and the error that names the nearest ones. Knows no folder."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import ConfigError, NotFoundError, UnknownNameError

__all__ = ["not_found", "safe_name"]

_SAFE = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,80}")


def safe_name(kind: str, name: str) -> str:
    """The name, if it can be a file's name everywhere.

    Raises:
        ConfigError: it holds other signs, starts with a dot, or has more than 80 signs.
    """
    if not _SAFE.fullmatch(name):
        raise ConfigError(f"The {kind} name {name!r} is not safe as a file name; expected 1 to 80 of A-Z a-z 0-9 . _ - and no dot at the start.")
    return name


def not_found(kind: str, name: str, known: Iterable[str], fix: str = "") -> NotFoundError:
    """The error to raise where nothing has that name; the nearest known names stand in it."""
    return NotFoundError(str(UnknownNameError(kind, name, known, fix)))

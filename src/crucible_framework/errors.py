"""Every error that Crucible raises, in one tree.

A message has three beats: what happened (with the value), what was expected, and the fix. The exit code of the `crucible` command
stands on the class, so that whoever catches an error knows it too. This file does not know who raises or prints them.

    CrucibleError                                70
    ├ ConfigError (ValueError)                    2   ── UnknownNameError (LookupError)
    ├ DataError (ValueError)                     65   ── FormatError · ChecksumError
    ├ BackendError (RuntimeError)                70
    │   ├ CapabilityError (NotImplementedError)   2
    │   ├ SessionClosedError                     70
    │   ├ ServiceError (status, retryable)       69
    │   ├ AuthError                              77
    │   └ NumericError (tensor, examples)        76
    ├ StoreError (RuntimeError)                  74
    │   ├ NotFoundError (LookupError)             2
    │   ├ CorruptError                           74
    │   ├ LockedError                            75
    │   └ StorageFullError                       74
    ├ InferenceError                             70   ── AllMembersFailedError (causes) · NoConsensusError (verdict)
    ├ StatisticsError (ValueError)               65   ── TooFewError
    ├ ExperimentError (RuntimeError)             70
    │   ├ BudgetExceeded                         75
    │   └ PlanChangedError                        2
    └ UnsafeError (RuntimeError)                 78
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import ClassVar

__all__ = [
    "AllMembersFailedError",
    "AuthError",
    "BackendError",
    "BudgetExceeded",
    "CapabilityError",
    "ChecksumError",
    "ConfigError",
    "CorruptError",
    "CrucibleError",
    "DataError",
    "ExperimentError",
    "FormatError",
    "InferenceError",
    "LockedError",
    "NoConsensusError",
    "NotFoundError",
    "NumericError",
    "PlanChangedError",
    "ServiceError",
    "SessionClosedError",
    "StatisticsError",
    "StorageFullError",
    "StoreError",
    "TooFewError",
    "UnknownNameError",
    "UnsafeError",
]


class CrucibleError(Exception):
    """The root: `except CrucibleError` catches everything that Crucible raises on purpose."""

    exit_code: ClassVar[int] = 70


class ConfigError(CrucibleError, ValueError):
    """A setting is missing, unknown, of the wrong type or out of range."""

    exit_code = 2


class UnknownNameError(ConfigError, LookupError):
    """A name that nothing is registered under; the message names the nearest ones.

    Args:
        kind: what was looked for, in the singular ("loss", "data set").
        name: what was asked.
        known: all names that would have worked.
        fix: an extra sentence, where there is one to say.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], fix: str = "") -> None:
        self.kind, self.name, self.known, self.fix = kind, name, tuple(sorted(known)), fix
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        listing = f" Known: {', '.join(self.known)}." if self.known else ""
        super().__init__(f"No {kind} is called {name!r}.{hint}{listing}{' ' + fix if fix else ''}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, tuple[str, ...], str]]:
        return type(self), (self.kind, self.name, self.known, self.fix)


class DataError(CrucibleError, ValueError):
    """The data cannot be used: empty, duplicate ids, longer than the context."""

    exit_code = 65


class FormatError(DataError):
    """A row or file does not have the layout that was expected; the message gives file:line."""


class ChecksumError(DataError):
    """A data file's bytes are not those whose sha256 was pinned."""


class BackendError(CrucibleError, RuntimeError):
    """A backend could not do what it was asked."""


class CapabilityError(BackendError, NotImplementedError):
    """The backend cannot honour a setting; raised before any work."""

    exit_code = 2


class SessionClosedError(BackendError):
    """The session, sampler or backend was closed before the request."""


class AuthError(BackendError):
    """A service refused the key, or there is none."""

    exit_code = 77


class ServiceError(BackendError):
    """A service failed. `status` is the HTTP status where there is one; `retryable` says whether trying again can help."""

    exit_code = 69

    def __init__(self, message: str, *, status: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.status, self.retryable = status, retryable


class NumericError(BackendError):
    """A loss or gradient is NaN or infinite; the weights were not touched.

    `tensor` names the first bad tensor, `examples` the ids of the examples of the request.
    """

    exit_code = 76

    def __init__(self, message: str, *, tensor: str = "", examples: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensor, self.examples = tensor, examples


class StoreError(CrucibleError, RuntimeError):
    """Reading or writing a run, checkpoint, model or artifact failed."""

    exit_code = 74


class NotFoundError(StoreError, LookupError):
    """There is no such run, checkpoint, model or artifact."""

    exit_code = 2


class CorruptError(StoreError):
    """Stored bytes do not match their manifest; nothing of them was used."""


class LockedError(StoreError):
    """Another process holds the run folder."""

    exit_code = 75


class StorageFullError(StoreError):
    """The disk, or the quota, is full; what was stored before is still there."""


class InferenceError(CrucibleError, RuntimeError):
    """Sampling gave no usable answer."""


class AllMembersFailedError(InferenceError):
    """Too few members of an ensemble, or no leg of a hedged request, gave an answer. `causes` maps who was asked to why there is none."""

    def __init__(self, message: str, causes: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.causes = dict(causes or {})

    def __reduce__(self) -> tuple[type[AllMembersFailedError], tuple[str, dict[str, str]]]:
        return type(self), (str(self), self.causes)


class NoConsensusError(InferenceError):
    """The members answered, but the voting rule gives no winner; `verdict` holds their ballots."""

    def __init__(self, message: str, verdict: object = None) -> None:
        super().__init__(message)
        self.verdict = verdict

    def __reduce__(self) -> tuple[type[NoConsensusError], tuple[str, object]]:
        return type(self), (str(self), self.verdict)


class StatisticsError(CrucibleError, ValueError):
    """The data do not allow the statistic that was asked."""

    exit_code = 65


class TooFewError(StatisticsError):
    """Too few observations for the statistic; the message says how many are needed."""


class ExperimentError(CrucibleError, RuntimeError):
    """A study cannot be run or read."""


class BudgetExceeded(ExperimentError):  # noqa: N818 - named for what happened, as in the design
    """The study's budget is used up; every finished cell is kept, and a larger budget goes on from there."""

    exit_code = 75


class PlanChangedError(ExperimentError):
    """The study's folder was begun with another plan; the message names the keys that differ."""

    exit_code = 2


class UnsafeError(CrucibleError, RuntimeError):
    """The environment is not safe for what was asked (for example, running code with no sandbox)."""

    exit_code = 78

"""Backends by name, and `connect`. Importing this loads no torch.

A backend is a callable that takes options and gives something that fits `protocols.Backend` and closes at the end of a `with` block. This
file does not know what any backend does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeAlias

from ..errors import ConfigError, UnknownNameError
from ..plugins import Registry
from ..protocols import Backend

__all__ = ["Connection", "Maker", "backends", "connect"]


class Connection(Backend, Protocol):
    """A backend that its `with` block closes."""

    def __enter__(self) -> Self:
        """The backend itself."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> object:
        """Closes it."""
        ...


Maker: TypeAlias = Callable[..., Connection]
"""Keyword options → an open backend."""

backends: Registry[Maker] = Registry(
    "backend",
    {
        "fake": "crucible_framework.backends.fake:FakeBackend",
        "local": "crucible_framework.backends.local:LocalBackend",
        "tinker": "crucible_framework.backends.tinker:TinkerBackend",
    },
)
"""All backends; other distributions add theirs under the entry-point group `crucible.backend`."""


def connect(name: str | Maker = "local", **options: object) -> Connection:
    """Opens a backend: `with connect("local") as backend: …`; without `with`, call its `close()`.

    Args:
        name: a registered name, "module:attribute", or a callable that makes one.
        options: the backend's own; for "local" see `LocalBackend`.

    Raises:
        UnknownNameError: nothing has that name, or the backend has no such option; the nearest ones are named.
        ConfigError: an option is out of range, or the backend's libraries are not installed.
    """
    maker = backends.get(name)
    signature = inspect.signature(maker)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        for option in options:
            if option not in signature.parameters:
                raise UnknownNameError(f"option of the backend {name!r}", option, signature.parameters)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"The backend {name!r} cannot be opened: {error}. Give it as a keyword to connect(...).") from error
    return maker(**options)

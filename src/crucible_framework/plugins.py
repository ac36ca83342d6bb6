"""One way to find a named component: a table row, a decorator, an entry point, "module:attribute", or the object itself.

Knows nothing of what it finds; each folder owns a `Registry` with its table.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from .errors import ConfigError, UnknownNameError

__all__ = ["Registry", "load_attribute"]

T = TypeVar("T")


def load_attribute(path: str) -> object:
    """Imports "package.module:attribute"; the attribute may be dotted ("package.module:Class.method").

    Raises:
        ConfigError: it has another form, or the module or the attribute is not there.
    """
    module_name, _, attribute = path.partition(":")
    if not attribute or not module_name or module_name.startswith("."):
        raise ConfigError(f"{path!r} names no component; expected 'module:attribute', for example 'my_package.losses:focal'.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{path!r} cannot be imported: {error}. Expected 'module:attribute' with the module on the Python path.") from error
    try:
        return cast("object", functools.reduce(getattr, attribute.split("."), module))
    except AttributeError as error:
        raise ConfigError(f"{path!r} names no attribute: module {module_name!r} has no {attribute!r}.") from error


class Registry(Generic[T]):
    """Names to components of one kind ("loss", "scorer").

    Args:
        kind: what is kept, in the singular; the entry-point group is `crucible.<kind>` with spaces as underscores.
        table: name → "module:attribute", imported when first asked for.
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._paths = dict(table)
        self._objects: dict[str, T] = {}

    @property
    def group(self) -> str:
        """The entry-point group that other distributions use."""
        return f"crucible.{self.kind.replace(' ', '_')}"

    def names(self) -> tuple[str, ...]:
        """All names, sorted, those of entry points included."""
        found = {point.name for point in entry_points(group=self.group)}
        return tuple(sorted(self._paths.keys() | self._objects.keys() | found))

    def add(self, name: str, component: T) -> T:
        """Registers an object under a new name.

        Raises:
            ConfigError: the name is taken by something else.
        """
        if name in self._paths or (name in self._objects and self._objects[name] is not component):
            raise ConfigError(f"A {self.kind} called {name!r} exists already. Choose another name.")
        self._objects[name] = component
        return component

    def register(self, name: str) -> Callable[[T], T]:
        """`add` as a decorator."""
        return lambda component: self.add(name, component)

    def get(self, name: str | T) -> T:
        """The component of that name; an object that is no string is given back as it is.

        Raises:
            UnknownNameError: nothing has that name; the nearest ones are named.
        """
        if not isinstance(name, str):
            return name
        if name in self._objects:
            return self._objects[name]
        path = self._paths.get(name)
        if path is None:
            path = next((point.value for point in entry_points(group=self.group) if point.name == name), None)
        if path is None and ":" in name:
            return cast("T", load_attribute(name))
        if path is None:
            raise UnknownNameError(self.kind, name, self.names(), fix="Your own: 'module:attribute'.")
        component = cast("T", load_attribute(path))
        self._objects[name] = component
        return component

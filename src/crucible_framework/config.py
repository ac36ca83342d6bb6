"""TOML, keyword arguments and `--set a.b=v` to frozen records, checked once at the door; fingerprints; and the one reader of the environment.

Unknown keys are errors that name the nearest key. pydantic converts types here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import os
import tomllib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast, get_type_hints

import orjson

from .errors import ConfigError, CrucibleError
from .records import Json, record

if TYPE_CHECKING:  # pydantic is loaded when the first record is made from plain values
    from pydantic import TypeAdapter

__all__ = ["Places", "differing_keys", "fingerprint", "from_dict", "load_toml", "merge", "parse_overrides", "places", "to_dict"]

T = TypeVar("T")


@record
class Places:
    """Folders that the environment decides.

    Attributes:
        cache: base models and data sets (`CRUCIBLE_CACHE`, else the user's cache folder).
        data: the user's own data folder (`CRUCIBLE_DATA`), if any.
        runs: runs and the model registry (`CRUCIBLE_RUNS`, else `runs` in the working directory).
        offline: no hub is asked (`HF_HUB_OFFLINE` or `CRUCIBLE_OFFLINE`).
    """

    cache: Path
    data: Path | None
    runs: Path
    offline: bool


def places() -> Places:
    """Reads the environment now."""
    env = os.environ
    cache_home = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    data = env.get("CRUCIBLE_DATA")
    return Places(
        cache=Path(env.get("CRUCIBLE_CACHE") or cache_home / "crucible"),
        data=Path(data) if data else None,
        runs=Path(env.get("CRUCIBLE_RUNS") or "runs"),
        offline=any(env.get(name, "").lower() in ("1", "true", "yes", "on") for name in ("HF_HUB_OFFLINE", "CRUCIBLE_OFFLINE")),
    )


def to_dict(value: object) -> Json:
    """A record as plain JSON values, in field order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return cast("Json", value)


@functools.lru_cache(maxsize=256)
def _adapter(cls: type) -> TypeAdapter[object]:
    """pydantic's plan for a class, made once: making it takes a hundred times as long as using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@functools.lru_cache(maxsize=256)
def _hints(cls: type) -> Mapping[str, object]:
    return get_type_hints(cls)


def _check_keys(cls: type, data: Mapping[str, object], prefix: str) -> None:
    names = {f.name for f in dataclasses.fields(cls)}
    hints = _hints(cls)
    for key, value in data.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f" Did you mean {prefix + near[0]!r}?" if near else ""
            raise ConfigError(f"Unknown key {prefix + key!r}.{hint} Known: {', '.join(sorted(prefix + n for n in names))}.")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check_keys(cast("type", hints[key]), cast("Mapping[str, object]", value), f"{prefix}{key}.")


def _key(cls: object, loc: Sequence[str | int]) -> str:
    """The dotted key of an error: fields and indices, without the names of union members that pydantic puts between them."""
    parts: list[str] = []
    for part in loc:
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            parts.append(str(part))
            cls = _hints(cls).get(str(part))
        elif isinstance(part, int):
            parts.append(str(part))
    return ".".join(parts)


def from_dict(cls: type[T], data: Mapping[str, object]) -> T:
    """A record from plain values.

    Raises:
        ConfigError: an unknown key (with the nearest one), a value of the wrong type or out of range.
    """
    from pydantic import ValidationError

    _check_keys(cls, data, "")
    try:
        return cast("T", _adapter(cast("Hashable", cls)).validate_python(dict(data)))
    except ValidationError as error:
        first = error.errors()[0]
        cause = cast("dict[str, object]", first.get("ctx", {})).get("error")
        if isinstance(cause, CrucibleError):
            raise cause from None
        key = _key(cls, first["loc"]) or cls.__name__
        if first["type"] == "missing":
            raise ConfigError(f"{key!r} is missing; {cls.__name__} needs it.") from None
        raise ConfigError(f"{key!r} is {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}.") from None


def parse_overrides(items: Iterable[str]) -> dict[str, object]:
    """`["lora.rank=8", "loss=kl"]` to nested values; the right side is TOML where it parses, else a string.

    Raises:
        ConfigError: an item has no "=".
    """
    tree: dict[str, object] = {}
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {item!r} has no value; expected key=value, for example lora.rank=8.")
        try:
            value: object = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, leaf = path.strip().split(".")
        node = tree
        for parent in parents:
            node = cast("dict[str, object]", node.setdefault(parent, {}))
            if not isinstance(node, dict):
                raise ConfigError(f"--set {item!r}: {parent!r} was set to a value before; expected a table.")
        node[leaf] = value
    return tree


def merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Nested update: tables are merged, other values replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def load_toml(path: Path) -> dict[str, object]:
    """The tables of a TOML file.

    Raises:
        ConfigError: no such file, or not TOML (with the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no configuration file {str(path)!r}.") from error
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration file {str(path)!r}: {error.strerror or error}. Expected a readable TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error


def _canonical(value: Json) -> Json:
    """Equal numbers in one form: 32.0 as 32, below 2^53, where the change loses nothing."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def fingerprint(value: object) -> str:
    """The hex sha256 of a record's canonical JSON: equal settings, equal fingerprint."""
    return hashlib.sha256(orjson.dumps(_canonical(to_dict(value)), option=orjson.OPT_SORT_KEYS)).hexdigest()


def differing_keys(old: Mapping[str, Json], new: Mapping[str, Json], prefix: str = "") -> tuple[str, ...]:
    """Dotted keys whose values differ between two plain trees, sorted."""
    found: list[str] = []
    for key in old.keys() | new.keys():
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(prefix + key)
    return tuple(sorted(found))

"""Who may ask: keys, kept as hashes. A key is shown once, when it is made.

Keys are long and random, so a plain sha256 of them cannot be guessed. Every comparison takes the same time for every key. This file does
not know HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from pathlib import Path
from typing import cast

from ..errors import AuthError, ConfigError, NotFoundError
from ..files import read_json, write_json
from ..records import Json, record

__all__ = ["PREFIX", "Key", "Keys"]

PREFIX = "tml-"
"""The SDK sends no key that starts otherwise."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@record
class Key:
    """A key without its secret."""

    name: str
    sha256: str
    created_at: float
    revoked: bool = False


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """The keys of one file, which only its owner can read.

    Args:
        path: of the JSON file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}

    def _load(self) -> dict[str, Key]:
        """The keys as they are in the file now: a key that was revoked elsewhere ends at once."""
        try:
            state = self.path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, {}
            return self._keys
        if (seen := (state.st_mtime_ns, state.st_size)) != self._seen:
            rows = cast("dict[str, dict[str, Json]]", read_json(self.path))
            self._keys = {
                name: Key(name=name, sha256=str(row["sha256"]), created_at=float(cast("float", row["created_at"])), revoked=bool(row["revoked"]))
                for name, row in rows.items()
            }
            self._seen = seen
        return self._keys

    def _save(self, keys: dict[str, Key]) -> None:
        write_json(self.path, {key.name: {"sha256": key.sha256, "created_at": key.created_at, "revoked": key.revoked} for key in keys.values()})
        self.path.chmod(0o600)

    def list(self) -> tuple[Key, ...]:
        """All keys, revoked ones too, in the order of their making."""
        return tuple(self._load().values())

    def active(self) -> bool:
        """Whether any key can be used."""
        return any(not key.revoked for key in self._load().values())

    def add(self, name: str) -> str:
        """Makes a key and returns it; it cannot be shown again.

        Raises:
            ConfigError: the name cannot be used, or is taken.
        """
        keys = dict(self._load())
        if not _NAME.fullmatch(name) or name in keys:
            raise ConfigError(f"A key cannot be called {name!r}; expected a new name of up to 64 letters, digits and . _ @ -.")
        secret = PREFIX + secrets.token_urlsafe(32)
        self._save(keys | {name: Key(name=name, sha256=_digest(secret), created_at=time.time())})
        return secret

    def revoke(self, name: str) -> None:
        """The key no longer works; its name stays taken, because it owns runs.

        Raises:
            NotFoundError: there is no such key.
        """
        keys = dict(self._load())
        if name not in keys:
            raise NotFoundError(f"There is no key called {name!r}. Known: {', '.join(keys) or 'none'}.")
        self._save(keys | {name: Key(name=name, sha256=keys[name].sha256, created_at=keys[name].created_at, revoked=True)})

    def known(self, name: str) -> str:
        """The name of a key that still works.

        Raises:
            AuthError: it was revoked.
        """
        key = self._load().get(name)
        if key is None or key.revoked:
            raise AuthError("The key that this token stands for was revoked. Use another key.")
        return name

    def tenant(self, secret: str) -> str:
        """The name of the key.

        Raises:
            AuthError: no such key, or it was revoked.
        """
        digest, found = _digest(secret), ""
        for key in self._load().values():
            if hmac.compare_digest(key.sha256, digest) and not key.revoked:
                found = key.name
        if not found:
            raise AuthError("The key is not known here, or was revoked. Send a valid one as X-API-Key; `crucible serve keys add` makes one.")
        return found

"""Short-lived tokens that stand for a key: who it is, signed, for an hour. A key that is revoked ends its tokens too.

This file does not know HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from pathlib import Path

import orjson

from ..errors import AuthError
from ..files import write_atomic

__all__ = ["Badges"]

LIFE_S = 3600


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Badges:
    """Signs and checks tokens (RFC 7519, HS256) with a secret that only the server's folder holds.

    Args:
        path: of the secret, which is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            write_atomic(path, secrets.token_hex(32).encode())
            path.chmod(0o600)
        self._secret = path.read_bytes()

    def _sign(self, text: str) -> str:
        return _text(hmac.new(self._secret, text.encode(), hashlib.sha256).digest())

    def make(self, tenant: str) -> str:
        """A token for a tenant."""
        now = int(time.time())
        claims = {"iss": "crucible", "sub": f"crucible:user:{tenant}", "org_id": "local", "tenant": tenant, "iat": now, "exp": now + LIFE_S}
        text = f"{_text(orjson.dumps({'alg': 'HS256', 'typ': 'JWT'}))}.{_text(orjson.dumps(claims))}"
        return f"{text}.{self._sign(text)}"

    def tenant(self, token: str) -> str:
        """Whose token it is.

        Raises:
            AuthError: it was not made here, or is over.
        """
        text, _, signature = token.rpartition(".")
        if text and hmac.compare_digest(self._sign(text), signature):
            body = text.partition(".")[2]
            claims = orjson.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            if claims["exp"] > time.time():
                return str(claims["tenant"])
        raise AuthError("The token is not valid here, or no longer. Exchange your key for another at /api/v1/auth/token.")

"""Which hosts are this machine. Knows no HTTP."""

from __future__ import annotations

import contextlib
import ipaddress

__all__ = ["is_loopback"]


def is_loopback(host: str) -> bool:
    """Whether the address or name means this machine."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False

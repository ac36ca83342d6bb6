"""Any Tinker service as a backend, through the official SDK. Importing this loads neither torch nor the SDK."""

from __future__ import annotations

from .backend import TinkerBackend
from .recovery import Recovery
from .spending import Prices, Spending

__all__ = ["Prices", "Recovery", "Spending", "TinkerBackend"]

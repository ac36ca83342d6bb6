"""What a run or a backend used at a service, and what that costs at given prices. This file does not know the service."""

from __future__ import annotations

import math
import threading

from ...errors import ConfigError
from ...records import record

__all__ = ["Prices", "Spending"]


@record
class Prices:
    """USD per million tokens: trained (each pass counts), read as a prompt, and drawn."""

    train: float
    prefill: float
    sample: float

    def __post_init__(self) -> None:
        for name in ("train", "prefill", "sample"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"Prices.{name} is {value!r}; expected USD per million tokens, finite and not negative.")


class Spending:
    """Counts of tokens; threads may share it. `cost_usd` is None without prices.

    Args:
        prices: of the service.
        of: where the same is counted, too.
    """

    def __init__(self, prices: Prices | None = None, of: Spending | None = None) -> None:
        self._prices, self._of, self._lock = prices, of, threading.Lock()
        self.trained_tokens = self.prompt_tokens = self.sampled_tokens = 0

    def add(self, *, trained: int = 0, prompt: int = 0, sampled: int = 0) -> None:
        """Adds."""
        with self._lock:
            self.trained_tokens += trained
            self.prompt_tokens += prompt
            self.sampled_tokens += sampled
        if self._of is not None:
            self._of.add(trained=trained, prompt=prompt, sampled=sampled)

    @property
    def cost_usd(self) -> float | None:
        """What it costs at these prices: an estimate, no invoice."""
        if self._prices is None:
            return None
        parts = (self.trained_tokens, self._prices.train), (self.prompt_tokens, self._prices.prefill), (self.sampled_tokens, self._prices.sample)
        return sum(tokens * price for tokens, price in parts) / 1e6

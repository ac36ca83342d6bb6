"""A router that looks at the prompt: a linear model of the reward per model. Numbers in, a name out; knows no samplers and no clock."""

# ruff: noqa: ARG002 - every router is told everything and uses what it can
from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..records import Json
from .bandits import Context, unit_reward

__all__ = ["LinUCB"]


class LinUCB:
    """A linear model of the reward per model over features of the prompt, and the largest upper bound.

    score = θ·x + alpha √(xᵀ A⁻¹ x), with A = ridge I + Σ x xᵀ, θ = A⁻¹ Σ reward x. Source: Li et al. 2010, arXiv 1003.0146 (disjoint).

    Args:
        alpha: how much uncertainty counts.
        ridge: how strongly θ is held at 0.
        discount: what an observation still weighs after each further one of that model; 1 forgets nothing.
    """

    def __init__(self, *, alpha: float = 0.6, ridge: float = 1.0, discount: float = 1.0) -> None:
        if not alpha >= 0 or not ridge > 0 or not 0 < discount <= 1:
            raise ConfigError(f"LinUCB has alpha={alpha!r}, ridge={ridge!r}, discount={discount!r}; expected ≥ 0, > 0 and (0, 1].")
        self._alpha, self._ridge, self._discount = alpha, ridge, discount
        self._lock = threading.RLock()
        self._inverse: dict[str, NDArray[np.float64]] = {}
        self._sums: dict[str, NDArray[np.float64]] = {}

    def _vector(self, context: Context) -> NDArray[np.float64]:
        vector = np.ones(1) if context is None else np.asarray(context, dtype=np.float64)
        known = next(iter(self._sums.values()), vector)
        if vector.ndim != 1 or vector.shape != known.shape or not np.isfinite(vector).all():
            raise ConfigError(f"The context has shape {vector.shape}; expected one dimension of {len(known)} finite numbers, as before.")
        return vector

    def scores(self, names: Sequence[str], context: Context = None) -> dict[str, float]:
        """The upper bound per model."""
        with self._lock:
            x = self._vector(context)
            found: dict[str, float] = {}
            for name in names:
                if name not in self._sums:
                    found[name] = self._alpha * math.sqrt(float(x @ x) / self._ridge)
                    continue
                spread = self._inverse[name] @ x
                found[name] = float(self._sums[name] @ spread + self._alpha * math.sqrt(max(0.0, float(x @ spread))))
            return found

    def choose(self, names: Sequence[str], context: Context = None) -> str:
        """The largest bound; one that was never tried first."""
        with self._lock:
            self._vector(context)
            new = next((name for name in names if name not in self._sums), None)
            if new is not None:
                return new
            scores = self.scores(names, context)
            return max(names, key=lambda name: scores[name])

    def observe(self, name: str, *, reward: float, cost: float, latency_s: float, ok: bool, context: Context = None) -> None:
        """One recursive least-squares step (Sherman & Morrison 1950)."""
        with self._lock:
            x = self._vector(context)
            inverse = self._inverse.get(name, np.eye(len(x)) / self._ridge) / self._discount
            spread = inverse @ x
            self._inverse[name] = inverse - np.outer(spread, spread) / (1 + float(x @ spread))
            self._sums[name] = self._sums.get(name, np.zeros(len(x))) * self._discount + (unit_reward(reward) if ok else 0.0) * x

    def state(self) -> dict[str, Json]:
        """All that was learned, as JSON values."""
        with self._lock:
            return {name: cast("Json", {"inverse": self._inverse[name].tolist(), "sums": self._sums[name].tolist()}) for name in self._sums}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Takes a saved state in place of its own."""
        inverse: dict[str, NDArray[np.float64]] = {}
        sums: dict[str, NDArray[np.float64]] = {}
        for name, one in state.items():
            try:
                both = cast("dict[str, list[float]]", one)
                inverse[name], sums[name] = np.array(both["inverse"], dtype=np.float64), np.array(both["sums"], dtype=np.float64)
                fits = inverse[name].shape == (len(sums[name]), len(sums[name]))
            except (KeyError, TypeError, ValueError):
                fits = False
            if not fits:
                raise ConfigError(f"The router's state of {name!r} is no pair of a square matrix and a vector. It was saved by another router, or is damaged.")
        with self._lock:
            self._inverse, self._sums = inverse, sums

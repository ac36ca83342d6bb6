"""Learning-rate schedules as functions (step from 0, steps in all) → factor in [0, 1]. They know no optimizer."""

from __future__ import annotations

import math

from ..plugins import Registry
from ..protocols import Schedule
from ..records import TrainConfig

__all__ = ["constant", "cosine", "learning_rate", "linear", "schedules"]

schedules: Registry[Schedule] = Registry("schedule", {name: f"{__name__}:{name}" for name in ("constant", "linear", "cosine")})


def constant(step: int, total: int) -> float:
    """1 throughout."""
    return 1.0 if step <= total else 0.0


def linear(step: int, total: int) -> float:
    """A straight line from 1 towards 0 at `total`."""
    return max(0.0, 1.0 - step / max(1, total))


def cosine(step: int, total: int) -> float:
    """Half a cosine from 1 to 0. Source: Loshchilov & Hutter 2017, arXiv 1608.03983 (without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, total))))


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step: linear warm-up to `adam.lr`, then the schedule down to `final_lr_ratio` of it.

    Args:
        config: names the schedule, the warm-up and the peak.
        step: counts from 0.
        total: steps of the whole run.

    Raises:
        UnknownNameError: no such schedule.
    """
    schedule = schedules.get(config.schedule)
    if step < config.warmup_steps:
        return config.adam.lr * (step + 1) / config.warmup_steps
    factor = schedule(step - config.warmup_steps, max(1, total - config.warmup_steps))
    return config.adam.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * factor)

"""Asking models: today one sampler, one prompt."""

from .choices import ChoiceSampler
from .generation import generate

__all__ = ["ChoiceSampler", "generate"]

"""Asking models: today one sampler, one prompt."""

from .generation import generate

__all__ = ["generate"]

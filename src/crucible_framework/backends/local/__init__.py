"""The embedded engine: LoRA training and sampling with PyTorch on this machine, offline if need be."""

from __future__ import annotations

from .backend import LocalBackend

__all__ = ["LocalBackend"]

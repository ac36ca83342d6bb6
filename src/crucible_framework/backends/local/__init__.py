"""The embedded engine: LoRA training and sampling with PyTorch on this machine, offline if need be."""

from __future__ import annotations

import os

# Threads that spin while they wait take a busy machine's cores from those that work; OpenMP reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .backend import LocalBackend

__all__ = ["LocalBackend"]

"""What a run was made on: versions, processor, memory. For the record only; nothing is decided by it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..records import Json

__all__ = ["describe_environment", "peak_memory_bytes"]

PACKAGES = ("crucible-framework", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "tinker")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_environment() -> dict[str, Json]:
    """Python, operating system, processor and the versions of the packages that decide numbers."""
    packages: dict[str, Json] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": packages,
    }


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

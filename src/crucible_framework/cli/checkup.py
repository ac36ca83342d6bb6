"""What `crucible doctor` looks at. It changes nothing and asks no network."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..config import places
from ..records import record
from .show import size

__all__ = ["Check", "examine"]

NEEDED = ("torch", "transformers", "tokenizers", "safetensors")
MEMORY_BYTES, DISK_BYTES = 2_000_000_000, 2_000_000_000


@record
class Check:
    """One thing that was looked at."""

    what: str
    found: str
    ok: bool
    fix: str = ""


def _packages() -> Iterator[Check]:
    for name in NEEDED:
        try:
            yield Check(what=name, found=version(name), ok=True)
        except PackageNotFoundError:
            yield Check(what=name, found="not installed", ok=False, fix="pip install 'crucible-framework[local]'")


def _writable(what: str, folder: Path) -> Check:
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    ok = os.access(nearest, os.W_OK)
    return Check(what=what, found=str(folder), ok=ok, fix="" if ok else f"make {nearest} writable, or name another folder in the environment")


def examine() -> tuple[Check, ...]:
    """Python, packages, memory, disk and folders."""
    where = places()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    nearest = next(parent for parent in (where.cache, *where.cache.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    models = where.cache / "models"
    held = sorted(path.parent.name for path in models.glob("*/manifest.json")) if models.is_dir() else []
    return (
        Check(what="Python", found=platform.python_version(), ok=True),
        *_packages(),
        Check(what="processor cores", found=str(os.cpu_count()), ok=True),
        Check(what="memory", found=size(memory), ok=memory >= MEMORY_BYTES, fix="at least 2 GB for smollm2-135m; base_model='tiny' needs less"),
        Check(what="free disk", found=size(free), ok=free >= DISK_BYTES, fix=f"free 2 GB beside {nearest}"),
        _writable("cache (CRUCIBLE_CACHE)", where.cache),
        _writable("runs (CRUCIBLE_RUNS)", where.runs),
        Check(what="base models in the cache", found=", ".join(held) or "none yet; fetched on first use", ok=True),
    )

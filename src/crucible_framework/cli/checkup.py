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


FAULTS = 1.5
"""From so much longer on, filling new memory is worth another allocator."""


def _speed() -> Iterator[Check]:
    """What decides how fast the local engine is."""
    try:
        from ..backends.local.native import compiler
        from ..backends.local.sizes import allocation_cost, fast_bf16
    except ImportError:
        return
    found = compiler()
    yield Check(what="C++ compiler", found=found or "none: with g++ training and sampling are several times faster", ok=True)
    yield Check(what="bfloat16 in the processor", found="yes" if fast_bf16() else "no: weights are float32", ok=True)
    cost = allocation_cost()
    advice = "; steps are faster with jemalloc: LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"
    yield Check(what="new memory", found=f"{cost:.1f} times slower than held memory{advice if cost >= FAULTS else ''}", ok=True)


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
        *_speed(),
        Check(what="memory", found=size(memory), ok=memory >= MEMORY_BYTES, fix="at least 2 GB for smollm2-135m; base_model='tiny' needs less"),
        Check(what="free disk", found=size(free), ok=free >= DISK_BYTES, fix=f"free 2 GB beside {nearest}"),
        _writable("cache (CRUCIBLE_CACHE)", where.cache),
        _writable("runs (CRUCIBLE_RUNS)", where.runs),
        Check(what="base models in the cache", found=", ".join(held) or "none yet; fetched on first use", ok=True),
    )

"""Weights as our own decoder reads them, in a file of the cache that is mapped: loaded at once, and one copy in memory for all processes.

Matrices that read the same input stand one after the other in the dtype that computes, so that nothing is converted or joined when a model
is loaded again. A file belongs to one state of one model's folder; when that changes, another takes its place. Deleting the folder `weights`
of the cache costs the next load a second. This file does not know modules.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock
from torch import Tensor

from ...errors import StoreError
from ...files import discard, publish, read_manifest, storage_errors
from .sizes import ITEM_BYTES
from .skeleton import read_weights, shapes

__all__ = ["prepared_weights"]

_LAYOUT = 1
_FILE = "weights.bin"
_ALIGN = 64
_MOST_BYTES = 2 << 30
"""Larger models are read from their own files: a second copy on the disk would be no small thing."""


def prepared_weights(folder: Path, config: SimpleNamespace, dtype: torch.dtype, cache: Path) -> dict[str, Tensor] | None:
    """The parameters of a model's folder by name, in the order of `shapes`; None where not all are there in their shapes.

    Args:
        folder: holds safetensors.
        config: of the model, as `known` gives it.
        dtype: of the result.
        cache: below it the prepared file stands; where it cannot be written, the weights are read without it.

    Raises:
        Exception: the folder's tensors are broken, as the safetensors library says it.
    """
    wanted = shapes(config)
    ends = _ends(wanted, dtype)
    size = max(ends.values())
    if size > _MOST_BYTES:
        return read_weights(folder, config, dtype)
    files = [f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in sorted(folder.glob("*.safetensors"))]
    whose, state = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (f"{folder.resolve()} {dtype}", f"{_LAYOUT} {files} {wanted}"))
    place = cache / "weights" / f"{whose}-{state}"
    if not _whole(place):
        found = read_weights(folder, config, dtype)
        if found is None:
            return None
        try:
            with storage_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(place.parent / f".{whose}.lock"):
                    _replace(place, whose, found, ends)
        except StoreError:
            return found
    whole = torch.from_file(str(place / _FILE), shared=False, size=size, dtype=torch.uint8)
    return {name: whole[ends[name] - math.prod(shape) * ITEM_BYTES[dtype] : ends[name]].view(dtype).view(shape) for name, shape in wanted.items()}


def _ends(wanted: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, int]:
    """Where each tensor ends in the file, matrices first: q, k and v, or gate and up, then touch."""
    ends, at = dict[str, int](), 0
    for name in sorted(wanted, key=lambda name: len(wanted[name]) == 1):  # a stable sort
        at = -(-at // _ALIGN) * _ALIGN + math.prod(wanted[name]) * ITEM_BYTES[dtype]
        ends[name] = at
    return ends


def _whole(place: Path) -> bool:
    """Whether a prepared file is there in its full length."""
    try:
        read_manifest(place)
    except StoreError:
        return False
    return True


def _replace(place: Path, whose: str, found: Mapping[str, Tensor], ends: Mapping[str, int]) -> None:
    """Publishes a folder in place of all others of the same model and dtype."""
    if _whole(place):  # another process was faster
        return

    def write(target: Path) -> None:
        with (target / _FILE).open("wb") as file:
            for name in sorted(ends, key=ends.__getitem__):
                data = found[name].contiguous().view(torch.uint8).numpy()
                file.write(bytes(ends[name] - data.nbytes - file.tell()))
                file.write(data.data)

    for old in place.parent.glob(f"{whose}-*"):
        discard(old)
    publish(place, write)

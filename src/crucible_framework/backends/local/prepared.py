"""Weights as our own decoder reads them, in a file of the cache that is mapped: loaded at once, and one copy in memory for all processes.

Matrices that read the same input stand one after the other in the dtype that computes, so that nothing is converted or joined when a model
is loaded again. Where fp32 matrices have a short form that changes no number, a second file beside it holds them in it, for who only reads.
Files belong to one state of one model's folder; when that changes, others take their place. Deleting the folder `weights` of the cache costs
the next load a second. This file does not know modules.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock
from torch import Tensor

from ...errors import StoreError
from ...files import discard, publish, read_manifest, storage_errors
from .short import GROUP, GROUP_BYTES, Short, grouped, shortened
from .sizes import ITEM_BYTES
from .skeleton import read_weights, shapes

__all__ = ["Prepared", "prepared_weights"]

_LAYOUT = 2
_FILE = "weights.bin"
_SHORT = {"bf16.bin": (shortened, torch.bfloat16, 1, 2), "grouped.bin": (grouped, torch.uint8, GROUP, GROUP_BYTES)}
"""Files of the matrices of `_FILE` in a short form, of which one is there at most: what makes it, its dtype, and that so many numbers take so many bytes."""
_ALIGN = 4 * GROUP
_MOST_BYTES = 2 << 30
"""Larger models are read from their own files: a second copy on the disk would be no small thing."""


@dataclass(slots=True, frozen=True, eq=False)
class Prepared:
    """The parameters of a model by name, in the order of `shapes`, and the short form of its matrices where a file holds it."""

    tensors: Mapping[str, Tensor]
    short: Short | None = None


def prepared_weights(folder: Path, config: SimpleNamespace, dtype: torch.dtype, cache: Path) -> Prepared | None:
    """The parameters of a model's folder; None where not all are there in their shapes.

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
        return None if (found := read_weights(folder, config, dtype)) is None else Prepared(found)
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
            return Prepared(found)
    whole = torch.from_file(str(place / _FILE), shared=False, size=size, dtype=torch.uint8)
    tensors = {name: whole[ends[name] - math.prod(shape) * ITEM_BYTES[dtype] : ends[name]].view(dtype).view(shape) for name, shape in wanted.items()}
    for name, (_, kind, _, _) in _SHORT.items():
        if (path := place / name).is_file():
            numbers = torch.from_file(str(path), shared=False, size=path.stat().st_size // kind.itemsize, dtype=kind)
            return Prepared(tensors, Short(numbers, whole.data_ptr()))
    return Prepared(tensors)


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

    order = sorted(ends, key=ends.__getitem__)

    def write(target: Path) -> None:
        _write(target / _FILE, ((found[name].contiguous(), ends[name]) for name in order))
        matrices = [name for name in order if found[name].ndim == 2 and found[name].dtype == torch.float32]
        for file, (make, _, each, many) in _SHORT.items() if matrices else ():
            if _write(target / file, ((make(found[name]), ends[name] // 4 // each * many) for name in matrices)):
                break
            (target / file).unlink()

    for old in place.parent.glob(f"{whose}-*"):
        discard(old)
    publish(place, write)


def _write(path: Path, parts: Iterable[tuple[Tensor | None, int]]) -> bool:
    """Writes tensors so that each ends at its place; False where one is None, which ends the file there."""
    with path.open("wb") as file:
        for tensor, end in parts:
            if tensor is None:
                return False
            data = tensor.view(torch.uint8).numpy()
            file.write(bytes(end - data.nbytes - file.tell()))
            file.write(data.data)
    return True

"""Memory for activations that is used again from layer to layer and from step to step.

New pages cost a processor more than the work that is done on them, and small ones more than large ones: the tensors of a pass are cut from
few large regions, for which large pages are asked. Memory comes back when the last tensor that shares it dies. This file does not know
what the tensors hold.
"""

from __future__ import annotations

import bisect
import math
import mmap
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Buffers"]

_REGION = 1 << 26
_ALIGN = 256
"""Bytes at whose multiples tensors begin."""
_LEAST = 1 << 14
"""Bytes below which a tensor is torch's own: the allocator has such pieces at hand."""


@dataclass(slots=True, eq=False)
class _Region:
    """A piece of memory; `holes` are its free pieces from start to end in order, none touches the next."""

    memory: NDArray[np.uint8]
    holes: list[tuple[int, int]] = field(init=False)
    touched_s: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self.holes = [(0, self.memory.nbytes)]

    @property
    def free(self) -> bool:
        """Whether nothing of it is in use."""
        return self.holes == [(0, self.memory.nbytes)]

    def take(self, size: int) -> int | None:
        """The start of the first hole that is large enough, of which so many bytes are now taken."""
        for place, (start, end) in enumerate(self.holes):
            if end - start >= size:
                self.holes[place : place + 1] = [(start + size, end)] if end - start > size else []
                self.touched_s = time.monotonic()
                return start
        return None

    def give(self, start: int, end: int) -> None:
        """Frees a piece."""
        place = bisect.bisect(self.holes, (start, end))
        if place < len(self.holes) and self.holes[place][0] == end:
            end = self.holes.pop(place)[1]
        if place and self.holes[place - 1][1] == start:
            start = self.holes.pop(place - 1)[0]
            place -= 1
        self.holes.insert(place, (start, end))


class Buffers:
    """Gives tensors on the processor; any thread may take them and let them go.

    Args:
        keep_s: seconds for which memory that nothing uses is kept for what comes next.
    """

    def __init__(self, keep_s: float = 30.0) -> None:
        self._keep_s = keep_s
        self._regions = list[_Region]()
        self._returned: deque[tuple[_Region, int, int]] = deque()
        self._watches: dict[int, weakref.ref[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that holds anything."""
        size = math.prod(shape) * dtype.itemsize
        if size < _LEAST:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            region, start, end = self._take(-(-size // _ALIGN) * _ALIGN)
            piece = region.memory[start : start + size]
            key = id(piece)

            def back(_: object) -> None:  # may run inside `empty` too, so it takes no lock
                self._returned.append((region, start, end))
                del self._watches[key]

            self._watches[key] = weakref.ref(piece, back)
        return torch.from_numpy(piece).view(dtype).view(shape)

    def trim(self) -> None:
        """Gives regions back to the system that nothing has used for a while."""
        with self._lock:
            self._collect()
            old_s = time.monotonic() - self._keep_s
            self._regions = [one for one in self._regions if not one.free or one.touched_s > old_s]

    @property
    def held(self) -> int:
        """Bytes of all regions."""
        return sum(one.memory.nbytes for one in self._regions)

    def _take(self, size: int) -> tuple[_Region, int, int]:
        self._collect()
        for region in self._regions:
            if (start := region.take(size)) is not None:
                return region, start, start + size
        self._regions.append(_Region(_memory(max(size, _REGION))))
        self._regions[-1].take(size)
        return self._regions[-1], 0, size

    def _collect(self) -> None:
        while self._returned:
            region, start, end = self._returned.popleft()
            region.give(start, end)


def _memory(size: int) -> NDArray[np.uint8]:
    """New memory that begins with a page, in large pages where the system has them."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}  # shared memory has no large pages
    whole = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel may know the word and have no large pages; small ones hold the same
            whole.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(whole, np.uint8)

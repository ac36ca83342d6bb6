"""Attention of packed heads as one compiled call for each direction; native/attend.cpp has the kernels.

It covers fp32, and bf16 where the processor has dot products of it, and keeps of a row of scores its log-sum only. attention.py says when
it is used, and has another way for what this does not cover. This file does not know rotations, layers or models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .native import library
from .walks import Span, Walks

__all__ = ["attend_packed", "attend_packed_back", "covers", "is_there"]

_MULTIPLE = 32
"""A head's size is a multiple of it: the kernels' blocks are as wide."""
_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_SIZES = (_POINTER, _INT, _INT, _INT, _INT)


class _CSpan(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_int32), ("count", ctypes.c_int32), ("length", ctypes.c_int32), ("skip", ctypes.c_int32), ("mask", ctypes.c_void_p),
    )  # fmt: skip


def _function(name: str, folder: Path | None, dtype: torch.dtype) -> ctypes._NamedFuncPointer | None:
    """A function of the library, or None: without a compiler, or for bf16 on a processor without dot products of it."""
    found = None if folder is None or dtype not in _KINDS else library("attend.cpp", folder)
    full = f"crucible_{name}_{_KINDS.get(dtype)}"
    if found is None or not hasattr(found, full):
        return None
    function = getattr(found, full)
    if function.argtypes is None:
        function.argtypes, function.restype = (_POINTER,) * (5 if name == "attend_back" else 3) + _SIZES, None
    return function  # type: ignore[no-any-return]  # ctypes says nothing of its functions


def is_there(folder: Path | None, dtype: torch.dtype, size: int) -> bool:
    """Whether heads of that dtype and size are covered on this processor.

    Args:
        folder: where compiled code is kept; None: there is none.
        dtype: of the heads.
        size: of a head.
    """
    return size % _MULTIPLE == 0 and _function("attend", folder, dtype) is not None


def covers(walks: Walks, x: Tensor, spans: Sequence[Span]) -> bool:
    """Whether heads x [T, heads, D] and all spans are covered; a mask must be one for all runs of its span."""
    there = x.device.type == "cpu" and x.is_contiguous() and is_there(walks.folder, x.dtype, x.shape[-1])
    return there and all(span.mask is None or span.mask.numel() == (span.length - span.skip) * span.length for span in spans)


def _places(spans: Sequence[Span]) -> tuple[ctypes.Array[_CSpan], list[Tensor]]:
    """The spans for the call, and the masks that they point to."""
    masks = [None if span.mask is None else span.mask.float().contiguous() for span in spans]
    rows = [_CSpan(s.start, s.count, s.length, s.skip, None if m is None else m.data_ptr()) for s, m in zip(spans, masks, strict=True)]
    return (_CSpan * len(rows))(*rows), [mask for mask in masks if mask is not None]


def attend_packed(walks: Walks, x: Tensor, queries: int, spans: Sequence[Span], *, norms: bool) -> tuple[Tensor, Tensor | None]:
    """Attention of heads x [T, heads + 2 · key-value heads, D] that `covers` → [T, heads, D]; with `norms` what its backward pass needs, fp32 [T, heads]."""
    function = _function("attend", walks.folder, x.dtype)
    assert function is not None  # covers() said so
    o = walks.buffers.empty((x.shape[0], queries, x.shape[2]), x.dtype)
    kept = x.new_empty((x.shape[0], queries), dtype=torch.float32) if norms else None
    places, _masks = _places(spans)
    function(x.data_ptr(), o.data_ptr(), None if kept is None else kept.data_ptr(), places, len(spans), queries, (x.shape[1] - queries) // 2, x.shape[2])
    return o, kept


def attend_packed_back(walks: Walks, g: Tensor, x: Tensor, spans: Sequence[Span], *, o: Tensor, norms: Tensor) -> Tensor:
    """The gradient of x from g, that of o, contiguous [T, heads, D]; o and norms are what `attend_packed` gave."""
    function = _function("attend_back", walks.folder, x.dtype)
    assert function is not None  # covers() said so
    dx, queries = walks.buffers.empty(tuple(x.shape), x.dtype), g.shape[1]
    places, _masks = _places(spans)
    pointers = (tensor.data_ptr() for tensor in (g, x, o, norms, dx))
    function(*pointers, places, len(spans), queries, (x.shape[1] - queries) // 2, x.shape[2])
    return dx

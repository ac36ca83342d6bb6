"""One step of a Llama- or Qwen-like decoder by compiled code: token ids in, logits out, keys and values written into pages in place.

It reads the weights where torch keeps them, or int8 copies of the matrices; of fp32 matrices the short form, where they have one, which
gives the same numbers to the bit from half the memory. Its numbers are those of the torch path up to rounding; sums are fp32, and with bf16
weights the inputs of products are rounded to bf16, however many tokens share a step. The structures are those of `native/step.cpp`. This
file does not know when a sequence ends or who asked for it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...records import SamplingParams
from .bases import Base
from .decoder import Joint, Parts
from .draws import draw
from .kv import PAGE, Pages
from .lora import Active
from .native import library
from .short import shortened
from .sizes import SMALL, available_bytes
from .steps import Chunk, by_adapter

__all__ = ["NativeSteps"]

_THREADS = 16
"""Threads of a step at the most: a small model's matrices come in some thirty pieces, and all threads meet a dozen times per layer."""
_KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_SHORT: Final = {torch.float32: 0, torch.bfloat16: 3, torch.uint8: 4}
"""Kinds of fp32 matrices and of their short forms, which unlike the matrices of a bf16 model meet fp32 activations."""
_P = ctypes.c_void_p
_I = ctypes.c_int32


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", _P), ("scale", _P), ("bias", _P), ("sums", _P), ("outputs", _I), ("inputs", _I), ("kind", _I))


class _Layer(ctypes.Structure):
    _fields_ = (("before", _P), ("between", _P), ("heads", _P), ("qkv", _Matrix), ("out", _Matrix), ("up", _Matrix), ("down", _Matrix))


class _Part(ctypes.Structure):
    _fields_ = (("low", _I), ("high", _I), ("first", _I), ("last", _I))


class _Pair(ctypes.Structure):
    _fields_ = (("a", _P), ("b", _P), ("ranks", _I), ("parts", _I), ("part", _Part * 3))


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("layers", "queries", "keys", "size", "width", "inner", "vocabulary", "kind", "cache_kind")),
        ("eps", ctypes.c_float),
        ("embedding", _P),
        ("embedding_kind", _I),
        ("adapter_kind", _I),
        ("norm", _P),
        ("head", _Matrix),
        ("layer", ctypes.POINTER(_Layer)),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("tokens", "sequences", "rows", "groups", "table_width", "heads_room")),
        *((name, _P) for name in ("ids", "places", "starts", "table", "last", "stops", "adapters", "cos", "sin", "pool")),
        ("layer_bytes", ctypes.c_int64),
        ("page_bytes", ctypes.c_int64),
        ("logits", _P),
    )


def _room_for_short(base: Base, kind: torch.dtype) -> bool:
    """Whether short copies of fp32 matrices pay, and take at most a quarter of the free memory."""
    numbers, have = sum(out * into for out, into in base.layers.values()), available_bytes()
    return kind == torch.float32 and numbers >= SMALL and have is not None and 2 * numbers <= have / 4


class NativeSteps:
    """The compiled step of one base; see `Steps`.

    Args:
        base: a model that `of` found covered.
        lib: the compiled functions.
        threads: that work on a step, as far as that helps.
        int8: whether the matrices are rounded to int8 with one scale per output.
    """

    chunk = 256
    joins = False

    def __init__(self, base: Base, parts: Parts, lib: ctypes.CDLL, *, threads: int, int8: bool) -> None:
        self._base, self._parts, self._lib = base, parts, lib
        self._kept = list[Tensor]()
        self._kind = parts.embedding.dtype
        self._int8 = int8
        self._half = torch.bfloat16 if int8 else self._kind  # of adapters and of the cache
        self._shorten = not int8 and base.short is None and _room_for_short(base, self._kind)
        self._adapters: weakref.WeakKeyDictionary[Active, tuple[Any, list[Tensor]]] = weakref.WeakKeyDictionary()
        self._names = [joint for layer in parts.layers for joint in (layer.qkv, layer.out, layer.up, layer.down)]
        layers = (_Layer * len(parts.layers))()
        for one, layer in zip(layers, parts.layers, strict=True):
            one.before, one.between = self._norm(layer.before), self._norm(layer.between)
            one.heads = None if layer.heads is None else self._norm(layer.heads)
            one.qkv, one.out, one.up, one.down = (self._matrix(j.frozen.weight, j.frozen.bias) for j in (layer.qkv, layer.out, layer.up, layer.down))
        first, embedding = parts.layers[0], self._short(parts.embedding)
        head = parts.head.weight
        self._model = _Model(
            layers=len(layers),
            queries=parts.queries,
            keys=parts.keys,
            size=parts.size,
            width=first.qkv.frozen.weight.shape[1],
            inner=first.down.frozen.weight.shape[1],
            vocabulary=head.shape[0],
            kind=_KINDS[torch.int8 if int8 else self._kind],
            cache_kind=_KINDS[self._half],
            eps=parts.eps,
            embedding=self._keep(embedding),
            embedding_kind=_SHORT[embedding.dtype] if self._kind == torch.float32 else _KINDS[self._kind],
            adapter_kind=_KINDS[self._half],
            norm=self._norm(parts.norm),
            head=self._matrix(head, None, embedding if head.data_ptr() == parts.embedding.data_ptr() else None),
            layer=layers,
        )
        self._layers = layers
        self._cos, self._sin = torch.empty(0), torch.empty(0)
        self._logits = torch.empty((0, head.shape[0]))
        lib.crucible_open.restype = _P
        self._engine = _P(lib.crucible_open(ctypes.byref(self._model), min(threads, _THREADS)))
        weakref.finalize(self, lib.crucible_close, self._engine)

    @classmethod
    def of(cls, base: Base, *, threads: int, int8: bool = False) -> NativeSteps | None:
        """Compiled steps for a base, or None where they do not cover it or cannot be had."""
        if base.native is None or base.decoder is None:
            return None
        parts = base.decoder.parts
        first, known = parts.layers[0], parts.embedding.dtype in (torch.float32, torch.bfloat16)
        regular = first.down.frozen.weight.shape[1] % 16 == 0 and parts.size % 2 == 0 and parts.queries // parts.keys <= 32
        lib = library("step.cpp", base.native) if known and regular else None
        return None if lib is None else cls(base, parts, lib, threads=threads, int8=int8)

    # ------------------------------------------------------------------------------------------------------------ weights
    def _keep(self, tensor: Tensor) -> int:
        """The tensor's address; it lives as long as this object."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _short(self, weight: Tensor) -> Tensor:
        """The matrix in its short form where it has one: out of the cache's file, or made now, until one has none."""
        if weight.dtype != torch.float32:
            return weight
        mapped = None if self._base.short is None else self._base.short.of(weight)
        made = shortened(weight) if mapped is None and self._shorten else None
        self._shorten = self._shorten and made is not None
        return next(found for found in (mapped, made, weight) if found is not None)

    def _norm(self, weight: Tensor) -> int:
        return self._keep(weight.float().contiguous())

    def _matrix(self, weight: Tensor, bias: Tensor | None, short: Tensor | None = None) -> _Matrix:
        def padded(vector: Tensor) -> int:  # whole vectors are read at the end
            return self._keep(torch.nn.functional.pad(vector.float(), (0, 32)).contiguous())

        out, into = weight.shape
        scale = sums = None
        if self._int8:
            steps = weight.float().abs().amax(dim=1).clamp_(min=1e-12) / 127
            weight, scale = (weight.float() / steps[:, None]).round_().to(torch.int8), padded(steps)
            sums = self._keep(torch.nn.functional.pad(weight.sum(dim=1, dtype=torch.int32), (0, 32)))
        elif weight.dtype == torch.float32:
            weight = self._short(weight) if short is None else short
        kind = _KINDS[weight.dtype] if self._int8 or self._kind != torch.float32 else _SHORT[weight.dtype]
        return _Matrix(self._keep(weight), scale, None if bias is None else padded(bias), sums, out, into, kind)

    def _adapter(self, active: Active) -> int:
        """The address of an adapter's pairs, made at its first use."""
        if active not in self._adapters:
            head = Joint(self._parts.head, ((self._base.head, 0, self._parts.head.weight.shape[0]),))
            kept = list[Tensor]()
            pairs = (_Pair * (len(self._names) + 1))(*(self._pair(active, joint, kept) for joint in [*self._names, head]))
            self._adapters[active] = pairs, kept
        return ctypes.addressof(self._adapters[active][0])

    def _pair(self, active: Active, joint: Joint, kept: list[Tensor]) -> _Pair:
        found = [(active.pairs[name], low, high) for name, low, high in joint.rows if name in active.pairs]
        if not found:
            return _Pair()
        outputs = joint.frozen.weight.shape[0]
        a = torch.cat([pair[0] for pair, _, _ in found]).to(self._half).contiguous()
        b = torch.zeros((a.shape[0], -(-outputs // 16) * 16))
        parts, start = (_Part * 3)(), 0
        for place, ((_, second), low, high) in enumerate(found):
            b[start : start + second.shape[1], low:high] = second.t() * active.scale
            parts[place] = _Part(start, start + second.shape[1], low, high)
            start += second.shape[1]
        blocked = b.view(a.shape[0], -1, 16).transpose(0, 1).to(self._half).contiguous()
        kept += [a, blocked]
        return _Pair(a.data_ptr(), blocked.data_ptr(), a.shape[0], len(found), parts)

    # -------------------------------------------------------------------------------------------------------------- steps
    @property
    def _room(self) -> int:
        return -(-self._parts.size // 16) * 16

    def pages(self, limit: int) -> Pages:
        """See `Steps`: per layer and page [heads, size, 16] keys, then [heads, 16, size rounded up] values."""
        numbers = self._parts.keys * PAGE * (self._parts.size + self._room)
        return Pages(len(self._layers), numbers, dtype=self._half, device=self._base.device, limit=-(-limit // PAGE))

    def _rotary(self, places: int) -> None:
        """Makes sure that the angles of so many places are there."""
        if self._cos.shape[0] < places:
            many = min(max(512, 2 * places), max(places, self._base.context))
            half = self._parts.size // 2
            self._cos, self._sin = (part[0, :, :half].float().contiguous() for part in self._parts.rotary(torch.empty(1), torch.arange(many)[None]))

    @torch.no_grad()
    def logits(self, chunks: Sequence[Chunk], pages: Pages) -> Tensor:
        """See `Steps`; the result is overwritten by the next step."""
        order, groups = by_adapter(chunks)
        some = [chunks[i] for i in order]
        ends = np.cumsum([len(chunk.tokens) for chunk in some])
        wanted = [place for place, chunk in enumerate(some) if chunk.wanted]
        found = self._run(some, groups, ends[wanted] - 1, pages)
        if order == list(range(len(order))):
            return found
        place = {order[where]: row for row, where in enumerate(wanted)}
        return found[[place[i] for i, chunk in enumerate(chunks) if chunk.wanted]]

    def scores(self, active: Active | None, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, ...]]:
        """For each (prompt, completion) the log p of every completion token at temperature 1, in nats. Both hold at least one token."""
        found = list[tuple[float, ...]]()
        pages = self.pages(max(len(prompt) + len(answer) for prompt, answer in pairs))
        for prompt, answer in pairs:
            tokens, table, parts = [*prompt, *answer[:-1]], list[int](), list[Tensor]()
            while len(table) * PAGE < len(tokens):
                table.append(cast("int", pages.take(beyond=True)))
            for start in range(0, len(tokens), self.chunk):
                some = tokens[start : start + self.chunk]
                first = max(0, len(prompt) - 1 - start)
                logits = self._run([Chunk(some, start, table, active, True)], [(active, 0, 1)], np.arange(first, len(some)), pages)
                targets = torch.tensor(answer[start + first - len(prompt) + 1 :][: len(logits)], dtype=torch.int64)
                parts.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
            pages.drop(table)
            found.append(tuple(torch.cat(parts).tolist()))
        return found

    def _run(self, some: Sequence[Chunk], groups: Sequence[tuple[Active | None, int, int]], last: NDArray[np.int64], pages: Pages) -> Tensor:
        """fp32 logits after the tokens whose places in the step `last` names; chunks of one adapter stand beside each other."""
        starts = np.cumsum([0, *(len(chunk.tokens) for chunk in some)], dtype=np.int32)
        ids = np.fromiter((token for chunk in some for token in chunk.tokens), np.int32, starts[-1])
        places = np.fromiter((place for chunk in some for place in range(chunk.start, chunk.start + len(chunk.tokens))), np.int32, starts[-1])
        table = np.zeros((len(some), max(len(chunk.pages) for chunk in some)), np.int32)
        for row, chunk in zip(table, some, strict=True):
            row[: len(chunk.pages)] = chunk.pages
        rows, stops = last.astype(np.int32), starts[[high for _, _, high in groups]]
        adapters = (_P * len(groups))(*(None if active is None else self._adapter(active) for active, _, _ in groups))
        self._rotary(int(places.max()) + 1)
        if self._logits.shape[0] < len(rows):
            self._logits = torch.empty((len(rows), self._logits.shape[1]))
        item = pages.tensor.element_size()
        step = _Step(
            tokens=int(starts[-1]),
            sequences=len(some),
            rows=len(rows),
            groups=len(groups),
            table_width=table.shape[1],
            heads_room=self._room,
            ids=ids.ctypes.data,
            places=places.ctypes.data,
            starts=starts.ctypes.data,
            table=table.ctypes.data,
            last=rows.ctypes.data,
            stops=stops.ctypes.data,
            adapters=ctypes.addressof(adapters),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            pool=pages.tensor.data_ptr(),
            layer_bytes=pages.tensor.stride(0) * item,
            page_bytes=pages.tensor.stride(1) * item,
            logits=self._logits.data_ptr(),
        )
        self._lib.crucible_step(self._engine, ctypes.byref(step))
        return self._logits[: len(rows)]

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[np.random.Generator]) -> tuple[list[int], list[float]]:
        """See `Steps`: as `draws.draw`, in one pass over the logits; rows with top-k or top-p go there."""
        rows, vocabulary = logits.shape
        logits = logits.contiguous()
        cut = [row for row, p in enumerate(params) if p.temperature > 0 and (p.top_k or p.top_p < 1)]
        skipped = set(cut)
        inverse = np.array([1.0 / (p.temperature or 1.0) for p in params], np.float32)
        uniform = np.array([-1.0 if p.temperature == 0 or row in skipped else generators[row].random() for row, p in enumerate(params)], np.float64)
        tokens, logprobs = np.empty(rows, np.int64), np.empty(rows, np.float32)
        self._lib.crucible_draw(
            self._engine,
            _P(logits.data_ptr()),
            rows,
            vocabulary,
            *(_P(array.ctypes.data) for array in (inverse, uniform, tokens, logprobs)),
        )
        drawn, scores = tokens.tolist(), logprobs.tolist()
        if cut:
            theirs = draw(logits[cut], [params[row] for row in cut], [generators[row] for row in cut])
            for row, token, logprob in zip(cut, *theirs, strict=True):
                drawn[row], scores[row] = token, logprob
        return drawn, scores

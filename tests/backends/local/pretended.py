"""A second device with real numbers, on a machine without one: what mixes devices, or takes a processor for granted, raises here as it does on CUDA.

A tensor of the pretended device is a wrapper that says `device="meta"` and holds a tensor of the processor. Every operation runs on what is held, with the
same kernels, so that results can be compared with the processor's to the last bits. Refused as CUDA refuses it: plain tensors beside the device's in one
operation (numbers of no dimension are taken by pointwise operations, and indices by indexing), `.numpy()` without `.cpu()`, a generator of the other
device, kernels that are there for processors only, and a mask of attention in another dtype than its queries.

Not pretended: streams, asynchronous errors, backward passes on a thread of the device's own, memory, and CUDA's own kernels with their rounding, dtypes
and alignment. The device is called "meta" because autograd of a processor's build of torch has guards for no other; torch's own meta tensors cannot be
had meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from crucible_framework.backends.local import queue

__all__ = ["DEVICE", "MixedError", "Pretended", "pretended_device"]

DEVICE = "meta"
_aten = torch.ops.aten
_CROSSING = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_NUMBERS = (_aten.fill_.Tensor, _aten.masked_fill.Tensor, _aten.masked_fill_.Tensor)


class MixedError(RuntimeError):
    """Tensors of two devices in one operation."""


class Pretended(Tensor):
    """A tensor of the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        """Around a tensor of the processor, which it shares."""
        offset, device = held.storage_offset(), torch.device(DEVICE)
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=offset, dtype=held.dtype, device=device)
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override] # torch names what it passes on
        """See `Tensor`."""
        return f"Pretended({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """What goes past the dispatcher: memory, numpy and lists."""
        if func is Tensor.numpy or func is Tensor.__array__:
            raise TypeError("can't convert a tensor of the pretended device to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if func in (Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage) and isinstance(args[0], Pretended):
            return func(args[0].held)
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(kwargs or {})
            mask = given.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None and mask.dtype not in (torch.bool, args[0].dtype):
                raise RuntimeError("invalid dtype for bias - should match query's dtype")
        del types
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch's own annotation has no function
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operation that has a tensor of the device among its arguments, on any thread."""
        del types
        return _run(func, args, kwargs or {})


def _indices(index: Any) -> Any:
    """Lists and arrays of an index as the processor's tensors, which torch would make on the device past the dispatcher."""
    if isinstance(index, tuple):
        return tuple(_indices(one) for one in index)
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Makes tensors on the device where no argument is on it yet; for one thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if Pretended not in types and not (kwargs and kwargs.get("device") is not None):
            return func(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What the dispatcher does not see: `torch.tensor` makes tensors without numbers on a device of this name, and generators lose what they say."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        del types
        given = dict(kwargs or {})
        if func is torch.tensor and given.get("device") is not None:
            return func(*args, **{**given, "device": "cpu"}).to(given["device"])
        if (generator := given.get("generator")) is not None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            asked = given.get("device") or ("cpu" if first is None else first.device)
            if generator.device.type != torch.device(asked).type:
                raise RuntimeError(f"Expected a {asked!r} device type for generator but found {generator.device}")
        return func(*args, **given)


def _check(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises where CUDA would."""
    flat = tree_flatten((args, kwargs))[0]
    plain = [one for one in flat if isinstance(one, Tensor) and not isinstance(one, Pretended)]
    if func in _INDEXING:  # indices may be the processor's, where the indexed tensor is the device's
        if not isinstance(args[0], Pretended):
            raise MixedError(f"{func}: indices of the device into a tensor of the processor")
        plain = [one for one in args[2:3] if isinstance(one, Tensor) and not isinstance(one, Pretended)]
    free = _pointwise(func) or func in _NUMBERS or func in _INDEXING
    if func not in _CROSSING and any(one.ndim or not free for one in plain):
        raise MixedError(f"{func}: Expected all tensors to be on the same device, but found at least two devices, the pretended one and cpu!")
    if func.namespace not in ("aten", "prim", "prims") or "_for_cpu" in func.name():
        raise NotImplementedError(f"{func}: no kernel on the pretended device")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    flat, shape = tree_flatten((tuple(args), dict(kwargs)))
    among = any(isinstance(one, Pretended) for one in flat)
    asked = kwargs.get("device")
    there = torch.device(asked).type == DEVICE if asked is not None else among
    if any(isinstance(one, Tensor) and one.is_meta and not isinstance(one, Pretended) for one in flat):
        raise RuntimeError(f"{func}: a tensor of the device without numbers; the pretended device has not seen where it was made")
    if among:
        _check(func, args, kwargs)
    inner_args, inner_kwargs = tree_unflatten([one.held if isinstance(one, Pretended) else one for one in flat], shape)
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if func is _aten._to_copy.default and there != among:
        inner_kwargs.pop("non_blocking", None)
    with torch.no_grad():
        result = func(*inner_args, **inner_kwargs)
    return _given_back(func, args, kwargs, result, there=there)


@cache
def _written(func: Any) -> list[tuple[str, int]]:
    """Name and place of the arguments that an operation writes to."""
    given = enumerate(func._schema.arguments)
    return [(one.name, place) for place, one in given if one.alias_info is not None and one.alias_info.is_write]


@cache
def _pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags


def _given_back(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, *, there: bool) -> Any:
    """The results as tensors of the device; what was written to comes back as the same object."""
    written = [kwargs[name] if name in kwargs else args[place] for name, place in _written(func) if name in kwargs or place < len(args)]
    if written and func._schema.returns:
        return written[0] if len(written) == 1 else type(result)(written)

    def wrap(one: Any) -> Any:
        return Pretended(one.detach()) if there and isinstance(one, Tensor) and not isinstance(one, Pretended) else one

    return tree_map(wrap, result)


class _Generator(torch.Generator):
    """A generator that says it is the device's; its numbers are those of the processor's generator with the same seed, its state has another length."""

    said: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> Self:
        made = super().__new__(cls, "cpu")  # type: ignore[call-arg] # torch says otherwise
        made.said = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says that it is."""
        return self.said

    def get_state(self) -> Tensor:
        """On the device as long as no state of the processor is."""
        state = super().get_state()
        return state if self.said.type == "cpu" else torch.cat([state, state.new_zeros(8)])

    def set_state(self, new_state: Tensor) -> torch.Generator:
        """Takes a state of the same device."""
        own = self.get_state()
        if new_state.shape != own.shape:
            raise RuntimeError("RNG state is wrong size")
        return super().set_state(new_state[: super().get_state().numel()])


class _Executor(ThreadPoolExecutor):
    """Threads that can make tensors on the device while they work."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `ThreadPoolExecutor`."""

        def there() -> Any:
            with _Calls(), _Mode():  # type: ignore[no-untyped-call] # torch's own
                return fn(*args, **kwargs)

        return super().submit(there)


@contextmanager
def pretended_device() -> Iterator[str]:
    """The device's name; inside the block it can be had on this thread and on those of engines that are made there."""
    with pytest.MonkeyPatch.context() as patch, _Calls(), _Mode():  # type: ignore[no-untyped-call] # torch's own
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(queue, "ThreadPoolExecutor", _Executor)
        yield DEVICE

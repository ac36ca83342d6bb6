"""What a model takes and what this machine has: weights counted, memory asked for, the dtype that fits. It loads nothing."""

from __future__ import annotations

import json
import statistics
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import BackendError, CorruptError

__all__ = ["ITEM_BYTES", "allocation_cost", "available_bytes", "check_memory", "fast_bf16", "fitting_dtype", "gpu_bytes", "room_to_pack", "weights_in"]

ITEM_BYTES = {torch.float32: 4, torch.bfloat16: 2}
SMALL = 16_000_000
"""Weights below which a model gains nothing from a shorter dtype."""


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def gpu_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a GPU, also what torch holds there and does not use; None for other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_memory(name: str, need: int, device: torch.device | None = None) -> None:
    """Raises BackendError where a model's weights need more bytes than can be had: of the processor's memory, through which they go, and of the device's."""
    places = {"memory": available_bytes(), "the GPU's memory": None if device is None else gpu_bytes(device)}
    for place, have in places.items():
        if have is not None and need > have:
            raise BackendError(
                f"{name!r} needs {need / 2**30:.1f} GiB for its weights; {have / 2**30:.1f} GiB of {place} are free. "
                f"Choose a smaller model ('smollm2-135m' needs 0.3), dtype='bfloat16', or a machine with more memory."
            )


def weights_in(folder: Path) -> int:
    """How many numbers the folder's safetensors hold, from their headers.

    Raises:
        CorruptError: no safetensors, or a header that does not parse.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CorruptError(f"The model folder {str(folder)!r} holds no .safetensors file. Download the model again; pickled weights are never read.")
    count = 0
    for path in paths:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, path.stat().st_size)))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            count += sum(torch.Size(entry["shape"]).numel() for entry in tensors)
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"{str(path)!r} is no valid safetensors file: {error}. Download the model again.") from error
        if path.stat().st_size != 8 + length + end:
            raise CorruptError(f"{str(path)!r} has {path.stat().st_size} bytes; its header says {8 + length + end}. Download the model again.")
    return count


def fitting_dtype(weights: int, device: torch.device) -> torch.dtype:
    """The dtype for a model of so many weights where none is asked for."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if fast_bf16() and weights >= SMALL else torch.float32


def fast_bf16() -> bool:
    """Whether the processor has instructions for bfloat16."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def allocation_cost(size: int = 1 << 26, rounds: int = 5) -> float:
    """How many times longer filling new memory takes than filling memory that is held: what page faults cost large temporaries here."""
    held, fresh, again = torch.empty(size, dtype=torch.uint8), list[float](), list[float]()
    held.fill_(1)
    for _ in range(rounds):
        start = time.perf_counter()
        torch.empty(size, dtype=torch.uint8).fill_(1)
        middle = time.perf_counter()
        held.fill_(1)
        fresh.append(middle - start)
        again.append(time.perf_counter() - middle)
    return statistics.median(fresh) / statistics.median(again)


def room_to_pack(layers: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> bool:
    """Whether two more copies of all matrices take at most a quarter of the free memory."""
    have = available_bytes()
    need = 2 * ITEM_BYTES[dtype] * sum(out * into for out, into in layers.values())
    return have is not None and need <= have / 4

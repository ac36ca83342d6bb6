"""A service's checkpoints as files: the adapter in PEFT's layout, and the receipt that says which checkpoint it is.

A service keeps optimizers to itself, so a "state" that was downloaded is continued at the service from where it lies; the files here are the
adapter as it was, and are checked against their sums before that. This file does not know sessions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from ...errors import CorruptError, NotFoundError, ServiceError
from ...files import read_json, storage_errors, write_atomic, write_json
from ...records import Checkpoint, Json

__all__ = ["read_receipt", "write_files"]

CONFIG, ADAPTER, STATE = "adapter_config.json", "adapter_model.safetensors", "state.json"
RECEIPT, SUM = "tinker_path", "tensors_sha256"
OURS = "crucible"
"""The one key of the tensors' metadata: several would be written in any order."""


def _sum(data: Mapping[str, object], tensors: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name])
    return digest.hexdigest()


def write_files(checkpoint: Checkpoint, to: Path, get: Callable[[str], bytes]) -> int:
    """Writes what `get` gives for a file's name into the folder; returns the size in bytes.

    Raises:
        ServiceError: the files are no adapter.
        StoreError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    config, blob = get(CONFIG), get(ADAPTER)
    try:
        settings, tensors = json.loads(config), load(blob)
        rank = settings["r"]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ServiceError(f"The service's files of {checkpoint.uri!r} are no LoRA adapter: {error!r}. Download it again.") from error
    for name, values in tensors.items():
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other == name or other not in tensors or values.ndim != 2 or values.shape[".lora_B." in name] != rank:
            raise ServiceError(f"The service's files of {checkpoint.uri!r} hold {name!r} of shape {values.shape}, which is no half of a rank {rank!r} adapter.")
        if not np.isfinite(values.astype(np.float32)).all():
            raise ServiceError(f"The service's files of {checkpoint.uri!r} hold numbers in {name!r} that are not finite. Use an earlier checkpoint.")
    if rank != checkpoint.lora.rank:
        raise ServiceError(f"The service's files of {checkpoint.uri!r} have rank {rank!r}; the checkpoint says {checkpoint.lora.rank}. Download it again.")
    receipt = {RECEIPT: checkpoint.uri, "step": str(checkpoint.step)}
    total = _sum(receipt, {name: values.tobytes() for name, values in tensors.items()})
    written = {CONFIG: config, ADAPTER: save(tensors, metadata={OURS: json.dumps({**receipt, SUM: total}, sort_keys=True)})}
    for name, data in written.items():
        write_atomic(to / name, data)
    if checkpoint.kind == "state":
        write_json(to / STATE, {**receipt, "note": "the optimizer stays at the service"})
        written[STATE] = (to / STATE).read_bytes()
    return sum(map(len, written.values()))


def read_receipt(checkpoint: Checkpoint) -> str:
    """The `tinker://` path of a checkpoint, from its files where it has some, which are checked.

    Raises:
        NotFoundError: a file is missing, or the checkpoint lies at no service.
        CorruptError: the files changed after they were downloaded.
    """
    from safetensors import SafetensorError, safe_open

    folder = checkpoint.local_path
    if folder is None:
        if not checkpoint.uri.startswith("tinker://"):
            raise NotFoundError(f"Checkpoint {checkpoint.uri!r} lies at no Tinker service. Expected a tinker:// path, or files that this backend downloaded.")
        return checkpoint.uri
    names = (CONFIG, ADAPTER, STATE) if checkpoint.kind == "state" else (CONFIG, ADAPTER)
    for name in names:
        if not (folder / name).is_file():
            raise NotFoundError(f"There is no {name!r} in {str(folder)!r}. Expected a whole checkpoint: download it again.")
    try:
        with storage_errors(folder, "read"), safe_open(folder / ADAPTER, framework="numpy") as file:
            metadata = dict(json.loads((file.metadata() or {}).get(OURS, "{}")))
            tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError) as error:
        raise CorruptError(f"{str(folder / ADAPTER)!r} is no valid safetensors file: {error}. Download it again.") from error
    receipt = {key: str(metadata.get(key, "")) for key in (RECEIPT, "step")}
    if not receipt[RECEIPT]:
        raise NotFoundError(f"The files in {str(folder)!r} were not downloaded from a Tinker service, so none can continue them. Use the local backend.")
    if _sum(receipt, tensors) != metadata.get(SUM):
        raise CorruptError(f"{str(folder / ADAPTER)!r} changed after it was downloaded. Download it again.")
    state = cast("dict[str, Json]", read_json(folder / STATE)) if checkpoint.kind == "state" else receipt
    if {key: state.get(key) for key in receipt} != receipt or receipt["step"] != str(checkpoint.step):
        raise CorruptError(
            f"The files in {str(folder)!r} are of step {receipt['step']!r} of {receipt[RECEIPT]!r}; the checkpoint is another. Download it again."
        )
    return str(receipt[RECEIPT])

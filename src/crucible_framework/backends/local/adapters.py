"""Snapshots of adapters as files in PEFT's layout and back, with optimizer and generator state beside them.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT and vLLM load as they are, and of a "state" also
`optimizer.safetensors` and `state.json`. Only plain files are written here; publishing them safely is the store's business. This file
does not know sessions or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CapabilityError, CorruptError, NotFoundError
from ...files import read_json, storage_errors, verify, write_json
from ...records import Checkpoint, Json, LoraConfig, record
from .lora import Adapter, Layers, layer_names, tensor_shapes
from .optim import AdamState, first_not_finite

__all__ = ["Snapshot", "read_snapshot", "size_bytes", "write_snapshot"]

CONFIG, ADAPTER, OPTIMIZER, STATE = "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"
FIRST, SECOND = "exp_avg.", "exp_avg_sq."
_UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "trainable_token_indices")


@record
class Snapshot:
    """An adapter at one moment. Its tensors are never written to.

    Attributes:
        adapter: fp32 tensors by PEFT name.
        optimizer: None in a snapshot for sampling only.
        generator: the state of the generator that draws dropout masks, None likewise.
    """

    adapter: Mapping[str, Tensor]
    optimizer: AdamState | None = None
    generator: Tensor | None = None


def size_bytes(snapshot: Snapshot) -> int:
    """Memory of the snapshot's tensors."""
    tensors = list(snapshot.adapter.values())
    if snapshot.optimizer is not None:
        tensors += [*snapshot.optimizer.exp_avg.values(), *snapshot.optimizer.exp_avg_sq.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _targets(layers: Layers, names: tuple[str, ...]) -> list[Json]:
    """The shortest names that mean exactly these layers: last parts where they suffice, else whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    same = {name for name in layers if name.rpartition(".")[2] in ends} == set(names)
    return [*sorted(ends)] if same else [*names]


def _peft_config(lora: LoraConfig, source: str, targets: list[Json]) -> dict[str, Json]:
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    fixed: dict[str, Json] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    settings: dict[str, Json] = {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout, "target_modules": targets}
    return {**fixed, "base_model_name_or_path": source, **settings}


def write_snapshot(folder: Path, snapshot: Snapshot, checkpoint: Checkpoint, *, source: str, layers: Layers, head: str) -> int:
    """Writes the files into a folder; returns their size in bytes.

    Args:
        folder: made where it is missing.
        snapshot: what is written.
        checkpoint: whose snapshot it is.
        source: what PEFT finds the base model under: a hub id, folder or name.
        layers: all linear layers of the base.
        head: the output layer's name.

    Raises:
        StorageFullError, StoreError: the folder cannot be written.
    """
    lora, names = checkpoint.lora, [CONFIG, ADAPTER]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, _peft_config(lora, source, _targets(layers, layer_names(layers, lora, head))))
        save_file(_plain(snapshot.adapter), folder / ADAPTER, metadata={"format": "pt"})
        if snapshot.optimizer is not None and snapshot.generator is not None:
            names += [OPTIMIZER, STATE]
            state = snapshot.optimizer
            save_file(_plain(state.exp_avg, FIRST) | _plain(state.exp_avg_sq, SECOND), folder / OPTIMIZER, metadata={"format": "pt"})
            generator = snapshot.generator.numpy().tobytes().hex()
            write_json(folder / STATE, {"base_model": checkpoint.base_model, "step": state.step, "dropout_generator": generator})
        return sum((folder / name).stat().st_size for name in names)


def _plain(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_snapshot(checkpoint: Checkpoint, layers: Layers, head: str, device: torch.device, *, state: bool) -> Snapshot:
    """The snapshot in the folder `checkpoint.local_path`. Where it has a manifest, every file's sha256 is checked before anything is used.

    Args:
        checkpoint: with a local path.
        layers: all linear layers of the base.
        head: the output layer's name.
        device: of the tensors.
        state: whether optimizer and generator are wanted.

    Raises:
        NotFoundError: a file is missing.
        CorruptError: bytes, names, shapes or numbers are not those of this checkpoint.
        CapabilityError: an adapter from elsewhere with features that the engine lacks.
    """
    folder = checkpoint.local_path
    if folder is None or not folder.is_dir():
        raise NotFoundError(f"Checkpoint {checkpoint.name!r} has no folder {str(folder)!r}. Expected a downloaded one: download it again.")
    _check_sums(checkpoint, folder)
    _check_config(checkpoint, folder)
    shapes = tensor_shapes(layers, layer_names(layers, checkpoint.lora, head), checkpoint.lora.rank)
    adapter = _load(folder / ADAPTER, shapes, device)
    if not state:
        return Snapshot(adapter=adapter)
    moments = _load(folder / OPTIMIZER, {prefix + name: shape for prefix in (FIRST, SECOND) for name, shape in shapes.items()}, device)
    first, second = ({name: moments[prefix + name] for name in shapes} for prefix in (FIRST, SECOND))
    step, generator = _read_state(checkpoint, folder / STATE)
    return Snapshot(adapter=adapter, optimizer=AdamState(step=step, exp_avg=first, exp_avg_sq=second), generator=generator)


def _check_sums(checkpoint: Checkpoint, folder: Path) -> None:
    if (folder / "manifest.json").exists():
        found = verify(folder).sha256
        if checkpoint.sha256 and found != checkpoint.sha256:
            raise CorruptError(
                f"The manifest in {str(folder)!r} has sha256 {found[:12]}…; the checkpoint says {checkpoint.sha256[:12]}…. "
                "It is the folder of another one: look the checkpoint up again."
            )
    elif checkpoint.sha256:
        raise CorruptError(
            f"The checkpoint folder {str(folder)!r} has lost its manifest.json; expected one with sha256 {checkpoint.sha256[:12]}…. Use another."
        )


def _check_config(checkpoint: Checkpoint, folder: Path) -> None:
    """The adapter's own configuration must not contradict the checkpoint's."""
    path, lora = folder / CONFIG, checkpoint.lora
    config = read_json(path)
    if not isinstance(config, dict):
        raise CorruptError(f"{str(path)!r} holds no JSON object. Use an earlier checkpoint.")
    for key, wanted in (("r", lora.rank), ("lora_alpha", lora.alpha)):
        if config.get(key) != wanted:
            raise CorruptError(
                f"{str(path)!r} has {key} {config.get(key)!r}; the checkpoint {checkpoint.name!r} says {wanted!r}. Look the checkpoint up again."
            )
    if used := [key for key in _UNSUPPORTED if config.get(key)]:
        raise CapabilityError(f"The adapter in {str(folder)!r} uses {', '.join(used)}; expected plain LoRA. Merge it into its base model with PEFT first.")


def _load(path: Path, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> Adapter:
    if not path.is_file():
        raise NotFoundError(f"There is no {path.name!r} in {str(path.parent)!r}. Expected a whole checkpoint: download it again.")
    try:
        with storage_errors(path, "read"):
            tensors = load_file(path)
    except SafetensorError as error:
        raise CorruptError(f"{str(path)!r} is no valid safetensors file: {error}. Use an earlier checkpoint.") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        odd = min(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        message = f"{str(path)!r} has {odd!r} with shape {found.get(odd)}; its base model and configuration expect {shapes.get(odd)}. "
        raise CorruptError(message + "Use the checkpoint's own base model and LoRA settings.")
    if (bad := first_not_finite(tensors)) is not None:
        raise CorruptError(f"{str(path)!r} holds NaN or infinity in {bad!r}; expected finite numbers. Use an earlier checkpoint.")
    return {name: tensors[name].to(device, torch.float32) for name in shapes}


def _read_state(checkpoint: Checkpoint, path: Path) -> tuple[int, Tensor]:
    try:
        state = cast("dict[str, Json]", read_json(path))
        base, step, raw = str(state["base_model"]), int(cast("int", state["step"])), bytes.fromhex(str(state["dropout_generator"]))
        generator = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        torch.Generator().set_state(generator)  # raises where it is none
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptError(f"{str(path)!r} does not parse: {error!r}. Use an earlier checkpoint.") from error
    if (base, step) != (checkpoint.base_model, checkpoint.step):
        message = f"{str(path)!r} is of step {step} on {base!r}; the checkpoint {checkpoint.name!r} says step {checkpoint.step} on {checkpoint.base_model!r}. "
        raise CorruptError(message + "Look the checkpoint up again.")
    return step, generator

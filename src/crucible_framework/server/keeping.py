"""Weights between a backend and the shelf: saving, resuming with or without the optimizer, and a tokenizer's files.

This file does not know sessions or HTTP.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from ..data.byte_files import byte_tokenizer_files
from ..errors import BackendError
from ..files import publish, read_json, write_json
from ..protocols import Backend, TrainingSession
from ..records import Checkpoint, Json
from .shelf import Kind, Run, Shelf, Stored

__all__ = ["Keeper", "without_optimizer"]

OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"


def without_optimizer(stored: Stored, to: Path) -> Checkpoint:
    """A copy of a "weights" checkpoint in the folder `to` whose optimizer starts anew: moments zero, step 0."""
    from safetensors.numpy import load_file, save_file

    to.mkdir(parents=True, exist_ok=True)
    for path in stored.folder.iterdir():
        if path.is_file() and path.name not in (OPTIMIZER, STATE, MANIFEST):
            (to / path.name).write_bytes(path.read_bytes())
    moments = load_file(stored.folder / OPTIMIZER)
    save_file({name: values * 0 for name, values in moments.items()}, to / OPTIMIZER, metadata={"format": "pt"})
    state = cast("dict[str, Json]", read_json(stored.folder / STATE))
    write_json(to / STATE, state | {"step": 0})
    made = stored.checkpoint
    return Checkpoint(name=made.name, uri=made.uri, kind="state", step=0, base_model=made.base_model, lora=made.lora, local_path=to)


class Keeper:
    """Moves weights.

    Args:
        backend: whose weights they are.
        shelf: where they are kept.
    """

    def __init__(self, backend: Backend, shelf: Shelf) -> None:
        self._backend, self._shelf = backend, shelf
        self._lock = threading.Lock()

    def put(
        self, run: Run, kind: Kind, name: str, made: Checkpoint, *, ttl_s: float | None, user_metadata: Mapping[str, str] | None, overwrite: bool = False
    ) -> Stored:
        """Writes a checkpoint that the backend holds onto the shelf.

        Raises:
            DataError: the name is taken or cannot be used.
            StoreError: the disk.
        """
        with self._lock:
            self._shelf.put_run(run)
            return self._shelf.put(
                run, kind, name, lambda folder: self._backend.download(made, folder), model=made.base_model, step=made.step,
                ttl_s=ttl_s, user_metadata=user_metadata, overwrite=overwrite,
            )  # fmt: skip

    def resume(self, stored: Stored, model: str, *, optimizer: bool) -> TrainingSession:
        """A session that starts from a checkpoint.

        Raises:
            BackendError: it holds no state to train on from, or is of another base model.
            CorruptError: its files changed.
        """
        if stored.kind != "weights":
            raise BackendError(f"{stored.path!r} holds weights for sampling only; expected …/weights/…, which save_state makes.")
        if stored.model != model:
            raise BackendError(f"{stored.path!r} is an adapter of {stored.model!r}; it cannot be loaded into a model on {model!r}.")
        if optimizer:
            return self._backend.resume(stored.checkpoint)
        with tempfile.TemporaryDirectory(prefix="crucible-serve-") as folder:
            return self._backend.resume(without_optimizer(stored, Path(folder)))

    def tokenizer_folder(self, model: str, root: Path) -> str | None:
        """A folder that transformers loads the model's tokenizer from, or None where there is none.

        Raises:
            UnknownNameError, ConfigError, ServiceError: the backend does not know the model.
        """
        tokenizer = self._backend.tokenizer(model)
        folder = getattr(tokenizer, "folder", None)
        if isinstance(folder, Path):
            return str(folder.resolve())
        if tokenizer.name != "bytes":
            return None
        with self._lock:
            ours = root.resolve() / "tokenizers" / "bytes"
            if not ours.is_dir():
                publish(ours, byte_tokenizer_files)
        return str(ours)

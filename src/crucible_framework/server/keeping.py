"""Weights between a backend and the shelf: saving, resuming with or without the optimizer, and a tokenizer's files.

This file does not know sessions or HTTP.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from ..config import to_dict
from ..data.byte_files import byte_tokenizer_files
from ..errors import BackendError
from ..files import discard, publish, read_json, write_json
from ..protocols import Backend, Sampler, TrainingSession
from ..records import Checkpoint, Json
from .journal import Snapshot
from .ledger import Answer
from .shelf import Kind, Run, Shelf, Stored

if TYPE_CHECKING:
    from .turns import Model

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


@runtime_checkable
class Forgets(Protocol):
    """A backend that keeps checkpoints in memory until it is told that it need not."""

    def forget(self, checkpoint: Checkpoint) -> None:
        """Frees what memory holds of a checkpoint; one that is not there is no error."""
        ...


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
        self, run: Run, kind: Kind, name: str, made: Checkpoint, *, ttl_s: float | None, user_metadata: Mapping[str, str] | None,
        overwrite: bool = False, request: str = "",
    ) -> Stored:  # fmt: skip
        """Writes a checkpoint that the backend holds onto the shelf.

        Raises:
            DataError: the name is taken or cannot be used.
            StoreError: the disk.
        """
        with self._lock, self._forgotten(made):
            self._shelf.put_run(run)
            return self._shelf.put(
                run, kind, name, lambda folder: self._backend.download(made, folder), model=made.base_model, step=made.step,
                ttl_s=ttl_s, user_metadata=user_metadata, overwrite=overwrite, request=request,
            )  # fmt: skip

    @contextmanager
    def _forgotten(self, made: Checkpoint) -> Iterator[None]:
        """After the block the backend need not hold the checkpoint in memory: it lies on disk, or nobody will ask for it."""
        try:
            yield
        finally:
            if isinstance(self._backend, Forgets):
                self._backend.forget(made)

    async def keep_state(self, model: Model, seq: int, answer: Answer, made: Checkpoint) -> None:
        """Publishes a live model's state with the answer of the request after which it is.

        Raises:
            StorageFullError, StoreError: the disk.
        """

        def write() -> None:
            if model.journal is not None:
                with self._forgotten(made):
                    meta: dict[str, Json] = {"run": to_dict(model.run), "step": made.step, "model": made.base_model}
                    model.journal.snapshot(seq, answer, lambda folder: self._backend.download(made, folder), meta)

        await asyncio.to_thread(write)

    def resume_snapshot(self, model: Model, snapshot: Snapshot) -> TrainingSession:
        """A session that goes on from a live model's state; raises as the backend's `resume`."""
        step, base = cast("int", snapshot.meta["step"]), str(snapshot.meta["model"])
        run = model.run
        state = Checkpoint(name="live", uri=f"live://{run.id}", kind="state", step=step, base_model=base, lora=run.lora, local_path=snapshot.folder)
        return self._backend.resume(state)

    def keep_sampler(self, folder: Path, number: int, made: Checkpoint, run: Run) -> Sampler:
        """A sampler whose weights lie in a session's folder.

        Raises:
            StorageFullError, StoreError: the disk.
        """
        target = folder / f"sampler-{number}"
        with self._forgotten(made):
            if target.exists():
                discard(target)
            meta: dict[str, Json] = {
                "lora": to_dict(made.lora),
                "model": made.base_model,
                "base_model": run.base_model,
                "uri": made.uri,
                "step": made.step,
            }
            publish(target, lambda temporary: self._backend.download(made, temporary), meta)
        return self._backend.sampler(replace(made, local_path=target, sha256=""))

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

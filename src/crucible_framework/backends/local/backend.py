"""The local backend: base models loaded once, one engine thread, snapshots in memory.

This file does not know how anything is computed.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, ParamSpec, Self, TypeVar

import torch

from ... import events
from ...config import places
from ...errors import BackendError, CapabilityError, ConfigError, NotFoundError
from ...protocols import Tokenizer
from ...records import Capabilities, Checkpoint, LoraConfig
from .adapters import Snapshot, read_snapshot, size_bytes, write_snapshot
from .bases import Base, canonical, load_base, load_tokenizer
from .looking import Seen, look
from .lora import Active, init_adapter, layer_names, tensor_shapes
from .optim import fresh
from .queue import Mix, Queue
from .sampling import Answer, Ask, Frozen, LocalSampler, Sampling
from .session import LocalSession

__all__ = ["LocalBackend"]

T = TypeVar("T")
P = ParamSpec("P")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]} Expected 'auto', 'cpu' or 'cuda'.") from error
    return device


class LocalBackend:
    """Trains and samples with PyTorch in this process; see `Backend`.

    Requests of sessions run on one thread in the order of their submission; samples are drawn between them, token by token, those of one
    base model together. Base weights are loaded once per model and shared; they never change. On a CPU the same requests of sessions give
    the same bits, for the same number of threads; samples may differ by rounding where others share their batch.

    Args:
        dtype: of the base weights; "auto" is bfloat16 on a GPU and on a processor with instructions for it, float32 elsewhere and for models of
            less than 16 million weights. Adapters are float32 always. "int8" is for evaluation only: matrices are rounded to int8 with one scale
            per output, so what is sampled is not quite what was trained; it needs a processor and a C++ compiler, and cannot train.
        device: "auto" takes a GPU where there is one.
        threads: that torch may use inside one operation; None: one per core, or as OMP_NUM_THREADS says. It applies to the process.
        cache: where `smollm2-135m` is kept; None: the user's cache folder.
        engine: "fast" runs the Llama, Qwen2 and Qwen3 families through a decoder of our own, with kernels that are compiled at first use where
            there is a C++ compiler; "torch" leaves these out; "plain" runs all through transformers' modules. Their numbers agree to rounding.
        activations_bytes: what a training pass may keep beside the weights; batches go through the model in passes that fit, and a sequence that does
            not fit alone keeps little and computes the rest again. None: passes of 2,048 tokens, and 4,096 tokens before
            anything is computed again.
        share_passes: whether batches of at most 100 tokens of several sessions that wait together are trained in one pass: faster, and equal to
            rounding only, so that two runs need not give the same bits.

    Raises:
        ConfigError: an option is out of range, or there is no such device.
    """

    def __init__(
        self,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto",
        device: str = "auto",
        threads: int | None = None,
        cache: str | Path | None = None,
        engine: Literal["fast", "torch", "plain"] = "fast",
        activations_bytes: int | None = None,
        share_passes: bool = False,
    ) -> None:
        if dtype not in ("auto", "float32", "bfloat16", "int8"):
            raise ConfigError(f"dtype is {dtype!r}; expected 'auto', 'float32', 'bfloat16' or 'int8'.")
        if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
            raise ConfigError(f"threads is {threads!r}; expected a whole number of at least 1, or None.")
        if engine not in ("fast", "torch", "plain"):
            raise ConfigError(f"engine is {engine!r}; expected 'fast', 'torch' or 'plain'.")
        if activations_bytes is not None and (not isinstance(activations_bytes, int) or isinstance(activations_bytes, bool) or activations_bytes < 1):
            raise ConfigError(f"activations_bytes is {activations_bytes!r}; expected a whole number of bytes, or None.")
        self._engine: Literal["fast", "torch", "plain"] = engine
        self._activations_bytes, self._share_passes = activations_bytes, share_passes
        self._device = _device(device)
        self._dtype = None if dtype == "auto" else torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
        self._cache = Path(cache) if cache is not None else places().cache
        threads = threads or torch.get_num_threads()
        self._queue: Queue[Ask, Answer] = Queue(Sampling(threads, int8=dtype == "int8"), threads)
        self._trains = dtype != "int8"
        self._loading, self._lock = threading.Lock(), threading.Lock()
        self._bases: dict[str, Base] = {}
        self._plain: dict[str, Future[Frozen]] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._saved: dict[str, Snapshot] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()

    @property
    def capabilities(self) -> Capabilities:
        """All of it."""
        return Capabilities(name="local", gradients="parameters")

    # -------------------------------------------------------------------------------------------------------- contract
    def train(self, base_model: str, lora: LoraConfig) -> LocalSession:
        """A new adapter, initialised from `lora.seed` as PEFT does.

        Raises:
            CapabilityError: the backend's dtype is "int8".
            UnknownNameError: no such base model, or a target module that no layer has.
            ConfigError, ServiceError, AuthError, CorruptError: the base model cannot be loaded; the message says why.
        """
        base = self._base(base_model)
        adapter = init_adapter(tensor_shapes(base.layers, layer_names(base.layers, lora, base.head), lora.rank), lora.seed, self._device)
        masks = torch.Generator().manual_seed(lora.seed + 2**32)  # other numbers than those the adapter was drawn from
        start = Snapshot(adapter=adapter, optimizer=fresh(adapter), generator=masks.get_state())
        return self._session(base, base_model, lora, start)

    def resume(self, checkpoint: Checkpoint) -> LocalSession:
        """Continues bit-exactly, from the folder `local_path` where there is one, else from memory.

        Raises:
            BackendError: the checkpoint is of kind "sampler".
            NotFoundError: its files are not there.
            CorruptError: they are damaged, or not those of this checkpoint.
        """
        if checkpoint.kind != "state":
            raise BackendError(f"Checkpoint {checkpoint.name!r} is of kind {checkpoint.kind!r}, without an optimizer; expected 'state'. Save it so.")
        base = self._base(checkpoint.base_model)
        return self._session(base, checkpoint.base_model, checkpoint.lora, self._snapshot(checkpoint, base, state=True))

    def sampler(self, model: str | Checkpoint) -> LocalSampler:
        """Samples the base model of that name, or a checkpoint's adapter.

        Raises:
            UnknownNameError, NotFoundError, CorruptError, …: as `train` and `resume`.
        """
        base = self._base(model if isinstance(model, str) else model.base_model)
        if isinstance(model, str):
            with self._lock:
                frozen = self._plain.setdefault(base.name, _resolved(Frozen(base)))
            return LocalSampler(self._queue, model, frozen)
        snapshot = self._snapshot(model, base, state=False)
        return LocalSampler(self._queue, model.uri, _resolved(Frozen(base, Active(snapshot.adapter, model.lora.alpha / model.lora.rank))))

    def tokenizer(self, base_model: str) -> Tokenizer:
        """The base model's tokenizer; the weights are not loaded for it.

        Raises:
            UnknownNameError, ConfigError, ServiceError: as `train`.
        """
        self._queue.check_open()
        name = canonical(base_model)
        with self._loading:
            if name not in self._tokenizers:
                base = self._bases.get(name)
                self._tokenizers[name] = base.tokenizer if base is not None else load_tokenizer(name, cache=self._cache)
            return self._tokenizers[name]

    def download(self, checkpoint: Checkpoint, to: Path) -> Checkpoint:
        """Writes adapter_config.json and adapter_model.safetensors, and of a "state" optimizer.safetensors and state.json, into `to`.

        Raises:
            NotFoundError: the checkpoint is neither in memory nor at its `local_path`.
            StorageFullError, StoreError: the folder cannot be written.
        """
        base = self._base(checkpoint.base_model)
        snapshot = self._snapshot(checkpoint, base, state=checkpoint.kind == "state")
        size = write_snapshot(to, snapshot, checkpoint, source=base.source, layers=base.layers, head=base.head)
        return replace(checkpoint, local_path=to, size_bytes=size, sha256="")

    def close(self) -> None:
        """Finishes what was submitted; later requests raise SessionClosedError. A second call does nothing."""
        self._queue.close()
        self._saved.clear()
        self._bases.clear()
        self._plain.clear()

    # --------------------------------------------------------------------------------------------- for sessions (Engine)
    def submit(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs a request on the engine's thread, after all before it."""
        return self._queue.submit(fn, *args, **kwargs)

    def submit_for(self, session: LocalSession, fn: Callable[[], T], mix: Mix[T] | None = None) -> Future[T]:
        """Runs a session's request on the engine's thread, after those before it."""
        return self._queue.submit_for(session, fn, mix if self._share_passes else None)

    def keep(self, checkpoint: Checkpoint, snapshot: Snapshot) -> Checkpoint:
        """Keeps a snapshot in memory until the backend is closed; a URI that is taken gets a number."""
        with self._lock:
            uri, number = checkpoint.uri, 1
            while uri in self._saved:
                number += 1
                uri = f"{checkpoint.uri}~{number}"
            self._saved[uri] = snapshot
        size = size_bytes(snapshot)
        events.emit("checkpoint.saved", checkpoint=checkpoint.name, step=checkpoint.step, kind=checkpoint.kind, size_bytes=size)
        return replace(checkpoint, uri=uri, size_bytes=size, created_at=time.time())

    def forget(self, checkpoint: Checkpoint) -> None:
        """Frees what memory holds of a checkpoint that was downloaded, or that nobody needs."""
        with self._lock:
            self._saved.pop(checkpoint.uri, None)

    def look(self, sampler: LocalSampler, rows: Sequence[Sequence[int]], seen: Seen) -> Future[None]:
        """Shows `seen` the logits of a sampler's model after each token of each row: (row, first position, fp32 [t, V]).

        Raises:
            DataError (from the future): a row does not fit the model.
        """
        return self._queue.submit(lambda: look(sampler._frozen.result(), rows, seen))

    def sampler_of(self, model: str, frozen: Future[Frozen]) -> LocalSampler:
        """A sampler of weights that an earlier request gives."""
        return LocalSampler(self._queue, model, frozen)

    # --------------------------------------------------------------------------------------------------------- private
    def _base(self, base_model: str) -> Base:
        self._queue.check_open()
        name = canonical(base_model)
        with self._loading:
            if name not in self._bases:
                self._bases[name] = load_base(
                    name,
                    cache=self._cache,
                    dtype=self._dtype,
                    device=self._device,
                    engine=self._engine,
                    activations_bytes=self._activations_bytes,
                )
            return self._bases[name]

    def _session(self, base: Base, base_model: str, lora: LoraConfig, start: Snapshot) -> LocalSession:
        if not self._trains:
            raise CapabilityError("A backend with dtype='int8' samples only; expected 'auto', 'bfloat16' or 'float32' for training. Connect a second one.")
        return LocalSession(self, base, lora, start, name=uuid.uuid4().hex[:12], base_model=base_model)

    def _snapshot(self, checkpoint: Checkpoint, base: Base, *, state: bool) -> Snapshot:
        if checkpoint.local_path is not None:
            return read_snapshot(checkpoint, base.layers, base.head, self._device, state=state)
        snapshot = self._saved.get(checkpoint.uri)
        if snapshot is None:
            raise NotFoundError(
                f"Checkpoint {checkpoint.uri!r} is not in this backend's memory and has no local_path. Pass one that was published in a run folder."
            )
        return snapshot


def _resolved(value: Frozen) -> Future[Frozen]:
    future: Future[Frozen] = Future()
    future.set_result(value)
    return future

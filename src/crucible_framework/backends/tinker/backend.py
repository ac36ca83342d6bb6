"""Any Tinker service behind the `Backend` contract, through the official `tinker` SDK 0.38.

What the service computes itself goes in one pass; every other loss takes two: log-probs come back, the loss is computed here, and its
gradient goes out as weights of a cross-entropy, which gives the same gradient. Requests are submitted ahead, in order. What a service cannot
honour raises `CapabilityError` before anything is sent. The key comes from the environment through the SDK and is never kept here.

A pass that fails here (a loss that is not finite, data that do not fit) never reaches the service; the gradient that was sent before it is
taken back by its negative. This file does not know HTTP beyond fetching a checkpoint's files.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import urlsplit

from ...config import places
from ...data.tokens import HuggingFaceTokenizer
from ...errors import AuthError, BackendError, ConfigError, NotFoundError, ServiceError, SessionClosedError
from ...protocols import Tokenizer
from ...records import Capabilities, Checkpoint, LoraConfig
from .files import read_receipt, write_files
from .line import Pending
from .sampler import TinkerSampler
from .session import TinkerSession
from .wire import explain, train_parts

if TYPE_CHECKING:
    import tinker
    from tinker import types

__all__ = ["TinkerBackend"]

T = TypeVar("T")
OPEN_KEY = "tml-local"
"""What is sent to a server on this machine when the environment names no key; such a server asks for any."""
EXPORT_S = 3600


class TinkerBackend:
    """Trains and samples at a Tinker service; see `Backend`.

    Counts what was sent in `trained_tokens` and `sampled_tokens`.

    Args:
        base_url: of the service; None: what `TINKER_BASE_URL` says, else the hosted one.
        tokenizers: a tokenizer folder per base model, where the model's own cannot be found by its name.

    Raises:
        ConfigError: the `tinker` SDK is not installed.
        AuthError: there is no key in the environment, and the service is not on this machine.
    """

    capabilities = Capabilities(name="tinker", gradients="logprobs", alpha=False, dropout=False, target_modules=False)

    def __init__(self, *, base_url: str | None = None, tokenizers: Mapping[str, str] | None = None) -> None:
        try:
            import tinker
        except ImportError as error:
            raise ConfigError("The backend 'tinker' needs the tinker SDK. Install crucible-framework[tinker].") from error
        from tinker import auth

        near = base_url is not None and urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
        if not near and not auth.tinker_has_credentials():
            raise AuthError("There is no key for the Tinker service. Set TINKER_API_KEY, or give base_url of a server on this machine.")
        key = None if auth.tinker_has_credentials() else OPEN_KEY
        self._base_url, self._key = base_url, key
        self._service: tinker.ServiceClient = tinker.ServiceClient(base_url=base_url, api_key=key)
        self._folders, self._tokenizers, self._lock = dict(tokenizers or {}), dict[str, Tokenizer](), threading.Lock()
        self._sessions: list[TinkerSession] = []
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="crucible-tinker")
        self.pending: Pending = set()
        self.trained_tokens = self.sampled_tokens = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()

    def check_open(self) -> None:
        """Raises SessionClosedError where the backend is closed."""
        if self._closed:
            raise SessionClosedError("The Tinker backend is closed. Open another with connect('tinker').")

    def _call(self, doing: str, ask: Callable[[], T]) -> T:
        self.check_open()
        try:
            return ask()
        except Exception as error:
            ours = explain(error, doing)
            if ours is error:
                raise
            raise ours from error

    def _session(self, client: tinker.TrainingClient, base_model: str, lora: LoraConfig, step: int) -> TinkerSession:
        info: types.GetInfoResponse = client.get_info()
        folder = info.model_data.tokenizer_id
        if folder and Path(folder).is_dir():
            self._folders.setdefault(base_model, folder)
        session = TinkerSession(self, client, base_model, lora, step)
        self._sessions.append(session)
        return session

    # -------------------------------------------------------------------------------------------------------- contract
    def train(self, base_model: str, lora: LoraConfig) -> TinkerSession:
        """A new adapter. With `target_modules` at its default every layer that the service can adapt is adapted.

        Raises:
            CapabilityError: alpha, dropout or target modules that a service does not honour; nothing was sent.
            CrucibleError: the service has no such model, refuses the key or cannot be reached.
        """
        parts = train_parts(lora)
        doing = f"the base model {base_model!r}"
        attn, mlp, unembed = (parts[f"train_{part}"] for part in ("attn", "mlp", "unembed"))
        client = self._call(
            doing,
            lambda: self._service.create_lora_training_client(
                base_model, rank=lora.rank, seed=lora.seed, train_attn=attn, train_mlp=mlp, train_unembed=unembed
            ).result(),
        )
        return self._session(client, base_model, lora, 0)

    def resume(self, checkpoint: Checkpoint) -> TinkerSession:
        """Continues a "state" with its optimizer, from where it lies at the service.

        Raises:
            BackendError: it is of kind "sampler".
            NotFoundError: the service has no such checkpoint, or a file of it is missing here.
            CorruptError: the files that were downloaded changed.
        """
        self.check_open()
        if checkpoint.kind != "state":
            raise BackendError(f"Checkpoint {checkpoint.name!r} is of kind {checkpoint.kind!r}, without an optimizer; expected 'state'. Save it so.")
        path = read_receipt(checkpoint)
        client = self._call(f"the checkpoint {path!r}", lambda: self._service.create_training_client_from_state_with_optimizer(path).result())
        return self._session(client, checkpoint.base_model, checkpoint.lora, checkpoint.step)

    def sampler(self, model: str | Checkpoint) -> TinkerSampler:
        """Samples a base model, or a checkpoint's adapter; a "state" is loaded into a model first.

        Raises:
            NotFoundError, CorruptError: as `resume`.
        """
        self.check_open()
        if isinstance(model, str):
            ready = self._call(f"the base model {model!r}", lambda: self._service.create_sampling_client(base_model=model).result())
            return TinkerSampler(self, model, model, _resolved(ready))
        path = read_receipt(model)
        if model.kind == "state":
            client = self._call(f"the checkpoint {path!r}", lambda: self._service.create_training_client_from_state(path).result())
            ready = self._call(f"the checkpoint {path!r}", lambda: client.save_weights_and_get_sampling_client().result())
        else:
            ready = self._call(f"the checkpoint {path!r}", lambda: self._service.create_sampling_client(model_path=path).result())
        return TinkerSampler(self, model.uri, model.base_model, _resolved(ready))

    def tokenizer(self, base_model: str) -> Tokenizer:
        """The base model's tokenizer: from the folder that was given for it or that a server on this machine named, else by the model's name.

        Raises:
            UnknownNameError, ConfigError, ServiceError: it cannot be found.
        """
        with self._lock:
            if base_model not in self._tokenizers:
                folder = self._folders.get(base_model)
                if folder is not None:
                    self._tokenizers[base_model] = HuggingFaceTokenizer(Path(folder), base_model)
                else:
                    from ..local.bases import canonical, load_tokenizer

                    self._tokenizers[base_model] = load_tokenizer(canonical(base_model), cache=places().cache)
            return self._tokenizers[base_model]

    def vocab_size(self, base_model: str) -> int:
        """Tokens that the base model's tokenizer knows."""
        return self.tokenizer(base_model).vocab_size

    def download(self, checkpoint: Checkpoint, to: Path) -> Checkpoint:
        """Writes adapter_config.json and adapter_model.safetensors into `to`, and of a "state" state.json, which says where its optimizer is.

        A service gives the files of a "state" through a short-lived model and export, which are removed again.

        Raises:
            NotFoundError: the service has no such checkpoint; a "sampler" must have been saved by this backend.
            ServiceError: its files are no adapter, or cannot be fetched.
            StorageFullError, StoreError: the folder cannot be written.
        """
        path = read_receipt(replace(checkpoint, local_path=None))
        doing = f"the files of {path!r}"
        if checkpoint.kind == "sampler":
            urls = self._call(doing, lambda: self._urls(path.replace("/sampler_weights/", "/external_weights/")))
            return self._written(checkpoint, to, urls)
        client = self._call(doing, lambda: self._service.create_training_client_from_state(path).result())
        exported = self._call(doing, lambda: client.save_weights_external(f"export-{uuid.uuid4().hex[:12]}", ttl_seconds=EXPORT_S).result().path)
        try:
            return self._written(checkpoint, to, self._call(doing, lambda: self._urls(exported)))
        finally:
            self._call(doing, lambda: self._rest().delete_checkpoint_from_tinker_path(exported).result())

    def _rest(self) -> tinker.RestClient:
        import tinker

        return tinker.RestClient(base_url=self._base_url, api_key=self._key)

    def _urls(self, path: str) -> Mapping[str, str]:
        return self._rest().get_external_weights_urls(path).result().urls

    def _written(self, checkpoint: Checkpoint, to: Path, urls: Mapping[str, str]) -> Checkpoint:
        def get(name: str) -> bytes:
            import httpx

            url = urls.get(name)
            if url is None or not url.startswith(("https://", "http://")):
                raise NotFoundError(f"The service gives no {name!r} of {checkpoint.uri!r}; it gives {', '.join(sorted(urls)) or 'nothing'}.")
            try:
                response = httpx.get(url, timeout=120, follow_redirects=True)
                response.raise_for_status()
            except httpx.HTTPError as error:
                raise ServiceError(f"{name!r} of {checkpoint.uri!r} cannot be fetched: {type(error).__name__}. Try again.", retryable=True) from error
            return response.content

        return replace(checkpoint, local_path=to, size_bytes=write_files(checkpoint, to, get), sha256="")

    def close(self) -> None:
        """Finishes what was submitted; later requests raise SessionClosedError. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for session in self._sessions:
            session.finish()
        wait(list(self.pending))
        self.pool.shutdown(wait=True)
        self._service.close("success").result()


def _resolved(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future

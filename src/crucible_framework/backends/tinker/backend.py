"""Any Tinker service behind the `Backend` contract, through the official `tinker` SDK 0.38.

What the service computes itself goes in one pass; every other loss takes two: log-probs come back, the loss is computed here, and its
gradient goes out as weights of a cross-entropy, which gives the same gradient. Requests are submitted ahead, in order. What a service cannot
honour raises `CapabilityError` before anything is sent. The key comes from the environment through the SDK and is never kept here.

A pass that fails here (a loss that is not finite, data that do not fit) never reaches the service; the gradient that was sent before it is
taken back by its negative. This file does not know HTTP beyond fetching a checkpoint's files.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import urlsplit

from ... import events
from ...clock import system_clock
from ...config import places
from ...data.tokens import HuggingFaceTokenizer
from ...errors import AuthError, BackendError, ConfigError, NotFoundError, ServiceError, SessionClosedError
from ...protocols import Clock, Tokenizer, TrainingSession
from ...records import Capabilities, Checkpoint, LoraConfig
from .files import read_receipt, write_files
from .line import Pending
from .recovery import RecoveringSession, Recovery
from .sampler import TinkerSampler
from .session import TinkerSession
from .spending import Prices, Spending
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

    `spending` counts the tokens that were sent and drawn, and what they cost at the prices given; a session's own count only its.

    Args:
        base_url: of the service; None: what `TINKER_BASE_URL` says, else the hosted one.
        tokenizers: a tokenizer folder per base model, where the model's own cannot be found by its name.
        recovery: makes a run that the service lost or corrupted again; None: its requests fail.
        prices: of the service, for `spending.cost_usd`.
        ttl_s: how long the service keeps checkpoints that are saved; None: for ever.
        clock: waits between attempts to make a run again.

    Raises:
        ConfigError: the `tinker` SDK is not installed.
        AuthError: there is no key in the environment, and the service is not on this machine.
    """

    capabilities = Capabilities(name="tinker", gradients="logprobs", alpha=False, dropout=False, target_modules=False)

    def __init__(
        self, *, base_url: str | None = None, tokenizers: Mapping[str, str] | None = None, recovery: Recovery | None = None,
        prices: Prices | None = None, ttl_s: int | None = None, clock: Clock = system_clock,
    ) -> None:  # fmt: skip
        if ttl_s is not None and (not isinstance(ttl_s, int) or isinstance(ttl_s, bool) or ttl_s < 1):
            raise ConfigError(f"ttl_s is {ttl_s!r}; expected a whole number of seconds of at least 1, or None.")
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
        self.spending, self.ttl_s = Spending(prices), ttl_s
        self._recovery, self._prices, self._clock = recovery, prices, clock
        self._services = [self._service]
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

    @property
    def trained_tokens(self) -> int:
        """Tokens of all passes."""
        return self.spending.trained_tokens

    @property
    def sampled_tokens(self) -> int:
        """Tokens that were drawn."""
        return self.spending.sampled_tokens

    def _session(self, client: tinker.TrainingClient, base_model: str, lora: LoraConfig, step: int) -> TinkerSession:
        info: types.GetInfoResponse = client.get_info()
        folder = info.model_data.tokenizer_id
        if folder and Path(folder).is_dir():
            self._folders.setdefault(base_model, folder)
        session = TinkerSession(self, client, base_model, lora, step, Spending(self._prices, self.spending))
        self._sessions.append(session)
        return session

    # -------------------------------------------------------------------------------------------------------- contract
    def train(self, base_model: str, lora: LoraConfig) -> TrainingSession:
        """A new adapter. With `target_modules` at its default every layer that the service can adapt is adapted.

        Raises:
            CapabilityError: alpha, dropout or target modules that a service does not honour; nothing was sent.
            CrucibleError: the service has no such model, refuses the key or cannot be reached.
        """
        train_parts(lora)
        return self._recovering(lambda: self._train(base_model, lora), self._train(base_model, lora))

    def _train(self, base_model: str, lora: LoraConfig) -> TinkerSession:
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

    def _recovering(self, anew: Callable[[], TinkerSession], session: TinkerSession) -> TrainingSession:
        """The session, made again by itself where that was asked."""
        if self._recovery is None:
            return session
        now = [session]

        def restart(checkpoint: Checkpoint | None) -> TrainingSession:
            def make() -> TinkerSession:
                return anew() if checkpoint is None else self._resume(checkpoint)

            try:
                now[0] = make()
            except SessionClosedError as error:
                if error.__cause__ is None:
                    raise
                self._renew()  # the client's session at the service is gone, too
                now[0] = make()
            return now[0]

        return RecoveringSession(restart, session, self._recovery, lost=lambda error: self._lost(error, now[0]), clock=self._clock)

    def _renew(self) -> None:
        import tinker

        self._service = tinker.ServiceClient(base_url=self._base_url, api_key=self._key)
        self._services.append(self._service)

    def _lost(self, error: BaseException, session: TinkerSession) -> bool:
        """Whether a session's run is gone: the service says so, cannot be reached, or calls the run corrupted."""
        if isinstance(error, SessionClosedError):
            return error.__cause__ is not None
        if isinstance(error, ServiceError):
            return error.retryable or self._corrupted(session.run)
        return type(error) is BackendError and self._corrupted(session.run)

    def _corrupted(self, run: str) -> bool:
        try:
            return bool(self._rest().get_training_run(run).result().corrupted)
        except Exception as error:  # an unknown state is no reason to begin again
            events.emit("recovery.poll_error", error=type(error).__name__)
            return False

    def resume(self, checkpoint: Checkpoint) -> TrainingSession:
        """Continues a "state" with its optimizer, from where it lies at the service.

        Raises:
            BackendError: it is of kind "sampler".
            NotFoundError: the service has no such checkpoint, or a file of it is missing here.
            CorruptError: the files that were downloaded changed.
        """
        return self._recovering(lambda: self._resume(checkpoint), self._resume(checkpoint))

    def _resume(self, checkpoint: Checkpoint) -> TinkerSession:
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
        import tinker

        if self._closed:
            return
        self._closed = True
        for session in self._sessions:
            session.finish()
        wait(list(self.pending))
        self.pool.shutdown(wait=True)
        for service in self._services:
            with contextlib.suppress(tinker.TinkerError):  # a session that the service ended cannot be finished
                service.close("success").result()


def _resolved(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future

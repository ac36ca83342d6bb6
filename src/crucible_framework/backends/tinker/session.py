"""An adapter that a service trains. This file does not know how the service is reached."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ... import events
from ...errors import BackendError, CapabilityError, ConfigError, NumericError, SessionClosedError
from ...protocols import GradientHook, Loss
from ...records import AdamConfig, Batch, Checkpoint, LoraConfig, OptimOutput, StepOutput
from .line import Line
from .sampler import SamplerOwner, TinkerSampler
from .spending import Spending
from .watching import watch
from .wire import adam_params, explain, native_form, wire_datum

if TYPE_CHECKING:
    import tinker
    from tinker import types
    from torch import Tensor

__all__ = ["TinkerSession"]

Weights = tuple[NDArray[np.float32], ...]


class _Saved(Protocol):
    """A service's answer to a save."""

    @property
    def path(self) -> str | None:
        """Where it lies."""
        ...


class Owner(SamplerOwner, Protocol):
    """What a session needs of its backend."""

    @property
    def ttl_s(self) -> int | None:
        """How long the service keeps checkpoints."""
        ...

    def vocab_size(self, base_model: str) -> int:
        """Tokens of a base model."""
        ...


def _tensors(values: Sequence[NDArray[np.float32]]) -> list[Tensor]:
    import torch

    return [torch.from_numpy(np.array(one, dtype=np.float32)) for one in values]


def _masked(loss: Loss, batch: Batch, output: types.ForwardBackwardOutput, rows: Sequence[NDArray[np.int64]]) -> Weights:
    """The service's log-probs, 0 where no weight counts, as every backend reports them."""
    found = list[NDArray[np.float32]]()
    for datum, used, one in zip(batch.data, rows, output.loss_fn_outputs, strict=True):
        whole = np.asarray(one["logprobs"].to_numpy(), dtype=np.float32).reshape(datum.targets.shape)
        values = np.zeros_like(whole)
        values[used] = whole[used]
        if not np.isfinite(values).all():
            raise NumericError(
                f"The service gave log-probs that are not finite for {datum.id!r} and {loss.name!r}. Lower the learning rate.", examples=batch.ids
            )
        found.append(values)
    return tuple(found)


class TinkerSession:
    """An adapter being trained by a service; see `TrainingSession`.

    `OptimOutput.grad_norm` is NaN where the service does not report it. A failure that the service itself finds fails the step after it on a
    Crucible server; what another service does with a step that was submitted ahead of such a failure is its own affair.
    """

    def __init__(  # noqa: PLR0917 - the first five are what a session is
        self, backend: Owner, client: tinker.TrainingClient, base_model: str, lora: LoraConfig, step: int = 0, spending: Spending | None = None
    ) -> None:
        self._backend, self._client, self._base_model, self._lora, self._step = backend, client, base_model, lora, step
        self.spending = spending or backend.spending
        watch(client, client.model_id)
        self._line = Line("tinker", backend.pending)
        self._names: dict[str, int] = {}
        self._sent: list[Callable[[], list[types.Datum]]] = []
        self._failure: BaseException | None = None
        self._closed = False

    def _check_open(self) -> None:
        self._backend.check_open()
        if self._closed:
            raise SessionClosedError(f"The session on {self._base_model!r} is closed. Start one with backend.train(...) or backend.resume(...).")

    @property
    def run(self) -> str:
        """The service's name of the training run."""
        return str(self._client.model_id)

    # ---------------------------------------------------------------------------------------------------------- passes
    def _rows(self, loss: Loss, batch: Batch) -> list[NDArray[np.int64]]:
        from ...losses.apply import positions

        return positions(loss, batch.data, self._backend.vocab_size(self._base_model))

    def _data(self, batch: Batch, weights: Sequence[NDArray[np.float32]]) -> list[types.Datum]:
        vocab = self._backend.vocab_size(self._base_model)
        return [wire_datum(datum, {"weights": np.asarray(values, dtype=np.float32)}, vocab) for datum, values in zip(batch.data, weights, strict=True)]

    def _applied(self, loss: Loss, batch: Batch, logprobs: Weights, *, grad: bool) -> tuple[StepOutput, Weights]:
        """What to report, and with `grad` the loss's gradient with respect to the log-probs."""
        from ...losses.apply import apply_loss, step_output

        tensors = _tensors(logprobs)
        applied = apply_loss(loss, batch.data, tensors, grad=grad)
        gradients = tuple(np.where(datum.weights != 0, one.numpy(), 0).astype(np.float32) for datum, one in zip(batch.data, applied.gradients, strict=False))
        return step_output(batch.data, applied, tensors), gradients

    def _check_loss(self, loss: Loss) -> None:
        self._check_open()
        if loss.needs == "logits":
            raise CapabilityError(f"The loss {loss.name!r} needs logits; a Tinker service gives log-probs. Use the local backend, or another loss.")
        if loss.penalties:
            names = ", ".join(penalty.name for penalty in loss.penalties)
            raise CapabilityError(f"The loss {loss.name!r} has terms on parameters ({names}), which a Tinker service does not show. Use the local backend.")

    def forward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """The loss's numbers; nothing changes."""
        self._check_loss(loss)

        def begin() -> Future[types.ForwardBackwardOutput]:
            self._rows(loss, batch)
            return self._client.forward(self._data(batch, [datum.weights for datum in batch.data]), "cross_entropy").future()

        def finish(output: types.ForwardBackwardOutput) -> StepOutput:
            made, _ = self._applied(loss, batch, _masked(loss, batch, output, self._rows(loss, batch)), grad=False)
            self.spending.add(trained=batch.tokens)
            events.emit("training.forward", examples=len(batch.data), tokens=batch.tokens)
            return made

        return self._line.submit("the request forward", begin, finish, batch.ids)

    def forward_backward(self, batch: Batch, loss: Loss) -> Future[StepOutput]:
        """Adds the gradient of the summed loss; after a failure of it the next `optim_step` fails too.

        Raises:
            CapabilityError: the loss needs logits.
        """
        self._check_loss(loss)
        started, found = time.perf_counter(), list[StepOutput]()

        def begin() -> Future[types.ForwardBackwardOutput]:
            try:
                return self._send(batch, loss, found)
            except BaseException as error:
                self._failure = explain(error, "the request forward_backward", batch.ids)
                raise

        def finish(output: types.ForwardBackwardOutput) -> StepOutput:
            made = found[0] if found else self._applied(loss, batch, _masked(loss, batch, output, self._rows(loss, batch)), grad=False)[0]
            self.spending.add(trained=batch.tokens * (2 if found else 1))
            duration_s = time.perf_counter() - started
            events.emit("training.forward_backward", examples=len(batch.data), tokens=batch.tokens, loss=made.loss, duration_s=duration_s)
            return made

        return self._line.submit("the request forward_backward", begin, finish, batch.ids)

    def _send(self, batch: Batch, loss: Loss, found: list[StepOutput]) -> Future[types.ForwardBackwardOutput]:
        """Submits a pass, the second one of two where there are two; `found` then gets what to report."""
        rows, vocab = self._rows(loss, batch), self._backend.vocab_size(self._base_model)
        native = native_form(loss, batch)
        if native is not None:
            data = [wire_datum(datum, inputs, vocab) for datum, inputs in zip(batch.data, native.inputs, strict=True)]
            future = self._client.forward_backward(data, native.name, dict(native.config) or None).future()  # type: ignore[arg-type]

            def negative() -> list[types.Datum]:
                _, gradients = self._applied(loss, batch, _masked(loss, batch, future.result(), rows), grad=True)
                return self._data(batch, gradients)

            self._sent.append(negative)
            return future
        output = self._client.forward(self._data(batch, [datum.weights for datum in batch.data]), "cross_entropy").result()
        made, gradients = self._applied(loss, batch, _masked(loss, batch, output, rows), grad=True)
        found.append(made)
        self._sent.append(lambda: self._data(batch, gradients))
        return self._client.forward_backward(self._data(batch, [-gradient for gradient in gradients]), "cross_entropy").future()

    # ------------------------------------------------------------------------------------------------------------ steps
    def optim_step(self, adam: AdamConfig, hook: GradientHook | None = None) -> Future[OptimOutput]:
        """One AdamW step with the accumulated gradient.

        Raises:
            CapabilityError: a hook is given; a service shows no gradients of parameters.
        """
        self._check_open()
        if hook is not None:
            raise CapabilityError("A Tinker service gives no gradients of parameters; optim_step got a hook. Use the local backend, or no hook.")

        def begin() -> Future[types.OptimStepResponse]:
            sent, failure = self._sent, self._failure
            self._sent, self._failure = [], None
            if failure is not None:
                for negative in sent:
                    self._client.forward_backward(negative(), "cross_entropy").result()
                kind = NumericError if isinstance(failure, NumericError) else BackendError
                raise kind(f"The step was not taken because a forward_backward before it failed: {failure}") from failure
            if not sent:
                raise BackendError("optim_step found no gradient; expected a forward_backward since the last step. Submit one first.")
            return self._client.optim_step(adam_params(adam)).future()

        def finish(response: types.OptimStepResponse) -> OptimOutput:
            self._step += 1
            metrics = dict(response.metrics or {})
            for known in ("optimizer_steps", "durable"):
                metrics.pop(known, None)
            norm = metrics.pop("grad_norm", float("nan"))
            events.emit("training.optim_step", step=self._step, grad_norm=norm, lr=adam.lr)
            return OptimOutput(step=self._step, grad_norm=norm, metrics=metrics)

        return self._line.submit("the request optim_step", begin, finish)

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def _free_name(self, name: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip(".-")[:100] or "checkpoint"
        self._names[plain] = self._names.get(plain, 0) + 1
        return plain if self._names[plain] == 1 else f"{plain}-n{self._names[plain]}"

    def save(self, name: str, kind: Literal["state", "sampler"] = "state") -> Future[Checkpoint]:
        """Keeps the weights at the service under a new `tinker://` path; a "sampler" also as files that `download` can fetch.

        Raises:
            ConfigError: the name is empty, or the kind is neither "state" nor "sampler".
        """
        self._check_open()
        if not name or kind not in ("state", "sampler"):
            raise ConfigError(f"A checkpoint cannot be called {name!r} with kind {kind!r}; expected a name and 'state' or 'sampler'.")
        path, ttl_s = self._free_name(name), self._backend.ttl_s

        def begin() -> Future[_Saved]:
            if kind == "state":
                return cast("Future[_Saved]", self._client.save_state(path, ttl_seconds=ttl_s).future())
            saving = self._client.save_weights_for_sampler(path, ttl_seconds=ttl_s).future()
            self._client.save_weights_external(path, ttl_seconds=ttl_s).result()
            return cast("Future[_Saved]", saving)

        def finish(response: _Saved) -> Checkpoint:
            made = Checkpoint(
                name=name, uri=str(response.path), kind=kind, step=self._step, base_model=self._base_model, lora=self._lora, created_at=time.time()
            )  # fmt: skip
            events.emit("checkpoint.saved", checkpoint=name, step=made.step, kind=kind)
            return made

        return self._line.submit("the request save", begin, finish)

    def sampler(self) -> TinkerSampler:
        """The weights as they stand after the requests so far."""
        self._check_open()
        ready = self._line.submit("the request sampler", lambda: self._client.save_weights_and_get_sampling_client().future(), lambda client: client)
        return TinkerSampler(self._backend, f"{self._base_model}/{self._client.model_id}", self._base_model, ready, self.spending)

    def close(self) -> None:
        """Requests submitted before still run; later ones raise SessionClosedError."""
        self._closed = True

    def finish(self) -> None:
        """Waits for what was submitted, ends the threads, and says what the run used."""
        self._closed = True
        self._line.close()
        spent = self.spending
        events.emit(
            "tinker.spending", model=self.run, trained_tokens=spent.trained_tokens, prompt_tokens=spent.prompt_tokens,
            sampled_tokens=spent.sampled_tokens, cost_usd=spent.cost_usd,
        )  # fmt: skip

"""One loop for every loss: data in, an adapter, its metrics and its checkpoints out.

Steps are submitted ahead of their results, so a remote service never waits for this process; what is written to `metrics.jsonl` depends
on the configuration and the data alone, so a run that was killed and resumed writes the same bytes as one that was not. Wall-clock
figures go to `timings.jsonl`. The trainer does not know which backend it drives, nor what the loss computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, cast

import numpy as np

from .. import events
from ..config import fingerprint, to_dict
from ..data import Batches, Rendered, normalise, render_all
from ..errors import CapabilityError, ConfigError, CorruptError, DataError, NotFoundError
from ..losses import resolve
from ..protocols import Backend, ExampleSession, GradientHook, Loss, LossFn, Sampler, TrainingSession
from ..records import Batch, Capabilities, Checkpoint, Dataset, Datum, Json, LoraConfig, OptimOutput, StepOutput, TrainConfig, TrainingResult, record
from ..store import Run, open_run
from .environment import describe_environment, peak_memory_bytes
from .examplewise import example_metrics
from .gradients import chain
from .rates import learning_rate
from .signals import stop_on_signal

__all__ = ["Callback", "Progress", "Trainer"]

AHEAD = 2
PROBE = 16
Stopped = Literal["max_steps", "epochs", "patience", "signal", "callback"]


@record
class Progress:
    """What a callback sees. `metrics` is the row just written; `step` counts finished steps of `total`."""

    kind: Literal["step", "epoch", "evaluation", "checkpoint"]
    step: int
    total: int
    epoch: float
    metrics: Mapping[str, float]
    tokens_per_s: float = 0.0
    checkpoint: Checkpoint | None = None


Callback = Callable[[Progress], Literal["stop"] | None]
"""Called on the caller's thread; returning "stop" ends training after the step, with a checkpoint."""


class _Pending(NamedTuple):
    step: int
    slices: tuple[Batch, ...]
    outputs: tuple[Future[StepOutput], ...]
    optim: Future[OptimOutput]
    lr: float


def _unhonoured(capabilities: Capabilities, lora: LoraConfig) -> tuple[str, ...]:
    """Settings that the backend ignores: an error where the user chose them, else their names for the record."""
    ignored = tuple(name for name in ("alpha", "dropout", "target_modules") if not getattr(capabilities, name))
    for name in ignored:
        if getattr(lora, name) != getattr(LoraConfig(), name):
            raise CapabilityError(
                f"The backend {capabilities.name!r} cannot honour lora.{name}={getattr(lora, name)!r}; it decides that itself. Leave it at its default."
            )
    return tuple(f"lora.{name}" for name in ignored)


class Trainer:
    """Trains one adapter; use it as a context manager.

    Args:
        backend: from `connect(...)`; it is not closed by the trainer.
        config: everything that decides the result.
        folder: the run folder; None keeps everything in memory (nothing is saved or resumable).
        loss: a loss object or function instead of the configuration's name.
        hook: runs between backward and step.
        callbacks: called after each step, epoch, evaluation and checkpoint.
        resume: continue from the folder's latest checkpoint; a folder without one starts from the beginning.
        command: recorded, so that the report can say how to reproduce the run.

    Raises:
        ConfigError: the folder holds a run already, or resume was asked with another configuration (the keys are named).
        LockedError: another process works in the folder.
        CapabilityError: the backend cannot honour a setting.
    """

    def __init__(
        self,
        backend: Backend,
        config: TrainConfig | None = None,
        *,
        folder: str | Path | None = None,
        loss: str | Loss | LossFn | Mapping[str, float] | None = None,
        hook: GradientHook | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        command: str = "",
    ) -> None:
        self.backend, self.config = backend, config or TrainConfig()
        self.loss = resolve(self.config.loss if loss is None else loss)
        self.folder = Path(folder) if folder is not None else None
        hooks: tuple[str | GradientHook, ...] = (*self.config.hooks, *((hook,) if hook is not None else ()))
        self.hook, self.callbacks, self._resume = chain(*hooks) if hooks else None, tuple(callbacks), resume
        self._environment = describe_environment()
        self._environment["not_honoured"] = list(_unhonoured(backend.capabilities, self.config.lora))
        if command:
            self._environment["command"] = command
        learning_rate(self.config, 0, 1)
        self._stack = contextlib.ExitStack()
        self._run: Run | None = None
        self._session: TrainingSession | None = None
        self._rows: list[dict[str, Json]] = []
        self._step = 0
        self._saved: Checkpoint | None = None
        self._stop: Stopped | None = None

    def __enter__(self) -> Self:
        if self.folder is not None and self._run is None:
            config = cast("dict[str, Json]", to_dict(self.config))
            self._run = self._stack.enter_context(open_run(self.folder, config, resume=self._resume, environment=self._environment))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            self._session.close()
        self._stack.__exit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------------------- the way in
    @property
    def session(self) -> TrainingSession:
        """The session, started or resumed on first use."""
        if self._session is None:
            latest = self._latest()
            if latest is not None and self._run is not None:
                self._session = self.backend.resume(latest)
                self._step, self._saved = latest.step, latest
                self._run.rewind(latest.step)
                self._rows = self._run.metrics()
                events.emit("training.resumed", step=latest.step, checkpoint=latest.name)
            else:
                self._session = self.backend.train(self.config.base_model, self.config.lora)
                if self._run is not None:
                    self._run.rewind(-1)
        return self._session

    def _latest(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is sound; None where a fresh start is due."""
        if self._run is None or not self._resume:
            return None
        try:
            return self._run.checkpoints.latest(verified=True)
        except NotFoundError:
            return None

    def sampler(self) -> Sampler:
        """A sampler of the weights as they stand; later steps do not change it."""
        return self.session.sampler()

    def train(self, dataset: Dataset, dev: Dataset | None = None) -> TrainingResult:
        """Trains to the end of the configuration, or until a callback, a signal or the patience ends it.

        Args:
            dataset: what is learned from.
            dev: evaluated every `eval_interval` steps (loss only).

        Raises:
            DataError: no examples, or one that does not fit.
            NumericError: a loss or gradient is not finite; the last checkpoint is intact.
            StorageFullError: a checkpoint does not fit on the disk; earlier ones are intact.
        """
        config = self.config
        if config.eval_interval and dev is None:
            raise ConfigError(f"eval_interval is {config.eval_interval} but there is no dev data. Pass dev=… or set eval_interval to 0.")
        with events.span("training.run", base_model=config.base_model, loss=self.loss.name), stop_on_signal(self._on_signal):
            started = time.monotonic()
            data = self._render(dataset, dev)
            session = self.session
            batches = Batches(data[0], config.batch_size, seed=config.seed, mode=config.batching, max_tokens=config.batch_size * config.max_length)
            per_epoch = batches.per_epoch / config.accumulate
            total = config.max_steps if config.epochs is None else min(config.max_steps, math.ceil(config.epochs * per_epoch))
            probe = [Batch(data=data[0][:PROBE])]
            first = self._probe(probe, 0)
            tokens = self._loop(session, batches, total, per_epoch, data[1])
            last = self._probe(probe, self._step, write=self._stop in (None, "patience"))
            checkpoint = self._finish_checkpoint()
            stopped: Stopped = self._stop or ("max_steps" if total == config.max_steps else "epochs")
            result = TrainingResult(
                initial_loss=first, final_loss=last, steps=self._step, epochs=self._step / per_epoch, tokens=tokens,
                duration_s=time.monotonic() - started, stopped=stopped, best_dev_loss=self._best_dev(), checkpoint=checkpoint, folder=self.folder,
            )  # fmt: skip
        if self._run is not None:
            plain = cast("dict[str, Json]", to_dict(dataclasses.replace(result, checkpoint=None, folder=None)))
            self._run.finish(plain, "stopped" if stopped in ("signal", "callback") else "done")
        return result

    def save(self, name: str) -> Checkpoint:
        """Saves weights and optimizer under a name of your own; it is pinned, so that pruning never removes it.

        Without a folder the checkpoint lives in the backend only (`local_path` is None on a fresh one).
        """
        return self._save(name, pinned=True)

    # --------------------------------------------------------------------------------------------------------- the loop
    def _render(self, dataset: Dataset, dev: Dataset | None) -> tuple[tuple[Datum, ...], tuple[Datum, ...]]:
        if not len(dataset):
            raise DataError(f"The data set {dataset.card.name!r} is empty; training needs at least one example.")
        tokenizer = self.backend.tokenizer(self.config.base_model)
        rendered = render_all(dataset, tokenizer, self.config.max_length)
        held_out = render_all(dev, tokenizer, self.config.max_length) if dev is not None else None
        if self._run is not None:
            cards = {"train": to_dict(dataset.card), "dev": to_dict(dev.card) if dev else None, "truncated": _truncated(rendered)}
            self._run.write_json("data.json", cards)
        if rendered.completions_cut:
            events.emit("data.truncated", completions=rendered.completions_cut, max_length=self.config.max_length)
        both = (*rendered.data, *(held_out.data if held_out else ()))
        if (prepare := self.loss.prepare) is not None:
            both = tuple(prepare(datum, tokenizer) for datum in both)
        if "reference_logprobs" in self.loss.extras:
            both = self._with_reference(both)
        return both[: len(rendered.data)], both[len(rendered.data) :]

    def _with_reference(self, data: Sequence[Datum]) -> tuple[Datum, ...]:
        """Adds the base model's log-probs: a fresh adapter adds nothing, so its session is the base model."""
        session = self.backend.train(self.config.base_model, self.config.lora)
        try:
            loss = resolve("cross_entropy")
            chunks = [data[i : i + self.config.batch_size] for i in range(0, len(data), self.config.batch_size)]
            futures = [session.forward(Batch(data=tuple(chunk)), loss) for chunk in chunks]
            logprobs = [array for future in futures for array in future.result().logprobs]
        finally:
            session.close()
        return tuple(
            dataclasses.replace(datum, extras={**datum.extras, "reference_logprobs": array.astype(np.float32)})
            for datum, array in zip(data, logprobs, strict=True)
        )

    def _steps(self, session: TrainingSession, batches: Batches, total: int) -> Iterator[_Pending]:
        """Submits step after step, at most AHEAD before the first unread one; yields them in order."""
        accumulate = self.config.accumulate
        submit = self._passes(session)
        window: deque[_Pending] = deque()
        for step in range(self._step, total):
            slices = normalise([batches.at(step * accumulate + i) for i in range(accumulate)])
            lr = learning_rate(self.config, step, total)
            outputs = tuple(submit(batch, self.loss) for batch in slices)
            optim = session.optim_step(dataclasses.replace(self.config.adam, lr=lr), self.hook)
            window.append(_Pending(step + 1, slices, outputs, optim, lr))
            if self._is_boundary(step + 1) or len(window) > AHEAD:
                yield from self._drain(window, keep=0 if self._is_boundary(step + 1) else AHEAD)
            if self._stop:
                break
        yield from self._drain(window, keep=0)

    def _passes(self, session: TrainingSession) -> Callable[[Batch, Loss], Future[StepOutput]]:
        if not self.config.example_norms:
            return session.forward_backward
        if isinstance(session, ExampleSession):
            return session.forward_backward_examples
        name = self.backend.capabilities.name
        raise CapabilityError(f"The backend {name!r} does not tell gradient norms of single examples. Use the local backend, or leave example_norms out.")

    @staticmethod
    def _drain(window: deque[_Pending], keep: int) -> Iterator[_Pending]:
        while len(window) > keep:
            yield window.popleft()

    def _is_boundary(self, step: int) -> bool:
        """After these steps something looks at the weights, so nothing may be submitted ahead of it."""
        return any(interval and step % interval == 0 for interval in (self.config.checkpoint_interval, self.config.eval_interval))

    def _loop(self, session: TrainingSession, batches: Batches, total: int, per_epoch: float, dev: Sequence[Datum]) -> int:
        tokens = sum(int(cast("int", row.get("train/tokens", 0))) for row in self._rows)
        self._stop = "patience" if self._out_of_patience() else None
        since = time.monotonic()
        if self._stop:
            return tokens
        for pending in self._steps(session, batches, total):
            row, count = self._collect(pending, per_epoch)
            tokens += count
            now = time.monotonic()
            speed = count / max(1e-9, now - since)
            self._write(row)
            if self._run is not None:
                self._run.log_timing({"step": pending.step, "step_s": now - since, "tokens_per_s": speed, "memory_bytes": peak_memory_bytes()})
            since = now
            self._step = pending.step
            self._tell("step", total, row, speed)
            if math.floor(pending.step / per_epoch) > math.floor((pending.step - 1) / per_epoch):
                self._tell("epoch", total, row, speed)
            self._at_boundary(pending.step, total, per_epoch, dev)
        return tokens

    def _collect(self, pending: _Pending, per_epoch: float) -> tuple[dict[str, Json], int]:
        outputs = [future.result() for future in pending.outputs]
        optim = pending.optim.result()
        weight = sum(output.weight for output in outputs)
        row: dict[str, Json] = {"step": pending.step, "epoch": pending.step / per_epoch}
        row["train/loss"] = sum(output.loss * output.weight for output in outputs) / weight
        tokens = sum(batch.tokens for batch in pending.slices)
        row |= {"train/tokens": tokens, "train/lr": pending.lr, "grad/global_norm": optim.grad_norm}
        for name in outputs[0].metrics:
            row[f"train/{name}"] = sum(output.metrics.get(name, 0.0) * output.weight for output in outputs) / weight
        row |= {f"grad/{name}" if "/" not in name else name: value for name, value in optim.metrics.items()}
        row |= example_metrics([(batch.ids, output.example_norms) for batch, output in zip(pending.slices, outputs, strict=True)])
        events.emit("training.step", step=pending.step, epoch=row["epoch"], loss=row["train/loss"], grad_norm=optim.grad_norm, lr=pending.lr, tokens=tokens)
        return row, tokens

    def _at_boundary(self, step: int, total: int, per_epoch: float, dev: Sequence[Datum]) -> None:
        config = self.config
        if config.eval_interval and step % config.eval_interval == 0 and dev:
            size = config.batch_size
            row: dict[str, Json] = {"step": step, "epoch": step / per_epoch}
            row["dev/loss"] = self._forward([Batch(data=tuple(dev[i : i + size])) for i in range(0, len(dev), size)])
            self._write(row)
            events.emit("training.evaluated", step=step, epoch=row["epoch"], loss=row["dev/loss"], examples=len(dev))
            self._tell("evaluation", total, row)
            if self._out_of_patience():
                self._stop = self._stop or "patience"
        if config.checkpoint_interval and step % config.checkpoint_interval == 0 and self._run is not None:
            self._save(f"{step:08d}")
            self._tell("checkpoint", total, {}, checkpoint=self._saved)

    # ------------------------------------------------------------------------------------------------------- small parts
    def _on_signal(self) -> None:
        self._stop = self._stop or "signal"

    def _forward(self, batches: Sequence[Batch]) -> float:
        """The loss in nats per weight, without dropout and without touching gradients."""
        outputs = [future.result() for future in [self.session.forward(batch, self.loss) for batch in batches]]
        return sum(o.loss * o.weight for o in outputs) / sum(o.weight for o in outputs)

    def _probe(self, batches: Sequence[Batch], step: int, *, write: bool = True) -> float:
        """The loss on a fixed handful of training examples, taken from the rows where a resumed run has it already.

        A run that was interrupted writes no row, so that once resumed it leaves the same bytes as one that was not.
        """
        for row in self._rows:
            if row["step"] == step and "probe/loss" in row:
                return float(cast("float", row["probe/loss"]))
        if step != self._step:
            raise CorruptError(f"{str(self.folder)!r} has a checkpoint of step {self._step} but no first metrics row. Start again in another folder.")
        loss = self._forward(batches)
        if write:
            self._write({"step": step, "epoch": self._rows[-1]["epoch"] if self._rows else 0.0, "probe/loss": loss})
        return loss

    def _write(self, row: dict[str, Json]) -> None:
        self._rows.append(row)
        if self._run is not None:
            self._run.log_metrics(row)

    def _tell(self, kind: Literal["step", "epoch", "evaluation", "checkpoint"], total: int, row: Mapping[str, Json], speed: float = 0.0,
              checkpoint: Checkpoint | None = None) -> None:  # fmt: skip
        metrics = {name: float(cast("float", value)) for name, value in row.items()}
        epoch = metrics.get("epoch", 0.0)
        progress = Progress(kind=kind, step=self._step, total=total, epoch=epoch, metrics=metrics, tokens_per_s=speed, checkpoint=checkpoint)
        for callback in self.callbacks:
            if callback(progress) == "stop":
                self._stop = self._stop or "callback"

    def _dev_losses(self) -> list[float]:
        return [float(cast("float", row["dev/loss"])) for row in self._rows if "dev/loss" in row]

    def _best_dev(self) -> float | None:
        return min(self._dev_losses(), default=None)

    def _out_of_patience(self) -> bool:
        losses = self._dev_losses()
        if not self.config.patience or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def _latest_metrics(self) -> dict[str, float]:
        latest: dict[str, float] = {}
        for row in self._rows:
            latest |= {name: float(cast("float", value)) for name, value in row.items() if "/" in name and not name.startswith("probe/")}
        return latest

    def _save(self, name: str, *, pinned: bool = False) -> Checkpoint:
        checkpoint = self.session.save(name, "state").result()
        if self._run is None:
            return checkpoint
        store = self._run.checkpoints
        published = store.publish(
            checkpoint, lambda folder: self.backend.download(checkpoint, folder), metrics=self._latest_metrics(),
            fingerprint=fingerprint(self.config), parent=self._saved.name if self._saved else "",
        )  # fmt: skip
        if pinned:
            store.pin(published.name)
        self._saved = published
        by_dev = any("dev/loss" in row for row in self._rows)
        store.prune(self.config.keep, metric="dev/loss" if by_dev else "train/loss", direction="min")
        return published

    def _finish_checkpoint(self) -> Checkpoint | None:
        if self._run is not None and self._step and (self._saved is None or self._saved.step != self._step):
            return self._save(f"{self._step:08d}")
        return self._saved


def _truncated(rendered: Rendered) -> dict[str, Json]:
    return {"prompts": rendered.prompts_cut, "completions": rendered.completions_cut, "tokens": rendered.tokens}

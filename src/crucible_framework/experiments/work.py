"""One job of a study: a cell trained and evaluated, a base evaluated, an ensemble's votes counted, or a few steps timed. Runs in any process.

Everything that it writes lies in the job's own folder under a lock; a job that was killed goes on from its last checkpoint and its last
row. Its result file is written last. This file does not know who runs it, nor when.
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, cast

from .. import files
from ..backends import Connection, connect
from ..backends import backends as known_backends
from ..config import from_dict, to_dict
from ..errors import CrucibleError
from ..evaluation import evaluate
from ..inference import ChoiceSampler
from ..protocols import Backend, Sampler
from ..records import Completion, Dataset, Evaluation, Json, Prompt, SamplingParams, TrainConfig, record
from ..training import Progress, Trainer
from .arms import Cell
from .design import DataPlan, Experiment
from .ensembles import Recorded, note_verdicts, verdicts
from .study import Kind, load_data, read_result, result_path, work_folder

__all__ = ["Engines", "Job", "Stopped", "Watch", "job_for", "perform"]

CALIBRATION_STEPS, CALIBRATION_ITEMS = 2, 3
LOCK_WAIT_S = 60.0
"""How long a job waits for a worker that was left over from a killed run to notice that it is alone."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """The job was asked to stop; what it did so far is on disk."""


@record
class Job:
    """All that a process must know to do a piece of a study."""

    kind: Literal["cell", "base", "calibrate"]
    id: str
    arm: str
    seed: int
    data: DataPlan
    config: TrainConfig
    backend: str
    options: Mapping[str, object]
    threads: int
    scorers: tuple[str, ...]
    perplexity: bool
    sampling: SamplingParams
    choose: bool
    in_flight: int
    folder: Path
    members: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vote: str = ""

    def plain(self) -> dict[str, Json]:
        """As JSON values."""
        return cast("dict[str, Json]", to_dict(self))

    @staticmethod
    def of(plain: Mapping[str, object]) -> Job:
        """From JSON values."""
        return from_dict(Job, plain)


def job_for(experiment: Experiment, cell: Cell, folder: Path, kind: Literal["cell", "base", "calibrate"]) -> Job:
    """The job of a cell, of its base, or of measuring what it will cost."""
    return Job(
        kind=kind,
        id=cell.base if kind == "base" else cell.id,
        arm=cell.arm,
        seed=cell.seed,
        data=experiment.plan_of(cell.data),
        config=cell.config,
        backend=cell.backend,
        options=experiment.options,
        threads=experiment.threads,
        scorers=experiment.scorers,
        perplexity=experiment.perplexity,
        sampling=experiment.sampling,
        choose=experiment.choose,
        in_flight=1 if experiment.perplexity else experiment.in_flight,
        folder=folder.absolute(),
        members={} if kind == "base" else cell.members,
        vote="" if kind == "base" else cell.vote,
    )


class Engines:
    """Backends that stay open from job to job, so that a base model is loaded once."""

    def __init__(self) -> None:
        self._open: dict[str, Connection] = {}
        self._guard = threading.Lock()

    def get(self, job: Job) -> Backend:
        """The backend of a job, opened on first use."""
        options = dict(job.options)
        if "threads" in inspect.signature(known_backends.get(job.backend)).parameters:
            options.setdefault("threads", job.threads)
        key = repr((job.backend, sorted(options.items(), key=lambda pair: pair[0])))
        with self._guard:  # jobs side by side in one process share it
            if key not in self._open:
                self._open[key] = connect(job.backend, **options)
            return self._open[key]

    def close(self) -> None:
        """Closes them all."""
        while self._open:
            self._open.popitem()[1].close()


@record
class Spent:
    """What a job has used so far in this attempt."""

    train_tokens: int = 0
    asked_tokens: int = 0
    steps: int = 0
    rows: int = 0


class Watch:
    """Counts what a job uses, tells it, and ends the job when it is asked to.

    Args:
        tell: called after every step and every answer with what was spent so far.
        stopping: whether the job should end at the next opportunity.
    """

    def __init__(self, tell: Callable[[Spent], None], stopping: Callable[[], bool]) -> None:
        self.spent = Spent()
        self._tell, self.stopping = tell, stopping

    def begin(self) -> None:
        """The libraries and the model are loaded."""
        self._tell(self.spent)

    def step(self, progress: Progress) -> Literal["stop"] | None:
        """A callback for the trainer."""
        if progress.kind == "step":
            tokens = int(progress.metrics.get("train/tokens", 0.0))
            self.spent = dataclasses.replace(self.spent, train_tokens=self.spent.train_tokens + tokens, steps=progress.step)
            self._tell(self.spent)
        return "stop" if self.stopping() else None

    def row(self, done: int, total: int) -> None:  # noqa: ARG002 - the signature is `evaluate`'s
        """A progress function for `evaluate`."""
        self.spent = dataclasses.replace(self.spent, rows=done)
        self._tell(self.spent)
        if self.stopping():
            raise Stopped

    def asked(self, future: Future[tuple[Completion, ...]]) -> None:
        """Counts the tokens of an answer."""
        if not future.cancelled() and future.exception() is None:
            tokens = sum(answer.prompt_tokens + len(answer.tokens) for answer in future.result())
            self.spent = dataclasses.replace(self.spent, asked_tokens=self.spent.asked_tokens + tokens)


class _Named:
    """A sampler under a name that is the same in every folder and every attempt, and whose tokens are counted."""

    def __init__(self, sampler: Sampler, model: str, watch: Watch) -> None:
        self.model = model
        self._sampler, self._watch = sampler, watch

    def sample(self, prompt: Prompt, params: SamplingParams, n: int = 1) -> Future[tuple[Completion, ...]]:
        future = self._sampler.sample(prompt, params, n)
        future.add_done_callback(self._watch.asked)
        return future

    def compute_logprobs(self, prompt: Prompt, completion: str | tuple[int, ...]) -> Future[tuple[float, ...]]:
        return self._sampler.compute_logprobs(prompt, completion)


def perform(job: Job, engines: Engines, watch: Watch) -> dict[str, Json]:
    """Does a job and gives its times and tokens; the result itself is on disk.

    Raises:
        Stopped: it was asked to end; resuming goes on.
        CrucibleError and whatever a backend, loss or scorer raises.
    """
    started = time.monotonic()
    if job.kind == "calibrate":
        return _calibrate(job, engines.get(job), watch)
    where = work_folder(job.folder, job.kind, job.id)
    with files.lock(where / ".lock", "cell", timeout_s=LOCK_WAIT_S):
        done = read_result(result_path(job.folder, job.kind, job.id))
        trained_s = 0.0
        if done is None or done["status"] != "done":
            if job.members:
                watch.begin()
                _voted(job, watch)
            else:
                backend = engines.get(job)
                backend.tokenizer(job.config.base_model)
                watch.begin()
                trained_s = _cell(job, job.kind, backend, watch)
    seconds = time.monotonic() - started
    return {"train_s": trained_s, "eval_s": seconds - trained_s, **_tokens(watch)}


def _tokens(watch: Watch) -> dict[str, Json]:
    return {"train_tokens": watch.spent.train_tokens, "asked_tokens": watch.spent.asked_tokens}


def _asked(job: Job, sampler: Sampler, watch: Watch, test: Dataset) -> Sampler:
    """The sampler under the job's name; where it is to choose, over the labels of the data set."""
    named = _Named(sampler, job.id, watch)
    return ChoiceSampler(named, test.card.labels, by="mean") if job.choose else named


def _body(job: Job) -> dict[str, Json]:
    return {"format_version": 1, "id": job.id, "arm": job.arm, "seed": job.seed, "data": job.data.key, "status": "done", "training": {}}


def _end(job: Job, kind: Kind, body: dict[str, Json], evaluation: Evaluation) -> None:
    """The result file, which is written last."""
    body["estimates"] = {one.name: to_dict(one) for one in evaluation.estimates}
    body["scores_sha256"] = files.sha256_file(work_folder(job.folder, kind, job.id) / "eval" / "scores.jsonl")
    files.write_json(result_path(job.folder, kind, job.id), body)


def _voted(job: Job, watch: Watch) -> None:
    """An ensemble's cell: its members' cells have ended, and their answers are votes."""
    _, test, _ = load_data(job.data)
    where = work_folder(job.folder, "cell", job.id)
    found = verdicts(job.folder, job.members, job.vote, test)
    told: dict[str, Json] = {"vote": job.vote, "members": dict(job.members), **note_verdicts(where, found)}
    evaluation = evaluate(
        Recorded(job.id, test, found), test, job.scorers, params=job.sampling, label="ensemble", folder=where / "eval", in_flight=1, progress=watch.row
    )
    _end(job, "cell", {**_body(job), "ensemble": told}, evaluation)


def _cell(job: Job, kind: Kind, backend: Backend, watch: Watch) -> float:
    started, where = time.monotonic(), work_folder(job.folder, kind, job.id)
    train, test, dev = load_data(job.data)
    body = _body(job)
    if job.kind == "cell":
        with Trainer(backend, job.config, folder=where / "run", callbacks=(watch.step,), resume=True) as trainer:
            result = trainer.train(train, dev)
        if result.checkpoint is None or result.stopped in ("signal", "callback"):
            raise Stopped
        kept = {"initial_loss": result.initial_loss, "final_loss": result.final_loss, "best_dev_loss": result.best_dev_loss}
        body["training"] = {**kept, "steps": result.steps, "epochs": result.epochs, "tokens": result.tokens, "stopped": result.stopped}
        sampler = backend.sampler(result.checkpoint)
    else:
        body |= {"arm": "base", "seed": 0}
        sampler = backend.sampler(job.config.base_model)
    trained_s = time.monotonic() - started
    evaluation = evaluate(
        _asked(job, sampler, watch, test), test, job.scorers, params=job.sampling, label="adapter" if job.kind == "cell" else "base",
        folder=where / "eval", perplexity=job.perplexity, in_flight=job.in_flight, progress=watch.row,
    )  # fmt: skip
    _end(job, kind, body, evaluation)
    return trained_s


def _calibrate(job: Job, backend: Backend, watch: Watch) -> dict[str, Json]:
    """Seconds and tokens of a step and of an answer, from a few of each; the first step, which loads and warms up, is left out."""
    train, test, _ = load_data(job.data)
    config = dataclasses.replace(job.config, max_steps=CALIBRATION_STEPS, checkpoint_interval=0, eval_interval=0, epochs=None, patience=0)
    moments: list[float] = []
    few = Dataset(examples=test.examples[:CALIBRATION_ITEMS], card=test.card)

    def timed(progress: Progress) -> Literal["stop"] | None:
        moments.append(time.monotonic()) if progress.kind == "step" else None
        return watch.step(progress)

    with tempfile.TemporaryDirectory() as nowhere, Trainer(backend, config, callbacks=(timed,)) as trainer:
        result = trainer.train(train)
        if len(moments) < CALIBRATION_STEPS and result.stopped != "epochs":
            raise Stopped
        started = time.monotonic()
        sampler = _asked(job, trainer.sampler(), watch, test)
        evaluate(sampler, few, job.scorers, params=job.sampling, folder=Path(nowhere) / "eval", perplexity=job.perplexity, in_flight=job.in_flight,
                 progress=watch.row)  # fmt: skip
        item_s = (time.monotonic() - started) / len(few)
    step_s = (moments[-1] - moments[0]) / (len(moments) - 1) if len(moments) > 1 else 0.0
    steps = job.config.max_steps
    if job.config.epochs is not None:
        per_epoch = max(1.0, result.steps / max(1e-9, result.epochs))
        steps = min(steps, round(job.config.epochs * per_epoch))
    return {
        "step_s": step_s, "tokens_per_step": result.tokens / max(1, result.steps), "steps": steps,
        "item_s": item_s, "tokens_per_item": watch.spent.asked_tokens / len(few), "items": len(test),
    }  # fmt: skip


def described(error: BaseException) -> dict[str, Json]:
    """An error as a failure's plain values: its class and its sentence, which hold no time and no place in memory."""
    return {"error": type(error).__name__, "message": str(error) or type(error).__name__, "passing": _passing(error)}


def _passing(error: BaseException) -> bool:
    """Whether trying the same again can help: what the settings or the data cause comes again."""
    if isinstance(error, CrucibleError):
        return bool(getattr(error, "retryable", False)) or error.exit_code in (69, 74, 75)
    return not isinstance(error, (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NotImplementedError))

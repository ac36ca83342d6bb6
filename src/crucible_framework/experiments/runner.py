"""Runs a study: every cell once, whatever dies on the way.

The state of a study is its files. A cell that has a result file is never run again; any other is started, or goes on from its last
checkpoint and its last answer. So a killed runner, a killed worker, a signal and an empty budget all leave the same thing behind: a folder
to resume. This file knows neither how a cell is trained nor what its result means.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from .. import events, files
from ..errors import BudgetExceeded, ConfigError, ExperimentError
from ..records import Json
from ..training import describe_environment
from ..training.signals import stop_on_signal
from .cost import Cost, Usage, calibrated, usage
from .design import Experiment
from .pool import InProcess, Message, Pool, Workers
from .stopping import decide, drop, rungs
from .study import BASES, CELLS, LOCK, TIMINGS, Study, claim, full_plan, load_study, note_leaks, read_result, result_path
from .work import Job, job_for

__all__ = ["Told", "run"]

Told = Callable[[int, int, str], None]
"""(cells and bases that have ended, in all, what happened last)."""
WAIT_S = 0.2
DEATHS = 5
"""A worker may die that often on one cell without getting any further; after that the cell has failed."""
EARLY = 20
"""The same while it was still loading libraries and models, when a cell is seldom at fault."""
STILLBORN = 30
"""So many workers in a row may die before they take up a cell, which is no cell's fault; after that the study ends."""


class _Runner:
    """The loop and what it must remember between messages; nothing of it is needed to resume."""

    def __init__(self, experiment: Experiment, folder: Path, pending: int, done: int, tell: Told | None) -> None:
        self.experiment, self.folder = experiment, folder
        self.waiting, self.active = deque[Job](), dict[str, Job]()
        self.total, self.done, self._tell_user = pending + done, done, tell
        self.stopping: Literal["", "signal", "budget"] = ""
        self.over = ""
        self.cost: Cost | None = None
        self._used, self._running = usage(folder), dict[str, tuple[float, int]]()
        self._alive, self._begun, self._early, self._stillborn = set[str](), set[str](), dict[str, int](), 0
        self._failed, self._deaths, self._best = dict[str, int](), dict[str, int](), dict[str, int]()
        self._timings = files.JsonLines(folder / TIMINGS)
        self.pool: Pool | None = None

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        self._timings.close()

    # ---------------------------------------------------------------------------------------------------------- budget
    def _usage(self) -> Usage:
        now = time.monotonic()
        total = self._used
        for since, tokens in self._running.values():
            total = total.plus(now - since, tokens)
        return total

    def _affordable(self, job: Job) -> bool:
        """Whether the next job fits into what is left, as far as is known; says so once where it does not."""
        if not self.experiment.budget.limited:
            return True
        usage_then = self._usage()
        for identity in (job.id, *self.active):
            planned = self.cost.of(identity) if self.cost else None
            since, tokens = self._running.get(identity, (time.monotonic(), 0))
            if planned is not None:
                usage_then = usage_then.plus(max(0.0, planned.seconds - (time.monotonic() - since)), max(0.0, planned.tokens - tokens))
        over = usage_then.over(self.experiment.budget)
        if over and not self.over:
            self.over = f"the next cell would bring it to {over}"
        return not over

    def plan_costs(self, cost: Cost) -> None:
        """Takes the estimate and shows it before anything is started."""
        self.cost = cost
        events.emit("experiment.estimated", experiment=self.experiment.name, seconds=cost.seconds, tokens=cost.tokens, money=cost.money)
        self._say(f"estimated: {cost.seconds / 60:.1f} minutes of work, {cost.tokens:,.0f} tokens")

    def check_budget(self) -> None:
        """Stops what runs when the budget is used up."""
        over = self._usage().over(self.experiment.budget)
        if over and not self.stopping:
            self.over = f"it has used {over}"
            self.stop("budget")

    # ------------------------------------------------------------------------------------------------------------ loop
    def stop(self, why: Literal["signal", "budget"]) -> None:
        """No new cell is started; those that run end where they can be resumed."""
        self.stopping = self.stopping or why
        if self.pool is not None:
            self.pool.stop()

    def climb(self, *, retry_failed: bool) -> None:
        """Seed by seed where arms may be dropped in between, else all at once."""
        reached = 0
        for seeds in rungs(self.experiment):
            reached += len(seeds)
            self.waiting = deque(_pending(self.experiment, self.folder, seeds, retry_failed=retry_failed)[0])
            self.loop()
            if self.stopping or self.waiting:
                return
            study = load_study(self.folder)
            decided = decide(study, reached)
            self.done += drop(study, decided)
            for arm, because in decided.items():
                events.decision("drop", chose=arm, among=[one.name for one in self.experiment.arms()], because=because)
                self._say(f"dropped {arm}: {because}")

    def loop(self) -> None:
        """Until everything that waits has ended, or nothing may be started any more."""
        pool = self.pool
        assert pool is not None
        while self.waiting or self.active:
            while len(self.active) < pool.size and not self.stopping and (job := self._next()) is not None and self._affordable(job):
                self.waiting.remove(job)
                if job.members and (failure := _lost_member(job)):
                    self._failure(job, failure)
                else:
                    self._start(job)
            if not self.active:
                break
            for message in pool.messages(WAIT_S):
                self.heard(message)
            self.check_budget()

    def _next(self) -> Job | None:
        """The first job that can be done now: an ensemble's once all its members have ended."""
        open_ = {job.id for job in self.waiting} | self.active.keys() if any(job.members for job in self.waiting) else set[str]()
        return next((job for job in self.waiting if open_.isdisjoint(job.members.values())), None)

    def _start(self, job: Job) -> None:
        assert self.pool is not None
        self.active[job.id] = job
        self._running[job.id] = (time.monotonic(), 0)
        self._begun.discard(job.id)
        self._alive.discard(job.id)
        self._say(f"started {job.id}")
        self.pool.submit(job)

    def heard(self, message: Message) -> None:
        """One message of the pool."""
        job = self.active.get(str(message["id"]))
        if job is None:
            return
        spent = cast("dict[str, int]", message.get("spent") or {})
        if message["kind"] == "progress":
            since, _ = self._running[job.id]
            self._running[job.id] = (since, spent["train_tokens"] + spent["asked_tokens"])
            self._alive.add(job.id)
            self._stillborn = 0
            if message.get("begun"):
                self._begun.add(job.id)
                self._early[job.id] = 0
            self._further(job, spent)
            self._say(f"{job.id}: step {spent['steps']}" + (f", {spent['rows']} answers" if spent["rows"] else ""))
            self.check_budget()
            return
        del self.active[job.id]
        self._account(job, message)
        match message["kind"]:
            case "done":
                self._ended(job, "done")
            case "failed":
                self._failure(job, cast("dict[str, Json]", message["failure"]))
            case "died":
                self._died(job, message)
            case _:  # stopped
                self._further(job, spent)
                if not self.stopping and self.pool is not None and self.pool.separate:
                    self._died(job, message)  # a signal to the worker alone
                elif not self.stopping:
                    self.stop("signal")  # in this process the trainer hears the signal, not the runner

    def _further(self, job: Job, spent: Mapping[str, int]) -> None:
        reached = spent.get("steps", 0) + spent.get("rows", 0)
        if reached > self._best.get(job.id, 0):
            self._best[job.id] = reached
            self._deaths[job.id] = 0

    def _account(self, job: Job, message: Message) -> None:
        since, tokens = self._running.pop(job.id)
        times = cast("dict[str, Json]", message.get("times") or {"train_s": time.monotonic() - since, "eval_s": 0.0, "train_tokens": tokens, "asked_tokens": 0})
        row: dict[str, Json] = {"id": job.id, "kind": job.kind, "ended": message["kind"], **times}
        self._timings.append(row)
        seconds, used = (sum(float(cast("float", times[key])) for key in keys) for keys in (("train_s", "eval_s"), ("train_tokens", "asked_tokens")))
        self._used = self._used.plus(seconds, used)

    def _ended(self, job: Job, status: str) -> None:
        self.done += 1
        events.emit("experiment.cell", id=job.id, kind=job.kind, arm=job.arm, seed=job.seed, data=job.data.key, status=status)
        self._say(f"{status} {job.id}")

    def _failure(self, job: Job, failure: Mapping[str, Json]) -> None:
        self._failed[job.id] = self._failed.get(job.id, 0) + 1
        if failure.get("passing") and self._failed[job.id] <= self.experiment.retries:
            self.waiting.appendleft(job)
            return
        message = str(failure["message"]).replace(str(self.folder.absolute()), ".")
        body = {
            "format_version": 1, "id": job.id, "arm": job.arm if job.kind == "cell" else "base", "seed": job.seed if job.kind == "cell" else 0,
            "data": job.data.key, "status": "failed", "failure": {"error": failure["error"], "message": message},
        }  # fmt: skip
        files.write_json(result_path(self.folder, "base" if job.kind == "base" else "cell", job.id), body)
        self._ended(job, "failed")

    def _died(self, job: Job, message: Message) -> None:
        if job.id in self._begun:
            self._deaths[job.id] = self._deaths.get(job.id, 0) + 1
        elif job.id in self._alive:
            self._early[job.id] = self._early.get(job.id, 0) + 1
        else:
            self._stillborn += 1
        if self._stillborn >= STILLBORN:
            raise ExperimentError(
                f"{STILLBORN} workers in a row ended before they began anything, the last with {message.get('code')}. "
                f"See {str(self.folder / 'workers.log')!r}; finished cells are kept, and resume (--resume) goes on."
            )
        if self._deaths.get(job.id, 0) < DEATHS and self._early.get(job.id, 0) < EARLY:
            self.waiting.appendleft(job)
            return
        how = f"exit code {message.get('code')}" if message["kind"] == "died" else "a signal"
        times = self._deaths.get(job.id, 0) + self._early.get(job.id, 0)
        message_text = f"Its worker ended {times} times without getting any further; the last time with {how}."
        self._failure(job, {"error": "WorkerDied", "message": message_text})

    def _say(self, what: str) -> None:
        if self._tell_user is not None:
            self._tell_user(self.done, self.total, what)


def _lost_member(job: Job) -> dict[str, Json]:
    """Why an ensemble's cell cannot be: the first member without a result, as a failure; empty where all have one."""
    for arm, identity in job.members.items():
        result = read_result(result_path(job.folder, "cell", identity))
        if result is None or result["status"] != "done":
            failure = cast("Mapping[str, Json]", (result or {}).get("failure") or {})
            told = f"{failure.get('error')}: {failure.get('message')}" if failure else "it was dropped, or has not run"
            return {"error": "MemberFailed", "message": f"Its member {arm!r} (cell {identity}) has no result: {told}", "passing": False}
    return {}


def _pending(experiment: Experiment, folder: Path, seeds: tuple[int, ...], *, retry_failed: bool) -> tuple[list[Job], int]:
    """(jobs of these seeds without a result, how many have one); a failure counts as a result unless it is to be tried again."""
    found: list[Job] = []
    cells = [cell for cell in experiment.cells() if cell.seed in seeds]
    jobs = [job_for(experiment, cell, folder, "base") for cell in {cell.base: cell for cell in cells}.values()]
    jobs += [job_for(experiment, cell, folder, "cell") for cell in cells]
    for job in jobs:
        result = read_result(result_path(folder, "base" if job.kind == "base" else "cell", job.id))
        if result is None or (retry_failed and result["status"] == "failed"):
            found.append(job)
    return found, len(jobs) - len(found)


def _pool(executor: str, jobs: int, together: int, runner: _Runner) -> Pool:
    threads = runner.experiment.threads
    if executor == "ray":
        from .ray_pool import RayWorkers

        return RayWorkers(max(1, jobs), threads, together)
    return Workers(jobs, threads, runner.folder / "workers.log", together) if jobs else InProcess(runner.heard)


def _prepare(experiment: Experiment, folder: Path, *, resume: bool) -> None:
    """The folder takes the plan, loses what a killed run left half written, and says what was found and where it runs."""
    claim(folder, full_plan(experiment), resume=resume)
    for place in (folder, folder / CELLS, folder / BASES):
        files.sweep(place)
    note_leaks(experiment, folder)
    if not (folder / "environment.json").exists():
        files.write_json(folder / "environment.json", describe_environment())


def run(
    experiment: Experiment,
    folder: str | Path,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    jobs: int = 1,
    together: int = 1,
    executor: Literal["local", "ray"] = "local",
    progress: Told | None = None,
) -> Study:
    """Runs every cell that has no result yet and gives the study. What fails is recorded and does not end the study.

    Result files hold no times, so that a study that was killed and resumed is the same, byte by byte, as one that was not.

    Args:
        folder: of the study; with Ray on several machines, one that all of them see.
        resume: go on with the study that is there.
        retry_failed: run cells again whose failure is on file.
        jobs: worker processes (or Ray actors); 0 runs the cells in this process, where losses and scorers registered in it are known.
        together: cells that train side by side in one process, sharing its backends and so the memory of their base model.
        executor: "local", or "ray" (needs the extra `[ray]`).
        progress: called when anything happens.

    Returns:
        The study; its `stopped` is True where SIGINT or SIGTERM ended it early.

    Raises:
        ConfigError: the folder holds a study and `resume` was not asked; or a setting is out of range.
        PlanChangedError: it holds a study of another plan; the keys that differ are named.
        BudgetExceeded: finished cells are kept; a larger budget goes on with `resume`.
        LockedError: another process runs the study.

    Emits:
        `experiment.run`, a span above the cells' own; `experiment.started`, `.estimated` with a budget, `.cell` for each that ends, `.done`.
    """
    if jobs < 0 or together < 1 or (together > 1 and not jobs) or executor not in ("local", "ray"):
        given = f"jobs is {jobs!r}, together {together!r} and executor {executor!r}"
        raise ConfigError(f"{given}; expected at least 0 jobs (1 with together), at least 1 together, and 'local' or 'ray'.")
    folder = Path(folder)
    with files.lock(folder / LOCK, "study"), events.span("experiment.run", experiment=experiment.name):
        _prepare(experiment, folder, resume=resume)
        pending, done = _pending(experiment, folder, experiment.seeds, retry_failed=retry_failed)
        events.emit("experiment.started", experiment=experiment.name, cells=len(pending) + done, pending=len(pending))
        runner = _Runner(experiment, folder, len(pending), done, progress)
        with contextlib.closing(runner), stop_on_signal(lambda: runner.stop("signal")):
            if pending and experiment.budget.limited:
                runner.plan_costs(calibrated(experiment, folder, jobs))
            if pending and not runner.stopping:
                runner.pool = _pool(executor, jobs, together, runner)
                runner.climb(retry_failed=retry_failed)
        study = replace(load_study(folder), stopped=runner.stopping == "signal", experiment=experiment)
        counts: dict[str, Json] = {status: len(study.of(status)) for status in ("done", "failed", "pending", "dropped")}
        events.emit("experiment.done", experiment=experiment.name, stopped=study.stopped, **counts)
        if runner.over and not study.stopped and not study.finished:
            raise BudgetExceeded(
                f"The budget of {experiment.name!r} is used up: {runner.over}. {len(study.of('done'))} of {len(study.cells)} cells are finished and kept. "
                "Raise the budget and go on with resume (--resume)."
            )
    return study

"""How far a study is: its cells as a matrix of arms over data sets and seeds, each with its state and its primary score.

It reads the plan and the small result files, and no rows and no checkpoints, so that it may be called often while the study runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from .. import files
from ..config import from_dict
from ..errors import CorruptError, CrucibleError, NotFoundError
from ..records import Json, record
from .arms import Cell
from .design import Experiment
from .study import FINDINGS, LOCK, PLAN, TIMINGS, read_result, result_path, work_folder

__all__ = ["CellState", "StudyOverview", "study_overview"]


@record
class CellState:
    """One cell. `score` is its primary estimate; `why` says what is wrong where it failed or why it was dropped; `run` is its training's folder, if any."""

    id: str
    arm: str
    seed: int
    data: str
    status: Literal["done", "failed", "running", "pending", "dropped", "broken"]
    score: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""
    run: Path | None = None


@record
class StudyOverview:
    """A study as it stands. `columns` are (data set, seed); `busy_s` and `tokens` are of all attempts that ended."""

    name: str
    folder: Path
    primary: str
    arms: tuple[str, ...]
    columns: tuple[tuple[str, int], ...]
    cells: Mapping[tuple[str, str, int], CellState]
    declared: int
    running: bool
    analysed: bool
    busy_s: float
    tokens: float
    created_at: float

    def count(self, status: str) -> int:
        """How many cells are in that state."""
        return sum(cell.status == status for cell in self.cells.values())

    @property
    def finished(self) -> bool:
        """Whether every cell has a result, a recorded failure, or a reason for which it was dropped."""
        return self.count("done") + self.count("failed") + self.count("dropped") == len(self.cells)


def _number(value: Json) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _state(folder: Path, cell: Cell, primary: str) -> CellState:
    run = work_folder(folder, "cell", cell.id) / "run"
    there = run if (run / "run.json").is_file() else None

    def made(status: Literal["done", "failed", "running", "pending", "dropped", "broken"], **more: object) -> CellState:
        return CellState(id=cell.id, arm=cell.arm, seed=cell.seed, data=cell.data, status=status, run=there, **more)  # type: ignore[arg-type] # checked by the record

    try:
        body = read_result(result_path(folder, "cell", cell.id))
    except CrucibleError as error:
        return made("broken", why=str(error))
    if body is None:
        return made("running" if files.held(run / ".lock") else "pending")
    if body["status"] == "failed":
        failure = cast("Mapping[str, Json]", body.get("failure") or {})
        return made("failed", why=f"{failure.get('error', 'Error')}: {failure.get('message', '')}")
    if body["status"] == "dropped":
        return made("dropped", why=str(body.get("because", "")))
    estimates = cast("Mapping[str, Mapping[str, Json]]", body.get("estimates") or {})
    found = estimates.get(primary, {})
    return made("done", score=_number(found.get("value")), low=_number(found.get("low")), high=_number(found.get("high")))


def study_overview(folder: str | Path) -> StudyOverview:
    """A study's state now; needs no lock.

    Raises:
        NotFoundError: there is no study.
        CorruptError: its plan is damaged; a damaged cell is a cell of status "broken".
    """
    folder = Path(folder)
    path = folder / PLAN
    if not path.is_file():
        raise NotFoundError(f"{str(folder)!r} holds no study ({PLAN} is missing). Start one: crucible run experiment.toml --folder {folder}")
    plan = files.read_json(path)
    if not isinstance(plan, dict) or not isinstance(plan.get("experiment"), dict):
        raise CorruptError(f"{str(path)!r} is no plan of a study. Restore it, or run the study again in another folder.")
    experiment = from_dict(Experiment, cast("dict[str, object]", plan["experiment"]))
    cells = experiment.cells()
    states = {(c.arm, c.data, c.seed): _state(folder, c, experiment.primary) for c in cells}
    rows = files.read_lines(folder / TIMINGS)

    def total(*keys: str) -> float:
        return sum(_number(row.get(key)) or 0.0 for row in rows for key in keys)

    return StudyOverview(
        name=experiment.name or folder.name, folder=folder, primary=experiment.primary, arms=tuple(dict.fromkeys(c.arm for c in cells)),
        columns=tuple(sorted(dict.fromkeys((c.data, c.seed) for c in cells))), cells=states, declared=len(experiment.hypotheses),
        running=files.held(folder / LOCK), analysed=(folder / FINDINGS).is_file(), busy_s=total("train_s", "eval_s"),
        tokens=total("train_tokens", "asked_tokens"), created_at=path.stat().st_mtime,
    )  # fmt: skip

"""A progress bar for the terminal, fed by the trainer's callbacks and by evaluations; silent where standard error is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .trainer import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bar", "progress_bar"]


class Bar:
    """What `progress_bar` yields: itself a callback for `Trainer`."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: Progress) -> None:
        """Shows a finished training step with its loss and speed."""
        if progress.kind == "step":
            note = f"loss {progress.metrics.get('train/loss', float('nan')):.4f}  {progress.tokens_per_s:,.0f} tokens/s"
            self.stage("training", progress.step, progress.total, note)

    def stage(self, name: str, done: int, total: int, note: str = "") -> None:
        """Shows how far some other work is."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, note=note)
        self._bar.update(self._tasks[name], completed=done, total=total, note=note)


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """Shows steps, loss, tokens/s and the time that is left while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield Bar(bar)

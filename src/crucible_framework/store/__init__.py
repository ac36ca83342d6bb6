"""What is kept on disk: runs, checkpoints, the model registry and artifacts. Importing it loads no torch."""

from __future__ import annotations

from .artifacts import Artifact, Artifacts
from .checkpoints import Checkpoints, load_checkpoint, step_name
from .models import Models, Stage
from .runs import Run, RunInfo, Status, list_runs, open_run, read_metrics, read_run

__all__ = [
    "Artifact",
    "Artifacts",
    "Checkpoints",
    "Models",
    "Run",
    "RunInfo",
    "Stage",
    "Status",
    "list_runs",
    "load_checkpoint",
    "open_run",
    "read_metrics",
    "read_run",
    "step_name",
]

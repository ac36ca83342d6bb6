"""What is kept on disk: runs, checkpoints, the model registry and artifacts, and the tracker over all of them. Importing it loads no torch."""

from __future__ import annotations

from .artifacts import Artifact, Artifacts
from .checkpoints import Checkpoints, load_checkpoint, step_name
from .exchange import copy_runs, export_runs, from_mlflow, import_runs
from .lineage import Ancestor
from .models import Models, Stage
from .run_files import RunInfo, Status, list_runs, read_metrics, read_run
from .runs import Run, open_run
from .share import pull, push
from .tracker import Comparison, Tracker

__all__ = [
    "Ancestor",
    "Artifact",
    "Artifacts",
    "Checkpoints",
    "Comparison",
    "Models",
    "Run",
    "RunInfo",
    "Stage",
    "Status",
    "Tracker",
    "copy_runs",
    "export_runs",
    "from_mlflow",
    "import_runs",
    "list_runs",
    "load_checkpoint",
    "open_run",
    "pull",
    "push",
    "read_metrics",
    "read_run",
    "step_name",
]

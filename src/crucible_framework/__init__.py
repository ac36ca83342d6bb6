"""Crucible: fine-tune LoRA adapters with your own losses, ask them, and say with honest statistics which is better.

Importing this package loads neither torch nor any model library; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import errors, events, losses
    from .backends import connect
    from .config import fingerprint, load_toml
    from .dashboard import Dashboard
    from .data import Batches, datasets, load_dataset, load_preferences, render
    from .demo import run_demo
    from .evaluation import compare, evaluate, load_evaluation, scorers
    from .experiments import Experiment, analyse, load_experiment, load_study
    from .experiments import run as run_experiment
    from .inference import ChoiceSampler, Ensemble, HedgedSampler, Pool, RoutedSampler, generate
    from .losses import combine
    from .losses import register as register_loss
    from .losses import resolve as resolve_loss
    from .protocols import Backend, Loss, Sampler, TrainingSession
    from .records import (
        AdamConfig,
        Batch,
        Checkpoint,
        Completion,
        Dataset,
        Datum,
        Evaluation,
        Example,
        Finding,
        LoraConfig,
        Message,
        ModelVersion,
        SamplingParams,
        TrainConfig,
        TrainingResult,
    )
    from .reports import write_report
    from .stats import bootstrap, compare_groups, mean_estimate, paired_difference, plan, seeds_and_items, wilson
    from .store import Artifacts, Checkpoints, Models, Tracker, list_runs, load_checkpoint, read_metrics
    from .training import Trainer, progress_bar

_HOMES = {
    "backends": ("connect",),
    "config": ("fingerprint", "load_toml"),
    "dashboard": ("Dashboard",),
    "data": ("Batches", "datasets", "load_dataset", "load_preferences", "render"),
    "demo": ("run_demo",),
    "evaluation": ("compare", "evaluate", "load_evaluation", "scorers"),
    "experiments": ("Experiment", "analyse", "load_experiment", "load_study"),
    "inference": ("ChoiceSampler", "Ensemble", "HedgedSampler", "Pool", "RoutedSampler", "generate"),
    "losses": ("combine",),
    "protocols": ("Backend", "Loss", "Sampler", "TrainingSession"),
    "records": (
        "AdamConfig", "Batch", "Checkpoint", "Completion", "Dataset", "Datum", "Evaluation", "Example", "Finding", "LoraConfig", "Message",
        "ModelVersion", "SamplingParams", "TrainConfig", "TrainingResult",
    ),
    "reports": ("write_report",),
    "stats": ("bootstrap", "compare_groups", "mean_estimate", "paired_difference", "plan", "seeds_and_items", "wilson"),
    "store": ("Artifacts", "Checkpoints", "Models", "Tracker", "list_runs", "load_checkpoint", "read_metrics"),
    "training": ("Trainer", "progress_bar"),
}  # fmt: skip
_WHERE = {name: (home, name) for home, names in _HOMES.items() for name in names}
_WHERE |= {
    "run_experiment": ("experiments", "run"),
    "register_loss": ("losses", "register"),
    "resolve_loss": ("losses", "resolve"),
    **{name: (name, "") for name in ("errors", "events", "losses")},
}

__all__ = [
    "AdamConfig",
    "Artifacts",
    "Backend",
    "Batch",
    "Batches",
    "Checkpoint",
    "Checkpoints",
    "ChoiceSampler",
    "Completion",
    "Dashboard",
    "Dataset",
    "Datum",
    "Ensemble",
    "Evaluation",
    "Example",
    "Experiment",
    "Finding",
    "HedgedSampler",
    "LoraConfig",
    "Loss",
    "Message",
    "ModelVersion",
    "Models",
    "Pool",
    "RoutedSampler",
    "Sampler",
    "SamplingParams",
    "Tracker",
    "TrainConfig",
    "Trainer",
    "TrainingResult",
    "TrainingSession",
    "analyse",
    "bootstrap",
    "combine",
    "compare",
    "compare_groups",
    "connect",
    "datasets",
    "errors",
    "evaluate",
    "events",
    "fingerprint",
    "generate",
    "list_runs",
    "load_checkpoint",
    "load_dataset",
    "load_evaluation",
    "load_experiment",
    "load_preferences",
    "load_study",
    "load_toml",
    "losses",
    "mean_estimate",
    "paired_difference",
    "plan",
    "progress_bar",
    "read_metrics",
    "register_loss",
    "render",
    "resolve_loss",
    "run_demo",
    "run_experiment",
    "scorers",
    "seeds_and_items",
    "wilson",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, attribute = _WHERE[name]
    module = import_module(f"{__name__}.{home}")
    value: object = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

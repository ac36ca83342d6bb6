"""What the tests of experiments share: a study of seconds on the fake backend, and what must be the same bytes in two studies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from crucible_framework.experiments import DataPlan, EnsemblePlan, Experiment, Hypothesis
from crucible_framework.records import AdamConfig, LoraConfig, SamplingParams, TrainConfig

TRAIN = TrainConfig(base_model="tiny", max_steps=6, batch_size=4, checkpoint_interval=2, keep=1, adam=AdamConfig(lr=5e-2), lora=LoraConfig(rank=2))


def small(**changes: object) -> Experiment:
    """Two ranks × two seeds on a few claims."""
    plain: dict[str, object] = {
        "name": "small",
        "train": TRAIN,
        "matrix": {"lora.rank": (2, 8)},
        "seeds": (0, 1),
        "data": (DataPlan(train_limit=24, test_limit=18),),
        "backend": "fake",
        "threads": 1,
        "perplexity": True,
        "primary": "target_nll",
        "sampling": SamplingParams(max_tokens=2, temperature=0.0),
        "hypotheses": (Hypothesis(better="lora.rank=8", than="lora.rank=2", because="a higher rank can say more"),),
    }
    return Experiment(**{**plain, **changes})  # type: ignore[arg-type]


VOTING: dict[str, object] = {"primary": "label_accuracy", "ensembles": (EnsemblePlan(name="both", members=("lora.rank=2", "lora.rank=8")),)}
"""Changes that give the small study an ensemble of its two arms."""


@pytest.fixture
def experiment() -> Experiment:
    """The small study."""
    return small()


SAME = (
    "plan.json",
    "findings.json",
    "cells/*.json",
    "cells/*/votes.jsonl",
    "bases/*.json",
    "cells/*/eval/*",
    "bases/*/eval/*",
    "cells/*/run/metrics.jsonl",
    "cells/*/run/config.json",
    "cells/*/run/data.json",
    "cells/*/run/checkpoints/*/*.safetensors",
    "cells/*/run/checkpoints/*/state.json",
)
"""Everything that says what came out; times are in none of it."""


def result_bytes(folder: Path) -> dict[str, str]:
    """File → sha256 of every result file."""
    found = sorted({path for pattern in SAME for path in folder.glob(pattern) if path.is_file() and path.name != ".lock"})
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def made() -> Callable[..., Experiment]:
    """Makes a small study with changes."""
    return small

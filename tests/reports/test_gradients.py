"""What gradient hooks recorded in a real run stands in its report, with the run's own numbers; without hooks nothing does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

import crucible_framework as cf
from crucible_framework.reports import words

if TYPE_CHECKING:
    from tests.reports.conftest import Page

Report: TypeAlias = "Callable[[Path], tuple[Page, str]]"
TITLES = (
    "Gradient norm by layer", "Gradient norm by block", "Cosine between steps", "Gradient norms of single examples", "Magnitudes of gradient entries",
    "Gradient health",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs") / "hooks"
    hooks = ("norms", "flow", "cosine", "distribution", "health")
    config = cf.TrainConfig(base_model="tiny", max_steps=4, hooks=hooks, example_norms=True, lora=cf.LoraConfig(rank=2), max_length=64)
    with cf.connect("local") as backend, cf.Trainer(backend, config, folder=made) as trainer:
        trainer.train(cf.load_dataset("minifact", split="train", limit=8))
    return made


def test_every_record_is_shown_with_its_numbers(folder: Path, report: Report) -> None:
    page, markdown = report(folder)
    row = next(row for row in cf.read_metrics(folder) if row["step"] == 4 and "train/loss" in row)
    for title in TITLES:
        assert title in page.text(), title
        assert title in markdown, title
    for name, value in row.items():
        if name.startswith(("grad/norm/", "grad/flow/", "grad/cosine/", "grad/example_norm/max")):
            assert isinstance(value, float)
            assert words.number(value) in markdown, name
    assert "layers.0.self_attn.q_proj" in markdown
    assert "| Vanishing | 0 of 4 | 0 |" in " ".join(markdown.split())


def test_a_run_without_hooks_says_nothing_of_them(make_run: Callable[..., Path], report: Report, tmp_path: Path) -> None:
    page, markdown = report(make_run(tmp_path / "plain"))
    for title in TITLES:
        assert title not in page.text()
        assert title not in markdown

"""Chat SFT on the cookbook's own conversations: it learns, and a run in two parts is the run in one."""

from __future__ import annotations

import statistics

import pytest

from .cookbook_for_tests import RATE, SMALL, TINY, Cookbook, Figures, Lesson


def learns_and_resumes(cookbook: Cookbook, model: str, rate: float, lesson: Lesson, figures: Figures) -> None:
    log = f"{model.replace('/', '-')}-parts"
    nll = [row["train_mean_nll"] for row in lesson.rows]
    figures("negative log-likelihood", [round(value, 3) for value in nll])
    assert [row["step"] for row in lesson.rows] == list(range(8))
    assert nll[-1] < 0.8 * nll[0]
    assert statistics.mean(nll[4:]) < 0.8 * statistics.mean(nll[:4]), "the same conversations, a second time"
    cookbook.chat(model, log, lesson.start, rate, 1)
    parts = cookbook.chat(model, log, lesson.start, rate, 2)
    for name in ("step", "train_mean_nll", "grad_norm"):
        assert [row[name] for row in parts] == [row[name] for row in lesson.rows], name


@pytest.mark.timeout(1800)
def test_chat_sft(cookbook: Cookbook, figures: Figures) -> None:
    start = cookbook.fresh(TINY)
    learns_and_resumes(cookbook, TINY, 1e-2, Lesson(start, cookbook.chat(TINY, "tiny", start, 1e-2, 2)), figures)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_chat_sft_on_the_default_model(small: Cookbook, lesson: Lesson, figures: Figures) -> None:
    learns_and_resumes(small, SMALL, RATE, lesson, figures)

"""On-policy distillation from a teacher that the cookbook's own chat SFT made."""

from __future__ import annotations

import statistics

import pytest

from .cookbook_for_tests import SMALL, Cookbook, Figures


@pytest.mark.slow
@pytest.mark.usefixtures("lesson")
@pytest.mark.timeout(3600)
def test_on_policy_distillation(small: Cookbook, figures: Figures) -> None:
    """The student comes nearer to the teacher on what it says itself."""
    teacher = [f"teacher_model={SMALL}", f"teacher_checkpoint={small.checkpoint('lesson', 'sampler')}"]
    sizes = ["groups_per_batch=16", "group_size=2", "max_tokens=16", "learning_rate=1e-3", "lora_rank=16", "max_steps=8", "eval_every=0"]
    rows = small.recipe("distillation.on_policy_distillation", SMALL, "distilled", "dataset=deepmath", *teacher, *sizes)
    gaps = [row["teacher_kl"] for row in rows]
    figures("reverse KL to the teacher", [round(gap, 3) for gap in gaps])
    assert len(rows) == 8
    assert statistics.mean(gaps[-2:]) < 0.8 * gaps[0]

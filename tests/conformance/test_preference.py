"""DPO, whose loss runs in the client, against a snapshot of the start."""

from __future__ import annotations

import math
import statistics

import pytest

from .cookbook_for_tests import SMALL, Cookbook, Figures


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_dpo(small: Cookbook, figures: Figures) -> None:
    """It begins at ln 2, where both models are one, and comes to prefer the answers to the question."""
    rows = small.recipe("preference.dpo.train", SMALL, "dpo", "batch_size=8", "learning_rate=3e-4", "lr_schedule=constant", "max_steps=6")
    figures("loss, accuracy, margin", [tuple(round(row[name], 3) for name in ("dpo_loss", "accuracy", "margin")) for row in rows])
    assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert abs(rows[0]["margin"]) < 1e-3
    assert statistics.mean(row["dpo_loss"] for row in rows[-2:]) < 0.85 * rows[0]["dpo_loss"]
    assert statistics.mean(row["accuracy"] for row in rows[-2:]) > 0.7

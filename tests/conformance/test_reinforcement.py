"""Reinforcement learning: arithmetic with every loss and in every mode, and the games of several turns."""

from __future__ import annotations

import statistics

import pytest

from .cookbook_for_tests import SMALL, TINY, Cookbook, Figures, Row

LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")


def sums(cookbook: Cookbook, figures: Figures, model: str, log: str, *settings: str) -> list[Row]:
    """Sums, in answers of a few tokens: right is 1, and a turn that does not end −0.1. Sampler and trainer must agree on every token."""
    rows = cookbook.recipe("math_rl.train", model, log, "group_size=4", "lora_rank=16", "eval_every=0", *settings)
    figures("reward", [round(row["env/all/reward/total"], 3) for row in rows])
    figures("answers that end", [round(value, 2) for value in ends(rows)])
    figures("sampler and trainer, half the mean square of log-probs' differences", max(row["optim/kl_sample_train_v2"] for row in rows))
    return rows


def ends(rows: list[Row]) -> list[float]:
    """The share of answers that end, per step."""
    return [row["env/all/format"] for row in rows]


@pytest.mark.timeout(1800)
def test_arithmetic(cookbook: Cookbook, figures: Figures) -> None:
    """The built-in model, which says random bytes, learns with the recipe's default loss to end its turn."""
    rows = sums(cookbook, figures, TINY, "sums", "groups_per_batch=16", "max_tokens=32", "learning_rate=1e-2", "max_steps=10")
    assert len(rows) == 10
    assert max(row["optim/kl_sample_train_v2"] for row in rows) < 1e-8
    assert ends(rows)[0] < 0.4
    assert max(ends(rows)) > 0.6


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "mode", ["max_steps_off_policy=1", "stream_minibatch_config.groups_per_batch=16 stream_minibatch_config.num_minibatches=2", "num_substeps=2"]
)
def test_modes_of_rollouts(cookbook: Cookbook, figures: Figures, mode: str) -> None:
    rows = sums(cookbook, figures, TINY, f"mode-{len(mode)}", "groups_per_batch=16", "max_tokens=32", "learning_rate=1e-2", "max_steps=10", *mode.split())
    assert ends(rows)[0] < 0.4
    assert max(ends(rows)) > 0.6


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("loss", LOSSES)
def test_arithmetic_on_the_default_model(small: Cookbook, figures: Figures, loss: str) -> None:
    rows = sums(small, figures, SMALL, f"sums-{loss}", "groups_per_batch=8", "max_tokens=6", "learning_rate=3e-4", "max_steps=4", f"loss_fn={loss}")
    assert max(row["optim/kl_sample_train_v2"] for row in rows) < 1e-6
    assert statistics.mean(ends(rows)[-2:]) > ends(rows)[0] + 0.2, "four steps teach to end in time; which sums come right is chance"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_guess_the_number(small: Cookbook, figures: Figures) -> None:
    """Ten turns at the most; a guess in another form than the game's costs 1."""
    game = ["batch_size=1", "group_size=6", "max_tokens=8", "learning_rate=5e-4", "eval_every=0", "max_steps=4"]
    rows = small.recipe("multiplayer_rl.guess_number.train", SMALL, "guess", *game)
    rewards = [row["env/all/reward/total"] for row in rows]
    figures("reward", [round(value, 2) for value in rewards])
    figures("turns", [row["env/all/turns_per_episode"] for row in rows])
    assert len(rows) == 4
    assert statistics.mean(rewards[-2:]) > rewards[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_questions(small: Cookbook, figures: Figures) -> None:
    """A second model answers; a model of this size does not find the word, so that what shows is twenty turns with it."""
    game = ["batch_size=1", "group_size=2", "num_epochs=1", "max_tokens=12", "eval_every=0", "max_steps=1"]
    rows = small.recipe("multiplayer_rl.twenty_questions.train", SMALL, "questions", *game)
    figures("reward, turns", [(row["env/all/reward/total"], row["env/all/turns_per_episode"]) for row in rows])
    assert len(rows) == 1
    assert all(row["env/all/turns_per_episode"] == 20 or row["env/all/reward/total"] > 0 for row in rows)

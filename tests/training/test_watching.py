"""Samples as training goes: the same examples at every checkpoint, of exactly those weights, and once per step after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

import crucible_framework as cf
from crucible_framework import events
from crucible_framework.errors import ConfigError
from crucible_framework.training import Trainer, read_watched, watch


def test_examples_are_answered_at_every_checkpoint_by_its_own_weights(tmp_path: Path) -> None:
    config = cf.TrainConfig(base_model="tiny", max_steps=6, batch_size=4, checkpoint_interval=3, adam=cf.AdamConfig(lr=0.5))
    dataset = cf.load_dataset("minifact", split="train", limit=12)
    params = cf.SamplingParams(max_tokens=8, temperature=0.0)
    with cf.connect("fake") as backend:
        callback = watch(dataset.examples[:2], lambda: trainer.sampler(), tmp_path / "run", params=params)  # noqa: PLW0108 - made after it
        trainer = Trainer(backend, config, folder=tmp_path / "run", callbacks=(callback,))
        with events.collect() as seen, trainer:
            trainer.train(dataset)
            last = trainer.sampler().sample(dataset.examples[0].prompt, params).result()[0].text
    first, second = read_watched(tmp_path / "run")
    assert (first.id, second.id) == (dataset.examples[0].id, dataset.examples[1].id)
    assert first.target == dataset.examples[0].target
    assert [step for step, _ in first.answers] == [3, 6]
    assert first.answers[-1][1] == last
    assert [event["count"] for event in seen if event["name"] == "training.watched"] == [2, 2]


def test_of_a_step_done_twice_the_later_answer_counts(tmp_path: Path) -> None:
    rows = ['{"step":1,"id":"a","completion":"old"}', '{"step":1,"id":"a","completion":"new"}', '{"id":"b"}', '{"step":2,"id":"a","completion":"x"}', "{torn"]
    (tmp_path / "watched.jsonl").write_text("\n".join(rows))
    (only,) = read_watched(tmp_path)
    assert only.answers == ((1, "new"), (2, "x"))
    assert read_watched(tmp_path / "none") == ()


def test_nothing_to_watch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 examples"):
        watch((), lambda: None, tmp_path)  # type: ignore[arg-type, return-value] # never called

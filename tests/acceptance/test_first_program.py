"""The first program of the design, as written, on the real base model and real SciFact; and what happens where the weights cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

import crucible_framework as cf


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_program_on_a_real_model_and_real_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data: Path) -> None:
    monkeypatch.setenv("CRUCIBLE_DATA", str(real_data))
    monkeypatch.chdir(tmp_path)
    config = cf.TrainConfig(base_model="smollm2-135m", lora=cf.LoraConfig(rank=16), max_steps=10)
    dataset = cf.load_dataset("scifact", split="train")
    with cf.connect("local") as backend, cf.Trainer(backend, config, folder="runs/first") as trainer:
        result = trainer.train(dataset)
        checkpoint = trainer.save("test-run")
        outputs = cf.generate(trainer.sampler(), "Test prompt")
    assert result.final_loss < result.initial_loss
    assert outputs
    assert outputs[0].text
    assert checkpoint.local_path is not None
    assert checkpoint.local_path.exists()


def test_weights_that_cannot_be_had_fail_at_once_with_the_fix(tmp_path: Path) -> None:
    config = cf.TrainConfig(base_model="meta-llama/Llama-3.1-8B", max_steps=1)
    with cf.connect("local") as backend, cf.Trainer(backend, config, folder=tmp_path / "run") as trainer, pytest.raises(cf.errors.BackendError) as failure:
        trainer.train(cf.load_dataset("minifact", split="train", limit=4))
    assert "meta-llama/Llama-3.1-8B" in str(failure.value)
    assert "smollm2-135m" in str(failure.value)

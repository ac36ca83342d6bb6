"""The one loop: what it gives, what it leaves on disk, how it stops, how it goes on."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from torch import Tensor

from crucible_framework import events
from crucible_framework.config import to_dict
from crucible_framework.errors import CapabilityError, ConfigError, CorruptError, CrucibleError, DataError, LockedError, NumericError, UnknownNameError
from crucible_framework.files import read_lines
from crucible_framework.protocols import Backend, Report
from crucible_framework.records import AdamConfig, Capabilities, Dataset, Datum, LoraConfig, TrainConfig
from crucible_framework.store import Checkpoints, read_run
from crucible_framework.training import Progress, Trainer

CONFIG = TrainConfig(base_model="fake", max_steps=12, checkpoint_interval=4, adam=AdamConfig(lr=0.05), max_length=2048)


def test_training_lowers_the_loss_and_leaves_a_whole_run_behind(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    folder = tmp_path / "run"
    with events.collect() as seen, Trainer(backend, CONFIG, folder=folder, command="crucible train x") as trainer:
        result = trainer.train(claims)
    assert result.final_loss < result.initial_loss
    assert (result.steps, result.stopped, result.folder) == (12, "max_steps", folder)
    assert result.checkpoint is not None
    assert result.checkpoint.step == 12
    rows = read_lines(folder / "metrics.jsonl")
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert sum(int(str(row["train/tokens"])) for row in steps) == result.tokens
    assert all(float(str(row["grad/global_norm"])) > 0 for row in steps)
    assert {row["step"] for row in rows if "probe/loss" in row} == {0, 12}
    assert [row["step"] for row in read_lines(folder / "timings.jsonl")] == list(range(1, 13))
    info = read_run(folder)
    assert info.status == "done"
    assert info.environment is not None
    assert info.environment["command"] == "crucible train x"
    saved = Checkpoints(folder / "checkpoints").list()
    assert [c.step for c in saved] == [4, 8, 12]
    assert saved[-1].metrics["train/loss"] == steps[-1]["train/loss"]
    assert "probe/loss" not in saved[-1].metrics, "it was taken before these weights"
    assert {"training.run", "training.step", "checkpoint.saved"} <= {str(event["name"]) for event in seen}


def test_the_learning_rate_follows_the_schedule(backend: Backend, claims: Dataset) -> None:
    config = dataclasses.replace(CONFIG, warmup_steps=2, schedule="linear", max_steps=6)
    seen: list[float] = []
    with Trainer(backend, config, callbacks=[lambda progress: seen.append(progress.metrics["train/lr"])]) as trainer:
        trainer.train(claims)
    assert seen == pytest.approx([0.025, 0.05, 0.05, 0.0375, 0.025, 0.0125])


def test_accumulated_slices_equal_one_large_batch(backend: Backend, claims: Dataset) -> None:
    def losses(config: TrainConfig) -> list[float]:
        seen: list[float] = []
        with Trainer(backend, config, callbacks=[lambda progress: seen.append(progress.metrics["grad/global_norm"])]) as trainer:
            trainer.train(claims)
        return seen

    small = losses(dataclasses.replace(CONFIG, batch_size=4, accumulate=2, max_steps=5, lora=LoraConfig(dropout=0.0)))
    large = losses(dataclasses.replace(CONFIG, batch_size=8, accumulate=1, max_steps=5, lora=LoraConfig(dropout=0.0)))
    assert small == pytest.approx(large, rel=1e-4)


def test_epochs_end_training_before_max_steps(backend: Backend, claims: Dataset) -> None:
    kinds: list[str] = []
    config = dataclasses.replace(CONFIG, batch_size=10, epochs=2, max_steps=100)
    with Trainer(backend, config, callbacks=[lambda progress: kinds.append(progress.kind)]) as trainer:
        result = trainer.train(claims)
    assert (result.steps, result.stopped, result.epochs) == (8, "epochs", 2.0)
    assert kinds.count("epoch") == 2


def test_a_callback_stops_and_resume_finishes_with_the_same_bytes(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    def at_five(progress: Progress) -> str | None:
        return "stop" if progress.step == 5 else None

    with Trainer(backend, CONFIG, folder=tmp_path / "whole") as trainer:
        trainer.train(claims)
    with Trainer(backend, CONFIG, folder=tmp_path / "parts", callbacks=[at_five]) as trainer:  # type: ignore[list-item]
        result = trainer.train(claims)
    assert result.stopped == "callback"
    assert 5 <= result.steps < 12
    with Trainer(backend, CONFIG, folder=tmp_path / "parts", resume=True) as trainer:
        result = trainer.train(claims)
    assert (result.steps, result.stopped) == (12, "max_steps")
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "parts/checkpoints/00000012" / file).read_bytes() == (tmp_path / "whole/checkpoints/00000012" / file).read_bytes()


def test_resuming_a_finished_run_repeats_nothing(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    with Trainer(backend, CONFIG, folder=tmp_path) as trainer:
        first = trainer.train(claims)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with Trainer(backend, CONFIG, folder=tmp_path, resume=True) as trainer:
        again = trainer.train(claims)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (again.initial_loss, again.final_loss, again.tokens, again.steps) == (first.initial_loss, first.final_loss, first.tokens, first.steps)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    with Trainer(backend, CONFIG, folder=tmp_path) as trainer:
        trainer.train(claims)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    file = tmp_path / "checkpoints/00000012/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    steps: list[int] = []
    with Trainer(backend, CONFIG, folder=tmp_path, resume=True, callbacks=[lambda progress: steps.append(progress.step)]) as trainer:
        trainer.train(claims)
    assert steps[0] == 9
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_lost_metrics_are_noticed(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    with Trainer(backend, CONFIG, folder=tmp_path) as trainer:
        trainer.train(claims)
    (tmp_path / "metrics.jsonl").unlink()
    with Trainer(backend, CONFIG, folder=tmp_path, resume=True) as trainer, pytest.raises(CorruptError, match="no first metrics row"):
        trainer.train(claims)


def test_a_changed_configuration_names_its_keys(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    with Trainer(backend, CONFIG, folder=tmp_path) as trainer:
        trainer.train(claims)
    other = dataclasses.replace(CONFIG, lora=LoraConfig(rank=8), seed=7)
    with pytest.raises(ConfigError, match=r"lora\.rank.*seed"), Trainer(backend, other, folder=tmp_path, resume=True):
        pytest.fail("it must not open")
    with pytest.raises(CrucibleError, match="resume"), Trainer(backend, CONFIG, folder=tmp_path):
        pytest.fail("it must not open")


def test_a_folder_in_use_is_refused(tmp_path: Path, backend: Backend) -> None:
    with Trainer(backend, CONFIG, folder=tmp_path), pytest.raises(LockedError), Trainer(backend, CONFIG, folder=tmp_path, resume=True):
        pytest.fail("it must not open")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(tmp_path: Path, backend: Backend, claims: Dataset, number: signal.Signals) -> None:
    def send(progress: Progress) -> None:
        if progress.step == 3 and progress.kind == "step":
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with Trainer(backend, CONFIG, folder=tmp_path, callbacks=[send]) as trainer:
        result = trainer.train(claims)
    assert result.stopped == "signal"
    assert result.checkpoint is not None
    assert result.checkpoint.step == result.steps < 12
    assert signal.getsignal(number) is before
    assert read_run(tmp_path).status == "stopped"


def test_patience_ends_training(backend: Backend, claims: Dataset) -> None:
    config = dataclasses.replace(CONFIG, eval_interval=1, patience=2, max_steps=60, adam=AdamConfig(lr=5.0), checkpoint_interval=0)
    dev = dataclasses.replace(claims, examples=claims.examples[:5])
    with Trainer(backend, config) as trainer:
        result = trainer.train(claims, dev)
    assert result.stopped == "patience"
    assert result.steps < 60
    assert result.best_dev_loss is not None


def test_a_hook_sees_and_changes_gradients(backend: Backend, claims: Dataset) -> None:
    names: set[str] = set()

    def nothing(gradients: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
        names.update(gradients)
        report("largest", max(float(gradient.abs().max()) for gradient in gradients.values()))
        return {name: gradient * 0 for name, gradient in gradients.items()}

    rows: list[dict[str, float]] = []
    config = dataclasses.replace(CONFIG, adam=AdamConfig(lr=0.1, weight_decay=0.0), max_steps=3)
    with Trainer(backend, config, hook=nothing, callbacks=[lambda progress: rows.append(dict(progress.metrics))]) as trainer:  # type: ignore[arg-type]
        result = trainer.train(claims)
    assert names
    assert all(row["grad/largest"] > 0 for row in rows)
    assert result.final_loss == pytest.approx(result.initial_loss, abs=1e-6)


def test_a_numeric_failure_keeps_the_last_checkpoint(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    calls = 0

    def breaks(data: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        total = -sum((lp.sum() for lp in logprobs), start=logprobs[0].sum() * 0)
        return (total * float("nan") if calls > 9 else total), {}

    with pytest.raises(NumericError), Trainer(backend, CONFIG, folder=tmp_path, loss=breaks) as trainer:  # type: ignore[arg-type]
        trainer.train(claims)
    assert read_run(tmp_path).status == "failed"
    saved = Checkpoints(tmp_path / "checkpoints").latest(verified=True)
    assert 0 < saved.step < 12


def test_a_loss_that_needs_a_reference_gets_the_base_models(backend: Backend, claims: Dataset) -> None:
    config = dataclasses.replace(CONFIG, loss={"cross_entropy": 0.8, "kl": 0.2}, max_steps=6)
    rows: list[dict[str, float]] = []
    with Trainer(backend, config, callbacks=[lambda progress: rows.append(dict(progress.metrics))]) as trainer:
        trainer.train(claims)
    assert rows[0]["train/loss/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(rows[-1]["train/loss/kl"]) > 1e-4


def test_saving_under_a_name_pins_it(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    with Trainer(backend, dataclasses.replace(CONFIG, keep=1), folder=tmp_path) as trainer:
        trainer.train(claims)
        saved = trainer.save("mine")
    assert saved.local_path is not None
    assert saved.local_path.exists()
    assert Checkpoints(tmp_path / "checkpoints").get("mine").pinned


def test_without_a_folder_nothing_is_written(tmp_path: Path, backend: Backend, claims: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Trainer(backend, CONFIG) as trainer:
        result = trainer.train(claims)
        assert trainer.save("memory").local_path is None
    assert result.folder is None
    assert list(tmp_path.iterdir()) == []


def test_what_the_backend_cannot_honour_is_refused_when_chosen_and_recorded_when_not(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    class Service:
        """A backend that fixes alpha and dropout itself."""

        capabilities = Capabilities(name="service", gradients="logprobs", alpha=False, dropout=False)

        def __getattr__(self, name: str) -> object:
            return getattr(backend, name)

    service: Backend = Service()  # type: ignore[assignment]
    with pytest.raises(CapabilityError, match=r"lora\.alpha=64"):
        Trainer(service, dataclasses.replace(CONFIG, lora=LoraConfig(alpha=64)))
    with Trainer(service, CONFIG, folder=tmp_path) as trainer:
        trainer.train(claims)
    info = read_run(tmp_path)
    assert info.environment is not None
    assert info.environment["not_honoured"] == ["lora.alpha", "lora.dropout"]


def test_bad_input(backend: Backend, claims: Dataset) -> None:
    with pytest.raises(UnknownNameError, match="cross_entropy"):
        Trainer(backend, dataclasses.replace(CONFIG, loss="cross_entropi"))
    with pytest.raises(UnknownNameError, match="linear"):
        Trainer(backend, dataclasses.replace(CONFIG, schedule="linar"))
    with Trainer(backend, dataclasses.replace(CONFIG, eval_interval=2)) as trainer, pytest.raises(ConfigError, match="dev"):
        trainer.train(claims)
    with Trainer(backend, CONFIG) as trainer, pytest.raises(DataError, match="empty"):
        trainer.train(dataclasses.replace(claims, examples=()))


def test_truncation_is_counted(tmp_path: Path, backend: Backend, claims: Dataset) -> None:
    with Trainer(backend, dataclasses.replace(CONFIG, max_length=64, max_steps=2), folder=tmp_path) as trainer:
        trainer.train(claims)
    from crucible_framework.files import read_json

    data = read_json(tmp_path / "data.json")
    assert isinstance(data, dict)
    truncated = data["truncated"]
    assert isinstance(truncated, dict)
    assert truncated["prompts"] == len(claims)
    assert truncated["completions"] == 0
    assert data["train"] == to_dict(claims.card)

"""`kill -9` at any moment: what was saved is whole, and the resumed run ends with the bytes of one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crucible_framework.store import Checkpoints, read_run

STATE = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")


def start(folder: Path, backend: str, model: str, steps: int) -> subprocess.Popen[bytes]:
    """A training process that resumes whatever is in the folder."""
    settings = {"checkpoint_interval": 7, "adam.lr": 0.01, "lora.rank": 4, "schedule": "cosine", "batch_size": 2, "max_length": 256}
    words = ["train", "--base-model", model, "--backend", backend, "--limit", "20", "--max-steps", str(steps), "--folder", str(folder), "--resume", "--quiet"]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return subprocess.Popen([sys.executable, "-m", "crucible_framework", *words], env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_once(folder: Path, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """Kills the process some time after it has written a metrics row; False where it ended before."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
        time.sleep(0.005)
    try:
        process.wait(timeout=chance.expovariate(1 / 0.15))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("backend", "model", "steps", "kills"),
    [("fake", "fake", 400, 4), pytest.param("local", "tiny", 150, 20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, backend: str, model: str, steps: int, kills: int) -> None:
    chance, killed = random.Random(5), 0
    while killed < kills:
        process = start(tmp_path / "killed", backend, model, steps)
        if not kill_once(tmp_path / "killed", process, chance):
            break  # it reached its end alive
        killed += 1
        checkpoints = Checkpoints(tmp_path / "killed/checkpoints")
        assert not checkpoints.broken()
        for checkpoint in checkpoints.list():
            checkpoints.verify(checkpoint)
    assert killed == kills, f"the run ended after {killed} kills: it needs more steps"
    for name in ("killed", "whole"):
        process = start(tmp_path / name, backend, model, steps)
        assert process.wait(timeout=300) == 0
        assert read_run(tmp_path / name).status == "done"
    ends = [Checkpoints(tmp_path / name / "checkpoints").latest(verified=True).local_path for name in ("killed", "whole")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for file in STATE:
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file

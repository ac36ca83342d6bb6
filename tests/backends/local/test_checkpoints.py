"""Saving, downloading, resuming and refusing: bit-exact from memory and from files, and nothing damaged is ever used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crucible_framework.backends.local import LocalBackend
from crucible_framework.backends.local.session import LocalSession
from crucible_framework.errors import BackendError, CapabilityError, ConfigError, CorruptError, NotFoundError, StoreError
from crucible_framework.files import publish
from crucible_framework.records import AdamConfig, Checkpoint, LoraConfig, SamplingParams

from .models_for_tests import CE, batch

LORA = LoraConfig(rank=4, dropout=0.2, seed=1, alpha=6.5)
ADAM = AdamConfig(lr=0.01, weight_decay=0.01)


def train(session: LocalSession, first: int, last: int) -> list[float]:
    futures = []
    for step in range(first, last):
        futures.append(session.forward_backward(batch(7, 11, seed=step), CE))
        session.optim_step(ADAM)
    return [future.result().loss for future in futures]


def files_of(backend: LocalBackend, session: LocalSession, folder: Path) -> dict[str, bytes]:
    backend.download(session.save("end").result(), folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def trained(backend: LocalBackend) -> LocalSession:
    session = backend.train("tiny", LORA)
    train(session, 0, 2)
    return session


def published(backend: LocalBackend, session: LocalSession, folder: Path) -> Checkpoint:
    checkpoint = session.save("c").result()
    manifest = publish(folder, lambda target: backend.download(checkpoint, target))
    return replace(checkpoint, local_path=folder, sha256=manifest.sha256)


@pytest.mark.parametrize("where", ["memory", "files", "published", "another backend"])
def test_resume_is_bit_exact(backend: LocalBackend, trained: LocalSession, tmp_path: Path, where: str) -> None:
    checkpoint = trained.save("c").result()
    assert (checkpoint.step, checkpoint.kind, checkpoint.base_model, checkpoint.lora) == (2, "state", "tiny", LORA)
    assert checkpoint.size_bytes > 0
    assert checkpoint.created_at > 0
    if where == "published":
        checkpoint = published(backend, trained, tmp_path / "p")
    elif where != "memory":
        checkpoint = backend.download(checkpoint, tmp_path / "c")
    other = LocalBackend(threads=1) if where == "another backend" else backend
    resumed = other.resume(checkpoint)
    assert train(resumed, 2, 5) == train(trained, 2, 5)
    assert files_of(other, resumed, tmp_path / "a") == files_of(backend, trained, tmp_path / "b")
    other.close()


def test_a_checkpoint_does_not_change_with_the_session(backend: LocalBackend, trained: LocalSession, tmp_path: Path) -> None:
    checkpoint = trained.save("c").result()
    before = files_of(backend, backend.resume(checkpoint), tmp_path / "a")
    train(trained, 2, 4)
    assert files_of(backend, backend.resume(checkpoint), tmp_path / "b") == before


def test_equal_names_have_their_own_uris(trained: LocalSession) -> None:
    uris = [trained.save("c").result().uri for _ in range(3)]
    assert uris == [f"local://{trained.name}/c", f"local://{trained.name}/c~2", f"local://{trained.name}/c~3"]


def test_files(backend: LocalBackend, trained: LocalSession, tmp_path: Path) -> None:
    state = backend.download(trained.save("c").result(), tmp_path / "state")
    sampler = backend.download(trained.save("c", "sampler").result(), tmp_path / "sampler")
    assert state.local_path is not None
    assert sampler.local_path is not None
    assert sorted(p.name for p in state.local_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(p.name for p in sampler.local_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert state.size_bytes == sum(path.stat().st_size for path in state.local_path.iterdir())
    config = json.loads((state.local_path / "adapter_config.json").read_text())
    assert config | {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": 4, "lora_alpha": 6.5, "lora_dropout": 0.2, "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    } == config  # fmt: skip
    again = backend.download(state, tmp_path / "again")
    assert again.local_path == tmp_path / "again"
    assert (tmp_path / "again" / "state.json").read_bytes() == (state.local_path / "state.json").read_bytes()


def test_a_fresh_session_can_be_saved_and_resumed(backend: LocalBackend, tmp_path: Path) -> None:
    session = backend.train("tiny", LORA)
    resumed = backend.resume(backend.download(session.save("zero").result(), tmp_path / "c"))
    assert train(resumed, 0, 2) == train(session, 0, 2)


def test_samplers_of_checkpoints(backend: LocalBackend, trained: LocalSession, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=8, seed=3)
    checkpoint = trained.save("c", "sampler").result()
    expected = trained.sampler().sample("hello", params).result()[0]
    train(trained, 2, 4)
    found = [
        backend.sampler(each).sample("hello", params).result()[0].tokens
        for each in (
            checkpoint,
            backend.download(checkpoint, tmp_path / "c"),
            backend.resume(backend.train("tiny", LORA).save("x").result()).save("y").result(),
        )
    ]
    assert found[0] == found[1] == expected.tokens
    assert backend.sampler(checkpoint).model == checkpoint.uri
    assert found[2] == backend.sampler("tiny").sample("hello", params).result()[0].tokens  # a fresh adapter changes nothing


def test_a_sampler_checkpoint_cannot_be_resumed(backend: LocalBackend, trained: LocalSession) -> None:
    with pytest.raises(BackendError, match="of kind 'sampler', without an optimizer"):
        backend.resume(trained.save("c", "sampler").result())
    with pytest.raises(BackendError, match="cannot start without optimizer"):
        backend.resume(replace(trained.save("c", "sampler").result(), kind="state"))
    with pytest.raises(ConfigError, match="'everything'"):
        trained.save("c", "everything")  # type: ignore[arg-type]


def test_unknown_checkpoints(backend: LocalBackend, trained: LocalSession, tmp_path: Path) -> None:
    checkpoint = trained.save("c").result()
    with pytest.raises(NotFoundError, match="not in this backend's memory"):
        backend.resume(replace(checkpoint, uri="local://elsewhere/c"))
    with pytest.raises(NotFoundError, match="has no folder"):
        backend.resume(replace(checkpoint, local_path=tmp_path / "nothing"))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "adapter_config.json", "manifest.json"])
def test_a_flipped_bit_is_found_before_anything_is_used(backend: LocalBackend, trained: LocalSession, tmp_path: Path, name: str) -> None:
    checkpoint = published(backend, trained, tmp_path / "c")
    _flip(tmp_path / "c" / name)
    for use in (backend.resume, backend.sampler):
        with pytest.raises(CorruptError):
            use(checkpoint)


def test_the_manifest_is_that_of_the_checkpoint(backend: LocalBackend, trained: LocalSession, tmp_path: Path) -> None:
    first = published(backend, trained, tmp_path / "one")
    train(trained, 2, 3)
    second = published(backend, trained, tmp_path / "two")
    with pytest.raises(CorruptError, match="It is the folder of another one"):
        backend.sampler(replace(first, local_path=second.local_path))
    (tmp_path / "one" / "manifest.json").unlink()
    with pytest.raises(CorruptError, match="has lost its manifest"):
        backend.resume(first)


def _edit(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def _retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"nonsense"), CorruptError, "no valid safetensors file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), NotFoundError, "There is no 'adapter_model.safetensors'"),
        (lambda f: (f / "optimizer.safetensors").unlink(), NotFoundError, "There is no 'optimizer.safetensors'"),
        (lambda f: (f / "adapter_config.json").unlink(), NotFoundError, "no file"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), CorruptError, "holds no JSON object"),
        (_edit("adapter_config.json", lambda c: c.update(r=8)), CorruptError, "has r 8; the checkpoint 'c' says 4"),
        (_edit("adapter_config.json", lambda c: c.update(lora_alpha=1)), CorruptError, "has lora_alpha 1"),
        (_edit("adapter_config.json", lambda c: c.update(use_dora=True)), CapabilityError, "uses use_dora; expected plain LoRA"),
        (_retensor(lambda t: t.pop(A)), CorruptError, "with shape None"),
        (_retensor(lambda t: t.update({A: torch.ones(5, 64)})), CorruptError, r"with shape \(5, 64\); .* expect \(4, 64\)"),
        (_retensor(lambda t: t[A].fill_(float("nan"))), CorruptError, "holds NaN or infinity"),
        (_edit("state.json", lambda s: s.pop("step")), CorruptError, "does not parse"),
        (_edit("state.json", lambda s: s.update(dropout_generator="xyz")), CorruptError, "does not parse"),
        (_edit("state.json", lambda s: s.update(step=7)), CorruptError, "is of step 7 on 'tiny'; the checkpoint 'c' says step 2"),
        (_edit("state.json", lambda s: s.update(base_model="other")), CorruptError, "on 'other'"),
        (_edit("state.json", lambda s: s.update(dropout_generator="00ff")), CorruptError, "GeneratorImplState"),
    ],
)
def test_damaged_files(
    backend: LocalBackend, trained: LocalSession, tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    checkpoint = backend.download(trained.save("c").result(), tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(error, match=message):
        backend.resume(checkpoint)


def test_download_where_nothing_can_be_written(backend: LocalBackend, trained: LocalSession, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="Cannot write"):
        backend.download(trained.save("c").result(), tmp_path / "file" / "sub")

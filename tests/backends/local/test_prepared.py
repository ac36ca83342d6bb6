"""Prepared weights: the numbers of the model's own files, mapped, joined without a copy, and made anew when anything about them is off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crucible_framework.backends.local import prepared
from crucible_framework.backends.local.bases import Base, load_base
from crucible_framework.backends.local.prepared import prepared_weights
from crucible_framework.backends.local.short import GROUP_BYTES, grouped, shortened
from crucible_framework.backends.local.skeleton import known, shapes
from crucible_framework.files import read_json

from .models_for_tests import make_qwen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_qwen(tmp_path / "model", hidden_size=64, intermediate_size=96)


def load(folder: Path, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Base:
    return load_base(str(folder), cache=tmp_path / "cache", dtype=dtype, device=torch.device("cpu"), engine="torch")


def kept(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "weights").iterdir() if not path.name.startswith("."))


def round_to_bf16(folder: Path, leave: str = "") -> None:
    """Makes the model's numbers bf16 numbers, but for those of one tensor."""
    tensors = {name: tensor if name == leave else tensor.bfloat16().float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantise(folder: Path) -> None:
    """Gives the matrices the numbers of a quantised model: 16 steps above the lowest of each 32, both in 11 bits."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            groups = tensor.view(-1, 32)
            low = groups.amin(1, keepdim=True).half().float()
            step = ((groups.amax(1, keepdim=True) - low) / 15).half().float()
            tensors[name] = (low + step * ((groups - low) / step).round().clamp(0, 15)).view(tensor.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def numbers_of(groups: torch.Tensor) -> torch.Tensor:
    """What bytes [out, in / 32 · 40] say."""
    parts = groups.view(groups.shape[0], -1, GROUP_BYTES)
    scale, low = (part.contiguous().view(torch.float32) for part in (parts[..., :4], parts[..., 4:8]))
    return (low + scale * parts[..., 8:]).flatten(1)


def matrices(base: Base) -> list[torch.Tensor]:
    assert base.decoder is not None
    parts = base.decoder.parts
    joints = [joint for layer in parts.layers for joint in (layer.qkv, layer.out, layer.up, layer.down)]
    return [parts.embedding, parts.head.weight, *(joint.frozen.weight for joint in joints)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_models_own_files(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = known(read_json(folder / "config.json"))
    assert config is not None
    theirs = load_file(folder / "model.safetensors")
    for _ in ("made", "mapped again"):
        found = prepared_weights(folder, config, dtype, tmp_path / "cache")
        assert found is not None
        assert list(found.tensors) == list(shapes(config))
        assert all(torch.equal(tensor, theirs[name].to(dtype)) for name, tensor in found.tensors.items())
        assert len({tensor.untyped_storage().data_ptr() for tensor in found.tensors.values()}) == 1
    assert len(kept(tmp_path)) == 1


def test_matrices_of_one_input_are_joined_without_a_copy(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        base = load(folder, tmp_path)
        assert base.decoder is not None
        mapped = base.model.get_submodule("model.embed_tokens").weight.untyped_storage().data_ptr()  # type: ignore[operator]
        joints = [joint for layer in base.decoder.parts.layers for joint in (layer.qkv, layer.out, layer.up, layer.down)]
        assert all(joint.frozen.weight.untyped_storage().data_ptr() == mapped for joint in joints)
        assert any(str(kept(tmp_path)[0]) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_another_state_of_the_model_takes_the_place_of_the_earlier_one(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(3, 12)[None]
    before = load(folder, tmp_path).hidden(ids).detach()
    (first,) = kept(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = load(folder, tmp_path).hidden(ids).detach()
    torch.testing.assert_close(after, before * 2)
    assert kept(tmp_path) != [first]
    assert len(kept(tmp_path)) == 1
    load(folder, tmp_path, torch.bfloat16)
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["weights.bin", "bf16.bin", "no bf16.bin", "manifest.json"])
def test_a_file_that_is_not_whole_is_made_again(folder: Path, tmp_path: Path, damage: str) -> None:
    round_to_bf16(folder)
    ids = torch.arange(3, 12)[None]
    before = load(folder, tmp_path).hidden(ids).detach()
    (place,) = kept(tmp_path)
    sizes = {path.name: path.stat().st_size for path in place.iterdir()}
    if damage.endswith(".bin") and " " not in damage:
        os.truncate(shutil.move(shutil.copy(place / damage, tmp_path / "copy"), place / damage), 100)
    else:
        (place / damage.removeprefix("no ")).unlink()
    again = load(folder, tmp_path)
    assert torch.equal(again.hidden(ids).detach(), before)
    assert again.short is not None
    assert kept(tmp_path) == [place]
    assert {path.name: path.stat().st_size for path in place.iterdir()} == sizes


@pytest.mark.parametrize("form", ["bf16", "grouped"])
def test_matrices_have_a_short_form_beside_them_that_changes_no_number(folder: Path, tmp_path: Path, form: str) -> None:
    if form == "bf16":
        round_to_bf16(folder)
    else:
        quantise(folder)
    for _ in ("made", "mapped again"):
        base = load(folder, tmp_path)
        for matrix in matrices(base):
            short = None if base.short is None else base.short.of(matrix)
            assert short is not None
            assert torch.equal(short.float() if form == "bf16" else numbers_of(short), matrix)
        assert base.short is not None
        assert base.short.of(base.decoder.parts.norm) is None  # type: ignore[union-attr]
        assert base.short.of(torch.ones(4, 4)) is None
        assert any(str(kept(tmp_path)[0] / f"{form}.bin") in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert load(folder, tmp_path, torch.bfloat16).short is None


def test_matrices_of_other_numbers_have_none(folder: Path, tmp_path: Path) -> None:
    round_to_bf16(folder, leave="model.layers.1.mlp.down_proj.weight")
    for _ in range(2):
        assert load(folder, tmp_path).short is None
    assert sorted(path.name for path in kept(tmp_path)[0].iterdir()) == ["manifest.json", "weights.bin"]


def test_groups_say_every_number_or_there_are_none() -> None:
    steps = torch.tensor([[0, 255, 6, *range(29)], [0, 9, *[3, 6] * 15]])
    for scale, low in ((2.0**-20, -1.0), (0.5, 0.0), (3.0, -3.0e6), (2.0**-120, 0.0)):
        matrix = (low + scale * steps).float()
        found = grouped(matrix)
        assert found is not None
        assert torch.equal(numbers_of(found), matrix)
    for odd in (torch.zeros(2, 32), torch.full((1, 64), 0.1)):
        found = grouped(odd)
        assert found is not None
        assert torch.equal(numbers_of(found), odd)
    rare = torch.zeros(1, 32)
    rare[0, [3, 9]] = torch.tensor([1e-30, -3e38])
    refused = [rare, torch.randn(4, 32), torch.ones(4, 33), torch.arange(0.0, 8192, 256)[None] + 1 / 3, torch.arange(32.0)[None] * 9]
    for one in (*refused, torch.full((1, 32), float("nan")), torch.full((1, 32), float("inf"))):
        found = grouped(one)
        assert found is None or torch.equal(numbers_of(found), one)
    assert grouped(torch.randn(4, 32)) is None
    assert shortened(torch.full((1, 32), float("nan"))) is None
    assert shortened(torch.full((1, 32), 1 + 2.0**-8)) is None


def test_a_folder_of_an_earlier_layout_is_replaced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_bf16(folder)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_LAYOUT", prepared._LAYOUT - 1)
        load(folder, tmp_path)
    (old,) = kept(tmp_path)
    assert load(folder, tmp_path).short is not None
    assert len(kept(tmp_path)) == 1
    assert kept(tmp_path) != [old]


def test_two_processes_that_prepare_at_once_find_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    round_to_bf16(folder)
    code = (
        "import sys, torch; from pathlib import Path; from crucible_framework.backends.local.bases import load_base\n"
        "base = load_base(sys.argv[1], cache=Path(sys.argv[2]), dtype=torch.float32, device=torch.device('cpu'), engine='torch')\n"
        "weight = base.decoder.parts.layers[0].qkv.frozen.weight; assert torch.equal(base.short.of(weight).float(), weight)\n"
        "print(float(base.hidden(torch.arange(3, 12)[None]).double().sum()))"
    )
    asked = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    both = [subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert len(kept(tmp_path)) == 1


def test_without_room_for_it_the_model_is_read_from_its_own_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(3, 12)[None]
    expected = load(folder, tmp_path / "other").hidden(ids).detach()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights").write_text("no folder can be made here")
    assert torch.equal(load(folder, tmp_path).hidden(ids).detach(), expected)
    (tmp_path / "cache" / "weights").unlink()
    monkeypatch.setattr(prepared, "_MOST_BYTES", 1000)
    assert torch.equal(load(folder, tmp_path).hidden(ids).detach(), expected)
    assert not (tmp_path / "cache" / "weights").exists()

"""Prepared weights: the numbers of the model's own files, mapped, joined without a copy, and made anew when anything about them is off."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crucible_framework.backends.local import prepared
from crucible_framework.backends.local.bases import Base, load_base
from crucible_framework.backends.local.prepared import prepared_weights
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_models_own_files(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = known(read_json(folder / "config.json"))
    assert config is not None
    theirs = load_file(folder / "model.safetensors")
    for _ in ("made", "mapped again"):
        found = prepared_weights(folder, config, dtype, tmp_path / "cache")
        assert found is not None
        assert list(found) == list(shapes(config))
        assert all(torch.equal(tensor, theirs[name].to(dtype)) for name, tensor in found.items())
        assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
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


@pytest.mark.parametrize("damage", ["cut", "no manifest"])
def test_a_file_that_is_not_whole_is_made_again(folder: Path, tmp_path: Path, damage: str) -> None:
    ids = torch.arange(3, 12)[None]
    before = load(folder, tmp_path).hidden(ids).detach()
    (place,) = kept(tmp_path)
    if damage == "cut":
        os.truncate(shutil.move(shutil.copy(place / "weights.bin", tmp_path / "copy"), place / "weights.bin"), 100)
    else:
        (place / "manifest.json").unlink()
    assert torch.equal(load(folder, tmp_path).hidden(ids).detach(), before)
    assert kept(tmp_path) == [place]
    assert (place / "weights.bin").stat().st_size > 100


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

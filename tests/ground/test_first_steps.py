"""The ground in use: configuration to record, publish and verify, registry, events."""

import subprocess
import sys
from pathlib import Path

import pytest

from crucible_framework import config, events, files
from crucible_framework.errors import ConfigError, CorruptError, LockedError, UnknownNameError
from crucible_framework.plugins import Registry
from crucible_framework.records import LoraConfig, TrainConfig


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rnk.*Did you mean 'lora\.rank'"):
        config.from_dict(TrainConfig, {"lora": {"rnk": 3}})


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank is 0"):
        LoraConfig(rank=0)


def test_a_flipped_bit_is_detected(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(b"0123456789")

    files.publish(tmp_path / "one", write, {"step": 1})
    assert files.verify(tmp_path / "one").meta == {"step": 1}
    (tmp_path / "one" / "weights").write_bytes(b"0123456788")
    with pytest.raises(CorruptError, match="weights"):
        files.verify(tmp_path / "one")


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with files.lock(tmp_path / ".lock"), pytest.raises(LockedError), files.lock(tmp_path / ".lock"):
        raise AssertionError


def test_unknown_component_names_the_nearest() -> None:
    registry: Registry[object] = Registry("loss", {"cross_entropy": "math:sqrt"})
    with pytest.raises(UnknownNameError, match="Did you mean 'cross_entropy'"):
        registry.get("cross_entropi")


def test_spans_nest() -> None:
    with events.collect() as seen, events.span("outer"), events.span("inner"):
        events.emit("leaf")
    leaf, inner, outer = seen
    assert leaf["span"] == inner["span"]
    assert inner["parent"] == outer["span"]


def test_import_is_light() -> None:
    code = "import sys, crucible_framework; print([m for m in ('torch', 'scipy', 'pydantic', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

"""Checkpoints: published, listed, compared, pinned; what is asked for and is not there is said with the nearest name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import events, files
from crucible_framework.errors import ConfigError, CorruptError, NotFoundError, StoreError
from crucible_framework.records import Checkpoint, LoraConfig
from crucible_framework.store import Checkpoints, load_checkpoint, step_name
from crucible_framework.store.checkpoints import checkpoint_meta, from_manifest
from crucible_framework.store.names import safe_name

Save = Callable[..., Checkpoint]


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def damage(checkpoint: Checkpoint) -> None:
    assert checkpoint.local_path is not None
    path = checkpoint.local_path / "adapter.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def test_publish_says_what_is_on_disk(store: Checkpoints) -> None:
    new = Checkpoint(
        name="best-so-far", uri="local://1", kind="sampler", step=12, base_model="tiny", lora=LoraConfig(rank=3, alpha=1.5), metrics={"a": 1.0}, created_at=5.0
    )
    with events.collect() as seen:
        saved = store.publish(new, lambda to: (to / "w").write_bytes(b"12345"), metrics={"dev/loss": math.inf}, fingerprint="f", parent="p")
    folder = store.folder / "00000012-best-so-far"
    manifest = files.read_manifest(folder)
    assert saved == dataclasses.replace(
        new, uri=f"file:{folder}", local_path=folder, sha256=manifest.sha256, size_bytes=5, metrics={"a": 1.0, "dev/loss": math.inf}
    )
    assert manifest.meta["parent"] == "p"
    assert manifest.meta["fingerprint"] == "f"
    assert load_checkpoint(folder) == saved == store.get("best-so-far") == store.latest()
    (event,) = [e for e in seen if e["name"] == "checkpoint.saved"]
    assert (event["checkpoint"], event["step"], event["size_bytes"], event["sha256"], event["path"]) == ("best-so-far", 12, 5, saved.sha256, str(folder))


@given(
    metrics=st.dictionaries(st.text(max_size=20), st.floats(), max_size=5),
    rank=st.integers(1, 4096),
    alpha=st.floats(0.001, 1e6),
    modules=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4),
    step=st.integers(0, 10**12),
    parent=st.text(max_size=20),
)
def test_what_a_manifest_says_reads_back(metrics: dict[str, float], rank: int, alpha: float, modules: list[str], step: int, parent: str) -> None:
    lora = LoraConfig(rank=rank, alpha=alpha, target_modules=tuple(modules))
    given_ = Checkpoint(name="n", uri="", kind="state", step=step, base_model="m", lora=lora, created_at=7.5)
    meta = checkpoint_meta(given_, metrics, fingerprint="", parent=parent)
    back = from_manifest(Path("/x"), files.Manifest(files=(), meta=meta, sha256="s"))
    assert {k: (v, math.isnan(v)) if not math.isnan(v) else True for k, v in back.metrics.items()} == {
        k: (v, False) if not math.isnan(v) else True for k, v in metrics.items()
    }
    assert dataclasses.replace(back, metrics={}) == dataclasses.replace(given_, uri="file:/x", local_path=Path("/x"), sha256="s")


def test_empty_folder(store: Checkpoints) -> None:
    assert store.list() == ()
    assert store.broken() == ()
    assert store.prune(1) == ()
    store.sweep()
    asks: tuple[Callable[[], Checkpoint], ...] = (store.latest, lambda: store.latest(verified=True), lambda: store.get(1), lambda: store.best("loss"))
    for ask in asks:
        with pytest.raises(NotFoundError):
            ask()
    assert not store.folder.exists(), "looking makes nothing"


def test_list_is_by_step_and_get_finds_by_name_folder_and_step(store: Checkpoints, save: Save) -> None:
    saved = {key: save(store, step, name=name) for key, step, name in [("c", 30, ""), ("a", 10, ""), ("b", 20, "mine"), ("d", 30, "end"), ("e", 40, "mine")]}
    assert store.list() == tuple(saved[key] for key in "abcde")
    assert store.latest() == saved["e"]
    asked: dict[str | int, str] = {"00000010": "a", 10: "a", "10": "a", "mine": "e", "00000020-mine": "b", 20: "b", "30": "c", "end": "d", 30: "c", 40: "e"}
    assert {key: store.get(key) for key in asked} == {key: saved[letter] for key, letter in asked.items()}
    with pytest.raises(NotFoundError, match="Did you mean 'mine'"):
        store.get("mins")
    with pytest.raises(NotFoundError, match="99"):
        store.get(99)
    assert step_name(123456789012) == "123456789012"


def test_names_and_steps_are_checked_before_anything_is_written(store: Checkpoints, save: Save) -> None:
    for name in ("a/b", "..", ".x", "ä", "x" * 81):
        with pytest.raises(ConfigError, match="not safe"):
            save(store, 1, name=name)
    with pytest.raises(ConfigError, match="at least 0"):
        save(store, -1)
    assert not store.folder.exists()


@given(st.text(max_size=90))
def test_a_safe_name_stays_in_its_folder(name: str) -> None:
    try:
        safe = safe_name("file", name)
    except ConfigError:
        return
    path = Path("/folder") / safe
    assert path.parent == Path("/folder")
    assert path.name == safe == name
    assert len(name.encode()) <= 80
    assert not name.startswith(".")


def test_a_sound_checkpoint_is_never_overwritten_but_a_damaged_one_is(store: Checkpoints, save: Save) -> None:
    first = save(store, 1, size=10)
    with pytest.raises(StoreError, match="exists already"):
        save(store, 1, size=20)
    assert store.list() == (first,)
    damage(first)
    second = save(store, 1, size=20)
    assert store.list() == (second,)
    store.verify(second)
    assert second.local_path is not None
    (second.local_path / "manifest.json").unlink()
    store.verify(save(store, 1))


def test_verified_goes_back_to_the_last_sound_one(store: Checkpoints, save: Save) -> None:
    saved = [save(store, step) for step in (1, 2, 3)]
    damage(saved[2])
    assert store.latest() == saved[2], "without a look at the bytes"
    assert store.latest(verified=True) == saved[1]
    with pytest.raises(CorruptError, match=r"adapter\.bin"):
        store.verify(saved[2])
    with pytest.raises(CorruptError):
        load_checkpoint(saved[2].local_path or Path())
    for checkpoint in saved[:2]:
        damage(checkpoint)
    with pytest.raises(NotFoundError, match="no sound checkpoint"):
        store.latest(verified=True)


def test_verify_knows_another_checkpoint_in_the_same_place(store: Checkpoints, save: Save) -> None:
    first = save(store, 1)
    files.discard(store.folder / "00000001")
    with pytest.raises(NotFoundError):
        store.verify(first)
    second = save(store, 1, metrics={"x": 1})
    with pytest.raises(CorruptError, match="Another checkpoint"):
        store.verify(first)
    store.verify(second)
    with pytest.raises(StoreError, match="Download it"):
        store.verify(dataclasses.replace(second, local_path=None))


def test_something_else_that_was_published_is_no_checkpoint(store: Checkpoints, save: Save) -> None:
    good = save(store, 1)
    files.publish(store.folder / "00000002", lambda to: (to / "x").write_bytes(b"x"), {"name": "x"})
    files.publish(store.folder / "notes", lambda to: (to / "x").write_bytes(b"x"), {"name": "x"})
    meta = checkpoint_meta(good, {}, fingerprint="", parent="")
    files.publish(store.folder / "00000003", lambda to: (to / "x").write_bytes(b"x"), {**meta, "lora": {"rank": 0, "target_modules": ["q"]}})
    files.publish(store.folder / "00000004", lambda to: (to / "x").write_bytes(b"x"), {**meta, "lora": {"ranks": 1, "target_modules": ["q"]}})
    assert store.list() == (good,)
    assert [(path.name, "no checkpoint of this version" in why) for path, why in store.broken()] == [(f"0000000{n}", True) for n in (2, 3, 4)]


def test_best_is_finite_and_of_equals_the_earliest(store: Checkpoints, save: Save) -> None:
    for step, value in enumerate([0.5, math.nan, 0.25, 0.25, math.inf, -math.inf], start=1):
        save(store, step, metrics={"loss": value})
    save(store, 7, metrics={"accuracy": 1.0})
    assert store.best("loss").step == 3
    assert store.best("loss", "max").step == 1
    with pytest.raises(NotFoundError, match="Did you mean 'accuracy'"):
        store.best("acuracy")
    with pytest.raises(ConfigError, match="'up'"):
        store.best("loss", "up")  # type: ignore[arg-type] # that is the test


def test_pins_last_and_can_be_taken_back(store: Checkpoints, save: Save) -> None:
    for step in (1, 2, 3):
        save(store, step, name="mine" if step == 2 else "")
    assert store.pin("mine").pinned
    assert store.pin(1).pinned
    assert [c.pinned for c in Checkpoints(store.folder).list()] == [True, True, False]
    assert not store.pin(1, pinned=False).pinned
    assert not store.pin(1, pinned=False).pinned
    with pytest.raises(NotFoundError):
        store.pin("other")
    assert [c.step for c in store.prune(1)] == [1]


def test_a_damaged_list_of_pins_stops_pruning_and_nothing_else(store: Checkpoints, save: Save) -> None:
    for step in (1, 2, 3):
        save(store, step)
    store.pin(1)
    for content in (b"{", b"[]", b'{"pinned": "all"}', b'{"pinned": [1]}'):
        (store.folder / "pins.json").write_bytes(content)
        for act in (lambda: store.prune(1), lambda: store.pin(2)):
            with pytest.raises(CorruptError):
                act()
        assert [c.step for c in store.list()] == [1, 2, 3]
        assert [path.name for path, _ in store.broken()] == ["pins.json"]
    (store.folder / "pins.json").unlink()
    assert [c.step for c in store.prune(1)] == [1, 2]


def test_prune_checks_what_it_is_asked(store: Checkpoints, save: Save) -> None:
    save(store, 1)
    with pytest.raises(ConfigError, match="keep is 0"):
        store.prune(0)
    with pytest.raises(ConfigError, match="direction"):
        store.prune(1, metric="loss", direction="up")  # type: ignore[arg-type] # that is the test
    with events.collect() as seen:
        save(store, 2)
        assert [c.step for c in store.prune(1, metric="nobody has it")] == [1]
    assert [(e["step"], e["checkpoint"]) for e in seen if e["name"] == "checkpoint.removed"] == [(1, "00000001")]


def test_rows_are_on_disk_before_the_checkpoint_that_follows_from_them(tmp_path: Path, save: Save) -> None:
    asked: list[bool] = []
    store = Checkpoints(tmp_path, before_publish=lambda: asked.append((tmp_path / "00000001").exists()))
    save(store, 1)
    assert asked == [False]

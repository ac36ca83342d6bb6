"""Artifacts: the same bytes have the same key and one file; what comes out is what went in, or an error."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.errors import ConfigError, CorruptError, NotFoundError
from crucible_framework.store import Artifacts, artifacts

if TYPE_CHECKING:
    from tests.store.conftest import Children


@pytest.fixture
def store(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


@settings(max_examples=25)
@given(data=st.binary(max_size=5000))
def test_what_goes_in_comes_out_by_its_sha256(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("a")
    (folder / "source").write_bytes(data)
    store = Artifacts(folder / "store")
    key = store.put(data)
    assert key == hashlib.sha256(data).hexdigest() == store.put(folder / "source")
    assert store.get(key) == data
    assert store.contains(key)
    assert [(a.key, a.size_bytes) for a in store.list()] == [(key, len(data))]


def test_a_large_file_is_read_in_parts(store: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_CHUNK_BYTES", 1000)
    data = random.Random(1).randbytes(54_321)
    (tmp_path / "source").write_bytes(data)
    assert store.get(store.put(tmp_path / "source")) == data


def test_an_empty_cache(store: Artifacts, tmp_path: Path) -> None:
    key = "0" * 64
    assert store.list() == store.prune(0) == ()
    assert not store.contains(key)
    assert not store.folder.exists()
    with pytest.raises(NotFoundError, match="Put it again"):
        store.get(key)
    with pytest.raises(NotFoundError, match="no file"):
        store.put(tmp_path / "missing")
    with pytest.raises(ConfigError, match="max_bytes"):
        store.prune(-1)
    for bad in ("", "../../etc/passwd", "A" * 64, "0" * 63):
        with pytest.raises(ConfigError, match="no artifact key"):
            store.get(bad)


def test_every_flipped_byte_is_found_and_put_mends_it(store: Artifacts) -> None:
    data = bytes(range(200))
    with events.collect() as seen:
        key = store.put(data)
        path = store.folder / key[:2] / key
        for position in range(len(data)):
            path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            with pytest.raises(CorruptError, match="Put it again"):
                store.get(key)
        path.write_bytes(data[:-1])
        with pytest.raises(CorruptError):
            store.get(key)
        assert store.put(data) == key
        assert store.put(data) == key
    assert store.get(key) == data
    assert [e["name"] for e in seen] == ["artifact.stored"] * 2, "stored, mended, and already there"


def test_prune_takes_the_least_recently_used_first(store: Artifacts) -> None:
    keys = [store.put(bytes([n]) * 100) for n in range(5)]
    store.get(keys[0])
    store.put(bytes([1]) * 100)
    assert [a.key for a in store.list()] == [keys[2], keys[3], keys[4], keys[0], keys[1]]
    assert store.prune(500) == ()
    with events.collect() as seen:
        assert [a.key for a in store.prune(299)] == [keys[2], keys[3], keys[4]]
    assert [e["key"] for e in seen if e["name"] == "artifact.removed"] == [keys[2], keys[3], keys[4]]
    assert [a.key for a in store.list()] == [keys[0], keys[1]]
    assert not store.contains(keys[2])
    assert len(store.prune(0)) == 2


def test_only_what_was_abandoned_long_ago_is_swept(store: Artifacts) -> None:
    key = store.put(b"x")
    young, old, moved = store.folder / ".tmp-young", store.folder / ".tmp-old", store.folder / key[:2] / ".tmp-discarded"
    for path in (young, old, moved):
        path.write_bytes(b"part")
    for path in (old, moved):
        os.utime(path, (1, 1))
    store.prune(10)
    assert young.exists()
    assert not old.exists()
    assert not moved.exists()
    assert [a.key for a in store.list()] == [key]


def test_threads_and_processes_put_the_same_and_prune_meanwhile(store: Artifacts, children: Children) -> None:
    data = [bytes([n]) * 3000 for n in range(6)]

    def work() -> None:
        for round_ in range(3):
            for part in data:
                key = store.put(part)
                try:
                    assert store.get(key) == part
                except NotFoundError:
                    pass  # pruned since: that is said, and no other bytes are given
            if round_ == 1:
                store.prune(6000)

    pids = [children.start(work) for _ in range(3)]
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [children.wait(pid) for pid in pids] == [0] * 3
    assert failures == []
    for part in data:
        store.put(part)
    assert len(store.list()) == 6
    assert not list(store.folder.rglob(".tmp-*"))

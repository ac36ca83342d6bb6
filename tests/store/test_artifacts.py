"""Artifacts: the same bytes have the same key and one file; what comes out is what went in, or an error."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework import events
from crucible_framework.errors import ChecksumError, ConfigError, CorruptError, NotFoundError, ServiceError
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


# ----------------------------------------------------------------------------------------------- owners, limit, verify
def test_what_is_owned_is_never_removed(store: Artifacts) -> None:
    owned, shared, loose = store.put(b"a" * 10, owner="one"), store.put(b"b" * 10, owner="one"), store.put(b"c" * 10)
    store.put(b"b" * 10, owner="two")
    assert store.owned() == {"one": tuple(sorted((owned, shared))), "two": (shared,)}
    assert [one.key for one in store.prune(0)] == [loose]
    store.release("one")
    store.release("nobody")
    assert store.owned() == {"two": (shared,)}
    assert [one.key for one in store.prune(0)] == [owned]
    store.release("two", [shared])
    assert [one.key for one in store.prune(0)] == [shared]
    with pytest.raises(ConfigError, match="is not safe as a file name"):
        store.put(b"x", owner="../x")


def test_a_limit_removes_the_least_recently_used_and_spares_the_new(tmp_path: Path) -> None:
    store = Artifacts(tmp_path, max_bytes=25)
    first, second = store.put(b"a" * 10), store.put(b"b" * 10)
    store.get(first)
    third = store.put(b"c" * 10)
    assert {one.key for one in store.list()} == {first, third}
    large = store.put(b"d" * 100)
    assert [one.key for one in store.list()] == [large]
    assert not store.contains(second)
    with pytest.raises(ConfigError, match="max_bytes is -1"):
        Artifacts(tmp_path, max_bytes=-1)


def test_verify_names_what_changed_and_what_is_gone(store: Artifacts) -> None:
    good, bad, gone = store.put(b"good"), store.put(b"bad"), store.put(b"gone", owner="run")
    assert store.verify() == ()
    (store.folder / bad[:2] / bad).write_bytes(b"worse")
    (store.folder / gone[:2] / gone).unlink()
    found = dict(store.verify())
    assert set(found) == {bad, gone}
    assert "changed after it was stored" in found[bad]
    assert found[gone] == "run owns it and it is not there"
    assert store.get(good) == b"good"


# ------------------------------------------------------------------------------------------------------------ download
class Shelf(ThreadingHTTPServer):
    """Serves one body with ranges; can break off after some bytes, refuse, and change what it serves."""

    def __init__(self) -> None:
        self.body, self.tag, self.breaks, self.status = b"", '"1"', list[int](), 200
        self.asked: list[str | None] = []
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                span = self.headers.get("Range") if self.headers.get("If-Range") == shelf.tag else None
                shelf.asked.append(self.headers.get("Range"))
                if shelf.status != 200:
                    self.send_error(shelf.status)
                    return
                start = int(span[6:-1]) if span else 0
                if span and start >= len(shelf.body):
                    self.send_error(416)
                    return
                self.send_response(206 if span else 200)
                if span:
                    self.send_header("Content-Range", f"bytes {start}-{len(shelf.body) - 1}/{len(shelf.body)}")
                if shelf.tag:
                    self.send_header("ETag", shelf.tag)
                self.send_header("Content-Length", str(len(shelf.body) - start))
                self.end_headers()
                most = shelf.breaks.pop(0) if shelf.breaks else len(shelf.body)
                self.wfile.write(shelf.body[start : start + most])
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.bin"


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    server = Shelf()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_goes_on_where_it_broke_off(store: Artifacts, shelf: Shelf) -> None:
    shelf.body, shelf.breaks = os.urandom(1_000_000), [300_000, 300_000]
    seen: list[tuple[int, int | None]] = []
    key = store.download(shelf.url, sha256=hashlib.sha256(shelf.body).hexdigest(), progress=lambda *now: seen.append(now))
    assert store.get(key) == shelf.body
    assert shelf.asked == [None, "bytes=300000-", "bytes=600000-"]
    assert seen[-1] == (1_000_000, 1_000_000)
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)
    assert store.download(shelf.url, sha256=key, owner="run") == key
    assert len(shelf.asked) == 3
    assert store.owned() == {"run": (key,)}
    assert not list(store.folder.glob(".tmp-*"))


def test_a_part_is_kept_for_the_next_try_and_only_for_the_same_file(store: Artifacts, shelf: Shelf) -> None:
    shelf.body, shelf.breaks = b"old" * 1000, [100, 100, 100, 100]
    with pytest.raises(ServiceError, match="what has come is kept") as caught:
        store.download(shelf.url)
    assert caught.value.retryable
    shelf.asked.clear()
    assert store.get(store.download(shelf.url)) == shelf.body
    assert shelf.asked == ["bytes=400-"]
    shelf.breaks = [100, 0, 0, 0]
    with pytest.raises(ServiceError):
        store.download(shelf.url)
    shelf.body, shelf.tag = b"new" * 1000, '"2"'
    assert store.get(store.download(shelf.url)) == shelf.body


def test_a_file_without_a_tag_starts_anew(store: Artifacts, shelf: Shelf) -> None:
    shelf.body, shelf.tag, shelf.breaks = b"x" * 1000, "", [10]
    assert store.get(store.download(shelf.url)) == shelf.body
    assert shelf.asked == [None, None]


def test_what_is_refused_or_wrong_is_said_and_not_kept(store: Artifacts, shelf: Shelf) -> None:
    shelf.body = b"bytes"
    with pytest.raises(ChecksumError, match="expected 000000000000"):
        store.download(shelf.url, sha256="0" * 64)
    assert store.list() == ()
    assert not list(store.folder.glob(".tmp-*"))
    shelf.status = 404
    with pytest.raises(ServiceError, match="answers 404") as caught:
        store.download(shelf.url)
    assert (caught.value.status, caught.value.retryable) == (404, False)
    shelf.status, before = 503, len(shelf.asked)
    with pytest.raises(ServiceError, match="503"):
        store.download(shelf.url)
    assert len(shelf.asked) == before + 4
    for bad in ("file:///etc/passwd", "ftp://x/y", "weights.bin"):
        with pytest.raises(ConfigError, match="no address"):
            store.download(bad)
    with pytest.raises(ConfigError, match="no artifact key"):
        store.download(shelf.url, sha256="abc")

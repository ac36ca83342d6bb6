"""Files that must survive: whole or absent after any failure, and damage is found before use. Faults at every operation: tests/store."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework import files
from crucible_framework.errors import CorruptError, LockedError, NotFoundError, StorageFullError, StoreError
from crucible_framework.records import LoraConfig

JSON_ROWS = st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=9), st.none(), st.booleans())), max_size=6)


def write_ab(folder: Path) -> None:
    (folder / "a").write_bytes(b"aaa")
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_bytes(b"")


# -------------------------------------------------------------------------------------------------------------- atomic
def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    for data in (b"first", b"", b"x" * 100_000):
        files.write_atomic(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_json_takes_records_arrays_and_odd_keys(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"lora": LoraConfig(rank=2), "a": np.arange(3), 4: tmp_path})
    back = files.read_json(tmp_path / "x.json")
    assert isinstance(back, dict)
    assert back["a"] == [0, 1, 2]
    assert back["4"] == str(tmp_path)
    assert isinstance(lora := back["lora"], dict)
    assert lora["rank"] == 2
    with pytest.raises(NotFoundError, match="There is no file"):
        files.read_json(tmp_path / "missing.json")
    (tmp_path / "x.json").write_bytes(b'{"a": ')
    with pytest.raises(CorruptError, match="not valid JSON"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(StoreError, match="Cannot read"):
        files.read_json(tmp_path)


def test_staged_bytes_are_gone_unless_moved(tmp_path: Path) -> None:
    with files.staged(tmp_path / "new", [b"ab", b"", b"c"]) as (path, sha256):
        assert path.read_bytes() == b"abc"
        assert sha256 == hashlib.sha256(b"abc").hexdigest() == files.sha256_file(path)
    assert list((tmp_path / "new").iterdir()) == []
    with files.staged(tmp_path, [b"abc"]) as (path, _):
        files.move(path, tmp_path / "to" / "here")
    assert (tmp_path / "to" / "here").read_bytes() == b"abc"

    def broken() -> object:
        yield b"ab"
        raise OSError(errno.EIO, "unreadable")

    with pytest.raises(StoreError, match="Input/output"), files.staged(tmp_path / "x", broken()):  # type: ignore[arg-type] # a generator that fails
        pass
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "becomes", "says"),
    [
        (OSError(errno.ENOSPC, "x"), StorageFullError, "Free some space"),
        (OSError(errno.EDQUOT, "x"), StorageFullError, "quota"),
        (OSError(errno.EFBIG, "x"), StorageFullError, "full"),
        (PermissionError(errno.EACCES, "x"), StoreError, "no permission"),
        (OSError(errno.EROFS, "x"), StoreError, "no permission"),
        (OSError(errno.EIO, "x"), StoreError, "Input/output error"),
        (OSError("odd"), StoreError, "odd"),
        (RuntimeError("write failed (os error 28)"), StorageFullError, "full"),
        (RuntimeError("read failed (os error 13)"), StoreError, "no permission"),
        (RuntimeError("something else"), RuntimeError, "something else"),
        (LockedError("ours"), LockedError, "ours"),
    ],
    ids=str,
)
def test_what_the_system_raises_becomes_one_sentence(tmp_path: Path, raised: Exception, becomes: type[Exception], says: str) -> None:
    with pytest.raises(becomes, match=says) as caught, files.storage_errors(tmp_path / "file"):
        raise raised
    assert type(caught.value) is becomes
    if becomes in (StoreError, StorageFullError):
        assert str(tmp_path / "file") in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- publish
def test_publish_and_read_back(tmp_path: Path) -> None:
    made = files.publish(tmp_path / "x" / "final", write_ab, {"step": 3, "arr": [1.5]})
    assert [(c.name, c.size_bytes, c.sha256) for c in made.files] == [
        ("a", 3, hashlib.sha256(b"aaa").hexdigest()),
        ("sub/b", 0, hashlib.sha256(b"").hexdigest()),
    ]
    assert made.meta == {"step": 3, "arr": [1.5]}
    assert made.size_bytes == 3
    assert made.sha256 == files.sha256_file(tmp_path / "x" / "final" / "manifest.json")
    assert files.read_manifest(tmp_path / "x" / "final") == files.verify(tmp_path / "x" / "final") == made
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["final"]


def test_publish_never_overwrites_and_takes_plain_files_only(tmp_path: Path) -> None:
    files.publish(tmp_path / "final", write_ab)
    with pytest.raises(StoreError, match="exists already"):
        files.publish(tmp_path / "final", write_ab)
    with pytest.raises(StoreError, match="links"):
        files.publish(tmp_path / "link", lambda to: (to / "a").symlink_to("/etc/passwd"))
    with pytest.raises(StoreError, match=r"manifest\.json"):
        files.publish(tmp_path / "own", lambda to: (to / "manifest.json").write_bytes(b"{}"))
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def reseal(folder: Path, **changes: object) -> None:
    """Changes a manifest and gives it the right sum again, as a forger or another version would."""
    path = folder / "manifest.json"
    body = orjson.loads(path.read_bytes()) | changes | {"checksum": "0" * 64}
    raw = orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    path.write_bytes(raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1))


def test_manifests_that_cannot_be_trusted(tmp_path: Path) -> None:
    files.publish(tmp_path / "f", write_ab)
    sha256 = hashlib.sha256(b"aaa").hexdigest()
    for name in ("../f/a", "/etc/passwd", "sub/../../f/a"):
        reseal(tmp_path / "f", files=[{"name": name, "size_bytes": 3, "sha256": sha256}])
        with pytest.raises(CorruptError, match="outside"):
            files.read_manifest(tmp_path / "f")
    for odd in ([{"name": "a"}], "a", [3], [{"name": "a", "size_bytes": "x", "sha256": sha256}]):
        reseal(tmp_path / "f", files=odd)
        with pytest.raises(CorruptError, match="does not parse"):
            files.read_manifest(tmp_path / "f")
    reseal(tmp_path / "f", files=[{"name": "a" * 300, "size_bytes": 3, "sha256": sha256}])
    with pytest.raises(StoreError):
        files.read_manifest(tmp_path / "f")
    reseal(tmp_path / "f", files=[], format_version=files.FORMAT_VERSION + 1)
    with pytest.raises(StoreError, match="Upgrade") as caught:
        files.read_manifest(tmp_path / "f")
    assert not isinstance(caught.value, CorruptError)
    for raw in (b"[]", b"null", b"{}", b"\xff", b""):
        (tmp_path / "f" / "manifest.json").write_bytes(raw)
        with pytest.raises(CorruptError):
            files.read_manifest(tmp_path / "f")
    with pytest.raises(NotFoundError, match="nothing was published"):
        files.read_manifest(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("p") / "f"
    files.publish(folder, lambda to: (to / "w").write_bytes(bytes(range(256))), {"name": "x", "version": 1})
    return folder


@settings(max_examples=100)
@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), name=st.sampled_from(["w", "manifest.json"]))
def test_any_changed_byte_is_found(published: Path, position: float, mask: int, name: str) -> None:
    whole = (published / name).read_bytes()
    changed = bytearray(whole)
    changed[int(position * len(whole))] ^= mask
    (published / name).write_bytes(changed)
    with pytest.raises(CorruptError):
        files.verify(published)
    (published / name).write_bytes(whole)
    files.verify(published)


def test_discard_and_sweep(tmp_path: Path) -> None:
    files.publish(tmp_path / "f", write_ab)
    files.discard(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="Cannot remove"):
        files.discard(tmp_path / "f")
    (tmp_path / ".tmp-dir").mkdir()
    (tmp_path / ".tmp-dir" / "x").write_bytes(b"x")
    (tmp_path / ".tmp-file").write_bytes(b"x")
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").write_bytes(b"x")
    assert files.sweep(tmp_path) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert files.sweep(tmp_path / "missing") == 0


# ---------------------------------------------------------------------------------------------------------------- lock
def test_lock_is_exclusive_also_between_threads_and_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    assert not files.held(path)
    with files.lock(path, "thing"):
        assert files.held(path)
        with pytest.raises(LockedError, match=r"The thing .* in use"), files.lock(path, "thing"):
            pass
        refused: list[bool] = []

        def other() -> None:
            try:
                with files.lock(path, timeout_s=0.05):
                    refused.append(False)
            except LockedError:
                refused.append(True)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert refused == [True]
    assert not files.held(path)
    with files.lock(path):
        pass


def test_lock_waits_and_survives_an_error_inside(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_bytes(b"")
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    timer = threading.Timer(0.2, os.close, args=(descriptor,))
    timer.start()
    with pytest.raises(ZeroDivisionError), files.lock(path, timeout_s=20):
        raise ZeroDivisionError
    timer.join()
    assert not files.held(path)


# ---------------------------------------------------------------------------------------------------------- JSON lines
@settings(max_examples=60)
@given(rows=JSON_ROWS, cut=st.integers(0, 400), garbage=st.binary(max_size=8))
def test_a_log_cut_anywhere_keeps_its_whole_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], cut: int, garbage: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log = files.JsonLines(path)
    for row in rows:
        log.append(row)  # type: ignore[arg-type] # hypothesis' values are JSON
    log.sync()
    log.close()
    log.close()
    assert files.read_lines(path) == rows
    whole = path.read_bytes()
    left = whole[: max(0, len(whole) - cut)]
    path.write_bytes(left)
    lines = left.split(b"\n")
    kept = rows[: len(lines) - 1]
    if lines[-1] and len(lines) <= len(rows) and lines[-1] == whole.split(b"\n")[len(lines) - 1]:
        kept = rows[: len(lines)]  # only its line end is missing
    assert files.read_lines(path) == kept
    again = files.JsonLines(path)
    again.append({"new": 1}, sync=True)
    again.close()
    assert files.read_lines(path) == [*kept, {"new": 1}]
    with path.open("ab") as file:
        file.write(b"\0" + garbage.replace(b"\n", b""))  # what a power cut may leave
    assert files.read_lines(path) == [*kept, {"new": 1}]


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"b": "' + b"x" * 200_000)
    log = files.JsonLines(path)
    log.append({"c": 3})
    log.close()
    assert files.read_lines(path) == [{"a": 1}, {"c": 3}]


def test_damage_before_the_last_line_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert files.read_lines(path) == []
    for bad in (b"[1]", b"{", b"null", b"\xff\xfe"):
        path.write_bytes(b'{"a": 1}\n' + bad + b'\n\n{"c": 3}\n')
        with pytest.raises(CorruptError, match=r"log\.jsonl:2: not a JSON object"):
            files.read_lines(path)
    path.write_bytes(b'{"a": 1}\n\n{"c": 3}')
    assert files.read_lines(path) == [{"a": 1}, {"c": 3}]


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(StoreError, match="Is a directory"):
        files.JsonLines(tmp_path / "log.jsonl")

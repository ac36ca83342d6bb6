"""The index can always be made again, and makes itself again whenever it could be wrong."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crucible_framework import events, files
from crucible_framework.errors import LockedError, StorageFullError, StoreError
from crucible_framework.records import Checkpoint, ModelVersion
from crucible_framework.store import Checkpoints, Models, index
from crucible_framework.store.index import SCHEMA, Index, journal_mode

if TYPE_CHECKING:
    from tests.store.conftest import Children, Disk

Save = Callable[..., Checkpoint]


@pytest.fixture
def models(tmp_path: Path, save: Save, quick: None) -> Models:
    store = Checkpoints(tmp_path / "run")
    found = Models(tmp_path / "models")
    for step in range(1, 6):
        found.register(save(store, step), "abc"[step % 3], tags={"n": str(step)}, description="long " * 200)
    found.promote("b:1")
    return found


def path_of(models: Models) -> Path:
    return models.folder / ".index.sqlite"


def dump(models: Models) -> list[str]:
    db = sqlite3.connect(path_of(models))
    try:
        return [*db.iterdump(), str(db.execute("PRAGMA user_version").fetchone())]
    finally:
        db.close()


def execute(models: Models, *statements: str) -> None:
    db = sqlite3.connect(path_of(models), isolation_level=None)
    try:
        for statement in statements:
            db.execute(statement)
    finally:
        db.close()


def rebuilt(models: Models) -> tuple[tuple[ModelVersion, ...], list[str]]:
    """What is listed, and why the index was made again for it."""
    with events.collect() as seen:
        found = models.list()
    return found, [str(e["reason"]) for e in seen if e["name"] == "model.index_rebuilt"]


def test_rebuild_gives_an_equal_index(models: Models) -> None:
    before, listed = dump(models), models.list()
    assert models.rebuild() == 5
    assert dump(models) == before
    path_of(models).unlink()
    assert models.rebuild() == 5
    assert dump(models) == before
    assert models.list() == listed


def test_a_deleted_index_comes_back(models: Models) -> None:
    listed = models.list()
    path_of(models).unlink()
    found, why = rebuilt(models)
    assert found == listed
    assert len(why) == 1
    assert rebuilt(models) == (listed, [])
    path_of(models).unlink()
    assert models.tag("a:1", {"k": "v"}).tags["k"] == "v"  # a writer finds it missing, too
    assert models.find(tags={"k": "v"})[0].name == "a"


@pytest.mark.parametrize("fill", [b"\0", b"\xff", None], ids=["zeros", "ones", "flips"])
def test_an_index_damaged_anywhere_is_never_believed(models: Models, fill: bytes | None) -> None:
    listed = models.list()
    whole = path_of(models).read_bytes()
    healed = 0
    for start in range(0, len(whole), 509):
        part = whole[start : start + 16]
        damage = fill * len(part) if fill else bytes(b ^ 0x10 for b in part)
        path_of(models).write_bytes(whole[:start] + damage + whole[start + 16 :])
        found, why = rebuilt(models)
        assert found == listed, start
        healed += bool(why)
        path_of(models).write_bytes(whole)
    assert healed >= len(listed)


@pytest.mark.parametrize("content", [b"", b"no database at all, but long enough to look like one " * 40], ids=["empty", "text"])
def test_another_file_in_its_place_is_replaced(models: Models, content: bytes) -> None:
    listed = models.list()
    path_of(models).write_bytes(content)
    assert rebuilt(models)[0] == listed
    path_of(models).write_bytes(content)
    models.promote("a:1", "staging")
    assert [v.name for v in models.find(stage="staging")] == ["a"]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM versions WHERE name = 'a'",
        'UPDATE versions SET body = replace(body, \'"n":"1"\', \'"n":"9"\')',
        "UPDATE versions SET body = 'no json'",
        "UPDATE versions SET version = 7 WHERE name = 'a' AND version = 1",
        "DROP TABLE versions",
        "DROP TABLE state",
        "DELETE FROM state",
        "UPDATE state SET value = 1 WHERE key = 'marked'",
        "PRAGMA user_version = 0",
    ],
)
def test_whatever_does_not_fit_makes_it_again(models: Models, statement: str) -> None:
    listed, before = models.list(), dump(models)
    execute(models, statement)
    found, why = rebuilt(models)
    assert found == listed
    assert len(why) == 1
    assert dump(models) == before


def test_a_damaged_row_is_noticed_by_a_search_too(models: Models) -> None:
    execute(models, "UPDATE versions SET body = 'no json' WHERE name = 'a'")
    assert len(models.find(tags={"n": "3"})) == 1


def test_a_newer_layout_is_refused_and_left_alone(models: Models) -> None:
    execute(models, f"PRAGMA user_version = {SCHEMA + 1}")
    before = path_of(models).read_bytes()
    for call in (models.list, lambda: models.promote("a:1")):
        with pytest.raises(StoreError, match=r"layout 2; .* Upgrade"):
            call()
    assert path_of(models).read_bytes() == before


def test_a_crash_after_the_files_is_seen_by_the_next_reader(models: Models, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        monkeypatch.setattr(Index, "_follow", lambda *_: os._exit(9))
        models.tag("a:1", {"late": "yes"})

    assert children.run(crash) == 9
    found, why = rebuilt(models)
    assert why == ["marked"]
    assert [v.name for v in found if v.tags.get("late")] == ["a"]


def test_an_index_that_cannot_follow_does_not_undo_what_is_true(models: Models, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    models._index._source, real = (lambda _: ([], False)), models._index._source
    with caplog.at_level(logging.WARNING):
        models.tag("a:1", {"late": "yes"})
    assert "will be made again" in caplog.text
    models._index._source = real
    assert rebuilt(models)[1] == ["marked"]
    assert models.get("a:1").tags["late"] == "yes"


def test_a_reader_does_not_wait_for_a_living_writer(models: Models) -> None:
    listed = models.list()
    inside, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with models._index.changing("a"):
            inside.set()
            assert go_on.wait(20)

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(20)
    assert rebuilt(models) == (listed, [])
    go_on.set()
    writer.join()
    assert rebuilt(models) == (listed, [])


def test_a_reader_of_a_damaged_index_waits_for_the_writer(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = models.list()
    path_of(models).write_bytes(b"damaged")
    monkeypatch.setattr(index, "_WAIT_S", 0.1)
    with files.lock(models.folder / ".lock"), pytest.raises(LockedError, match="in use"):
        models.list()
    assert models.list() == listed


def test_a_database_held_by_another_program_is_locked(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_BUSY_S", 0.05)
    db = sqlite3.connect(path_of(models), isolation_level=None)
    try:
        db.execute("BEGIN EXCLUSIVE")
        for call in (models.list, lambda: models.promote("a:1")):
            with pytest.raises(LockedError, match="in use"):
                call()
        assert models.broken() == ()
    finally:
        db.close()
    assert models.get("a:1").stage == "none"


@pytest.mark.parametrize("limit", ["max_page_count", "no room"])
def test_a_full_disk_stops_before_any_file_changes(models: Models, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    def full(path: Path) -> None:
        db = sqlite3.connect(":memory:")
        try:
            with index._translated(path):
                db.execute("PRAGMA max_page_count = 2")
                db.execute("CREATE TABLE t (x)")
                db.execute("INSERT INTO t VALUES (zeroblob(100000))")
        finally:
            db.close()

    if limit == "max_page_count":
        with pytest.raises(StorageFullError, match="Free some space"):
            full(path_of(models))
        return
    monkeypatch.setattr(Index, "_mark", lambda self: full(self.path))
    with pytest.raises(StorageFullError):
        models.promote("a:1")
    assert not (models.folder / "a" / "1.json").exists()


def test_an_index_that_cannot_be_opened_is_an_error_with_a_fix(models: Models, disk: Disk) -> None:
    path_of(models).unlink()
    path_of(models).mkdir()  # something that neither opens nor goes away
    with pytest.raises(StoreError, match="Cannot"):
        models.list()
    path_of(models).rmdir()
    assert len(models.list()) == 5


def test_an_error_while_it_is_made_hides_no_version_for_good(models: Models, disk: Disk) -> None:
    listed, errors, short = models.list(), 0, 0
    for at in itertools.count(1):
        path_of(models).unlink()
        with disk.failing(at, errno.EIO) as hit:
            try:
                found = models.list()
                short += found != listed
                assert all(version in listed for version in found)
            except StoreError:
                errors += 1
        assert models.list() == listed
        assert rebuilt(models) == (listed, [])
        if not hit():
            break
    assert errors
    assert short


def test_a_version_that_stays_unreadable_hides_no_other(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.read_manifest

    def unreadable(folder: Path) -> files.Manifest:
        if folder == models.folder / "b" / "1":
            raise StoreError("Cannot read it: Input/output error.")
        return real(folder)

    listed = models.list()
    with monkeypatch.context() as patch:
        patch.setattr(files, "read_manifest", unreadable)
        models.rebuild()
        assert models.list() == tuple(v for v in listed if (v.name, v.version) != ("b", 1))
        assert [path.name for path, _ in models.broken()] == ["1"]
        assert models.promote("b:2", "staging").stage == "staging"
        assert models.get("a:1").version == 1
    assert [v.stage for v in models.list("b")] == ["production", "staging"]


def test_the_mark_is_on_disk_before_files_change(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert index.SYNCHRONOUS == "FULL"
    with models._index._connect() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_journal_mode_follows_the_version_of_sqlite(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [journal_mode(v) for v in ((3, 40, 1), (3, 51, 2), (3, 51, 3), (3, 52, 0))] == ["TRUNCATE", "TRUNCATE", "WAL", "WAL"]
    listed = models.list()
    monkeypatch.setattr(index, "journal_mode", lambda: "WAL")
    models.tag("a:1", {"wal": "yes"})
    db = sqlite3.connect(path_of(models))
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    assert len(models.list()) == len(listed)
    path_of(models).write_bytes(b"damaged")
    assert len(models.list()) == len(listed)
    monkeypatch.undo()
    assert [v.name for v in models.find(tags={"wal": "yes"})] == ["a"]

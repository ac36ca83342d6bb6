"""Whatever fails, and wherever the process dies: what was saved is intact, and what is new is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crucible_framework import files
from crucible_framework.errors import CorruptError, StorageFullError, StoreError
from crucible_framework.records import Checkpoint
from crucible_framework.store import Artifacts, Checkpoints, Models, open_run, read_metrics, read_run

if TYPE_CHECKING:
    from tests.store.conftest import Children, Disk

Save = Callable[..., Checkpoint]
FAULTS = pytest.mark.parametrize(("code", "sticky"), [(errno.ENOSPC, True), (errno.EIO, False)], ids=["disk full", "one I/O error"])


def leftovers(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob(".tmp-*")]


def check_error(error: StoreError, code: int) -> None:
    assert isinstance(error, StorageFullError) == (code == errno.ENOSPC), error
    assert "Cannot" in str(error)


# --------------------------------------------------------------------------------------------------------- checkpoints
@FAULTS
def test_publish_survives_a_failure_of_every_operation(tmp_path: Path, disk: Disk, save: Save, code: int, sticky: bool) -> None:
    failures = 0
    for at in itertools.count(1):
        store = Checkpoints(tmp_path / str(at))
        first = save(store, 1, metrics={"loss": 0.5})
        second = None
        with disk.failing(at, code, sticky=sticky) as hit:
            try:
                second = save(store, 2)
            except StoreError as error:
                failures += 1
                check_error(error, code)
        assert store.list() == ((first,) if second is None else (first, second))
        for checkpoint in store.list():
            store.verify(checkpoint)
        if second is None:
            assert leftovers(store.folder) == []
            second = save(store, 2)  # the same again, once there is room
            assert store.latest(verified=True) == second
        if not hit():
            break
    assert failures >= 12


def test_publish_killed_at_every_operation_leaves_all_or_nothing(tmp_path: Path, disk: Disk, children: Children, save: Save) -> None:
    seen = set()
    for at in itertools.count(1):
        store = Checkpoints(tmp_path / str(at))
        first = save(store, 1)

        def crash(store: Checkpoints = store, at: int = at) -> None:
            with disk.crashing(at):
                save(store, 2)

        exit_code = children.run(crash)
        found = store.list()
        seen.add(len(found))
        assert found[0] == first
        assert [c.step for c in found] in ([1], [1, 2])
        for checkpoint in found:
            store.verify(checkpoint)
        store.sweep()
        assert leftovers(store.folder) == []
        if len(found) == 1:
            save(store, 2)
        assert [c.step for c in store.list()] == [1, 2]
        if exit_code == 0:
            break
        assert exit_code == 9
    assert seen == {1, 2}


def test_publish_syncs_each_thing_before_the_next_depends_on_it(tmp_path: Path, disk: Disk, save: Save) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name open files")
    store = Checkpoints(tmp_path)
    with disk.recording():
        save(store, 7)
    synced = [Path(path).name for name, path in disk.calls if name == "fsync"]
    order = [(name, Path(path).name) for name, path in disk.calls if name in ("fsync", "rename", "replace")]
    publication = order.index(("rename", next(name for op, name in order if op == "rename")))
    before, after = order[:publication], order[publication + 1 :]
    assert {"adapter.bin", "state", "optimizer.json"} <= {name for op, name in before if op == "fsync"}
    manifest = next(i for i, (op, _) in enumerate(before) if op == "replace")
    assert max(before.index(("fsync", name)) for name in ("adapter.bin", "state", "optimizer.json")) < manifest
    assert before[manifest - 1] == ("fsync", before[manifest][1]), "the manifest is on disk before it gets its name"
    assert before[-1][0] == "fsync", "the folder is on disk before it appears"
    assert before[-1][1].startswith(".tmp-00000007")
    assert ("fsync", tmp_path.name) in after, "its appearance is on disk before anybody is told"
    assert len(synced) >= 6


def test_kill_9_at_random_times_never_shows_half_a_checkpoint(tmp_path: Path, children: Children, save: Save, until: Callable[..., None]) -> None:
    rng = random.Random(7)
    for round_ in range(10):
        folder = tmp_path / str(round_)
        reported = tmp_path / f"{round_}.reported"
        store = Checkpoints(folder)

        def work(store: Checkpoints = store, reported: Path = reported) -> None:
            for step in range(1, 10_000):
                save(store, step, size=20_000)
                with reported.open("ab") as file:
                    file.write(b"%d\n" % step)

        pid = children.start(work)
        until(lambda reported=reported: reported.exists())
        time.sleep(rng.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL)
        assert children.wait(pid) == -signal.SIGKILL
        told = [int(line) for line in reported.read_bytes().split(b"\n")[:-1]]
        found = [c.step for c in store.list()]
        assert found == list(range(1, len(found) + 1))
        assert len(told) <= len(found) <= len(told) + 1, "nothing that was reported is lost"
        assert store.broken() == ()
        for checkpoint in store.list():
            store.verify(checkpoint)
        store.sweep()
        assert leftovers(folder) == []
        save(store, len(found) + 1)


def test_a_limit_of_the_operating_system_is_a_full_disk(tmp_path: Path, children: Children, save: Save) -> None:
    store = Checkpoints(tmp_path)
    first = save(store, 1)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(StorageFullError, match="Free some space"):
            save(store, 2, size=100_000)

    assert children.run(work) == 0
    assert store.list() == (first,)
    assert leftovers(tmp_path) == []


def test_no_permission_is_said_in_one_sentence(tmp_path: Path, children: Children, save: Save) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    first = save(store, 1)
    store.folder.chmod(0o500)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # root may do anything
        with pytest.raises(StoreError, match="no permission") as caught:
            save(store, 2)
        assert not isinstance(caught.value, StorageFullError)

    assert children.run(work) == 0
    store.folder.chmod(0o700)
    assert store.list() == (first,)


def test_an_error_of_a_native_library_is_a_full_disk_too(tmp_path: Path) -> None:
    class NativeError(Exception):
        pass

    def write(folder: Path) -> None:
        raise NativeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageFullError):
        files.publish(tmp_path / "x", write)
    with pytest.raises(ZeroDivisionError):
        files.publish(tmp_path / "x", lambda _: 1 / 0)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- runs
@FAULTS
def test_a_row_is_written_whole_or_not_at_all(tmp_path: Path, disk: Disk, code: int, sticky: bool) -> None:
    at = 0
    for at in itertools.count(1):
        with open_run(tmp_path / str(at), {"lr": 0.1}) as run:
            run.log_metrics({"step": 1, "loss": 0.5})
            rows = [{"step": 1, "loss": 0.5}]
            with disk.failing(at, code, sticky=sticky) as hit:
                for step in (2, 3):
                    try:
                        run.log_metrics({"step": step, "loss": 0.25})
                        rows.append({"step": step, "loss": 0.25})
                    except StoreError as error:
                        check_error(error, code)
            run.log_metrics({"step": 4})
        assert read_metrics(run.folder) == [*rows, {"step": 4}]
        if not hit():
            break
    assert at >= 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_run_that_cannot_write_its_end_still_tells_the_first_error(tmp_path: Path, disk: Disk, code: int) -> None:
    def work() -> None:
        with contextlib.ExitStack() as stack, open_run(tmp_path / "r", {}):
            stack.enter_context(disk.failing(1, code, sticky=True))  # on until the run is closed
            raise ValueError("the real reason")

    with pytest.raises(ValueError, match="the real reason"):
        work()
    assert read_run(tmp_path / "r").status == "interrupted"  # as after a crash: it never said that it ended


# -------------------------------------------------------------------------------------------------------------- models
@FAULTS
def test_register_survives_a_failure_of_every_operation(tmp_path: Path, disk: Disk, save: Save, code: int, sticky: bool) -> None:
    checkpoint = save(Checkpoints(tmp_path / "run"), 1)
    Models(tmp_path / "models").register(checkpoint, "claims")
    failures = 0
    for at in itertools.count(1):
        models = Models(shutil.copytree(tmp_path / "models", tmp_path / f"models-{at}"))
        count = 1
        with disk.failing(at, code, sticky=sticky) as hit:
            try:
                models.register(checkpoint, "claims")
                count = 2
            except StoreError as error:
                failures += 1
                check_error(error, code)
        assert [v.version for v in models.list()] == list(range(1, count + 1))
        assert models.get("claims").version == count
        assert models.broken() == ()
        assert models.register(checkpoint, "claims").version == count + 1
        if not hit():
            break
    assert failures >= 12


def test_register_killed_at_every_operation_leaves_a_version_or_none(tmp_path: Path, disk: Disk, children: Children, save: Save) -> None:
    checkpoint = save(Checkpoints(tmp_path / "run"), 1)
    Models(tmp_path / "models").register(checkpoint, "claims")
    seen = set()
    for at in itertools.count(1):
        models = Models(shutil.copytree(tmp_path / "models", tmp_path / f"models-{at}"))

        def crash(models: Models = models, at: int = at) -> None:
            with disk.crashing(at):
                models.register(checkpoint, "claims")

        exit_code = children.run(crash)
        found = models.list()
        seen.add(len(found))
        assert [v.version for v in found] in ([1], [1, 2])
        assert models.get("claims") == found[-1]
        assert models.broken() == ()
        models.rebuild()
        assert models.list() == found, "the index says what the files say"
        assert models.register(checkpoint, "claims").version == len(found) + 1
        assert leftovers(models.folder) == []
        if exit_code == 0:
            break
        assert exit_code == 9
    assert seen == {1, 2}


def test_promote_killed_at_every_operation_leaves_one_in_production(tmp_path: Path, disk: Disk, children: Children, save: Save) -> None:
    checkpoint = save(Checkpoints(tmp_path / "run"), 1)
    first = Models(tmp_path / "models")
    for _ in range(2):
        first.register(checkpoint, "claims")
    first.promote("claims:1")
    seen = set()
    for at in itertools.count(1):
        models = Models(shutil.copytree(tmp_path / "models", tmp_path / f"models-{at}"))

        def crash(models: Models = models, at: int = at) -> None:
            with disk.crashing(at):
                models.promote("claims:2")

        exit_code = children.run(crash)
        stages = {v.version: v.stage for v in models.list()}
        seen.add(tuple(stages.items()))
        assert stages in ({1: "production", 2: "none"}, {1: "archived", 2: "production"})
        models.promote("claims:2", "none")  # taking it back never brings an older one back by itself
        assert models.list()[0].stage == ("production" if stages[1] == "production" else "archived")
        if exit_code == 0:
            break
    assert len(seen) == 2


# ----------------------------------------------------------------------------------------------------------- artifacts
@FAULTS
def test_put_survives_a_failure_of_every_operation(tmp_path: Path, disk: Disk, code: int, sticky: bool) -> None:
    at = 0
    for at in itertools.count(1):
        store = Artifacts(tmp_path / str(at))
        old = store.put(b"old")
        with disk.failing(at, code, sticky=sticky) as hit:
            try:
                new = store.put(b"new" * 1000)
            except StoreError as error:
                new = ""
                check_error(error, code)
        assert store.get(old) == b"old"
        if new:
            assert store.get(new) == b"new" * 1000
        assert leftovers(store.folder) == []
        assert store.get(store.put(b"new" * 1000)) == b"new" * 1000
        if not hit():
            break
    assert at >= 6


def test_put_killed_at_every_operation(tmp_path: Path, disk: Disk, children: Children) -> None:
    at = 0
    for at in itertools.count(1):
        store = Artifacts(tmp_path / str(at))

        def crash(store: Artifacts = store, at: int = at) -> None:
            with disk.crashing(at):
                store.put(b"new" * 1000)

        exit_code = children.run(crash)
        for artifact in store.list():
            assert store.get(artifact.key) == b"new" * 1000
        assert store.get(store.put(b"new" * 1000)) == b"new" * 1000
        if exit_code == 0:
            break
    assert at >= 6


# -------------------------------------------------------------------------------------------------------------- damage
def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path: Path, save: Save) -> None:
    store = Checkpoints(tmp_path)
    checkpoint = save(store, 3, metrics={"loss": 0.25})
    assert checkpoint.local_path is not None
    rng = random.Random(3)
    names = [p for p in sorted(checkpoint.local_path.rglob("*")) if p.is_file()]
    assert len(names) == 3
    for path in names:
        whole = path.read_bytes()
        for position in range(0, len(whole), 1 if path.name == "manifest.json" else 4):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CorruptError, match=path.name):
                store.verify(checkpoint)
        path.write_bytes(whole)
    store.verify(checkpoint)


def test_every_truncation_is_found_without_reading_contents(tmp_path: Path, save: Save) -> None:
    store = Checkpoints(tmp_path)
    first = save(store, 1)
    second = save(store, 2)
    assert second.local_path is not None
    for path in (second.local_path / "manifest.json", second.local_path / "adapter.bin"):
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            assert store.list() == (first,)
            assert [p for p, _ in store.broken()] == [second.local_path]
        path.write_bytes(whole + b" ")
        assert store.list() == (first,)
        path.write_bytes(whole)
    assert store.list() == (first, second)
    (second.local_path / "adapter.bin").unlink()
    assert store.list() == (first,)

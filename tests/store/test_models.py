"""The registry: versions that own their files, stages, tags, searches, ancestors; one truth in files however many write."""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework import events, files
from crucible_framework.errors import ConfigError, CorruptError, NotFoundError, StoreError, UnknownNameError
from crucible_framework.records import Checkpoint, LoraConfig
from crucible_framework.store import Checkpoints, Models, load_checkpoint
from crucible_framework.store.query import parse_condition

if TYPE_CHECKING:
    from tests.store.conftest import Children

Save = Callable[..., Checkpoint]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def checkpoints(tmp_path: Path, save: Save) -> tuple[Checkpoint, ...]:
    store = Checkpoints(tmp_path / "run" / "checkpoints")
    return tuple(save(store, step, metrics={"dev/loss": 1.0 / step}) for step in (1, 2, 3))


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models")


# ------------------------------------------------------------------------------------------------------------ register
def test_register_copies_the_files_and_says_all_of_it(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    source = checkpoints[1]
    with events.collect() as seen:
        made = models.register(source, "claims", tags={"task": "nli"}, metrics={"accuracy": 0.75}, description="first try")
    assert (made.name, made.version, made.stage, made.description) == ("claims", 1, "none", "first try")
    assert made.tags == {"task": "nli"}
    assert made.metrics == {"dev/loss": 0.5, "accuracy": 0.75}
    assert source.local_path is not None
    assert made.parents == (f"file:{source.local_path}",)
    copy = made.checkpoint
    assert copy.local_path is not None
    assert copy.local_path == models.folder / "claims" / "1"
    assert dataclasses.replace(copy, uri=source.uri, local_path=source.local_path, sha256=source.sha256) == source
    assert (copy.local_path / "adapter.bin").read_bytes() == (source.local_path / "adapter.bin").read_bytes()
    assert (copy.local_path / "state" / "optimizer.json").read_bytes() == b'{"step": 2}'
    assert models.get("claims") == models.list()[0] == made
    registered = [event for event in seen if event["name"] == "model.registered"]
    assert [(e["model"], e["version"], e["size_bytes"], e["step"]) for e in registered] == [("claims", 1, source.size_bytes, 2)]


def test_a_registered_version_survives_the_run_it_came_from(tmp_path: Path, models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    made = models.register(checkpoints[0], "claims")
    Checkpoints(tmp_path / "run" / "checkpoints").prune(1)
    shutil.rmtree(tmp_path / "run")
    assert models.get("claims:1") == made
    assert made.checkpoint.local_path is not None
    assert load_checkpoint(made.checkpoint.local_path) == made.checkpoint


def test_versions_count_per_name_and_never_twice(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    numbers = [models.register(c, name).version for c, name in zip((*checkpoints, checkpoints[0]), ("a", "b", "a", "a"), strict=True)]
    assert numbers == [1, 1, 2, 3]
    models.promote("a:3")
    shutil.rmtree(models.folder / "a" / "3")  # by hand; its number, and what was said of it, is not given to another
    assert models.register(checkpoints[0], "a").version == 4
    assert [f"{v.name}:{v.version}" for v in models.list()] == ["a:1", "a:2", "a:4", "b:1"]
    assert [v.version for v in models.list("a")] == [1, 2, 4]
    assert models.get("a").stage == "none"


def test_a_checkpoint_that_was_never_published_can_be_registered(tmp_path: Path, models: Models) -> None:
    (tmp_path / "fresh" / "sub").mkdir(parents=True)
    (tmp_path / "fresh" / "sub" / "w.bin").write_bytes(b"weights")
    fresh = Checkpoint(name="x", uri="local://x", kind="sampler", step=5, base_model="tiny", lora=LoraConfig(), local_path=tmp_path / "fresh")
    made = models.register(fresh, "m")
    assert made.checkpoint.size_bytes == 7
    assert made.checkpoint.sha256
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="holds no files"):
        models.register(dataclasses.replace(fresh, local_path=tmp_path / "empty"), "m")
    with pytest.raises(StoreError, match="Download it"):
        models.register(dataclasses.replace(fresh, local_path=None), "m")


def test_damage_never_enters_the_registry(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    damaged, replaced, good = checkpoints
    assert damaged.local_path is not None
    path = damaged.local_path / "adapter.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptError, match=r"adapter\.bin"):
        models.register(damaged, "claims")
    with pytest.raises(CorruptError, match="another checkpoint"):
        models.register(dataclasses.replace(replaced, sha256="0" * 64), "claims")
    assert models.list() == ()
    assert models.register(good, "claims").version == 1


@pytest.mark.parametrize("name", ["", "a b", "../a", ".hidden", "a:1", "a@b", "x" * 81])
def test_names_that_are_no_file_names_are_refused(models: Models, checkpoints: tuple[Checkpoint, ...], name: str) -> None:
    with pytest.raises(ConfigError, match="not safe"):
        models.register(checkpoints[0], name)
    assert not models.folder.exists()


def test_a_tag_is_text(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    with pytest.raises(ConfigError, match="Tag"):
        models.register(checkpoints[0], "a", tags={"": "x"})
    with pytest.raises(ConfigError, match="'seed' is 3"):
        models.register(checkpoints[0], "a", tags={"seed": 3})  # type: ignore[dict-item] # that is the test


# ------------------------------------------------------------------------------------------------------- get and stages
def test_references(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    for checkpoint in checkpoints:
        models.register(checkpoint, "claims")
    models.promote("claims:1", "staging")
    models.promote("claims:2")
    assert {r: models.get(r).version for r in ("claims", "claims:1", "claims:3", "claims@production", "claims@staging", "claims@none")} == {
        "claims": 3, "claims:1": 1, "claims:3": 3, "claims@production": 2, "claims@staging": 1, "claims@none": 3,
    }  # fmt: skip
    with pytest.raises(NotFoundError, match=r"claims:9.*claims:2@production"):
        models.get("claims:9")
    with pytest.raises(NotFoundError, match="claims@archived"):
        models.get("claims@archived")
    with pytest.raises(NotFoundError, match="Did you mean 'claims'"):
        models.get("claim")
    for bad in ("claims@", "claims:0", "claims:1@production", ""):
        with pytest.raises(ConfigError, match="names no model"):
            models.get(bad)


def test_one_version_in_production(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    for checkpoint in checkpoints:
        models.register(checkpoint, "claims")
        models.register(checkpoint, "other")
    models.promote("other:1")
    with events.collect() as seen:
        for version in (1, 3, 1, 2):
            assert models.promote(f"claims:{version}").stage == "production"
            assert [v.version for v in models.find(name="claims", stage="production")] == [version]
    assert [e["replaced"] for e in seen if e["name"] == "model.promoted"] == ["", "claims:1", "claims:3", "claims:1"]
    assert {v.version: v.stage for v in models.list("claims")} == {1: "archived", 2: "production", 3: "archived"}
    models.promote("claims:2", "none")
    assert models.find(name="claims", stage="production") == ()
    assert models.get("other@production").version == 1
    with pytest.raises(ConfigError, match="'prod'"):
        models.promote("claims:1", "prod")  # type: ignore[arg-type] # that is the test


def test_promote_refuses_damaged_files(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    models.register(checkpoints[0], "claims")
    path = models.folder / "claims" / "1" / "adapter.bin"
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CorruptError):
        models.promote("claims:1")
    with pytest.raises(CorruptError):
        models.get("claims:1")
    assert models.list()[0].stage == "none"


def test_tags_change_and_nothing_else_does(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    made = models.register(checkpoints[0], "claims", tags={"task": "nli", "owner": "ann"})
    models.promote("claims:1")
    changed = models.tag("claims@production", {"owner": None, "task": "qa", "seed": "3", "missing": None})
    assert changed == dataclasses.replace(made, stage="production", tags={"task": "qa", "seed": "3"})
    assert models.get("claims") == changed
    models.rebuild()
    assert models.get("claims") == changed
    with pytest.raises(NotFoundError):
        models.tag("claims:2", {"a": "b"})


# ---------------------------------------------------------------------------------------------------- search, ancestors
def test_find_fits_all_that_is_given(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    models.register(checkpoints[0], "a", tags={"task": "nli", 'odd "key".$': "it's %"}, metrics={"accuracy": 0.5, 'it\'s "odd"': 1})
    models.register(checkpoints[1], "a", tags={"task": "nli"}, metrics={"accuracy": 0.9})
    models.register(checkpoints[2], "b", tags={"task": "qa"}, metrics={"accuracy": math.nan, "best": math.inf})
    models.promote("a:2", "staging")

    def found(**wanted: object) -> list[str]:
        return [f"{v.name}:{v.version}" for v in models.find(**wanted)]  # type: ignore[arg-type] # each test says what it gives

    assert found() == ["a:1", "a:2", "b:1"]
    assert found(name="a") == ["a:1", "a:2"]
    assert found(tags={"task": "nli"}) == ["a:1", "a:2"]
    assert found(tags={"task": "nli"}, where=["accuracy >= 0.9"]) == ["a:2"]
    assert found(where=["accuracy<0.9"]) == ["a:1"]
    assert found(where=["accuracy = 0.5"]) == found(where=["accuracy == 5e-1"]) == ["a:1"]
    assert found(where=["accuracy > -inf"]) == ["a:1", "a:2"], "not a number fits no condition"
    assert found(where=["dev/loss <= 0.5", "accuracy > 0"]) == ["a:2"]
    assert found(where=["recall > 0"]) == []
    assert found(tags={'odd "key".$': "it's %"}) == ["a:1"]
    assert found(stage="staging", base_model="tiny") == ["a:2"]
    assert found(base_model="huge") == found(tags={"task": "q"}) == found(name="a' OR '1'='1") == []
    back = models.get("b").metrics
    assert math.isnan(back["accuracy"])
    assert back["best"] == math.inf
    for bad in ("accuracy", "accuracy > high", "> 3", "accuracy > 1 OR 1", "a > 1.2.3"):
        with pytest.raises(ConfigError, match="is no condition"):
            models.find(where=[bad])


@given(
    metric=st.text(st.characters(categories=["L", "N"], include_characters="/_-@."), min_size=1),
    sign=st.sampled_from(["<", "<=", "=", "==", "!=", ">=", ">"]),
    value=st.floats(allow_nan=False),
    space=st.sampled_from(["", " ", "  "]),
)
def test_every_condition_reads_back(metric: str, sign: str, value: float, space: str) -> None:
    found = parse_condition(f" {metric}{space}{sign}{space}{value!r} ")
    assert (found.key, found.sign, found.number) == (metric, "=" if sign == "==" else sign, value)


def test_lineage_walks_to_the_checkpoints(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    first = models.register(checkpoints[0], "a")
    second = models.register(checkpoints[1], "b", parents=["a:1", "tinker://run/7"])
    merged = models.register(second.checkpoint, "merged", parents=["a:1"])
    assert merged.parents == ("a:1", "b:1"), "a copy of a registered version names it"
    uris = [f"file:{c.local_path}" for c in checkpoints]
    assert models.lineage("merged") == {
        "merged:1": ("a:1", "b:1"), "a:1": (uris[0],), "b:1": ("a:1", "tinker://run/7", uris[1]), uris[0]: (), "tinker://run/7": (), uris[1]: (),
    }  # fmt: skip
    assert next(iter(models.lineage("a"))) == "a:1"
    assert first.parents == (uris[0],)
    with pytest.raises(NotFoundError, match="Register the parent first"):
        models.register(checkpoints[0], "c", parents=["a:2"])
    assert models.list("c") == ()


# ---------------------------------------------------------------------------------------------------------- the truth
def test_an_empty_registry_is_no_error(models: Models) -> None:
    assert models.list() == models.find(stage="production") == ()
    assert models.broken() == ()
    assert models.rebuild() == 0
    with pytest.raises(NotFoundError, match="No model is called 'x'"):
        models.get("x")
    assert not models.folder.exists(), "looking makes nothing"


def test_the_registry_may_be_moved(tmp_path: Path, models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    models.register(checkpoints[0], "a")
    moved = Models(models.folder.rename(tmp_path / "elsewhere"))
    assert moved.get("a").checkpoint.local_path == tmp_path / "elsewhere" / "a" / "1"


def test_damaged_versions_are_left_out_and_named(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    for checkpoint in (*checkpoints, *checkpoints):
        models.register(checkpoint, "a")
    folder = models.folder / "a"
    (folder / "1" / "manifest.json").write_bytes(b"{")
    models.tag("a:2", {"x": "y"})
    (folder / "2.json").write_bytes((folder / "2.json").read_bytes().replace(b'"y"', b'"z"'))
    shutil.copytree(folder / "3", folder / "9")
    shutil.rmtree(folder / "4")
    shutil.copytree(checkpoints[0].local_path or folder, folder / "4")  # a checkpoint, but no version
    (folder / "5.json").write_bytes(b"[]")
    models.rebuild()
    assert [v.version for v in models.list()] == [3, 6]
    assert {path.name: why for path, why in models.broken()}.keys() == {"1", "2", "4", "5", "9"}
    with pytest.raises(CorruptError, match="Delete it"):
        models.promote("a:6")  # whether 2 or 5 are in production cannot be known
    (folder / "2.json").unlink()
    (folder / "5.json").unlink()
    assert models.promote("a:6").stage == "production"
    assert [v.version for v in models.list()] == [2, 3, 5, 6]


def test_a_version_whose_folder_was_replaced_is_not_served(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    models.register(checkpoints[0], "a")
    models.register(checkpoints[1], "a")
    manifest = files.read_manifest(models.folder / "a" / "1")
    shutil.rmtree(models.folder / "a" / "1")
    files.publish(models.folder / "a" / "1", lambda to: (to / "adapter.bin").write_bytes(b"other"), manifest.meta)
    with pytest.raises(CorruptError, match="was replaced"):
        models.get("a:1")
    assert models.rebuild() == 2
    assert models.get("a:1").checkpoint.size_bytes == 5


# --------------------------------------------------------------------------------------------------------- concurrency
def test_threads_get_distinct_consecutive_versions(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    got: list[int] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(3):
            got.append(Models(models.folder).register(checkpoints[0], "claims").version)
            assert models.list()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(1, 25))
    assert [v.version for v in models.list()] == list(range(1, 25))


def test_processes_get_distinct_consecutive_versions(models: Models, checkpoints: tuple[Checkpoint, ...], children: Children) -> None:
    def work() -> None:
        for _ in range(5):
            made = models.register(checkpoints[0], "claims")
            models.promote(f"claims:{made.version}")
            assert len(models.find(stage="production")) == 1
            assert made.version in [v.version for v in models.list()]

    pids = [children.start(work) for _ in range(4)]
    assert [children.wait(pid) for pid in pids] == [0] * 4
    assert [v.version for v in models.list()] == list(range(1, 21))
    before = models.list()
    models.rebuild()
    assert models.list() == before
    assert models.broken() == ()


# ------------------------------------------------------------------------------------------------ order and aliases
def test_the_best_comes_first_by_stated_or_known_directions(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    for value in (0.5, 0.9, 0.7):
        models.register(checkpoints[0], "a", metrics={"eval/accuracy": value, "odd": value, "dev/loss": value}, directions={"odd": "min"})
    models.register(checkpoints[1], "b")
    models.register(checkpoints[1], "c", metrics={"eval/accuracy": math.nan, "plain": 1.0})

    def order(**wanted: object) -> list[str]:
        return [f"{v.name}:{v.version}" for v in models.find(**wanted)]  # type: ignore[arg-type] # each test says what it gives

    assert order(order_by="eval/accuracy") == ["a:2", "a:3", "a:1", "b:1", "c:1"]
    assert order(order_by="eval/accuracy", direction="min", limit=1) == ["a:1"]
    assert order(order_by="odd", name="a") == ["a:1", "a:3", "a:2"]
    assert order(order_by="dev/loss", where=["eval/accuracy > 0"]) == ["a:1", "a:3", "a:2"]
    assert models.get("a:1").directions == {"odd": "min"}
    models.rebuild()
    assert order(order_by="odd", name="a") == ["a:1", "a:3", "a:2"]
    with pytest.raises(ConfigError, match="Nothing says whether more of 'plain'"):
        models.find(order_by="plain")
    with pytest.raises(UnknownNameError, match="Did you mean 'eval/accuracy'"):
        models.find(order_by="eval/acuracy")
    with pytest.raises(ConfigError, match="expected 'min' or 'max'"):
        models.register(checkpoints[0], "a", metrics={"x": 1.0}, directions={"x": "up"})  # type: ignore[dict-item]
    assert models.find(where=["eval/accuracy != 0.5"], name="a")[0].version == 2
    with pytest.raises(ConfigError, match="compares no number"):
        models.find(where=["eval/accuracy = high"])


def test_aliases_point_at_versions_and_move(models: Models, checkpoints: tuple[Checkpoint, ...]) -> None:
    for _ in range(3):
        models.register(checkpoints[0], "a")
    with events.collect() as seen:
        models.alias("a", "champion", 2)
    assert [(e["alias"], e["version"]) for e in seen if e["name"] == "model.aliased"] == [("champion", 2)]
    assert models.get("a@champion").version == 2
    models.alias("a", "champion", 3)
    models.alias("a", "rival", 1)
    assert models.aliases("a") == {"champion": 3, "rival": 1}
    assert models.tag("a@champion", {"x": "1"}).version == 3
    models.alias("a", "champion", None)
    with pytest.raises(NotFoundError, match="No alias or stage is called 'champion'"):
        models.get("a@champion")
    with pytest.raises(NotFoundError, match="No model version fits 'a:9'"):
        models.alias("a", "new", 9)
    for bad in ("production", "2", "a b", "-x", ""):
        with pytest.raises(ConfigError):
            models.alias("a", bad, 1)
    path = models.folder / "a" / "aliases.json"
    path.write_text(path.read_text().replace('"rival": 1', '"rival": 2'))
    with pytest.raises(CorruptError, match="its checksum differs"):
        models.get("a@rival")
    assert models.get("a").version == 3

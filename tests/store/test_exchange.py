"""Runs go out as one table, or to MLflow, and come back as they were."""

from __future__ import annotations

import math
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible_framework import files
from crucible_framework.errors import ConfigError, FormatError, StorageFullError
from crucible_framework.exporters import flat, mlflow_copies
from crucible_framework.records import Json
from crucible_framework.store import RunInfo, Tracker, copy_runs, export_runs, from_mlflow, import_runs, open_run
from crucible_framework.store.exchange import _nested, _parts, _rows

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    root = tmp_path / "runs"
    with open_run(root / "a", {"base_model": "tiny", "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}, "loss": {"kl": 0.5}}) as run:
        run.log_metrics({"step": 0, "epoch": 0.0, "probe/loss": 3.0})
        run.log_metrics({"step": 1, "epoch": 0.5, "train/loss": 2.0, "train/tokens": 40})
        run.log_metrics({"step": 1, "epoch": 0.5, "dev/loss": None})
        run.log_timing({"step": 1, "step_s": 0.25})
        run.finish({"final_loss": 2.0})
    with pytest.raises(ValueError, match='bad, "quoted"\nand broken'), open_run(root / "b", {"base_model": "tiny"}):
        raise ValueError('bad, "quoted"\nand broken')
    tracker = Tracker(root)
    tracker.tag("a", {"owner": 'Ada, "the first"', "n": "1"})
    tracker.note("a", "two\nlines, one comma")
    return tracker


def told(info: RunInfo) -> dict[str, object]:
    return {
        "name": info.name, "status": info.status, "created": info.created_at, "finished": info.finished_at, "error": info.error, "params": dict(info.params),
        "tags": dict(info.tags), "notes": info.notes, "result": info.result, "fingerprint": info.fingerprint, "steps": info.steps, "epochs": info.epochs,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_format_brings_runs_back(tracker: Tracker, tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"runs{suffix}"
    rows = export_runs(tracker.runs(), path)
    assert rows == len(_rows(path)) > 10
    assert import_runs(path, tmp_path / "back") == ("a", "b")
    back = Tracker(tmp_path / "back")
    assert [told(info) for info in back.runs()] == [told(info) for info in tracker.runs()]
    for name in "ab":
        for file in ("metrics.jsonl", "timings.jsonl"):
            assert files.read_lines(back.folder(name) / file) == files.read_lines(tracker.folder(name) / file)
        assert files.read_json(back.folder(name) / "config.json") == files.read_json(tracker.folder(name) / "config.json")
    with pytest.raises(ConfigError, match="has 'a', 'b' already; nothing was imported"):
        import_runs(path, tmp_path / "back")


def test_parquet_is_a_table_that_others_read(tracker: Tracker, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export_runs(tracker.runs(), tmp_path / "runs.parquet")
    table = parquet.read_table(tmp_path / "runs.parquet")
    assert [str(field.type) for field in table.schema] == ["string", "string", "string", "int64", "int64", "double", "double", "string"]
    losses = [row for row in table.to_pylist() if row["kind"] == "metric" and row["name"] == "train/loss"]
    assert [(row["run"], row["step"], row["epoch"], row["number"]) for row in losses] == [("a", 1, 0.5, 2.0)]


def test_files_that_are_no_tables_are_named(tracker: Tracker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in '.xlsx'; expected one of .csv, .jsonl, .parquet"):
        export_runs(tracker.runs(), tmp_path / "runs.xlsx")
    with pytest.raises(ConfigError, match="There is no file"):
        import_runs(tmp_path / "none.csv", tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FormatError, match=r"other.csv: row 1 has a, b; expected run, kind"):
        import_runs(tmp_path / "other.csv", tmp_path / "new")
    (tmp_path / "bad.jsonl").write_bytes(
        orjson.dumps({"run": "a", "kind": "metric", "name": "x", "row": None, "step": 1, "epoch": None, "number": 1.0, "text": None})
    )
    with pytest.raises(FormatError, match="does not parse"):
        import_runs(tmp_path / "bad.jsonl", tmp_path / "new")
    (tmp_path / "evil.jsonl").write_bytes((tmp_path / "bad.jsonl").read_bytes().replace(b'"a"', b'"../a"'))
    with pytest.raises(ConfigError, match="not safe"):
        import_runs(tmp_path / "evil.jsonl", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_half_of_a_run(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_runs(tracker.runs(), tmp_path / "runs.jsonl")

    def full(path: Path, data: bytes) -> None:
        if path.name == "metrics.jsonl":
            raise StorageFullError("full")
        real(path, data)

    real = files.write_atomic
    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(StorageFullError):
        import_runs(tmp_path / "runs.jsonl", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


_keys = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=4)
_trees = st.recursive(
    st.one_of(st.integers(-5, 5), st.text(max_size=5), st.none(), st.lists(st.integers(0, 3), max_size=2)),
    lambda inner: st.dictionaries(_keys, inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_keys, _trees, max_size=4))
def test_dotted_keys_give_the_tree_back(tree: dict[str, Json]) -> None:
    assert _nested(flat(tree)) == tree


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.one_of(st.floats(allow_nan=False), st.integers(-(2**53), 2**53), st.text(), st.booleans(), st.none()))
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_every_value_comes_back(tmp_path: Path, suffix: str, value: Json) -> None:
    from crucible_framework.store.exchange import _fact, _written

    path = tmp_path / f"x{suffix}"
    path.write_bytes(_written([_fact("a", "metric", "x", value, row=0, step=1)], suffix))
    found = _parts(_rows(path), path)[2][0]["x"]
    expected = None if isinstance(value, float) and math.isinf(value) else value
    assert found == expected
    assert type(found) is type(expected)


def test_mlflow_gets_runs_and_gives_them_back(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    where = (tmp_path / "mlruns").as_uri()
    assert copy_runs(tracker.runs(), mlflow_copies("study", where)) == 2
    assert from_mlflow("study", tmp_path / "back", tracking_uri=where) == ("a", "b")
    back = Tracker(tmp_path / "back")
    assert back.get("a").params == tracker.get("a").params
    assert back.get("a").tags == tracker.get("a").tags
    assert [info.status for info in back.runs(order_by="steps", direction="max")] == ["done", "failed"]
    assert back.history("a", "train/loss") == tracker.history("a", "train/loss")
    assert back.history("a", "train/loss", by="epoch") == ((0.5, 2.0),)
    with pytest.raises(ConfigError, match="MLflow has no experiment 'other'"):
        from_mlflow("other", tmp_path / "x", tracking_uri=where)

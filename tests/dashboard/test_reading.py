"""Growing files are read once and wholly, whatever happens to them meanwhile."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.dashboard.reading import Curves, Tail, Workspace
from crucible_framework.errors import NotFoundError
from crucible_framework.files import write_atomic
from crucible_framework.store import open_run, read_run

WHOLE = st.integers(-(2**63), 2**64 - 1)  # what the reader keeps whole; no metric counts further


@given(st.lists(st.dictionaries(st.text(max_size=5), WHOLE | st.text(max_size=10), max_size=3), max_size=12), st.data())
def test_however_a_file_grows_every_row_comes_once(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, int | str]], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("tail") / "rows.jsonl"
    raw = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    found: list[object] = []
    tail = Tail(path)
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        with path.open("ab") as file:
            file.write(raw[start:end])
        if data.draw(st.booleans()):
            tail = Tail(path, tail.cursor)  # another reader goes on from the cursor
        chunk = tail.read()
        assert not chunk.again
        assert chunk.damaged == 0
        found += chunk.rows
    assert found == rows


def test_a_replaced_or_cut_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert Tail(path).read().rows == ()
    path.write_text('{"step":1}\n{"step":2}\n')
    tail = Tail(path)
    assert len(tail.read().rows) == 2
    write_atomic(path, b'{"step":1}\n')
    chunk = tail.read()
    assert (chunk.again, chunk.rows) == (True, ({"step": 1},))
    path.write_bytes(b"")
    assert tail.read().again
    path.write_text('not json\n[1]\n{"step":5}\n{"step":')
    chunk = tail.read()
    assert (chunk.rows, chunk.damaged) == (({"step": 5},), 2)


def test_a_cursor_that_is_none_begins_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step":1}\n')
    for cursor in ("", "x", "1", "-", "1-x", "99999999999999999999-1"):
        assert Tail(path, cursor).read().rows == ({"step": 1},), cursor


def test_curves_keep_peaks_gaps_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0, "ok": True, "note": "x"} for step in range(5000)]
    rows[1234]["loss"], rows[2345]["loss"] = 99.0, -99.0
    rows[3000]["loss"] = None  # a loss that was not finite
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"loss": 3}\n{"step": "x", "loss": 3}\n')
    curves = Curves(path)
    curves.update()
    assert curves.names() == ("loss",)
    points = curves.points("loss", 100)
    assert len(points) <= 101
    assert {(1234.0, 99.0), (2345.0, -99.0)} <= set(points)
    assert curves.points("loss", 10_000, 2999, 3001) == [(2999, 1.0), (3001, 1.0)]
    assert curves.points("other") == []
    assert curves.last("loss") == 1.0
    assert curves.last("other") is None
    write_atomic(path, b'{"step": 7, "loss": 2}\n')
    curves.update()
    assert curves.points("loss") == [(7.0, 2.0)]


_values = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, width=32) | st.text(max_size=2)
_rows = st.lists(st.dictionaries(st.sampled_from(["step", "a", "b"]), _values, max_size=3), max_size=8)


@given(rows=_rows, torn=st.booleans())
def test_what_curves_say_of_a_run_is_what_its_files_say(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], torn: bool) -> None:
    folder = tmp_path_factory.mktemp("runs") / "a"
    with open_run(folder, {}):
        pass
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows).replace("Infinity", "1e9") + '{"step": 8' * torn)
    assert Workspace(folder.parent).info("a") == read_run(folder)


def test_a_line_that_holds_two_rows_is_damaged_and_its_neighbours_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step":1},{"step":2}\n{"step":3}\n{"step":4\n,"a":5}\n')
    chunk = Tail(path).read()
    assert (chunk.rows, chunk.damaged) == (({"step": 3},), 3)


def test_curves_of_unordered_steps_are_not_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "a": 1}\n{"step": 3, "a": 2}\n')
    curves = Curves(path)
    curves.update()
    assert sorted(curves.points("a", 100, 0, 4)) == [(3.0, 2.0)]
    assert math.isclose(curves.last("a") or 0, 2.0)


@pytest.mark.parametrize("name", ["", ".", "..", "../run-0", "run-0/../run-1", "/etc", "run-0\0", ".hidden", "a\\b", "missing", "models"])
def test_only_a_run_that_is_there_has_a_folder(workspace: Path, name: str) -> None:
    with pytest.raises(NotFoundError, match="There is no run"):
        Workspace(workspace).folder(name)


def test_a_workspace_lists_the_newest_first_and_names_what_is_broken(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    make_run(tmp_path / "a", steps=2)
    make_run(tmp_path / "b", steps=2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{")
    (tmp_path / "c" / "config.json").write_text("{}")
    (tmp_path / ".tmp-x").mkdir()
    (tmp_path / ".tmp-x" / "run.json").write_text("{}")
    workspace = Workspace(tmp_path)
    infos = workspace.infos()
    assert [(info.name, info.status) for info in infos] == [("b", "done"), ("a", "done"), ("c", "broken")]
    assert "run.json" in infos[2].error
    assert workspace.info("a") is workspace.info("a"), "what has not changed is not read again"
    before = workspace.info("a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/loss": 9}\n')
    assert workspace.info("a").metrics["train/loss"] == 9 != before.metrics["train/loss"]

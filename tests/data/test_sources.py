"""Reading files: rows with their lines, and file:line in every complaint. Finding files: the caller's folder, CRUCIBLE_DATA, the cache."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.config import places
from crucible_framework.data import hub, read_rows
from crucible_framework.data.sources import file_card, find_files, find_path
from crucible_framework.errors import FormatError, NotFoundError, StoreError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(rows=st.lists(st.dictionaries(NAMES, JSON, max_size=4), max_size=6), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), packed=st.booleans())
def test_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], end: str, bom: bool, packed: bool) -> None:
    raw = ("\ufeff" if bom else "").encode() + "".join(json.dumps(row) + end for row in rows).encode()
    path = tmp_path_factory.mktemp("rows") / ("a.jsonl.gz" if packed else "a.JSONL")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert [(row.line, dict(row.values)) for row in read_rows(path)] == list(enumerate(rows, start=1))


@given(
    header=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    lines=st.lists(st.lists(CELLS, min_size=4, max_size=4), max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_csv_comes_back(tmp_path_factory: pytest.TempPathFactory, header: list[str], lines: list[list[str]], end: str, bom: bool) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([header, *(line[: len(header)] for line in lines)])
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    path.write_bytes(("\ufeff" if bom else "").encode() + text.getvalue().encode())
    assert [dict(row.values) for row in read_rows(path)] == [dict(zip(header, line, strict=False)) for line in lines]


def test_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n  \n{"a": 2}')
    (tmp_path / "a.csv").write_text('a,b\n\n"two\nlines",1\nx,2\n')
    assert [row.where for row in read_rows(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:5"]
    assert [row.line for row in read_rows(tmp_path / "a.csv")] == [3, 5]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON: .*correct or remove the line"),
        ("a.jsonl", b'{"a": NaN}\n', r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\r\n\r\n[1]\r\n', r"a\.jsonl:3: the line is a JSON list; expected an object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl:2: not UTF-8: .* at byte 16. Save the file as UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 50, mtime=0)[:-9], r"not a whole gzip file"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: the row has 3 cells; expected 2"),
        ("a.csv", b'a,b\n1,2\n"open,2\n', r"a\.csv:3: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: the header is \['a', 'a'\]"),
        ("a.csv", b"a,\n1,2\n", r"a\.csv:1: the header is"),
        ("a.csv", b"a,b\n1,caf\xe9\n", r"a\.csv:2: not UTF-8"),
        ("a.txt", b"hello", r"the suffix '\.txt' is not read. Expected \.jsonl"),
    ],
)
def test_files_that_do_not_parse(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=match):
        read_rows(tmp_path / name)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b"")
        assert read_rows(tmp_path / name) == ()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no data file"):
        read_rows(tmp_path / "a.jsonl")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").touch()

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StoreError, match="no permission"):
        read_rows(tmp_path / "a.jsonl")


def test_cells_are_asked_for_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"claim": "yes", "n": 1, "blank": " "}\n{}\n')
    row, empty = read_rows(tmp_path / "a.jsonl")
    assert row.text("claim") == "yes"
    assert row.get("n") == 1
    for key, match in (("n", "'n' is 1; expected text"), ("blank", "'blank' is ' '"), ("label", "no 'label'; the row has 'claim', 'n', 'blank'")):
        with pytest.raises(FormatError, match=rf"a\.jsonl:1: .*{match}"):
            row.text(key)
    with pytest.raises(FormatError, match=r"a\.jsonl:2: .*the row has nothing"):
        empty.get("claim")


def test_a_card_names_a_file_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n")
    card = file_card(tmp_path / "a.csv")
    assert (card.name, card.size_bytes, card.sha256) == ("a.csv", 4, hashlib.sha256(b"a,b\n").hexdigest())


# ------------------------------------------------------------------------------------------------------------- finding
def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{folder}")
    return folder


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setenv("CRUCIBLE_DATA", str(tmp_path / "mine"))
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "cache"))
    return {"given": tmp_path / "given", "mine": tmp_path / "mine", "cache": tmp_path / "cache" / "data"}.__getitem__


WANTED = (("a.jsonl",), ("b.jsonl", "b.jsonl.gz"))


def test_the_folder_given_comes_before_the_environment_and_the_cache(roots: Callable[[str], Path]) -> None:
    cached = put(roots("cache") / "set", "a.jsonl", "b.jsonl")
    assert find_files("set", WANTED) == (cached / "a.jsonl", cached / "b.jsonl")
    mine = put(roots("mine"), "a.jsonl", "b.jsonl.gz")
    assert find_files("set", WANTED) == (mine / "a.jsonl", mine / "b.jsonl.gz")
    given_folder = put(roots("given") / "set", "a.jsonl", "b.jsonl", "b.jsonl.gz")
    assert find_files("set", WANTED, data=roots("given")) == (given_folder / "a.jsonl", given_folder / "b.jsonl")


def test_files_of_a_set_are_never_mixed_from_two_folders(roots: Callable[[str], Path]) -> None:
    put(roots("mine") / "set", "a.jsonl")
    put(roots("cache") / "set", "b.jsonl")
    with pytest.raises(NotFoundError, match=r"'set' is not here: looked in .*mine.*cache.* and missed b\.jsonl or b\.jsonl\.gz\. Get it\."):
        find_files("set", WANTED, fix="Get it.")


def test_a_folder_given_is_the_only_one(roots: Callable[[str], Path]) -> None:
    put(roots("mine") / "set", "a.jsonl", "b.jsonl")
    with pytest.raises(NotFoundError, match="Set CRUCIBLE_DATA to their folder"):
        find_files("set", WANTED, data=put(roots("given")))


def test_a_path_is_looked_for_as_it_is_and_then_below_the_roots(roots: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(put(tmp_path / "here"))
    put(roots("cache"), "x.jsonl")
    assert find_path("x.jsonl") == roots("cache") / "x.jsonl"
    put(roots("mine"), "x.jsonl")
    assert find_path("x.jsonl") == roots("mine") / "x.jsonl"
    put(tmp_path / "here", "x.jsonl")
    assert find_path("x.jsonl") == Path("x.jsonl")
    with pytest.raises(NotFoundError, match=r"no data file 'y\.jsonl': looked at .*mine/y\.jsonl.*cache/data/y\.jsonl"):
        find_path("y.jsonl")


def test_without_an_environment_only_the_cache_is_looked_at() -> None:
    folder = put(places().cache / "data", "a.jsonl", "b.jsonl")
    assert places().data is None
    assert find_files("set", WANTED) == (folder / "a.jsonl", folder / "b.jsonl")


def test_hub_names_go_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    assert find_path("hf://datasets/owner/name/a.jsonl") == tmp_path
    assert asked == ["hf://datasets/owner/name/a.jsonl"]

"""LaTeX, JSON, CSV and notebooks: foreign text stays text, every number is there, and programs that read the format can."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from tests.reports.conftest import MakeRun
from tests.reports.test_escaping import NASTY, TEXT, page

from crucible_framework.errors import ConfigError, UnknownNameError
from crucible_framework.reports import FORMATS, write_report
from crucible_framework.reports.diagrams import rank_diagram, scatter_plot, undominated
from crucible_framework.reports.latex import escaped, render_latex
from crucible_framework.reports.notebook import render_notebook
from crucible_framework.reports.parts import Point, Ranks, Scatter, Table
from crucible_framework.reports.tables import render_csv, render_json

EMPTY = Table(title="", columns=("",), rows=(), source="")


# -------------------------------------------------------------------------------------------------------------- LaTeX
@given(text=TEXT)
@settings(max_examples=60)
def test_latex_text_holds_no_command_of_its_own(text: str) -> None:
    shown = escaped(text)
    assert all(ord(char) < 0x180 for char in shown), "pdfLaTeX sets nothing else"
    bare = re.sub(r"\\([{}$&#%_]|(?:text[a-z]+|allowbreak|dots)\{\}|ensuremath\{[^{}]*(?:\{[^{}]*\})?[^{}]*\})", "", shown)
    bare = re.sub(r"\{\[\}|\{\]\}|\{-\}|\{\}", "", bare)
    assert not set("\\{}$&#%_^") & set(bare.replace("\\allowbreak", "")), (text, bare)


def test_every_part_of_a_document_is_in_the_latex() -> None:
    source = render_latex(page("plain words"))
    assert source.count(r"\begin{longtable}") == 1
    assert source.count(r"\begin{axis}") == 3
    assert source.count(r"\begin{tikzpicture}[x=1mm") == 1
    assert source.rstrip().endswith(r"\end{document}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdfLaTeX is installed")
def test_pdflatex_compiles_the_worst_texts(tmp_path: Path) -> None:
    (tmp_path / "report.tex").write_text(render_latex(page(" ".join(NASTY))), encoding="utf-8")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-1500:]


# ---------------------------------------------------------------------------------------------------------------- CSV
@given(text=TEXT)
@settings(max_examples=60)
def test_no_csv_cell_is_a_formula_and_every_number_is_there(text: str) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(page(text)))))
    assert {row["section"] for row in rows} == {"results"}
    for row in rows:
        for cell in row.values():
            if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
                float(cell)
    numbers = {row["value"] for row in rows}
    assert {"0.5", "0.4", "0.6", "1.0", "2.0"} <= numbers


# --------------------------------------------------------------------------------------------------- JSON and notebook
@given(text=TEXT)
@settings(max_examples=40)
def test_json_and_notebooks_parse_and_keep_the_text(text: str) -> None:
    surrogate = any(0xD800 <= ord(char) < 0xE000 for char in text)
    if surrogate:
        return  # no file could have given it
    body = json.loads(render_json(page(text)))
    assert body["title"] == text
    assert [block["kind"] for block in body["sections"][0]["blocks"]] == ["Table", "LineChart", "DotPlot", "Scatter", "Ranks", "Samples", "Listing", "Note"]
    book = json.loads(render_notebook(page(text)))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell) for cell in ids)
    drawn = [cell for cell in book["cells"] if "attachments" in cell]
    assert len(drawn) == 4
    for cell in drawn:
        ((name, picture),) = cell["attachments"].items()
        assert f"(attachment:{name})" in cell["source"]
        assert picture["image/svg+xml"].startswith("<svg xmlns=")


def test_the_notebooks_code_reads_the_files(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (path,) = write_report(run, "jupyter")
    book = json.loads(path.read_text(encoding="utf-8"))
    (code,) = [cell["source"] for cell in book["cells"] if cell["cell_type"] == "code"]
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=run, capture_output=True, text=True, check=True)
    assert {"run.json", "metrics.jsonl", "findings.json"} <= set(done.stdout.split())


def test_all_formats_are_written_and_are_the_same_again(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    paths = write_report(run, tuple(FORMATS))
    assert [path.name for path in paths] == ["report.html", "report.md", "report.tex", "report.json", "report.csv", "report.ipynb"]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(run, tuple(FORMATS))] == before
    with pytest.raises(UnknownNameError, match="latex"):
        write_report(run, ["latx"])
    with pytest.raises(ConfigError, match="at least one"):
        write_report(run, [])


# ----------------------------------------------------------------------------------------------------------- diagrams
def coordinates(svg: str) -> list[tuple[float, float]]:
    found = [(float(x), float(y)) for x, y in re.findall(r'(?:cx|x1|x)="(-?[\d.]+)" (?:cy|y1|y)="(-?[\d.]+)"', svg)]
    return found + [tuple(map(float, pair.split(","))) for line in re.findall(r'points="([^"]+)"', svg) for pair in line.split()]  # type: ignore[misc]


def test_a_scatter_stays_inside_and_joins_the_best() -> None:
    points = tuple(Point(label=f"arm {i}", x=10.0**i, y=0.2 * i, low=0.2 * i - 0.1, high=0.2 * i + 0.1, best=i % 2 == 0) for i in range(5))
    svg = str(scatter_plot(Scatter(title="t", x_label="seconds", y_label="score", points=points, source="s", values=EMPTY, share=True), "k"))
    assert 'class="front"' in svg
    assert "logarithmic axis" in svg
    assert all(-1 <= x <= 641 and 0 <= y <= 311 for x, y in coordinates(svg))
    assert scatter_plot(Scatter(title="t", x_label="", y_label="", points=(), source="", values=EMPTY), "k") == ""


def test_undominated_are_those_that_nothing_beats_in_both() -> None:
    assert undominated([(1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (3.0, 0.9)], less_is_better=False) == [True, False, True, False]
    assert undominated([(1.0, 0.5), (2.0, 0.4), (3.0, 0.6)], less_is_better=True) == [True, True, False]


def test_a_rank_diagram_draws_a_bar_for_each_set() -> None:
    plot = Ranks(title="t", places=(("a", 1.2), ("b", 1.9), ("c", 2.9)), sets=(("a", "b"), ("c",)), distance=9.0, source="s", values=EMPTY)
    svg = str(rank_diagram(plot, "k"))
    assert svg.count('class="bar"') == 1
    assert "wider than the line" in svg
    assert "Not shown to differ: a and b." in svg
    assert all(0 <= x <= 640 for x, _ in coordinates(svg))
    assert rank_diagram(Ranks(title="t", places=(("a", 1.0),), sets=(), distance=1.0, source="s", values=EMPTY), "k") == ""

"""What a notebook shows is a table of facts, and no text of a model or user is ever markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.display import table_html
from crucible_framework.records import Ballot, DatasetCard, Estimate, Evaluation, Finding, Verdict
from crucible_framework.store import Comparison, RunInfo

EVIL = "<script>alert(1)</script>\u202e\x1b[31m&\"'"


class Page(HTMLParser):
    """The tags and texts of some HTML."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert not attrs
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


CARD = DatasetCard(name=EVIL, split="test", task="verify", rows=1, sha256="0" * 64, licence="CC0", source="here")
SHOWN: dict[str, Any] = {
    "finding": Finding(name=EVIL, test="McNemar", statistic=1.0, p_value=0.03, effect=0.125, interval=(0.01, 0.24), n=80, why=EVIL, source="x"),
    "verdict": Verdict(answer=EVIL, text="", agreement=0.5, strategy="majority", ballots=(Ballot(member="a", answer=EVIL, error=EVIL),), reason=EVIL),
    "evaluation": Evaluation(model=EVIL, card=CARD, items=(), estimates=(Estimate(name="accuracy", value=0.125, low=0.1, high=0.2, n=8, method=EVIL),)),
    "run": RunInfo(name="a", folder=Path(), status="failed", created_at=0.0, base_model=EVIL, steps=3, metrics={EVIL: 0.125}, error=EVIL, tags={"k": EVIL}),
    "comparison": Comparison(names=("a", EVIL), params={"x": (EVIL, None)}, same={}, metrics={"loss": (0.125, None)}),
}


@pytest.mark.parametrize("name", SHOWN)
def test_every_record_shows_its_facts_and_runs_nothing(name: str) -> None:
    shown = SHOWN[name]._repr_html_()
    page = Page(shown)
    assert set(page.tags) <= {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert "<script" not in shown
    assert "\u202e" not in shown
    assert "\x1b" not in shown
    assert any("<script>alert(1)</script>" in text for text in page.texts)
    if name != "verdict":
        assert "0.125" in page.texts


def test_studies_show_their_cells(tmp_path: Path) -> None:
    from crucible_framework.experiments import Experiment
    from crucible_framework.experiments.study import CellResult, Failure, Study

    failed = CellResult(
        id="c", arm=EVIL, seed=1, data="minifact", base="b", status="failed", training={}, failure=Failure(error="NumericError", message="loss is NaN")
    )
    study = Study(experiment=Experiment(name="ranks"), folder=tmp_path, cells=(failed,), bases={})
    page = Page(study._repr_html_())
    assert page.texts[0] == "Study ranks: 0 done, 1 failed, 0 pending"
    assert "loss is NaN" in page.texts
    assert "script" not in page.tags


def test_an_abstention_and_an_unknown_number_are_said() -> None:
    page = Page(
        Verdict(answer=None, text="", agreement=0.0, strategy="unanimous", ballots=(Ballot(member="a", answer=None),), reason="they differ")._repr_html_()
    )
    assert page.texts[0] == "no answer (unanimous, agreement 0.00)"
    assert {"(none)", "–", "they differ"} <= set(page.texts)


def test_long_tables_and_texts_are_cut_and_counted() -> None:
    page = Page(table_html("t", ("a",), [("x" * 400,)] * 60))
    assert page.tags.count("tr") == 1 + 50 + 1
    assert "… and 10 more" in page.texts
    assert f"{'x' * 300}… [100 more]" in page.texts


@given(st.text(), st.text())
def test_any_text_stays_text(title: str, cell: str) -> None:
    page = Page(table_html(title, (cell,), [(cell, 1.0, None)]))
    assert page.tags == ["div", "p", "b", "table", "thead", "tr", "th", "tbody", "tr", "td", "td", "td"]

"""Foreign text stays text: no tag, attribute, link, heading or hidden character comes of it, in HTML, SVG and Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from crucible_framework.reports import write_report
from crucible_framework.reports.markup import element, join, raw
from crucible_framework.reports.parts import (
    Document,
    DotPlot,
    Fact,
    Interval,
    LineChart,
    Listing,
    Note,
    Point,
    Ranks,
    Sample,
    Samples,
    Scatter,
    Section,
    Series,
    Table,
)
from crucible_framework.reports.text import fenced, inline, render_markdown
from crucible_framework.reports.web import render_html
from crucible_framework.reports.words import visible

MakeRun = Callable[..., Path]
NASTY = (
    "<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", '" onload="x', "' onmouseover='x", "</title></svg>", "<!-- x", "]]>",
    "&lt;b&gt; &#60;", "a | b \\| c \\", "```\n# heading\n```", "`` ` ``", "[x](javascript:alert(1))", "![x](https://example.org/i.png)",
    "<https://example.org>", "https://example.org www.example.org a@b.org @user", "# heading", "- item", "1. one", "> quote", "| a |\n|---|", "***",
    "===", "~~x~~ $x$ __b__ *i*", "\u202eabc\u2066", "\x1b[31mred\x00\x07\r", "\u200b\u00ad\ufeff", "line\nline\ttab", "\u2028\u0085", "    code",
    "<b", "&", "\\", "`", "|", "$", " ", "\n", "[^1]: x", "x:\n: y", "---", "\\\\|", "``` x",
)  # fmt: skip
SURROGATE = "\ud800"  # no JSON file can hold one, a caller can
TEXT = st.one_of(
    st.text(min_size=1, max_size=60),
    st.sampled_from(NASTY),
    st.lists(st.sampled_from([*NASTY, SURROGATE, "word", " "]), min_size=1, max_size=4).map("".join),
    st.text(alphabet="<>&\"'`|\\[]()!*_~#-+.:@/ \n\t=${}\x1b\u202e1aw", min_size=1, max_size=40),
)


def page(text: str) -> Document:
    """Every kind of block, with the text wherever foreign text can stand."""
    table = Table(title=text, columns=(text, text), rows=((text, text), ("plain", text)), source=text, numeric=(1,), note=text)
    line = Series(name=text, x=(1.0, 2.0), y=(1.0, 2.0), role="raw")
    chart = LineChart(title=text, x_label=text, y_label=text, series=(line,), source=text, values=table, note=text)
    dots = DotPlot(title=text, rows=(Interval(label=text, value=0.5, low=0.4, high=0.6, text=text),), unit=text, source=text, note=text)
    sample = Sample(
        id=text,
        document=text,
        group="other",
        prompt=text,
        target=text,
        base=text,
        adapter=text,
        base_score="1",
        adapter_score=text,
        base_right=True,
        adapter_right=None,
    )
    blocks = (
        table,
        chart,
        dots,
        Scatter(title=text, x_label=text, y_label=text, points=(Point(label=text, x=1.0, y=0.5, low=0.4, high=0.6),), source=text, values=table, note=text),
        Ranks(title=text, places=((text, 1.0), ("plain", 2.0)), sets=((text, "plain"),), distance=1.5, source=text, values=table, note=text),
        Samples(rule=text, items=(sample,), source=text),
        Listing(title=text, text=text, language="sh", source=text),
        Note(text=text, source=text),
    )
    facts = (Fact(label=text, value=text, detail=text),)
    return Document(
        title=text,
        subtitle=text,
        status=text,
        finished=True,
        summary=text,
        verdict=text,
        facts=facts,
        notices=(text,),
        sections=(Section(key="results", title=text, blocks=blocks),),
    )


class Skeleton(HTMLParser):
    """The tags with their attributes, and the text inside elements of one class."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.ends: list[str] = []
        self.blocks: list[str] = []
        self.headings: list[str] = []
        self._into: list[str] | None = None
        self.others: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        css = dict(attrs).get("class")
        self._into = self.blocks if css in ("text", "code") else self.headings if tag == "h1" else None
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self.ends.append(tag)
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)


PLAIN = Skeleton(render_html(page("word")))


@given(TEXT)
@example("".join((*NASTY, SURROGATE)))
def test_html_has_the_same_tags_whatever_the_text_and_gives_it_back(text: str) -> None:
    source = render_html(page(text))
    found = Skeleton(source)
    assert found.tags == PLAIN.tags
    assert found.ends == PLAIN.ends
    assert found.others == []
    assert found.blocks == [visible(text)] * 5  # target, base, adapter, prompt, listing
    assert found.headings == [visible(text)]
    source.encode()


def reader() -> MarkdownIt:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def flat(tokens: list[Token]) -> list[tuple[str, str]]:
    """Kinds of tokens with their tags; text and code on a line count as the same."""
    kinds: list[tuple[str, str]] = []
    for token in tokens:
        if token.type in ("text", "code_inline", "text_special"):
            if not kinds or kinds[-1][0] != "text":
                kinds.append(("text", ""))
        elif token.type == "inline":
            kinds += flat(token.children or [])
        else:
            kinds.append((token.type, token.tag))
    return [kind for index, kind in enumerate(kinds) if kind[0] != "text" or index == 0 or kinds[index - 1][0] != "text"]


PLAIN_MARKDOWN = [kind for kind in flat(reader().parse(render_markdown(page("word")))) if kind[0] != "text"]


@given(TEXT.filter(str.strip))
@example("".join((*NASTY, SURROGATE)))
def test_markdown_has_the_same_structure_whatever_the_text_and_gives_it_back(text: str) -> None:
    source = render_markdown(page(text))
    tokens = reader().parse(source)
    kinds = [kind for kind in flat(tokens) if kind[0] != "text"]
    assert kinds == PLAIN_MARKDOWN
    assert [token.content for token in tokens if token.type == "fence"] == [f"{visible(text)}\n"] * 5


@given(TEXT.filter(str.strip), st.booleans())
def test_a_line_of_markdown_reads_as_the_text(text: str, cell: bool) -> None:
    written = inline(text, cell=cell)
    assert "\n" not in written
    source = f"| h |\n| --- |\n| {written} |" if cell else written
    inlines = [token for token in reader().parse(source) if token.type == "inline"]
    children = inlines[-1].children or []
    assert {child.type for child in children} <= {"text", "code_inline", "text_special"}
    read = "".join(child.content for child in children)
    shown = visible(text).replace("\n", "⏎").replace("\t", "⇥")
    assert read.split() == shown.split()


@given(TEXT)
def test_a_fenced_block_is_left_by_nothing(text: str) -> None:
    (block,) = reader().parse(fenced(text))
    assert (block.type, block.content) == ("fence", f"{visible(text)}\n")


@pytest.mark.parametrize("text", ["https://example.org/a|b", "see www.example.org", "HTTP://X", "mail a@b.org", "ping @user"])
def test_what_readers_turn_into_links_becomes_code(text: str) -> None:
    (token,) = [token for token in reader().parse(inline(text)) if token.type == "inline"]
    assert [(child.type, child.content) for child in token.children or []] == [("code_inline", text)]


@given(st.text())
def test_nothing_hidden_is_left(text: str) -> None:
    shown = visible(text)
    assert all(char in "\n\t\ufe0e\ufe0f" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for char in shown)
    assert visible(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_elements_escape_text_and_attributes_and_keep_markup() -> None:
    assert element("p", {"title": '<"&', "hidden": None, "x": 1.239}, "<b>", raw("<i></i>")) == '<p title="&lt;&quot;&amp;" x="1.24">&lt;b&gt;<i></i></p>'
    assert element("meta", {"charset": "utf-8"}) == '<meta charset="utf-8">'
    assert join("a<", join("<")) == "a&lt;&lt;"


def test_model_output_in_a_whole_run_changes_no_tag(make_run: MakeRun, tmp_path: Path) -> None:
    hostile = make_run(tmp_path / "a" / "run", texts=NASTY, prompts=NASTY)
    calm = make_run(tmp_path / "b" / "run", texts=(" word",) * 4, prompts=("word",))
    html, markdown = (path.read_text(encoding="utf-8") for path in write_report(hostile))
    plain_html, plain_markdown = (path.read_text(encoding="utf-8") for path in write_report(calm))
    assert "&lt;script&gt;" in html
    assert [tag for tag, _ in Skeleton(html).tags] == [tag for tag, _ in Skeleton(plain_html).tags]
    kinds, calm_kinds = ([kind for kind in flat(reader().parse(text)) if kind[0] != "text"] for text in (markdown, plain_markdown))
    assert kinds == calm_kinds
    for text in (html, markdown):
        assert visible(text) == text

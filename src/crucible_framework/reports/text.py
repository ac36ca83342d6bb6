"""A document as Markdown (CommonMark with GitHub's tables): the same words as the HTML, charts as tables of their values.

Foreign text stands in fenced blocks longer than any fence in it, or is escaped; nothing of it becomes a link, a tag or a heading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .parts import Block, Document, DotPlot, LineChart, Listing, Note, Ranks, Sample, Samples, Scatter, Table
from .words import visible

__all__ = ["fenced", "inline", "markdown_of", "render_markdown"]

_SPECIAL = re.compile(r"[\\`*\[\]<|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#|\w)")
_LINKS = re.compile(r"://|www\.|@", re.IGNORECASE)
_START = re.compile(r"^(\s*)(?:([#+\-=:>])|(\d{1,9})([.)])(?=\s|$))")
_SPACES = str.maketrans({"\n": "⏎", "\t": "⇥"})


def inline(text: str, *, cell: bool = False) -> str:
    """Text on one line; what readers would turn into a link becomes code. `cell` inside a table."""
    text = visible(text).translate(_SPACES).strip()  # spaces at its ends would make code of a line, or end bold print
    if _LINKS.search(text):
        fence = "`" * (_longest(text) + 1)
        pad = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
        return f"{fence}{pad}{text.replace('|', chr(92) + '|') if cell else text}{pad}{fence}"
    escaped = _SPECIAL.sub(lambda match: f"\\{match[0]}", text)
    return escaped if cell else _START.sub(lambda m: f"{m[1]}\\{m[2]}" if m[2] else f"{m[1]}{m[3]}\\{m[4]}", escaped)


def _longest(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def fenced(text: str, language: str = "text") -> str:
    """Text in a fenced block, as it is but for hidden characters, which are shown as signs."""
    shown = visible(text)
    fence = "`" * max(3, _longest(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def render_markdown(document: Document) -> str:
    """The whole file."""
    parts = [f"# {inline(document.title)}", f"{'Training report' if document.of == 'run' else 'Study'} · {inline(document.status)}", inline(document.subtitle)]
    parts += [inline(document.summary), f"**{inline(document.verdict)}**" if document.verdict else ""]
    if document.notices:
        parts += ["Know before you read on:", "\n".join(f"- {inline(notice)}" for notice in document.notices)]
    for section in document.sections:
        parts.append(f"## {inline(section.title)}")
        parts += [piece for block in section.blocks for piece in markdown_of(block)]
    parts.append(f"Made by Crucible Framework. Every number is read from the files of the {document.of} named beside it.")
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_of(block: Block) -> Iterator[str]:
    """The paragraphs of one block."""
    match block:
        case Table():
            yield from _table(block)
        case LineChart() | Scatter() | Ranks():
            yield from _table(block.values)
            yield inline(block.note)
        case DotPlot():
            return  # its numbers stand in the tables of scores and comparisons
        case Samples():
            yield f"{inline(block.rule)} (from {inline(block.source)})"
            for sample in block.items:
                yield from _sample(sample)
        case Listing():
            yield f"**{inline(block.title)}** (from {inline(block.source)})"
            yield fenced(block.text, block.language)
        case Note():
            yield inline(block.text) + (f" (from {inline(block.source)})" if block.source else "")


def _table(table: Table) -> Iterator[str]:
    def line(row: tuple[str, ...]) -> str:
        return f"| {' | '.join(inline(text, cell=True) for text in row)} |"

    yield f"**{inline(table.title)}** (from {inline(table.source)})"
    rule = "|".join(" ---: " if index in table.numeric else " --- " for index in range(len(table.columns)))
    yield "\n".join((line(table.columns), f"|{rule}|", *map(line, table.rows)))
    yield inline(table.note)


def _mark(right: bool | None, score: str) -> str:
    if right is None:
        return "not scored" if score == "–" else f"score {score}"
    return "right" if right else "wrong"


def _sample(sample: Sample) -> Iterator[str]:
    document = f", document {inline(sample.document)}" if sample.document else ""
    yield f"### {inline(sample.id) or 'no id'}{document}"
    sides = (("Target", sample.target), (f"Base ({_mark(sample.base_right, sample.base_score)})", sample.base))
    for who, text in (*sides, (f"Adapter ({_mark(sample.adapter_right, sample.adapter_score)})", sample.adapter)):
        yield f"{inline(who)}:"
        yield fenced(text) if text else "(empty)"
    if sample.prompt:
        yield "Prompt:"
        yield fenced(sample.prompt)

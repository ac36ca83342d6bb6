r"""A document as LaTeX that pdfLaTeX compiles as it is: booktabs tables to copy into a paper, figures as pgfplots with their numbers in them.

All text goes through `escaped`; what pdfLaTeX cannot set is written as its code point, so that no foreign text stops a compilation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .charts import thin
from .parts import Block, Document, DotPlot, Interval, LineChart, Listing, Note, Ranks, Sample, Samples, Scatter, Series, Table
from .words import clip, visible

__all__ = ["escaped", "render_latex"]

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_\allowbreak{}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}", "-": "{-}", "[": "{[}", "]": "{]}", "\u00a0": "~", "−": r"\ensuremath{-}", "×": r"\ensuremath{\times}", "±": r"\ensuremath{\pm}",
    "–": "--", "—": "---", "…": r"\dots{}", "’": "'", "‘": "`", "“": "``", "”": "''", "·": r"\ensuremath{\cdot}", "→": r"\ensuremath{\to}",
    "≤": r"\ensuremath{\le}", "≥": r"\ensuremath{\ge}", "≈": r"\ensuremath{\approx}", "∞": r"\ensuremath{\infty}", "√": r"\ensuremath{\surd}",
    "α": r"\ensuremath{\alpha}", "β": r"\ensuremath{\beta}", "δ": r"\ensuremath{\delta}", "Δ": r"\ensuremath{\Delta}", "ε": r"\ensuremath{\varepsilon}",
    "η": r"\ensuremath{\eta}", "λ": r"\ensuremath{\lambda}", "χ": r"\ensuremath{\chi}", "ω": r"\ensuremath{\omega}", "²": r"\ensuremath{^2}",
    "³": r"\ensuremath{^3}", "¹": r"\ensuremath{^1}", "⁻": r"\ensuremath{^-}",
    **{sign: rf"\ensuremath{{^{index}}}" for index, sign in zip((0, *range(4, 10)), "⁰⁴⁵⁶⁷⁸⁹", strict=True)},
    "✓": "ok", "✗": "x", "⏎": " / ", "⇥": " ", "\t": " ",
}  # fmt: skip
_SET = frozenset(chr(code) for code in (*range(0x20, 0x7F), *range(0xC0, 0x180))) - {"ŉ", "ſ", "Ŀ", "ŀ", "ı", "ĸ", "Ŧ", "ŧ", "Ħ", "ħ"}
_WIDE = 5
_HEAD = r"""\documentclass[10pt]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{textcomp}
\usepackage[a4paper,margin=22mm]{geometry}
\usepackage{booktabs,longtable,array,pdflscape,ragged2e}
\usepackage{pgfplots}
\pgfplotsset{compat=1.14}
\newcolumntype{L}[1]{>{\RaggedRight\arraybackslash\hspace{0pt}}p{#1}}
\newcolumntype{R}[1]{>{\RaggedLeft\arraybackslash\hspace{0pt}}p{#1}}
\setlength{\parindent}{0pt}\setlength{\parskip}{6pt}"""


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    shown = visible(text).replace("\n", " ")
    return "".join(_SPECIAL.get(char) or (char if char in _SET else f"{{[}}U+{ord(char):04X}{{]}}") for char in shown)


def render_latex(document: Document) -> str:
    """The whole file."""
    parts = [_HEAD, rf"\title{{{escaped(document.title)}}}", rf"\author{{{escaped(document.subtitle)}}}", r"\date{}", r"\begin{document}", r"\maketitle"]
    parts += [rf"\emph{{{escaped(document.status)}}}. {escaped(document.summary)}", rf"\textbf{{{escaped(document.verdict)}}}" if document.verdict else ""]
    if document.notices:
        parts.append("\n".join((r"\begin{itemize}", *(rf"\item {escaped(notice)}" for notice in document.notices), r"\end{itemize}")))
    for section in document.sections:
        parts.append(rf"\section*{{{escaped(section.title)}}}")
        parts += [piece for block in section.blocks for piece in _block(block)]
    parts += [f"Made by Crucible Framework. Every number is read from the files of the {document.of} named beside it.", r"\end{document}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Table():
            yield from _table(block)
        case LineChart():
            yield _caption(block.title, block.source, block.note)
            yield _lines(block)
        case DotPlot():
            yield _caption(block.title, block.source, block.note)
            yield _dots(block)
        case Scatter():
            yield _caption(block.title, block.source, block.note)
            yield _scatter(block)
        case Ranks():
            yield _caption(block.title, block.source, block.note)
            yield _ranks(block)
        case Samples():
            yield f"{escaped(block.rule)} {_from(block.source)}"
            for sample in block.items:
                yield from _sample(sample)
        case Listing():
            yield _caption(block.title, block.source)
            yield _verbatim(block.text)
        case Note():
            yield escaped(block.text) + (f" {_from(block.source)}" if block.source else "")


def _from(source: str) -> str:
    return rf"{{\footnotesize (from {escaped(source)})}}"


def _caption(title: str, source: str, note: str = "") -> str:
    return rf"\textbf{{{escaped(title)}}} {_from(source)}" + (rf" {{\small {escaped(note)}}}" if note else "")


def _verbatim(text: str) -> str:
    lines = [escaped(line).replace(" ", "~") or "~" for line in text.split("\n")]
    return r"{\ttfamily\footnotesize\RaggedRight " + "\\\\\n".join(lines) + r"\par}"


def _sample(sample: Sample) -> Iterator[str]:
    yield rf"\textbf{{{escaped(sample.id or 'no id')}}}" + (f", document {escaped(sample.document)}" if sample.document else "")
    for who, text in (("Prompt", sample.prompt), ("Target", sample.target), ("Base", sample.base), ("Adapter", sample.adapter)):
        if text:
            yield f"{who}:"
            yield _verbatim(text)


# -------------------------------------------------------------------------------------------------------------- tables
def _widths(table: Table) -> list[float]:
    """Shares of the line by how much the columns hold, none too narrow for its words."""
    rows = (table.columns, *table.rows)
    sizes = [max(6.0, min(60.0, max(len(row[i]) for row in rows) ** 0.75)) for i in range(len(table.columns))]
    return [size / sum(sizes) for size in sizes]


def _table(table: Table) -> Iterator[str]:
    yield _caption(table.title, table.source, table.note)
    columns = len(table.columns)
    kinds = (rf"{'R' if index in table.numeric else 'L'}{{\dimexpr {width:.4f}\linewidth-2\tabcolsep\relax}}" for index, width in enumerate(_widths(table)))
    head = " & ".join(rf"\textbf{{{escaped(title)}}}" for title in table.columns) + r" \\"
    rows = [" & ".join(escaped(cell) for cell in row) + r" \\" for row in table.rows]
    bare = columns == 2 and not table.columns[0]
    top = [r"\toprule", *([] if bare else [head, r"\midrule"]), r"\endhead"]
    body = "\n".join((rf"\begin{{longtable}}{{@{{}}{''.join(kinds)}@{{}}}}", *top, *rows, r"\bottomrule", r"\end{longtable}"))
    wide = columns > _WIDE
    size = r"\footnotesize" if columns > _WIDE else r"\small"
    yield (r"\begin{landscape}" if wide else "") + f"{{{size} {body}}}" + (r"\end{landscape}" if wide else "")


# ------------------------------------------------------------------------------------------------------------- figures
def _number(value: float) -> str:
    return f"{value:.8g}"


def _axis(options: Sequence[str], *body: str) -> str:
    return "\n".join((r"\begin{tikzpicture}", rf"\begin{{axis}}[{', '.join(options)}]", *body, r"\end{axis}", r"\end{tikzpicture}"))


def _curve(series: Series) -> str:
    points = thin([(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None and math.isfinite(y)], 200)
    marks = "only marks, mark size=1.2pt" if series.role == "points" else "no marks"
    coordinates = " ".join(f"({_number(x)},{_number(y)})" for x, y in points)
    return rf"\addplot+[{marks}] coordinates {{{coordinates}}};" + "\n" + rf"\addlegendentry{{{escaped(series.name)}}}"


def _lines(chart: LineChart) -> str:
    series = [one for one in chart.series if any(y is not None and math.isfinite(y) for y in one.y)]
    if not series:
        return ""
    log = chart.log and all(y > 0 for one in series for y in one.y if y is not None)
    look = [
        "width=0.95\\linewidth",
        "height=65mm",
        "legend style={font=\\footnotesize}",
        "legend pos=outer north east" if len(series) > 4 else "legend pos=north east",
    ]
    return _axis([*look, f"xlabel={{{escaped(chart.x_label)}}}", f"ylabel={{{escaped(chart.y_label)}}}", *(["ymode=log"] if log else [])], *map(_curve, series))


def _error(row: Interval, scale: float, at: int) -> str:
    value, low, high = row.value * scale, row.low * scale, row.high * scale
    if not (math.isfinite(low) and math.isfinite(high)):
        low = high = value
    return f"({_number(value)},{at}) += ({_number(max(0.0, high - value))},0) -= ({_number(max(0.0, value - low))},0)"


def _dots(plot: DotPlot) -> str:
    rows = [row for row in plot.rows if math.isfinite(row.value)]
    if not rows:
        return ""
    scale, count = (100.0 if plot.share else 1.0), len(rows)
    names = ",".join(f"{{{escaped(clip(row.label, 60))}}}" for row in rows)
    look = [
        "width=0.62\\linewidth", f"height={22 + 7 * count}mm", f"ytick={{{','.join(map(str, range(1, count + 1)))}}}", f"yticklabels={{{names}}}",
        "y dir=reverse", f"ymin=0.4, ymax={count}.6", f"xlabel={{{escaped(plot.unit)}}}",
        "yticklabel style={font=\\footnotesize, align=right, text width=55mm}",
    ]  # fmt: skip
    points = " ".join(_error(row, scale, index) for index, row in enumerate(rows, 1))
    zero = [rf"\draw[dashed] (axis cs:0,0.4) -- (axis cs:0,{count}.6);"] if plot.zero else []
    return _axis(look, *zero, rf"\addplot+[only marks, error bars/.cd, x dir=both, x explicit] coordinates {{{points}}};")


def _scatter(plot: Scatter) -> str:
    scale = 100.0 if plot.share else 1.0
    points = [p for p in plot.points if all(map(math.isfinite, (p.x, p.y, p.low, p.high)))]
    if not points:
        return ""
    marks = " ".join(
        f"({_number(p.x)},{_number(p.y * scale)}) += (0,{_number((p.high - p.y) * scale)}) -= (0,{_number((p.y - p.low) * scale)})" for p in points
    )
    names = [rf"\node[anchor=west, font=\footnotesize] at (axis cs:{_number(p.x)},{_number(p.y * scale)}) {{~{escaped(p.label)}}};" for p in points]
    look = [
        "width=0.8\\linewidth",
        "height=75mm",
        "clip=false",
        f"xlabel={{{escaped(plot.x_label)}}}",
        f"ylabel={{{escaped(plot.y_label + (', %' if plot.share else ''))}}}",
    ]
    return _axis(look, rf"\addplot+[only marks, error bars/.cd, y dir=both, y explicit] coordinates {{{marks}}};", *names)


def _ranks(plot: Ranks) -> str:
    places = sorted(plot.places, key=lambda place: (place[1], place[0]))
    if len(places) < 2:
        return ""
    rank = dict(places)
    unit = 100 / max(1, len(places) - 1)
    at = {name: _number((value - 1) * unit) for name, value in places}
    drawn = [r"\begin{tikzpicture}[x=1mm,y=1mm]", rf"\draw (0,0) -- ({_number((len(places) - 1) * unit)},0);"]
    drawn += [rf"\draw ({_number(i * unit)},0) -- ({_number(i * unit)},2) node[above] {{\footnotesize {i + 1}}};" for i in range(len(places))]
    if math.isfinite(plot.distance):
        reach = min(plot.distance, len(places) - 1.0) * unit
        drawn.append(rf"\draw[|-|] (0,10) -- ({_number(reach)},10) node[right] {{\footnotesize critical difference {plot.distance:.3g}}};")
    bars = [names for names in plot.sets if len(names) > 1]
    for row, names in enumerate(bars):
        ends = sorted((rank[name] - 1) * unit for name in names)
        drawn.append(rf"\draw[line width=1.4pt] ({_number(ends[0] - 1)},{-3 - 2 * row}) -- ({_number(ends[-1] + 1)},{-3 - 2 * row});")
    for index, (name, value) in enumerate(places):
        down = -8 - 2 * len(bars) - 5 * index
        drawn.append(rf"\draw[gray] ({at[name]},0) -- ({at[name]},{down}) node[black, right] {{\footnotesize {escaped(name)} {value:.2f}}};")
    return "\n".join((*drawn, r"\end{tikzpicture}"))

"""Commands around claims and quality: look at a claim text, hold an evaluation against targets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from ..errors import FormatError, NotFoundError
from ..evaluation import check_quality, load_evaluation, parse_claims, topology
from . import show
from .reply import Reply

__all__ = ["register"]


def claims(path: Annotated[str, Parameter(allow_leading_hyphen=True)], /) -> Reply:
    """Look at a text of CLAIM and RELATION lines: what breaks the layout, what argues in a circle.

    Args:
        path: a text file, or `-` for standard input.
    """
    if path != "-" and not Path(path).is_file():
        raise NotFoundError(f"There is no file {path!r}; expected a text of CLAIM and RELATION lines. Take - for standard input.")
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path!r} is no UTF-8 text: {error.reason} at byte {error.start}. Expected CLAIM and RELATION lines: save it as UTF-8.") from error
    found = parse_claims(text)
    shape = topology(found)
    numbers = {"claims": shape.claims, "relations": shape.relations, "components": shape.components, "circuit rank": shape.circuit_rank}
    numbers |= {"circuit rank of supports": shape.support_rank, "β₁ (without directions)": shape.betti1}
    told = [f"{name}: {value}" for name, value in numbers.items()]
    told += [f"circle: {' ↔ '.join(circle)}" for circle in shape.circles] + [f"supported and refuted: {name}" for name in shape.conflicts]
    told += [f"{f'line {fault.line}' if fault.line else 'text'}: {fault.text}" for fault in found.faults]
    return Reply({"topology": shape, "faults": found.faults, "claims": found.claims, "relations": found.relations}, "\n".join(told))


def gate(folder: Path, /, *targets: str, bound: bool = False) -> Reply:
    """Hold an evaluation against quality targets; exit code 1 where one is missed.

    Args:
        folder: what `crucible eval --folder` left: the folder, or its `model`.
        targets: `citation_accuracy>=0.95`, `target_nll<=2`; quote them. A metric that was not measured is missed.
        bound: hold the bad end of each interval against the target instead of the value.
    """
    inner = folder / "model"
    evaluation = load_evaluation(inner if (inner / "evaluation.json").is_file() else folder)
    found = check_quality(evaluation, targets, bound=bound)
    missed = [(str(short.target), show.figure(short.value), short.reason) for short in found.shortfalls]
    text = "All targets are met." if found.passed else show.table(("target", "value", "why"), missed, "")
    return Reply(found, text, exit_code=0 if found.passed else 1)


def register(app: App) -> None:
    """Adds the commands."""
    app.command(claims)
    app.command(gate)

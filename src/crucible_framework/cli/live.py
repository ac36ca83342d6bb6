"""Answers on a terminal while they are drawn."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TextIO

from rich.control import strip_control_codes

from ..protocols import Sampler, StreamSampler
from ..records import Completion, Piece, Prompt, SamplingParams

__all__ = ["BETWEEN", "aloud", "ask_aloud", "place"]

BETWEEN = "\n---\n"
place: ContextVar[TextIO | None] = ContextVar("place", default=None)
"""Where a command may write text as it comes; None where its output is one whole (`--json`) or none (`--quiet`)."""


def aloud(sampler: Sampler, wanted: bool | None) -> TextIO | None:
    """Where to tell an answer as it comes, None where it comes whole: on a terminal unless that is not wanted, elsewhere where it is."""
    out = place.get()
    if out is None or wanted is False or not isinstance(sampler, StreamSampler):
        return None
    return out if wanted or out.isatty() else None


class _Told:
    """Writes the answers one after another: what comes of a later one waits until those before it have ended."""

    def __init__(self, out: TextIO, n: int) -> None:
        self._out, self._at = out, 0
        self._waiting, self._over = [""] * n, [False] * n

    def __call__(self, piece: Piece) -> None:
        self._waiting[piece.index] += piece.text
        self._over[piece.index] = piece.stop_reason is not None
        while self._at < len(self._waiting):
            text, self._waiting[self._at] = self._waiting[self._at], ""
            self._out.write(strip_control_codes(text))  # as the whole answer is printed
            if not self._over[self._at]:
                break
            self._at += 1
            self._out.write(BETWEEN if self._at < len(self._waiting) else "\n")
        self._out.flush()


def ask_aloud(sampler: Sampler, prompt: Prompt, params: SamplingParams, n: int = 1, *, out: TextIO | None) -> tuple[Completion, ...]:
    """The answers; told as they come where there is a place for it. An interruption ends the drawing."""
    told = None if out is None else _Told(out, n)
    future = sampler.stream(prompt, params, told, n) if told is not None and isinstance(sampler, StreamSampler) else sampler.sample(prompt, params, n)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise

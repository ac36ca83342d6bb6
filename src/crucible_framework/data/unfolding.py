"""The text of a sample while it is being drawn: what is certain is told, and what further tokens may still change is held back.

This file knows no model, and does not say when a sample ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..protocols import Tokenizer

__all__ = ["Unfolding"]


class Unfolding:
    """Tokens in, text out, whose parts together are the text of the whole.

    Only the newest tokens are decoded, behind those whose text was decoded before, so that a tokenizer which treats the first token apart
    (no space before it) sees none as the first that is not. A text that ends in a broken character waits for the next token, and a text
    that ends as a stop begins waits until it is one or cannot be one.

    Args:
        tokenizer: decodes.
        stops: of the sample; token ids among them never come here.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str | int] = ()) -> None:
        self._decode, self._stops = tokenizer.decode, [stop for stop in stops if isinstance(stop, str)]
        self._window, self._behind, self._before = list[int](), 0, ""  # the first `_behind` tokens of the window have the text `_before`
        self._held, self._told = "", list[str]()

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain with these tokens, "" where there is none."""
        self._window += tokens
        text = self._decode(self._window)
        if len(text) > len(self._before) and not text.endswith("\ufffd"):
            self._held += text[len(self._before) :]
            self._window = self._window[self._behind :]
            self._behind, self._before = len(self._window), self._decode(self._window)
        starts = (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        return self._tell(len(self._held) - max(starts, default=0))

    def end(self, text: str) -> str:
        """The rest of a sample whose whole text this is. A tokenizer that rewrites what it decoded before leaves no rest."""
        told = "".join(self._told)
        self._held = text[len(told) :] if text.startswith(told) else ""
        return self._tell(len(self._held))

    def _tell(self, size: int) -> str:
        told, self._held = self._held[:size], self._held[size:]
        self._told.append(told)
        return told

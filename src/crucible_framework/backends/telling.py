"""Streams of an engine: pieces are told on a thread of their own, so that a reader who is slow holds up neither the engine nor others.

What waits for a slow reader is no more than what was asked to be drawn. This file knows no model.
"""

from __future__ import annotations

import contextvars
import threading
from queue import SimpleQueue
from typing import TypeAlias

from ..data import Unfolding
from ..promise import Promise
from ..protocols import OnPiece, Tokenizer
from ..records import Completion, Piece, SamplingParams

__all__ = ["Teller"]

_Drawn: TypeAlias = tuple[int, int, float, Completion | None]


class Teller:
    """Turns what an engine draws into the pieces of one stream, and keeps its promise after the last of them.

    The engine calls `put` and `fail`, which never wait. The thread begins with the first call and ends with the promise, however that is kept.

    Args:
        promise: of the stream; its receiver may cancel.
        on_piece: the reader; what it raises breaks the promise.
        tokenizer, params: of the samples.
        n: how many there are.
        context: of the one who asked; the reader is called in it.
    """

    def __init__(
        self, promise: Promise[tuple[Completion, ...]], on_piece: OnPiece, tokenizer: Tokenizer, params: SamplingParams, *, n: int, context: contextvars.Context
    ) -> None:
        self._promise, self._on_piece, self._context = promise, on_piece, context
        self._texts = [Unfolding(tokenizer, params.stop) for _ in range(n)]
        self._whole: dict[int, Completion] = {}
        self._queue: SimpleQueue[_Drawn | BaseException | None] = SimpleQueue()
        self._begun = False
        promise.future.add_done_callback(lambda _: self._queue.put(None))

    @property
    def over(self) -> bool:
        """Whether nobody listens any more: cancelled, broken or kept."""
        return self._promise.future.done()

    def put(self, index: int, token: int, logprob: float, whole: Completion | None) -> None:
        """The next token of a sample, and with its last one the sample."""
        self._send((index, token, logprob, whole))

    def fail(self, error: BaseException) -> None:
        """Breaks the promise, once the reader has what was drawn before."""
        self._send(error)

    def _send(self, item: _Drawn | BaseException) -> None:
        if self.over:
            return
        self._queue.put(item)
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._context.run, args=(self._tell,), name="crucible-stream", daemon=True).start()

    def _tell(self) -> None:
        while (item := self._queue.get()) is not None and not self.over:
            if isinstance(item, BaseException):
                self._promise.fail(item)
                continue
            index, token, logprob, whole = item
            try:
                text = self._texts[index].add([token]) if whole is None else self._texts[index].end(whole.text)
                self._on_piece(Piece(index=index, text=text, tokens=(token,), logprobs=(logprob,), stop_reason=None if whole is None else whole.stop_reason))
            except Exception as error:  # the reader's own
                self._promise.fail(error)
                continue
            if whole is not None:
                self._whole[index] = whole
                if len(self._whole) == len(self._texts):
                    self._promise.give(tuple(self._whole[place] for place in range(len(self._texts))))

"""Keys and values in pages of 16 tokens: taken when a sequence grows, shared where sequences begin alike, and found again later.

A full page is remembered under the tokens up to its end and the adapter that made it, so that a prompt's start that was computed before is
not computed again; pages that nobody uses are kept until their room is needed. This file does not know tokens' meaning or sampling.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["PAGE", "Pages", "key_after"]

PAGE = 16
"""Tokens of a page: as many scores as a vector of the compiled step holds."""
_FIRST = 64
"""Pages that are there at first; their number doubles when they are used up."""


def key_after(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page of tokens behind the page of key `before`; the first page's `before` says whose pages they are."""
    return hashlib.blake2b(before + np.array(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


class Pages:
    """Pages of one model.

    Attributes:
        tensor: [layers, pages, numbers], what the pages hold; replaced when there are to be more.

    Args:
        layers: of the model.
        numbers: keys and values of 16 tokens in one layer.
        limit: pages that there may be; `take(beyond=True)` goes further.
    """

    def __init__(self, layers: int, numbers: int, *, dtype: torch.dtype, device: torch.device, limit: int) -> None:
        self.limit = limit
        self.tensor: Tensor = torch.empty((layers, min(limit, _FIRST), numbers), dtype=dtype, device=device)
        self._free = list(range(self.tensor.shape[1]))[::-1]
        self._users = [0] * self.tensor.shape[1]
        self._known: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def left(self) -> int:
        """Pages that can be taken without going beyond the limit."""
        return len(self._free) + len(self._idle) + max(0, self.limit - self.tensor.shape[1])

    @property
    def used(self) -> int:
        """Pages that somebody uses."""
        return self.tensor.shape[1] - len(self._free) - len(self._idle)

    def take(self, *, beyond: bool = False) -> int | None:
        """A page for one user; None where there is none within the limit."""
        if not self._free and not (self.tensor.shape[1] < self.limit and self._grow(self.limit)):
            if self._idle:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
                self._free.append(page)
            elif not (beyond and self._grow(2 * self.tensor.shape[1])):
                return None
        page = self._free.pop()
        self._users[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """One more user for each."""
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One user less for each; what nobody uses and nobody can find again is free. The last page goes first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def shared(self, page: int) -> bool:
        """Whether it has more than one user, and so must not be written to."""
        return self._users[page] > 1

    def copy(self, source: int, target: int) -> None:
        """Copies what a page holds."""
        self.tensor[:, target] = self.tensor[:, source]

    # ------------------------------------------------------------------------------------------------- finding them again
    def remember(self, key: bytes, page: int) -> None:
        """The page is full; it can be found under the key. The first one of a key stays."""
        if key not in self._known and page not in self._key:
            self._known[key], self._key[page] = page, key

    def known(self, keys: Sequence[bytes]) -> int:
        """How many keys from the first on are known."""
        return next((place for place, key in enumerate(keys) if key not in self._known), len(keys))

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of as many keys from the first on as are known, with one more user each."""
        found = [self._known[key] for key in keys[: self.known(keys)]]
        self.share(found)
        return found

    def _forget(self, page: int) -> None:
        if (key := self._key.pop(page, None)) is not None:
            del self._known[key]

    def _grow(self, limit: int) -> bool:
        layers, count, numbers = self.tensor.shape
        size = min(limit, 2 * count)
        wider = self.tensor.new_empty((layers, size, numbers))
        wider[:, :count] = self.tensor
        self.tensor = wider
        self._free += range(size - 1, count - 1, -1)
        self._users += [0] * (size - count)
        return True

"""Logits of a frozen model after each token of given sequences, shown to a function a few positions at a time. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import DataError
from .engine import check_tokens
from .layout import lay_out
from .sampling import Frozen

__all__ = ["Seen", "look"]

Seen = Callable[[int, int, Tensor], None]
"""(row, first position, fp32 logits [t, V] after the tokens from there on)."""
POSITIONS = 256
"""Whose logits are held at once."""


def look(frozen: Frozen, rows: Sequence[Sequence[int]], seen: Seen) -> None:
    """Calls `seen` with the logits after each token of each row, in the order of its positions.

    Raises:
        DataError: a row has no token, one outside the vocabulary, or more than the model reads.
    """
    base = frozen.base
    for row in rows:
        check_tokens(base, list(row), "The sequence", "Shorten it.")
        if len(row) > base.context:
            raise DataError(f"The sequence has {len(row)} tokens; {base.name!r} reads at most {base.context}. Shorten it.")
    with torch.no_grad(), base.slot.using(frozen.active):
        for one in lay_out([list(row) for row in rows], base.device, **base.layout):
            hidden = base.read(one)
            for member, places in zip(one.members, one.where, strict=True):
                for start in range(0, len(places), POSITIONS):
                    some = torch.from_numpy(places[start : start + POSITIONS]).to(base.device)
                    seen(member, start, base.logits(hidden[some]))

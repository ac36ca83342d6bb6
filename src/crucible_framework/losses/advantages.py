"""From rewards of a group of samples to advantages, and from a sampled completion to a datum for the policy losses. No torch.

This file does not know rewards' meaning, models or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, DataError
from ..records import Completion, Datum

__all__ = ["group_advantages", "sampled_datum"]

Kind = Literal["normalised", "leave_one_out", "centred"]


def group_advantages(rewards: ArrayLike, kind: Kind = "normalised") -> NDArray[np.float64]:
    """How much better than its group each sample of one prompt is.

    Args:
        rewards: [n], or [groups, n], of samples of the same prompt; finite.
        kind: "normalised": (r − mean) / standard deviation, n − 1 in its denominator, as in GRPO; "leave_one_out": r − mean of the others
            (RLOO), unbiased as a baseline; "centred": r − mean (Dr. GRPO).

    Returns:
        Of the same shape; zeros where all rewards of a group are equal, as such a group teaches nothing.

    Raises:
        ConfigError: an unknown kind.
        DataError: fewer than two samples in a group, or a reward that is not finite.

    Source: Shao et al. 2024 (GRPO), arXiv 2402.03300; Ahmadian et al. 2024 (RLOO), arXiv 2402.14740; Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim not in (1, 2) or values.shape[-1] < 2:
        raise DataError(f"The rewards have shape {values.shape}; expected [n] or [groups, n] with n of at least 2: draw more samples per prompt.")
    if not np.isfinite(values).all():
        raise DataError(f"The rewards hold {values[~np.isfinite(values)][0]}; expected finite numbers. Score failed samples with the lowest reward.")
    apart: NDArray[np.float64] = values - values.mean(axis=-1, keepdims=True)
    if kind == "centred":
        return apart
    if kind == "leave_one_out":
        n = values.shape[-1]
        apart *= n / (n - 1)
        return apart
    if kind != "normalised":
        raise ConfigError(f"The advantages' kind is {kind!r}; expected 'normalised', 'leave_one_out' or 'centred'.")
    scale = values.std(axis=-1, ddof=1, keepdims=True)
    flat = (np.ptp(values, axis=-1, keepdims=True) <= 1e-9 * np.abs(values).max(axis=-1, keepdims=True)) | (scale == 0)
    np.divide(apart, scale, out=apart, where=~flat)
    apart[np.broadcast_to(flat, apart.shape)] = 0.0
    return apart


def sampled_datum(name: str, prompt: Sequence[int], completion: Completion, advantage: float | Sequence[float]) -> Datum:
    """A sampled completion as the policy losses want it.

    Args:
        name: the datum's id.
        prompt: its token ids (`render_prompt`), at least one.
        completion: drawn at temperature 1; its tokens and log-probs are the sampler's.
        advantage: one for all tokens, or one per token.

    Returns:
        Tokens and targets [T], weight 1 on the completion, extras `logprobs` and `advantages` [T], 0 on the prompt.

    Raises:
        DataError: no prompt or completion tokens, or lengths that differ.
    """
    n = len(completion.tokens)
    each = np.broadcast_to(np.asarray(advantage, dtype=np.float32), (n,)) if np.ndim(advantage) == 0 else np.asarray(advantage, dtype=np.float32)
    if not len(prompt) or not n or len(completion.logprobs) != n or each.shape != (n,):
        raise DataError(
            f"Sample {name!r} has {len(prompt)} prompt tokens, {n} sampled, {len(completion.logprobs)} log-probs and advantages of shape {each.shape}; "
            "expected at least one prompt token, and one log-prob and advantage per sampled token."
        )
    full = [*prompt, *completion.tokens]
    weights, old, advantages = (np.zeros(len(full) - 1, dtype=np.float32) for _ in range(3))
    weights[-n:], old[-n:], advantages[-n:] = 1.0, np.asarray(completion.logprobs, dtype=np.float32), each
    tokens, targets = np.array(full[:-1], dtype=np.int32), np.array(full[1:], dtype=np.int64)
    return Datum(id=name, tokens=tokens, targets=targets, weights=weights, extras={"logprobs": old, "advantages": advantages})

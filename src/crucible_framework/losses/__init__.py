"""Training losses by name: the registry, `resolve`, `combine` and `register`. Importing this loads no torch.

A loss is a function (data, log-probs per datum) → (summed scalar, metrics) with a small `Loss` record beside it. This file does not know
what any loss computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

from ..errors import BackendError, ConfigError
from ..plugins import Registry
from ..protocols import Loss, LossFn
from ..records import Datum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["combine", "losses", "register", "resolve"]

losses: Registry[Loss] = Registry(
    "loss",
    {
        "cross_entropy": "crucible_framework.losses.tokenwise:CROSS_ENTROPY",
        "kl": "crucible_framework.losses.tokenwise:KL",
        "mse": "crucible_framework.losses.tokenwise:MSE",
    },
)
"""All losses; other distributions add theirs under the entry-point group `crucible.loss`."""


def register(name: str, *, source: str = "user", needs: Literal["logprobs", "logits"] = "logprobs", extras: tuple[str, ...] = ()) -> Callable[[LossFn], Loss]:
    """Makes the decorated function a loss that is found by `name`; what it returns is the `Loss`.

    Args:
        name: a new name.
        source: the paper or definition.
        needs: what the function gets as its second argument: log-probs of the targets, or logits [T, V] (local backends only).
        extras: arrays that every datum must bring.

    Raises:
        ConfigError: the name is taken.
    """

    def decorate(fn: LossFn) -> Loss:
        return losses.add(name, Loss(name=name, fn=fn, source=source, needs=needs, extras=extras))

    return decorate


def resolve(spec: str | Mapping[str, float] | Loss | LossFn) -> Loss:
    """The loss that is meant: a name or "module:attribute", weights over several (see `combine`), a `Loss`, or a plain function.

    Raises:
        UnknownNameError: nothing has that name; the nearest ones are named.
        ConfigError: `spec` is none of these.
    """
    if isinstance(spec, Mapping):
        return combine(spec)
    found: object = losses.get(spec) if isinstance(spec, str) else spec
    if isinstance(found, Loss):
        return found
    if callable(found):
        return Loss(name=getattr(found, "__name__", type(found).__name__), fn=found, source="user")
    raise ConfigError(f"{spec!r} gives a {type(found).__name__}; expected a loss: a name, weights over names, a Loss or a function (data, logprobs).")


@overload
def combine(weights: Mapping[str, float]) -> Loss: ...
@overload
def combine(weights: Mapping[str | Loss | LossFn, float]) -> Loss: ...
def combine(weights: Mapping[str, float] | Mapping[str | Loss | LossFn, float]) -> Loss:
    """The weighted sum of several losses: Σ c_i · L_i.

    Each term's own value, without its factor, is reported as `loss/<name>` per unit of token weight, so that the reported loss is
    Σ c_i · `loss/<name_i>`; what a term itself reports becomes `<name>/<metric>`. A term with factor 0 is reported and adds nothing.

    Args:
        weights: factor per loss (name, `Loss` or function); each at least 0, one of them more.

    Raises:
        UnknownNameError: a name is not registered.
        ConfigError: no loss, a negative or non-finite factor, only zeros, or two losses of one name.
    """
    for key, factor in weights.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor < 0:
            name = key if isinstance(key, str) else getattr(key, "name", getattr(key, "__name__", type(key).__name__))
            raise ConfigError(f"The weight of loss {name!r} is {factor!r}; expected a finite number of at least 0, for example 0.5.")
    if not any(weights.values()):
        raise ConfigError(f"The loss weights {dict(weights)!r} have no positive one; expected at least one, for example {{'cross_entropy': 1.0}}.")
    terms = [(resolve(key), float(factor)) for key, factor in weights.items()]
    names = [term.name for term, _ in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"The combined losses are called {', '.join(map(repr, names))}; expected each name once. Give functions different names.")
    needs: Literal["logprobs", "logits"] = "logits" if any(term.needs == "logits" for term, _ in terms) else "logprobs"

    def combined(data: Sequence[Datum], inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        import torch

        from .apply import target_logprobs, total_weight

        logprobs = inputs
        if needs == "logits":
            logprobs = [target_logprobs(values, torch.tensor(datum.targets).to(values.device)) for datum, values in zip(data, inputs, strict=True)]
        total = total_weight(data)
        parts: list[Tensor] = []
        metrics: dict[str, float] = {}
        for term, factor in terms:
            value, reported = term.fn(data, inputs if term.needs == "logits" else logprobs)
            if value.numel() != 1:
                raise BackendError(f"The loss {term.name!r} gave a tensor of shape {tuple(value.shape)}; expected one number. Sum over the weighted tokens.")
            metrics |= {f"{term.name}/{key}": float(number) for key, number in reported.items()}
            metrics[f"loss/{term.name}"] = float(value.detach()) / total
            if factor:
                parts.append(factor * value.reshape(()))
        return torch.stack(parts).sum(), metrics

    return Loss(
        name="+".join(f"{factor:g}*{term.name}" for term, factor in terms),
        fn=combined,
        source="weighted sum of: " + "; ".join(term.source for term, _ in terms),
        needs=needs,
        extras=tuple(dict.fromkeys(name for term, _ in terms for name in term.extras)),
    )

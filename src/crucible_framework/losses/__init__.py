"""Training losses by name: the registry, `resolve`, `combine` and `register`. Importing this loads no torch.

A loss is a function (data, log-probs per datum) → (summed scalar, metrics) with a small `Loss` record beside it. This file does not know
what any loss computes.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast, overload

from ..errors import BackendError, ConfigError, UnknownNameError
from ..plugins import Registry, load_attribute
from ..protocols import Loss, LossFn, Tokenizer
from ..records import Datum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["combine", "losses", "register", "resolve"]

_TABLE = {
    "tokenwise": "cross_entropy kl mse",
    "policy": "importance_sampling ppo cispo dro gspo on_policy_distillation",
    "preference": "dpo ipo simpo orpo kto",
    "distillation": "distillation",
    "regularizers": "entropy negative_entropy forward_kl reverse_kl symmetric_kl consistency",
    "penalties": "l1 l2 orthogonality gradient_penalty",
    "structure": "topological citation_validity chirality",
}
_PLACES = {name: f"{__name__}.{file}" for file, names in _TABLE.items() for name in names.split()}
_WITH_SETTINGS = frozenset(
    ["ppo", "cispo", "dro", "gspo", "dpo", "ipo", "simpo", "orpo", "kto", "distillation", "topological", "citation_validity", "gradient_penalty"]
)
_CALL = re.compile(r"(?P<name>\w+)\((?P<settings>[^()]*)\)")

losses: Registry[Loss] = Registry("loss", {name: f"{place}:{name.upper()}" for name, place in _PLACES.items()})
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

    A loss with settings may be named with them: "dpo(beta=0.5)", "topological(variant=dagma)".

    Raises:
        UnknownNameError: nothing has that name; the nearest ones are named.
        ConfigError: `spec` is none of these, or a setting is unknown or out of range.
    """
    if isinstance(spec, Mapping):
        return combine(spec)
    if isinstance(spec, str) and (call := _CALL.fullmatch(spec.strip())):
        return _with_settings(call["name"], call["settings"])
    found: object = losses.get(spec) if isinstance(spec, str) else spec
    if isinstance(found, Loss):
        return found
    if callable(found):
        return Loss(name=getattr(found, "__name__", type(found).__name__), fn=found, source="user")
    raise ConfigError(f"{spec!r} gives a {type(found).__name__}; expected a loss: a name, weights over names, a Loss or a function (data, logprobs).")


def _setting(text: str) -> str | float | bool:
    if text in ("True", "true", "False", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text.strip("'\"")


def _with_settings(name: str, settings: str) -> Loss:
    """The loss of that name with "key=value, …" in the place of its defaults."""
    if name not in _WITH_SETTINGS:
        raise UnknownNameError("loss with settings", name, _WITH_SETTINGS)
    factory = cast("Callable[..., Loss]", load_attribute(f"{_PLACES[name]}:{name}"))
    known = tuple(inspect.signature(factory).parameters)
    given: dict[str, str | float | bool] = {}
    for part in filter(None, (piece.strip() for piece in settings.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise UnknownNameError(f"setting of loss {name!r}", key, known)
        given[key] = _setting(value)
        default = inspect.signature(factory).parameters[key].default
        if not equals or type(given[key]) is not type(default):
            raise ConfigError(f"The setting {part!r} of loss {name!r} does not fit; expected '{key}=' and a value like {default!r}.")
    return factory(**given)


def _terms(weights: Mapping[str, float] | Mapping[str | Loss | LossFn, float]) -> list[tuple[Loss, float]]:
    """The losses with their factors, checked; see `combine`."""
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
    return terms


def _norm(value: Tensor, inputs: Sequence[Tensor]) -> float:
    """The L2 norm of a value's gradient with respect to its inputs."""
    import torch

    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return math.hypot(*(float(part.norm()) for part in found if part is not None))


@overload
def combine(weights: Mapping[str, float]) -> Loss: ...
@overload
def combine(weights: Mapping[str | Loss | LossFn, float]) -> Loss: ...
def combine(weights: Mapping[str, float] | Mapping[str | Loss | LossFn, float]) -> Loss:
    """The weighted sum of several losses: Σ c_i · L_i.

    Each term's own value, without its factor, is reported as `loss/<name>` per unit of token weight, so that the reported loss is
    Σ c_i · `loss/<name_i>`; what a term itself reports becomes `<name>/<metric>`. A term with factor 0 is reported and adds nothing.

    In training `grad_norm/<name>` is the L2 norm of the term's gradient with respect to its input, without its factor, per unit of token weight:
    a term of norm 0 is dead, and one whose factor × norm is far above the others' drowns them.

    Args:
        weights: factor per loss (name, `Loss` or function); each at least 0, one of them more.

    Raises:
        UnknownNameError: a name is not registered.
        ConfigError: no loss, a negative or non-finite factor, only zeros, or two losses of one name.
    """
    terms = _terms(weights)
    needs: Literal["logprobs", "logits"] = "logits" if any(term.needs == "logits" for term, _ in terms) else "logprobs"

    def combined(data: Sequence[Datum], inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        import torch

        from .apply import target_logprobs, total_weight
        from .penalties import nothing

        logprobs = inputs
        if needs == "logits":
            logprobs = [target_logprobs(values, torch.tensor(datum.targets).to(values.device)) for datum, values in zip(data, inputs, strict=True)]
        total, metrics = total_weight(data), dict[str, float]()
        parts: list[Tensor] = []
        for term, factor in terms:
            if term.penalties and term.fn is nothing:
                continue  # its backend reports it
            value, reported = term.fn(data, inputs if term.needs == "logits" else logprobs)
            if value.numel() != 1:
                raise BackendError(f"The loss {term.name!r} gave a tensor of shape {tuple(value.shape)}; expected one number. Sum over the weighted tokens.")
            metrics |= {f"{term.name}/{key}": float(number) for key, number in reported.items()}
            metrics[f"loss/{term.name}"] = float(value.detach()) / total
            if factor:
                parts.append(factor * value.reshape(()))
            if torch.is_grad_enabled() and value.requires_grad:
                metrics[f"grad_norm/{term.name}"] = _norm(value.reshape(()), inputs) / abs(total)
        return torch.stack(parts or [logp[:0].sum() for logp in logprobs]).sum(), metrics

    steps = list(dict.fromkeys(term.prepare for term, _ in terms if term.prepare is not None))

    def prepare(datum: Datum, tokenizer: Tokenizer) -> Datum:
        for step in steps:
            datum = step(datum, tokenizer)
        return datum

    return Loss(
        name="+".join(f"{factor:g}*{term.name}" for term, factor in terms),
        fn=combined,
        source="weighted sum of: " + "; ".join(term.source for term, _ in terms),
        needs=needs,
        extras=tuple(dict.fromkeys(name for term, _ in terms for name in term.extras)),
        penalties=tuple(replace(penalty, factor=factor * penalty.factor) for term, factor in terms for penalty in term.penalties),
        prepare=prepare if steps else None,
    )

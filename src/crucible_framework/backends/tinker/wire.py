"""Between our records and the `tinker` SDK's types, and from the SDK's errors to ours.

This file knows no order and no connection. Importing it loads neither torch nor the SDK.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ... import errors
from ...errors import AuthError, BackendError, CapabilityError, CrucibleError, NotFoundError, NumericError, ServiceError, SessionClosedError
from ...protocols import Loss, Tokenizer
from ...records import AdamConfig, Batch, Completion, Datum, LoraConfig, SamplingParams, record

if TYPE_CHECKING:
    from tinker import types

__all__ = ["ALPHA", "Native", "adam_params", "completion", "explain", "native_form", "sampling_params", "train_parts", "wire_datum"]

ALPHA = 32.0
"""The alpha that a Tinker service uses."""
_PARTS = {"train_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "train_mlp": ("gate_proj", "up_proj", "down_proj"), "train_unembed": ("lm_head",)}
_CONFIG = {"low": "clip_low_threshold", "high": "clip_high_threshold", "beta": "beta"}
_CLASS = re.compile(r"(?:Request failed: )?(?P<kind>[A-Z]\w+Error): (?P<text>.*?)(?: for self\.request_id=.*)?", re.DOTALL)


@record
class Native:
    """A loss as the service computes it in one pass: its name, settings, and what each datum brings."""

    name: str
    config: Mapping[str, float]
    inputs: tuple[Mapping[str, NDArray[np.generic]], ...]


# ------------------------------------------------------------------------------------------------------------ requests
def train_parts(lora: LoraConfig) -> dict[str, bool]:
    """Which layers the service shall adapt.

    Raises:
        CapabilityError: alpha, dropout or target modules that no service honours; nothing was sent.
    """
    if lora.alpha != ALPHA:
        raise CapabilityError(f"A Tinker service fixes alpha at {ALPHA:g}; lora.alpha is {lora.alpha!r}. Leave it at its default.")
    if lora.dropout not in (0.0, LoraConfig().dropout):
        raise CapabilityError(f"A Tinker service has no dropout; lora.dropout is {lora.dropout!r}. Leave it at its default, which is not applied, or set 0.")
    if lora.target_modules == LoraConfig().target_modules:
        return dict.fromkeys(_PARTS, True)
    wanted = {layer for name in lora.target_modules for layer in ((*_PARTS["train_attn"], *_PARTS["train_mlp"]) if name == "all-linear" else (name,))}
    parts = {part: wanted.issuperset(layers) for part, layers in _PARTS.items()}
    if not wanted or wanted.difference(*(layers for part, layers in _PARTS.items() if parts[part])):
        raise CapabilityError(
            f"A Tinker service adapts whole groups of layers; lora.target_modules is {lora.target_modules!r}. Expected 'all-linear', or unions of "
            f"{'; '.join(', '.join(layers) for layers in _PARTS.values())}. Or leave it at its default: then every layer is adapted."
        )
    return parts


def adam_params(adam: AdamConfig) -> types.AdamParams:
    """The optimizer's settings; no clipping is a norm of 0."""
    from tinker import types

    return types.AdamParams(
        learning_rate=adam.lr, beta1=adam.beta1, beta2=adam.beta2, eps=adam.eps, weight_decay=adam.weight_decay, grad_clip_norm=adam.max_grad_norm or 0.0
    )


def sampling_params(params: SamplingParams) -> types.SamplingParams:
    """How to draw.

    Raises:
        CapabilityError: stops that are texts and token ids at once.
    """
    from tinker import types

    texts, ids = [stop for stop in params.stop if isinstance(stop, str)], [stop for stop in params.stop if isinstance(stop, int)]
    if texts and ids:
        raise CapabilityError(f"stop is {params.stop!r}; a Tinker service takes texts or token ids, not both. Write the tokens as text.")
    return types.SamplingParams(
        max_tokens=params.max_tokens, seed=params.seed, stop=texts or ids or None, temperature=params.temperature, top_k=params.top_k or -1, top_p=params.top_p
    )


def wire_datum(datum: Datum, inputs: Mapping[str, NDArray[np.generic]], vocab_size: int) -> types.Datum:
    """A datum with its targets and what else the loss needs. A target that counts for nothing may be any number here; the service gets 0."""
    from tinker import types

    targets = np.where((datum.targets < 0) | (datum.targets >= vocab_size), 0, datum.targets)
    tensors = {"target_tokens": targets.astype(np.int64), **inputs}
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.tokens.tolist()),
        loss_fn_inputs={name: types.TensorData.from_numpy(np.ascontiguousarray(values)) for name, values in tensors.items()},
    )


def native_form(loss: Loss, batch: Batch) -> Native | None:
    """The loss as one pass of the service, or None where that would not be the same number: it then takes two passes.

    The service's policy losses have no weights; an advantage that is multiplied by the weight says the same where no weight is negative.
    """
    if loss.native is None:
        return None
    if loss.native == "cross_entropy":
        return Native(name="cross_entropy", config={}, inputs=tuple({"weights": datum.weights} for datum in batch.data))
    given: Mapping[str, float] = loss.fn.keywords if isinstance(loss.fn, functools.partial) else {}
    if not given.keys() <= _CONFIG.keys() or any((datum.weights < 0).any() for datum in batch.data):
        return None
    if loss.native == "dro" and any((datum.weights != 1).any() for datum in batch.data):
        return None
    inputs = list[Mapping[str, NDArray[np.generic]]]()
    for datum in batch.data:
        extras: dict[str, NDArray[np.generic]] = {name: values.astype(np.float32) for name, values in datum.extras.items() if name in _USED}
        if extras.keys() < {"logprobs", "advantages"} or any(values.shape != datum.targets.shape for values in extras.values()):
            return None
        extras["advantages"] = (datum.extras["advantages"] * datum.weights).astype(np.float32)
        if loss.native == "gspo":
            extras.setdefault("sequence_ratio_mask", (datum.weights != 0).astype(np.float32))
        else:
            extras.pop("sequence_ratio_mask", None)
        inputs.append(extras)
    return Native(name=loss.native, config={_CONFIG[key]: value for key, value in given.items()}, inputs=tuple(inputs))


_USED = ("logprobs", "advantages", "clip_low_threshold", "clip_high_threshold", "sequence_ratio_mask")


# ------------------------------------------------------------------------------------------------------------- results
def completion(sequence: types.SampledSequence, params: SamplingParams, tokenizer: Tokenizer, prompt_tokens: int, duration_s: float) -> Completion:
    """A sampled sequence: `text` ends before what stopped it, `tokens` hold it."""
    tokens = tuple(int(token) for token in sequence.tokens)
    ends = {*tokenizer.eos_ids, *(stop for stop in params.stop if isinstance(stop, int))}
    text = tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in ends else tokens)
    text = text[: min((at for stop in params.stop if isinstance(stop, str) and (at := text.find(stop)) >= 0), default=len(text))]
    return Completion(
        text=text,
        tokens=tokens,
        logprobs=tuple(float(value) for value in sequence.logprobs or ()),
        stop_reason=sequence.stop_reason,
        prompt_tokens=prompt_tokens,
        duration_s=duration_s,
    )


# -------------------------------------------------------------------------------------------------------------- errors
def _ours(text: str, examples: Sequence[str]) -> CrucibleError | None:
    """The error of ours that a Crucible server names at the start of its message."""
    match = _CLASS.fullmatch(text)
    kind = getattr(errors, match["kind"], None) if match else None
    if match is None or not (isinstance(kind, type) and issubclass(kind, CrucibleError)):
        return None
    message = match["text"]
    if issubclass(kind, NumericError):
        return NumericError(message, examples=tuple(examples))
    if issubclass(kind, ServiceError):
        return ServiceError(message)
    return errors.ConfigError(message) if issubclass(kind, errors.UnknownNameError) else kind(message)


def explain(error: BaseException, doing: str, examples: Sequence[str] = ()) -> BaseException:
    """An error of the SDK as one of ours; others are given back as they are.

    Args:
        error: what the SDK raised.
        doing: what was asked, for the message ("the request forward_backward").
        examples: the ids of the request's data.
    """
    import tinker
    from tinker.lib.retryable_exception import RetryableException

    if isinstance(error, RetryableException):
        return SessionClosedError(f"The service has lost {doing}: {error} Go on from the last checkpoint, or connect with recovery=Recovery().")
    if isinstance(error, CrucibleError) or not isinstance(error, (tinker.TinkerError, ValueError, RuntimeError)):
        return error
    if isinstance(error, tinker.RequestFailedError):
        return _ours(error.message, examples) or BackendError(f"The service failed {doing}: {error.message} Its category: {error.category.name.lower()}.")
    if isinstance(error, tinker.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        inner = body.get("error")
        kind, text = (inner.get("type"), inner.get("message")) if isinstance(inner, dict) else (None, body.get("detail"))
        text = str(text or error.message)
        if isinstance(error, (tinker.AuthenticationError, tinker.PermissionDeniedError)):
            return AuthError(f"The service refused {doing} with HTTP {error.status_code}: {text} Set TINKER_API_KEY to a valid key.")
        if isinstance(error, tinker.NotFoundError):
            return NotFoundError(text)
        if error.status_code == 410:
            return SessionClosedError(f"The service has ended what {doing} needs: {text}")
        if error.status_code in (400, 422):
            return (kind and _ours(f"{kind}: {text}", examples)) or BackendError(f"The service refused {doing}: {text}")
        return ServiceError(f"The service answered {doing} with HTTP {error.status_code}: {text}", status=error.status_code, retryable=error.status_code >= 429)
    if isinstance(error, tinker.APIConnectionError):
        return ServiceError(
            f"The service cannot be reached for {doing}: {error.message} Check TINKER_BASE_URL and the network, then try again.", retryable=True
        )
    return ServiceError(f"The service's answer to {doing} cannot be used: {error}")

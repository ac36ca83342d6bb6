"""What a training request asks of a session: the loss by its wire name and settings, the pass itself, and which layers are adapted.

This file does not know order, tenants or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CapabilityError, DataError, UnknownNameError
from ..losses import resolve
from ..protocols import Backend, Loss, TrainingSession
from ..records import AdamConfig, Batch, Datum, LoraConfig, StepOutput, record
from .wire import datum_of, encode_pass

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb
    from torch import Tensor

__all__ = ["ALPHA", "LOSSES", "adam_config", "poison", "served_loss", "start", "start_pass"]

ALPHA = 32.0
"""LoRA's alpha, which the protocol does not carry."""
_BOUNDS = {"clip_low_threshold": "low", "clip_high_threshold": "high"}
_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": _BOUNDS,
    "cispo": _BOUNDS,
    "dro": {"beta": "beta"},
    "gspo": _BOUNDS,
    "stable_reinforce": {"kl_coeff": "kl_coeff"},
}
LOSSES = tuple(_SETTINGS)
"""The losses that a request may name."""
_TRUNCATED = 2.0
_SAMPLED = ("logprobs", "advantages")
_LAYERS: Mapping[str, tuple[str, ...]] = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "unembed": ("lm_head",),
}


# -------------------------------------------------------------------------------------------------------------- losses
def _stable_reinforce(kl_coeff: float = 0.0) -> Loss:
    """A stand-in for the service's loss of that name, whose formula is not public: −Σ sg(min(r, 2)) · log p · A + ½ k (log p − log q)².

    REINFORCE whose importance weight r = p / q is truncated, and a quadratic pull to the sampler. log q are the datum's own `logprobs`.
    """
    from ..losses.policy import cispo

    reinforce = cispo(0.0, _TRUNCATED)

    def fn(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        value, metrics = reinforce.fn(data, logprobs)
        for datum, logp in zip(data, logprobs, strict=True):
            gap = logp - logp.new_tensor(datum.extras["logprobs"])
            value = value + 0.5 * kl_coeff * (logp.new_tensor(datum.weights) * gap * gap).sum()
        return value, metrics

    return Loss(name="stable_reinforce", fn=fn, source="a stand-in; see docs/tinker.md", extras=reinforce.extras)


def served_loss(name: str, config: Mapping[str, float | str]) -> Loss:
    """The loss of a request.

    Raises:
        UnknownNameError: no such loss, or no such setting of it.
        ConfigError, DataError: a setting is out of range or no number.
    """
    if name == "custom":
        raise CapabilityError("Custom losses run in the client here, not on the server. Use forward_backward_custom with a function.")
    if name not in _SETTINGS:
        raise UnknownNameError("loss", name, _SETTINGS)
    given = dict[str, float]()
    for key, value in config.items():
        if key not in _SETTINGS[name]:
            raise UnknownNameError(f"setting of the loss {name!r}", key, _SETTINGS[name])
        if isinstance(value, str):
            raise DataError(f"The setting {key!r} of the loss {name!r} is {value!r}; expected a number.")
        given[_SETTINGS[name][key]] = value
    if name == "stable_reinforce":
        return _stable_reinforce(**given)
    if name == "cross_entropy":
        return resolve(name)
    from ..losses import policy

    makers = {"importance_sampling": policy.importance_sampling, "ppo": policy.ppo, "cispo": policy.cispo, "dro": policy.dro, "gspo": policy.gspo}
    return makers[name](**given)


# -------------------------------------------------------------------------------------------------------------- passes
@record
class _Asked:
    """A pass that is ready to be submitted; `weights` are those that were sent, where others are used."""

    batch: Batch
    loss: Loss
    weights: tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...] = ()


def _sampled_only(datum: Datum) -> Datum:
    """Weight 0 where log q and the advantage are both 0: so clients fill the prompt, which nobody sampled and whose ratio means nothing."""
    filled = [datum.extras[name] for name in _SAMPLED if name in datum.extras and datum.extras[name].shape == datum.targets.shape]
    sampled = np.any([values != 0 for values in filled], axis=0)
    return replace(datum, weights=sampled.astype(np.float32)) if len(filled) == len(_SAMPLED) and sampled.any() else datum


def _read(message: pb.ForwardBackwardRequest) -> _Asked:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    config |= {key: value.text if value.WhichOneof("value") == "text" else value.number for key, value in message.loss_fn_config_v2.items()}
    loss = served_loss(message.loss_fn, config)
    data = tuple(datum_of(datum, f"datum {place}") for place, datum in enumerate(message.data))
    if not message.forward_only and set(_SAMPLED) <= set(loss.extras):
        data = tuple(one if "weights" in sent.loss_fn_inputs else _sampled_only(one) for one, sent in zip(data, message.data, strict=True))
    if not message.forward_only or loss.name != "cross_entropy":
        return _Asked(batch=Batch(data=data), loss=loss)
    # A client that computes its own loss needs every log-prob, whatever the weights are.
    everywhere = tuple(replace(datum, weights=(datum.targets >= 0).astype(np.float32)) for datum in data)
    return _Asked(batch=Batch(data=everywhere), loss=loss, weights=tuple(datum.weights for datum in data))


def _weighted(output: StepOutput, weights: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> StepOutput:
    """Cross-entropy anew with the weights that were sent."""
    if not weights:
        return output
    total = sum(float(weight.sum(dtype=np.float64)) for weight in weights) or 1.0
    value = -sum(
        float((weight * np.where(weight != 0, logprobs, 0.0)).sum(dtype=np.float64)) for weight, logprobs in zip(weights, output.logprobs, strict=True)
    )
    return replace(output, loss=value / total, weight=total)


def poison(session: TrainingSession) -> None:
    """Makes the session's next step fail and clear its gradient: a pass before it could not even be submitted."""
    session.forward_backward(Batch(data=()), resolve("cross_entropy")).add_done_callback(lambda future: future.exception())


async def start_pass(session: TrainingSession, message: pb.ForwardBackwardRequest) -> Awaitable[bytes]:
    """Submits a pass; what comes back resolves to its result as protobuf.

    Raises:
        DataError, ConfigError, CapabilityError: the request makes no sense; a step after it fails.
    """
    try:
        asked = await asyncio.to_thread(_read, message)
    except Exception:
        if not message.forward_only:
            poison(session)
        raise
    future = session.forward(asked.batch, asked.loss) if message.forward_only else session.forward_backward(asked.batch, asked.loss)

    async def finish() -> bytes:
        output = await asyncio.wrap_future(future)
        return await asyncio.to_thread(lambda: encode_pass(_weighted(output, asked.weights), message.loss_fn))

    return finish()


def adam_config(*, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float, grad_clip_norm: float) -> AdamConfig:
    """The optimizer's settings; a clipping norm of 0 means none.

    Raises:
        ConfigError: a number is out of range.
    """
    clip = grad_clip_norm or None
    return AdamConfig(lr=learning_rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, max_grad_norm=clip)


# --------------------------------------------------------------------------------------------------------------- start
def start(backend: Backend, model: str, *, rank: int, seed: int, train: Mapping[str, bool]) -> tuple[TrainingSession, LoraConfig]:
    """A fresh session whose adapter is on the layers that `train` names ("attn", "mlp", "unembed"), as far as the model has such.

    Raises:
        UnknownNameError: no such base model.
        ConfigError: the rank or seed is out of range, or none of the layers is there.
    """
    wanted = tuple(layer for part, layers in _LAYERS.items() if train.get(part, True) for layer in layers)
    lora = LoraConfig(rank=rank, alpha=ALPHA, dropout=0.0, target_modules=wanted, seed=seed)
    while True:
        try:
            return backend.train(model, lora), lora
        except UnknownNameError as error:
            left = tuple(layer for layer in lora.target_modules if layer != error.name)
            if error.name not in lora.target_modules or not left:
                raise
            lora = replace(lora, target_modules=left)

"""What a model's requests do in their turn: create, load, pass, step, save. This file does not know order, HTTP or keys."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ..errors import ConfigError, DataError, FormatError
from ..records import LoraConfig, record
from .desk import Desk, SamplerCard, Session, json_answer
from .http import parsed
from .ledger import PROTO, Answer
from .passes import adam_config, start, start_pass
from .shelf import Kind as Shelved
from .shelf import Stored
from .turns import Model, Start

if TYPE_CHECKING:
    from tinker import types
    from tinker.proto import tinker_public_pb2 as pb

__all__ = ["KINDS", "Kind", "model_for"]

STEPS = "optimizer_steps"
"""Not "step": clients write these metrics into rows of their own, which have a "step" that counts otherwise."""
Request: TypeAlias = Any
"""One of the SDK's request types; which one, the kind says."""


@record
class Kind:
    """A kind of request: how its body is read, and what it does in its turn."""

    parse: Callable[[bytes], Request]
    begin: Callable[[Desk, Model, Request], Start]


def _read(name: str) -> Callable[[bytes], Request]:
    def parse(raw: bytes) -> Request:
        from tinker import types

        return parsed(getattr(types, name), raw)

    return parse


def _read_pass(raw: bytes) -> pb.ForwardBackwardRequest:
    from google.protobuf.message import DecodeError
    from tinker.proto import tinker_public_pb2 as pb

    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise FormatError(f"The body is no ForwardBackwardRequest in protobuf: {error}. SDK 0.38.0 sends one.") from error
    return message


async def _now(answer: Answer) -> Answer:
    return answer


# -------------------------------------------------------------------------------------------------------------- models
def _seed(run: str, given: int | None) -> int:
    """Where a client names no seed, one of the run's id, so that the run can be repeated."""
    return (int(hashlib.sha256(run.encode()).hexdigest()[:8], 16) if given is None else given) % 2**31


def model_for(desk: Desk, session: Session, request: types.CreateModelRequest | types.LoadWeightsRequest) -> Model:
    """The model that a first request is about: the one of its number, or a new one.

    Raises:
        DataError: the number is negative.
        UnknownNameError: a base model that is not served.
        ConfigError: another optimizer than AdamW, or a rank or seed out of range.
        NotFoundError: there is no such checkpoint.
    """
    from tinker import types

    number = request.model_seq_id
    if number is None or number < 0:
        raise DataError(f"model_seq_id is {number}; expected a whole number of at least 0.")
    if request.optimizer_config is not None and request.optimizer_config.type != "adamw":
        raise ConfigError(f"The optimizer {request.optimizer_config.type!r} is not here; expected 'adamw'.")
    if isinstance(request, types.LoadWeightsRequest):
        stored = desk.readable(request.path, session.owner)
        base, lora, train = request.base_model or stored.run.base_model, stored.run.lora, stored.run.train
    else:
        asked, base = request.lora_config, request.base_model
        lora = LoraConfig(rank=32 if asked is None else asked.rank, seed=_seed(f"{session.id}:{number}", None if asked is None else asked.seed))
        train = {part: bool(getattr(asked, f"train_{part}", True)) for part in ("attn", "mlp", "unembed")}
    desk.check_model(base)
    return desk.add_model(session, number, base, lora=lora, train=train, meta=request.user_metadata)


def _create(desk: Desk, model: Model, request: types.CreateModelRequest) -> Start:
    """A fresh adapter."""
    del request

    async def begin() -> Awaitable[Answer]:
        run = model.run
        model.training, lora = await asyncio.to_thread(start, desk.backend, model.model, rank=run.lora.rank, seed=run.lora.seed, train=run.train)
        model.run = replace(run, lora=lora)
        await asyncio.to_thread(desk.shelf.put_run, model.run)
        return _now(json_answer(type="create_model", model_id=run.id))

    return begin


def _load(desk: Desk, model: Model, request: types.LoadWeightsRequest) -> Start:
    """A checkpoint's weights, with its optimizer where that is asked."""
    stored = desk.readable(request.path, model.session.owner)

    async def begin() -> Awaitable[Answer]:
        old = model.training
        training = await asyncio.to_thread(desk.keeper.resume, stored, model.model, optimizer=request.optimizer)
        if old is not None:
            old.close()
        model.training = training
        model.run = replace(model.run, lora=stored.run.lora)
        await asyncio.to_thread(desk.shelf.put_run, model.run)
        return _now(json_answer(type="load_weights", path=request.path, model_id=model.run.id))

    return begin


# -------------------------------------------------------------------------------------------------------------- passes
def _pass(desk: Desk, model: Model, message: pb.ForwardBackwardRequest) -> Start:
    async def begin() -> Awaitable[Answer]:
        work = await start_pass(model.live, message)
        desk.used(
            model.session, model.run.base_model, "training", sum(len(chunk.encoded_text.tokens) // 4 for datum in message.data for chunk in datum.model_input)
        )

        async def finish() -> Answer:
            return Answer(await work, PROTO)

        return finish()

    return begin


def _step(desk: Desk, model: Model, asked: types.OptimStepRequest) -> Start:
    async def begin() -> Awaitable[Answer]:
        from tinker import types

        given = asked.optim_params
        if not isinstance(given, types.AdamParams):
            raise ConfigError("optim_step asks for another optimizer than AdamW, which is the only one here. Use types.AdamParams.")
        fields = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
        future = model.live.optim_step(adam_config(**{name: getattr(given, name) for name in fields}))

        async def finish() -> Answer:
            made = await asyncio.wrap_future(future)
            desk.count("steps_total", model.session.owner)
            durable = float(model.journal is not None)
            return json_answer(type="optim_step", metrics={"grad_norm": made.grad_norm, STEPS: float(made.step), "durable": durable, **made.metrics})

        return finish()

    return begin


# --------------------------------------------------------------------------------------------------------- checkpoints
def _saving(
    desk: Desk, model: Model, kind: Shelved, name: str, *, seq: int, ttl_s: float | None, metadata: Mapping[str, str] | None, overwrite: bool
) -> Callable[[], Awaitable[Awaitable[Stored]]]:
    async def begin() -> Awaitable[Stored]:
        request = f"{model.run.id}:{seq}"
        await asyncio.to_thread(desk.shelf.check_free, model.run.id, kind, name, overwrite=overwrite, request=request)
        if ttl_s is not None and ttl_s <= 0:
            raise DataError(f"ttl_seconds is {ttl_s}; expected a positive number of seconds, or none.")
        future = model.live.save(name, "state" if kind == "weights" else "sampler")

        async def finish() -> Stored:
            made = await asyncio.wrap_future(future)
            desk.used(model.session, model.run.base_model, "checkpoint", 1)
            return await asyncio.to_thread(
                desk.keeper.put, model.run, kind, name, made, ttl_s=ttl_s, user_metadata=metadata, overwrite=overwrite, request=request
            )

        return finish()

    return begin


def _save(kind: Shelved) -> Callable[[Desk, Model, Request], Start]:
    """A checkpoint to train on from, or the adapter's files."""

    def begins(desk: Desk, model: Model, asked: types.SaveWeightsRequest | types.SaveWeightsExternalRequest) -> Start:
        if getattr(asked, "age_encryption_recipients", None):
            raise ConfigError("age_encryption_recipients is given; this server writes files as they are. Leave it out.")
        seq, more = asked.seq_id or 0, {name: getattr(asked, name, None) for name in ("user_metadata", "overwrite")}
        metadata = cast("Mapping[str, str] | None", more["user_metadata"])
        name = asked.path or f"checkpoint-{seq:06}"
        saving = _saving(desk, model, kind, name, seq=seq, ttl_s=asked.ttl_seconds, metadata=metadata, overwrite=bool(more["overwrite"]))

        async def begin() -> Awaitable[Answer]:
            work = await saving()

            async def finish() -> Answer:
                stored = await work
                return json_answer(type="save_weights" if kind == "weights" else "save_weights_external", path=stored.path, size_bytes=stored.size_bytes)

            return finish()

        return begin

    return begins


def _save_for_sampler(desk: Desk, model: Model, asked: types.SaveWeightsForSamplerRequest) -> Start:
    """Weights to sample from: a checkpoint with a name, or a sampler that lives as long as its session."""
    number, seq, saving = asked.sampling_session_seq_id, asked.seq_id or 0, None
    if asked.path is not None:
        saving = _saving(desk, model, "sampler_weights", asked.path, seq=seq, ttl_s=asked.ttl_seconds, metadata=asked.user_metadata, overwrite=False)
    elif number is None:
        raise DataError("save_weights_for_sampler has neither path nor sampling_session_seq_id; expected one of them.")

    async def begin() -> Awaitable[Answer]:
        work = await saving() if saving is not None else None
        made = model.live.save("sampler", "sampler") if number is not None and model.journal is not None else None
        sampler = model.live.sampler() if number is not None and made is None else None

        async def finish() -> Answer:
            fields: dict[str, object] = {} if work is None else {"path": (await work).path}
            if number is not None:
                path = cast("str | None", fields.get("path"))
                opened = sampler
                if made is not None:
                    opened = await asyncio.to_thread(
                        desk.keeper.keep_sampler, desk.live_folder(model.session), number, await asyncio.wrap_future(made), model.run
                    )
                assert opened is not None  # one of the two was made above
                card = desk.add_sampler(model.session, number, lambda name: SamplerCard(name, opened, model.run.base_model, model.model, path, own=True))
                fields["sampling_session_id"] = card.id
            return json_answer(type="save_weights_for_sampler", **fields)

        return finish()

    return begin


KINDS: Mapping[str, Kind] = {
    "create_model": Kind(parse=_read("CreateModelRequest"), begin=_create),
    "load_weights": Kind(parse=_read("LoadWeightsRequest"), begin=_load),
    "forward_backward": Kind(parse=_read_pass, begin=_pass),
    "optim_step": Kind(parse=_read("OptimStepRequest"), begin=_step),
    "save_weights": Kind(parse=_read("SaveWeightsRequest"), begin=_save("weights")),
    "save_weights_external": Kind(parse=_read("SaveWeightsExternalRequest"), begin=_save("external_weights")),
    "save_weights_for_sampler": Kind(parse=_read("SaveWeightsForSamplerRequest"), begin=_save_for_sampler),
}
"""Every kind of request to a model, by its route."""

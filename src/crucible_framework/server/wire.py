"""The Tinker protocol's binary messages to records and back, as SDK 0.38.0 writes and reads them.

Requests become `Datum` and `SamplingParams`, results become protobuf. Everything that a client sends is checked here for shape and size of
its arrays. This file does not know sessions, order or HTTP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CapabilityError, DataError
from ..records import Completion, Datum, SamplingParams, StepOutput, record

if TYPE_CHECKING:
    from tinker import types
    from tinker.proto import tinker_public_pb2 as pb

__all__ = ["TopK", "datum_of", "encode_pass", "encode_sample", "metric_name", "prompt_of", "sampling_params", "tensor_of"]

_TYPES: Mapping[int, np.dtype[np.generic]] = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4")}
_REDUCTIONS = ("mean", "sum", "min", "max", "slack", "hash2", "unique")
MAX_CELLS = 2**27
"""Numbers of one dense tensor at the most: a sparse one of a few bytes may claim any shape."""


@record
class TopK:
    """The k likeliest tokens of some positions: int32 and float32, both [N, k]."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


# ------------------------------------------------------------------------------------------------------------ requests
def tensor_of(message: pb.Tensor, name: str) -> NDArray[np.generic]:
    """A wire tensor as a dense array of its shape; entries that a sparse one leaves out are 0.

    Raises:
        DataError: unknown type, sizes that contradict each other, indices out of range, or an absurd shape.
    """
    dtype = _TYPES.get(message.dtype)
    if dtype is None:
        raise DataError(f"{name!r} has the data type {message.dtype}; expected float32 (1), int64 (2) or int32 (3).")
    shape = tuple(message.shape)
    if any(side < 0 for side in shape) or math.prod(shape) > MAX_CELLS:
        raise DataError(f"{name!r} has the shape {shape}; expected at most {MAX_CELLS} numbers. Split the batch.")
    try:
        if not message.HasField("sparse_csr"):
            values = np.frombuffer(message.dense, dtype=dtype)
            return values.reshape(shape) if shape else values
        sparse = message.sparse_csr
        values = np.frombuffer(sparse.values, dtype=dtype)
        crow, columns = np.frombuffer(sparse.crow_indices, dtype="<i8"), np.frombuffer(sparse.col_indices, dtype="<i8")
        dense = np.zeros(shape, dtype=dtype)
        rows, width = shape
    except ValueError as error:
        raise DataError(f"{name!r} does not fit its shape {shape}: {error}. Send as many numbers as the shape says.") from error
    counts = np.diff(crow)
    if len(crow) != rows + 1 or crow[0] != 0 or (counts < 0).any() or crow[-1] != len(values) or len(columns) != len(values):
        raise DataError(f"{name!r} is no valid CSR tensor: {len(values)} values, {len(columns)} columns, {len(crow)} row starts for shape {shape}.")
    if len(columns) and (columns.min() < 0 or columns.max() >= width):
        raise DataError(f"{name!r} has a column index outside 0 to {width - 1}.")
    dense[np.repeat(np.arange(rows), counts), columns] = values
    return dense


def _tokens(chunks: Sequence[pb.Chunk], name: str) -> NDArray[np.int32]:
    parts = list[NDArray[np.int32]]()
    for chunk in chunks:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise CapabilityError(f"{name} holds a chunk that is no text; this server trains on text only. Leave images and audio out.")
        if len(chunk.encoded_text.tokens) % 4:
            raise DataError(f"{name} holds {len(chunk.encoded_text.tokens)} bytes of tokens; expected 4 for each.")
        parts.append(np.frombuffer(chunk.encoded_text.tokens, dtype="<i4"))
    if not sum(map(len, parts)):
        raise DataError(f"{name} has no tokens; expected at least one.")
    return np.concatenate(parts)


def datum_of(message: pb.Datum, name: str) -> Datum:
    """A wire datum. Weights are those given, else 1; every further tensor becomes an extra under its wire name.

    Raises:
        DataError: no tokens or targets, or arrays that do not fit together.
        CapabilityError: a chunk that is no text.
    """
    tokens = _tokens(message.model_input, name)
    tensors = {key: tensor_of(tensor, f"{name}: {key}") for key, tensor in message.loss_fn_inputs.items()}
    targets = tensors.pop("target_tokens", None)
    if targets is None:
        raise DataError(f"{name} has no 'target_tokens'; expected one for each of its {len(tokens)} tokens.")
    weights = tensors.pop("weights", None)
    given = np.ones(targets.shape, dtype=np.float32) if weights is None else weights.astype(np.float32)
    extras = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    for key, extra in extras.items():
        if extra.shape[:1] != tokens.shape:
            raise DataError(f"{name} has {key!r} of shape {extra.shape} for {len(tokens)} tokens; expected one for each.")
    for key, values in (("weights", given), *extras.items()):
        if not np.isfinite(values).all():
            raise DataError(f"{name} has a number in {key!r} that is not finite; expected finite numbers.")
    return Datum(id=name, tokens=tokens, targets=targets.astype(np.int64), weights=given, extras=extras)


def prompt_of(chunks: Sequence[types.ModelInputChunk]) -> tuple[int, ...]:
    """The tokens of a JSON prompt.

    Raises:
        DataError: there are none.
        CapabilityError: a chunk that is no text.
    """
    tokens = list[int]()
    for chunk in chunks:
        if chunk.type != "encoded_text":
            raise CapabilityError(f"The prompt holds a chunk of type {chunk.type!r}; this server reads 'encoded_text' only.")
        tokens.extend(chunk.tokens)
    if not tokens:
        raise DataError("The prompt has no tokens; expected at least one.")
    return tuple(tokens)


def sampling_params(asked: types.SamplingParams, longest: int) -> tuple[SamplingParams, bool]:
    """Our parameters, and whether the end of a turn ends the answer: an empty list of stops asks that nothing does.

    Args:
        asked: as the SDK sends them.
        longest: `max_tokens` where none is given, and its upper limit.

    Raises:
        DataError: a stop of another type.
        ConfigError: a number is out of range.
    """
    given = asked.stop
    stops: list[str | int] = [] if given is None else [given] if isinstance(given, (str, int)) else list(given)
    return SamplingParams(
        max_tokens=min(longest if asked.max_tokens is None else asked.max_tokens, longest),
        temperature=asked.temperature,
        top_k=max(asked.top_k, 0),
        top_p=asked.top_p,
        stop=tuple(stop for stop in stops if stop != ""),
        seed=None if asked.seed is None else asked.seed % 2**63,
    ), given is None or bool(stops)


# ------------------------------------------------------------------------------------------------------------- results
def metric_name(name: str) -> str:
    """A metric's name with the reduction that the SDK needs behind exactly one colon: `mean` where it has none."""
    stem, _, reduction = name.rpartition(":")
    if stem and reduction in _REDUCTIONS:
        return f"{stem.replace(':', '/')}:{reduction}"
    return f"{re.sub(':', '/', name)}:mean"


def encode_pass(output: StepOutput, loss: str) -> bytes:
    """A `ForwardBackwardOutput`: log-probs per datum and the summed loss."""
    from tinker.proto import tinker_public_pb2 as pb

    message = pb.ForwardBackwardOutput(loss_fn_output_type=f"{loss}:TensorData")
    for trailing, group in groupby(output.logprobs, key=lambda values: values.shape[1:]):
        arrays = [np.ascontiguousarray(values, dtype="<f4") for values in group]
        item = message.loss_fn_outputs.add(type_tag=loss, num_datums=len(arrays))
        field = item.fields["logprobs"]
        field.data = b"".join(values.tobytes() for values in arrays)
        field.offsets = np.cumsum([0, *(values.nbytes for values in arrays)], dtype="<i8").tobytes()
        field.dtype = pb.DTYPE_FLOAT32
        field.trailing_shape.extend(trailing)
    for name, value in output.metrics.items():
        message.metrics[metric_name(name)] = value
    message.metrics["loss:sum"] = output.loss * output.weight
    return message.SerializeToString()


def _fill_top(message: pb.TopkLogprobs, top: TopK) -> None:
    message.token_ids = np.ascontiguousarray(top.ids, dtype="<i4").tobytes()
    message.logprobs = np.ascontiguousarray(top.logprobs, dtype="<f4").tobytes()
    message.length, message.k = top.ids.shape


class Cells(Protocol):
    """Where values stand in a matrix: all cells of it in order, or those of a CSR layout."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def crow(self) -> NDArray[np.int64] | None: ...
    @property
    def columns(self) -> NDArray[np.int64] | None: ...


def _fill(message: pb.Tensor, values: NDArray[np.generic], shape: tuple[int, int], dtype: int, cells: Cells | None = None) -> None:
    data = np.ascontiguousarray(values).tobytes()
    if cells is not None and cells.crow is not None and cells.columns is not None:
        message.sparse_csr.values = data
        message.sparse_csr.crow_indices, message.sparse_csr.col_indices = cells.crow.astype("<i8").tobytes(), cells.columns.astype("<i8").tobytes()
    else:
        message.dense = data
    message.dtype = dtype  # type: ignore[assignment]
    message.shape.extend(shape)


def encode_sample(
    completions: Sequence[Completion],
    *,
    prompt_logprobs: NDArray[np.float32] | None = None,
    prompt_top: TopK | None = None,
    sample_tops: Sequence[TopK] | None = None,
    targets: tuple[Cells, NDArray[np.float32]] | None = None,
    alternatives: TopK | None = None,
) -> bytes:
    """A `SampleResponse`.

    Args:
        completions: in order.
        prompt_logprobs: float32 [P], NaN where there is none.
        prompt_top: the likeliest tokens at each prompt position.
        sample_tops: those at each drawn token, per completion.
        targets: the cells that were asked, and float32 log-probs of them; answered in the layout in which they were asked.
        alternatives: draws beside each prompt token after the first, [P − 1, K].
    """
    from tinker.proto import tinker_public_pb2 as pb

    message = pb.SampleResponse()
    for place, one in enumerate(completions):
        item = message.sequences.add(stop_reason=pb.STOP_REASON_STOP if one.stop_reason == "stop" else pb.STOP_REASON_LENGTH)
        item.tokens = np.asarray(one.tokens, dtype="<i4").tobytes()
        item.logprobs = np.asarray(one.logprobs, dtype="<f4").tobytes()
        if sample_tops is not None:
            _fill_top(item.topk_sampled_logprobs, sample_tops[place])
    if prompt_logprobs is not None:
        message.prompt_logprobs = np.asarray(prompt_logprobs, dtype="<f4").tobytes()
    if prompt_top is not None:
        _fill_top(message.topk_prompt_logprobs, prompt_top)
    if targets is not None:
        cells, values = targets
        _fill(message.target_prompt_logprobs, values, cells.shape, pb.DTYPE_FLOAT32, cells)
    if alternatives is not None:
        shape = (alternatives.ids.shape[0], alternatives.ids.shape[1])
        _fill(message.prompt_alt_tokens.tokens, alternatives.ids.astype("<i8"), shape, pb.DTYPE_INT64)
        _fill(message.prompt_alt_tokens.logprobs, alternatives.logprobs, shape, pb.DTYPE_FLOAT32)
    return message.SerializeToString()

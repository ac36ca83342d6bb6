"""Wire, shelf, keys, ledger and the command, each by itself."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cyclopts import App
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tinker import types
from tinker.proto import request_conv, response_conv
from tinker.proto import tinker_public_pb2 as pb
from tinker.types._pydantic_types.tensor_data import TensorData as WireTensor

from crucible_framework.cli import serve as command
from crucible_framework.cli.reply import Reply
from crucible_framework.errors import AuthError, CapabilityError, ConfigError, CorruptError, DataError, NotFoundError, StorageFullError, UnknownNameError
from crucible_framework.records import Completion, LoraConfig, StepOutput
from crucible_framework.server import Keys, ServeConfig
from crucible_framework.server.ledger import Answer, Gate, failure
from crucible_framework.server.looks import wanted_targets
from crucible_framework.server.metrics import prometheus
from crucible_framework.server.shelf import Run, Shelf, path_parts
from crucible_framework.server.wire import TopK, datum_of, encode_pass, encode_sample, metric_name, prompt_of, sampling_params, tensor_of

from .serving_for_tests import ServerProcess

# ---------------------------------------------------------------------------------------------------------------- wire
numbers = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.floats(-10, 10, width=32).map(lambda x: x if abs(x) > 1 else 0.0))


@given(numbers)
def test_tensors_come_as_they_were_sent(values: np.ndarray) -> None:
    """Dense and sparse, by the SDK's own encoder."""
    import torch

    for tensor in (types.TensorData.from_numpy(values), types.TensorData.from_torch_sparse(torch.from_numpy(values))):
        np.testing.assert_array_equal(tensor_of(request_conv._tensor_data_to_proto(tensor), "x"), values)


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6))
def test_passes_come_back_as_they_were(shapes: list[tuple[int, bool]]) -> None:
    """Ragged lengths, and targets [T] and [T, K] mixed, by the SDK's own decoder."""
    rng = np.random.default_rng(0)
    logprobs = tuple(rng.normal(size=(n, 3) if wide else (n,)).astype(np.float32) for n, wide in shapes)
    output = StepOutput(loss=2.0, weight=3.0, logprobs=logprobs, metrics={"a:b": 1.0, "c": 2.0, "d:sum": 3.0})
    seen = response_conv.deserialize_forward_backward_output(encode_pass(output, "ppo"))
    assert seen.metrics == {"a/b:mean": 1.0, "c:mean": 2.0, "d:sum": 3.0, "loss:sum": 6.0}
    for left, right in zip(seen.loss_fn_outputs, logprobs, strict=True):
        np.testing.assert_array_equal(left["logprobs"].to_numpy().reshape(right.shape), right)


@given(st.text(min_size=1, max_size=12))
def test_metric_names_have_one_colon(name: str) -> None:
    stem, reduction = metric_name(name).split(":")
    assert reduction in ("mean", "sum", "min", "max", "slack", "hash2", "unique")
    assert stem or name == ":" or name.startswith(":") or not name


def test_samples_come_back_as_they_were() -> None:
    one = Completion(text="x", tokens=(1, 2), logprobs=(-0.5, -1.0), stop_reason="stop", prompt_tokens=3)
    top = TopK(ids=np.array([[1, 2], [3, 4]], dtype=np.int32), logprobs=np.array([[-1, -2], [-3, -4]], dtype=np.float32))
    scores = np.array([np.nan, -1, -2], dtype=np.float32)
    seen = response_conv.deserialize_sample_response(
        encode_sample(
            [one],
            prompt_logprobs=scores,
            prompt_top=top,
            sample_tops=[top],
            targets=(wanted_targets(WireTensor(data=[1, 2], dtype="int64", shape=[2, 1]), 3), np.ones(2, dtype=np.float32)),
        )
    )
    assert list(seen.sequences[0].tokens) == [1, 2]
    assert seen.sequences[0].stop_reason == "stop"
    assert seen.prompt_logprobs == [None, -1.0, -2.0]
    assert seen.topk_prompt_logprobs_np is not None
    assert seen.topk_prompt_logprobs_np.token_ids.tolist() == [[1, 2], [3, 4]]
    assert seen.target_prompt_logprobs is not None
    assert seen.target_prompt_logprobs.shape == [2, 1]


def _tensor(**fields: object) -> pb.Tensor:
    return pb.Tensor(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor(dense=b"\0" * 8, dtype=0, shape=[1]),
        _tensor(dense=b"\0" * 7, dtype=2, shape=[1]),
        _tensor(dense=b"\0" * 8, dtype=2, shape=[2]),
        _tensor(dense=b"", dtype=1, shape=[-1]),
        _tensor(dense=b"", dtype=1, shape=[2**20, 2**20]),
        _tensor(sparse_csr=pb.SparseCsr(values=b"\0" * 4, crow_indices=b"\0" * 8, col_indices=b"\0" * 8), dtype=1, shape=[1, 1]),
        _tensor(sparse_csr=pb.SparseCsr(values=b"\0" * 4, crow_indices=np.array([0, 1]).tobytes(), col_indices=np.array([5]).tobytes()), dtype=1, shape=[1, 2]),
        _tensor(sparse_csr=pb.SparseCsr(values=b"", crow_indices=b"", col_indices=b""), dtype=1, shape=[3]),
    ],
)
def test_tensors_that_contradict_themselves(tensor: pb.Tensor) -> None:
    with pytest.raises(DataError):
        tensor_of(tensor, "x")


def test_data_that_make_no_sense() -> None:
    datum = pb.Datum()
    with pytest.raises(DataError, match="no tokens"):
        datum_of(datum, "d")
    datum.model_input.add().encoded_text.tokens = b"\1\0\0\0\2\0\0\0"
    with pytest.raises(DataError, match="target_tokens"):
        datum_of(datum, "d")
    datum.loss_fn_inputs["target_tokens"].CopyFrom(_tensor(dense=np.array([1, 2]).tobytes(), dtype=2, shape=[2]))
    assert datum_of(datum, "d").weights.tolist() == [1.0, 1.0]
    datum.loss_fn_inputs["advantages"].CopyFrom(_tensor(dense=np.ones(3, dtype=np.float32).tobytes(), dtype=1, shape=[3]))
    with pytest.raises(DataError, match="advantages"):
        datum_of(datum, "d")
    datum.loss_fn_inputs["advantages"].CopyFrom(_tensor(dense=np.array([1, np.nan], dtype=np.float32).tobytes(), dtype=1, shape=[2]))
    with pytest.raises(DataError, match="not finite"):
        datum_of(datum, "d")
    datum.model_input.add().image.data = b"png"
    with pytest.raises(CapabilityError, match="text only"):
        datum_of(datum, "d")
    with pytest.raises(DataError, match="no tokens"):
        prompt_of([])
    with pytest.raises(CapabilityError, match="image"):
        prompt_of([types.ImageChunk(data=b"x", format="png")])


def test_sampling_settings() -> None:
    params, ends = sampling_params(types.SamplingParams(seed=-1, stop="a", top_k=-1), 99)
    assert (params.max_tokens, params.top_k, params.stop, ends) == (99, 0, ("a",), True)
    assert params.seed is not None
    assert params.seed >= 0
    assert sampling_params(types.SamplingParams(stop=[]), 9)[1] is False
    assert sampling_params(types.SamplingParams(max_tokens=500), 9)[0].max_tokens == 9


# --------------------------------------------------------------------------------------------------------------- shelf
RUN = Run(id="s-1:train:0", owner="ann", base_model="tiny", lora=LoraConfig(), train={"attn": True}, created_at=1.0, last_request_at=1.0)


def write(folder: Path) -> None:
    (folder / "a.json").write_text("{}")


def test_shelf(tmp_path: Path) -> None:
    """Kept over a restart; expired, damaged and half-written checkpoints are no checkpoints."""
    time = [100.0]
    shelf = Shelf(tmp_path, lambda: time[0])
    shelf.put_run(RUN)
    stored = shelf.put(RUN, "weights", "one", write, model="tiny", step=3, ttl_s=10)
    assert shelf.at(stored.path) == stored
    assert (stored.checkpoint.kind, stored.checkpoint.step, stored.expires_at) == ("state", 3, 110.0)
    with pytest.raises(DataError, match="exists already"):
        shelf.put(RUN, "weights", "one", write, model="tiny", step=4)
    assert shelf.put(RUN, "weights", "one", write, model="tiny", step=4, ttl_s=10, overwrite=True).step == 4

    def full(folder: Path) -> None:
        write(folder)
        raise StorageFullError("full")

    with pytest.raises(StorageFullError):
        shelf.put(RUN, "weights", "two", full, model="tiny", step=4)
    shelf.put(RUN, "sampler_weights", "bad", write, model="tiny", step=4)
    (tmp_path / "runs" / "s-1%3Atrain%3A0" / "sampler_weights" / "bad" / "a.json").write_text("{...}")
    again = Shelf(tmp_path, lambda: time[0])
    assert again.runs() == again.runs("ann") == [RUN]
    assert again.runs("bob") == []
    assert [one.name for one in again.checkpoints(RUN.id)] == ["one"]
    with pytest.raises(CorruptError):
        again.get(RUN.id, "sampler_weights", "bad")
    time[0] = 111.0
    with pytest.raises(NotFoundError):
        again.at(stored.path)
    assert again.expire() == 1
    assert again.expire() == 0
    for name in ("", "../x", "a/b", ".x", "x" * 200, "x.settings.json"):
        with pytest.raises(DataError):
            again.check_free(RUN.id, "weights", name)
    for run in ("../../etc", "", "a/b"):
        with pytest.raises(NotFoundError):
            again.run(run)
    for path in ("tinker://a/b/c", "http://a/weights/c", "tinker://a/weights", "tinker://a/weights/b/c"):
        with pytest.raises(DataError):
            path_parts(path)
    (tmp_path / "runs" / "s-1%3Atrain%3A0" / "run.json").write_text('{"id": 1}')
    with pytest.raises(CorruptError):
        again.run(RUN.id)


# ---------------------------------------------------------------------------------------------------------------- keys
def test_keys(tmp_path: Path) -> None:
    """Only hashes are stored; a change by another process counts at once."""
    keys, other = Keys(tmp_path / "keys.json"), Keys(tmp_path / "keys.json")
    assert not keys.active()
    secret = keys.add("ann")
    assert secret.startswith("tml-")
    assert secret[4:] not in (tmp_path / "keys.json").read_text()
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0
    assert other.tenant(secret) == "ann"
    other.revoke("ann")
    with pytest.raises(AuthError) as caught:
        keys.tenant(secret)
    assert secret not in str(caught.value)
    assert not keys.active()
    assert [key.revoked for key in keys.list()] == [True]
    with pytest.raises(ConfigError):
        keys.add("ann")
    with pytest.raises(NotFoundError):
        keys.revoke("bob")


# -------------------------------------------------------------------------------------------------------------- ledger
def test_a_place_is_not_lost_when_who_waits_for_it_leaves() -> None:
    async def go() -> list[str]:
        gate, order = Gate(1), list[str]()
        await gate.enter("a")

        async def wait(owner: str, name: str) -> None:
            await gate.enter(owner)
            order.append(name)
            gate.leave()

        tasks = [asyncio.create_task(wait(owner, name)) for owner, name in (("a", "a1"), ("a", "a2"), ("b", "b1"), ("c", "c1"))]
        await asyncio.sleep(0)
        tasks[3].cancel()
        gate.leave()
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(gate.enter("d"), 1)
        return order

    assert asyncio.run(go()) == ["b1", "a2"]


def test_internal_errors_say_nothing_of_their_inside() -> None:
    inside = failure(KeyError("secret"))
    assert b"secret" not in inside.body
    assert json.loads(inside.body)["category"] == "server"
    assert json.loads(failure(DataError("no")).body) == {"error": "DataError: no", "category": "user"}
    assert Answer(b"x").type == "application/json"


def test_prometheus() -> None:
    assert prometheus({"steps_total": 2, "requests_total:a": 1, "requests_total:b": 3}).splitlines()[2:4] == [
        'crucible_requests_total{kind="a"} 1', 'crucible_requests_total{kind="b"} 3'
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"places": 0}, {"durable": "never"}, {"poll_s": 0.0}, {"port": 70000}])
def test_settings_are_checked(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(ServeConfig(), **change)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- command
def ask(*words: str) -> Reply:
    app = App(name="crucible", result_action="return_value")
    command.register(app)
    reply = app(words, exit_on_error=False, print_error=False)
    assert isinstance(reply, Reply)
    return reply


def test_keys_command(tmp_path: Path) -> None:
    made = ask("serve", "keys", "add", "ann", "--folder", str(tmp_path))
    assert isinstance(made.data, dict)
    assert Keys(tmp_path / "keys.json").tenant(made.data["key"]) == "ann"
    assert ask("serve", "keys", "revoke", "ann", "--folder", str(tmp_path)).data == {"name": "ann", "revoked": True}
    assert ask("serve", "keys", "list", "--folder", str(tmp_path)).text == "ann (revoked)"


def test_options_go_to_the_backend(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text("port = 0\n[options]\nlatency = 1\n")
    with pytest.raises(UnknownNameError, match="Did you mean 'latency_s'"):
        ask("serve", str(tmp_path / "serve.toml"), "--backend", "fake", "--folder", str(tmp_path / "here"))


def test_serve_command_ends_with_a_signal(tmp_path: Path) -> None:
    """It says where it is, answers, and stops cleanly."""
    import httpx

    (tmp_path / "serve.toml").write_text('port = 0\nmodels = ["tiny"]\n[aliases]\n"org/model" = "tiny"\n[options]\nlatency_s = 0.001\n')
    script = (
        "import sys; from cyclopts import App; from crucible_framework.cli.serve import register; app = App(result_action='return_value'); "
        "register(app); print(app(sys.argv[1:]).text)"
    )
    words = ["serve", str(tmp_path / "serve.toml"), "--backend", "fake", "--folder", str(tmp_path / "here"), "--verbose"]
    process = subprocess.Popen([sys.executable, "-c", script, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    url = line.split(" at ")[1].split()[0]
    listed = httpx.get(f"{url}/api/v1/get_server_capabilities", headers={"X-API-Key": "tml-x"}).json()["supported_models"]
    assert [one["model_name"] for one in listed] == ["tiny", "org/model"]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode in (0, 130, -2), out


def test_a_killed_server_loses_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between checkpoints and started again: the client resumes to the numbers of an undisturbed run."""
    from crucible_framework.backends import connect
    from crucible_framework.losses import resolve
    from crucible_framework.records import AdamConfig
    from crucible_framework.testing import make_batch

    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    batch, lora, loss = make_batch(), LoraConfig(rank=4, dropout=0.0), resolve("cross_entropy")
    process = ServerProcess("fake", tmp_path)
    try:
        with connect("tinker", base_url=process.url) as backend:
            session = backend.train("tiny", lora)
            saved, values = None, list[float]()
            for _ in range(6):
                values.append(session.forward_backward(batch, loss).result().loss)
                session.optim_step(AdamConfig(lr=0.01)).result()
                saved = saved or session.save("first").result()
            process.end(signal.SIGKILL)
            process = ServerProcess("fake", tmp_path, int(process.url.rsplit(":", 1)[1]))
        assert saved is not None
        with connect("tinker", base_url=process.url) as backend:
            resumed, again = backend.resume(saved), list[float]()
            for _ in range(5):
                again.append(resumed.forward_backward(batch, loss).result().loss)
                resumed.optim_step(AdamConfig(lr=0.01)).result()
            assert again == values[1:]
    finally:
        process.end()

"""The unmodified SDK trains, saves, resumes and samples against the server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from crucible_framework.backends import connect
from crucible_framework.data import ByteTokenizer
from crucible_framework.server import ServeConfig, Serving, serve

from .conftest import Start

IDS = list(b"hello world, hello world")
PROMPT = types.ModelInput.from_ints(IDS[:6])


def datum(**extras: Any) -> types.Datum:
    inputs: dict[str, Any] = {"target_tokens": IDS[1:], **extras}
    return types.Datum(model_input=types.ModelInput.from_ints(IDS[:-1]), loss_fn_inputs=inputs)


def plain() -> types.Datum:
    return datum(weights=[1.0] * (len(IDS) - 1))


@pytest.fixture
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=4, seed=1, user_metadata={"for": "tests"}).result()


def losses(client: tinker.TrainingClient, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        made = client.forward_backward([plain()] * 2, "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-2))
        found.append(made.result().metrics["loss:sum"])
        assert (stepped.result().metrics or {})["grad_norm"] > 0
    return found


def test_training_lowers_the_loss(training: tinker.TrainingClient) -> None:
    seen = losses(training, 6)
    assert seen[-1] < 0.9 * seen[0]
    info = training.get_info()
    assert (info.model_name, info.lora_rank, info.is_lora) == ("tiny", 4, True)
    assert info.model_id.endswith(":train:0")


def test_local_engine_behind_the_server(tmp_path: Path) -> None:
    """The real engine: training, a seeded sample, and log-probs that agree with the forward pass."""
    with connect("local") as backend, serve(backend, ServeConfig(folder=tmp_path, port=0, poll_s=2.0)) as server:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
        client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        seen = losses(client, 4)
        assert seen[-1] < 0.8 * seen[0]
        sampler = client.save_weights_and_get_sampling_client().result()
        forward = client.forward([plain()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
        scores = sampler.compute_logprobs(types.ModelInput.from_ints(IDS)).result()
        np.testing.assert_allclose(np.array(scores[1:], dtype=np.float64), forward, atol=1e-4)
        answers = [sampler.sample(PROMPT, 3, types.SamplingParams(max_tokens=5, seed=7)).result().sequences for _ in range(2)]
        assert [list(one.tokens) for one in answers[0]] == [list(one.tokens) for one in answers[1]]
        assert len({tuple(one.tokens) for one in answers[0]}) == 3
        asked = types.SamplingParams(max_tokens=5, seed=7, temperature=0.8)
        told = sampler.sample(PROMPT, 2, asked, include_prompt_logprobs=True, topk_prompt_logprobs=100, topk_sample_logprobs=100).result()
        prompt = told.topk_prompt_logprobs_np
        assert prompt is not None
        places = [(place, prompt, IDS[place], (told.prompt_logprobs or ())[place]) for place in range(1, 6)]
        for one in told.sequences:
            assert one.topk_logprobs_np is not None
            places += [(place, one.topk_logprobs_np, token, (one.logprobs or ())[place]) for place, token in enumerate(one.tokens)]
        found = [(dict(zip(top.token_ids[at].tolist(), top.logprobs[at].tolist(), strict=True)).get(token), value) for at, top, token, value in places]
        assert sum(rival is not None for rival, _ in found) > 8
        assert all(rival is None or rival == pytest.approx(value, abs=1e-4) for rival, value in found)
        service.close("success").result()


def test_tokenizer_is_the_servers(training: tinker.TrainingClient) -> None:
    """transformers loads what the server names, with the ids of the built-in tokenizer."""
    tokenizer, ours = training.get_tokenizer(), ByteTokenizer()
    text = "Naïve — 4 < 5\n\t<|im_start|>user"
    assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text)
    assert tokenizer.decode(ours.encode("Naïve — 4")) == "Naïve — 4"
    assert len(tokenizer) == ours.vocab_size
    assert tokenizer.eos_token_id == ours.eos_ids[0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("<|im_start|>user\nHi")


def test_custom_loss_is_the_native_one(training: tinker.TrainingClient, service: tinker.ServiceClient) -> None:
    """Cross-entropy written by a user trains to the numbers of the service's own."""

    def own(_: Sequence[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.stack([one.sum() for one in logprobs]).sum(), {"mine": 1.0}

    twin = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    seen = []
    for _ in range(3):
        made = training.forward_backward_custom([datum()] * 2, own).result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        assert made.metrics["mine"] == 1.0
        seen.append(made.metrics["loss:sum"])
    assert seen == pytest.approx(losses(twin, 3), rel=1e-5)


@pytest.mark.parametrize("optimizer", [True, False])
def test_resume(training: tinker.TrainingClient, service: tinker.ServiceClient, *, optimizer: bool) -> None:
    """With the optimizer it goes on as if nothing had happened; without, the weights are the same and the moments are new."""
    losses(training, 3)
    path = training.save_state("middle").result().path
    expected = losses(training, 3)
    make = service.create_training_client_from_state_with_optimizer if optimizer else service.create_training_client_from_state
    seen = losses(make(path).result(), 3)
    assert seen[0] == expected[0]
    assert (seen == expected) == optimizer


def test_every_loss(training: tinker.TrainingClient) -> None:
    """Each gives −Σ A at p = q, which its gradient then changes; settings and per-token thresholds are taken."""
    n = len(IDS) - 1
    base = training.forward([plain()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    given = {"logprobs": base.tolist(), "advantages": [0.5] * n}
    for name, config in {"importance_sampling": None, "ppo": {"clip_low_threshold": 0.9}, "gspo": None}.items():
        extras = given | ({"sequence_ratio_mask": [1.0] * n} if name == "gspo" else {}) | ({"clip_high_threshold": [1.1] * n} if name == "ppo" else {})
        assert training.forward_backward([datum(**extras)], name, config).result().metrics["loss:sum"] == pytest.approx(-0.5 * n, rel=1e-5)  # type: ignore[arg-type]
    for name, config in {"cispo": None, "dro": {"beta": 0.1}, "stable_reinforce": {"kl_coeff": 0.1}}.items():
        made = training.forward_backward([datum(**given)], name, config).result()  # type: ignore[arg-type]
        assert made.metrics["loss:sum"] == pytest.approx(-0.5 * float(base.sum()), rel=1e-5)
    assert (training.optim_step(types.AdamParams()).result().metrics or {})["optimizer_steps"] == 1.0


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"])
def test_the_prompt_takes_no_part_in_policy_losses(training: tinker.TrainingClient, name: str) -> None:
    """Clients fill it with zeros, and send no mask: what was sampled alone makes the ratios, the pulls and the numbers."""
    n, prompt = len(IDS) - 1, 9
    base = training.forward([plain()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    sampled = np.arange(n) >= prompt
    filled = {"logprobs": (np.where(sampled, base - 0.01, 0.0)).tolist(), "advantages": np.where(sampled, 0.5, 0.0).tolist()}
    config = {"kl_coeff": 0.5} if name == "stable_reinforce" else None
    without, told = (
        training.forward_backward([datum(**filled, **more)], name, config).result()  # type: ignore[arg-type]
        for more in ({}, {"weights": sampled.astype(float).tolist()})
    )
    assert without.metrics == told.metrics
    assert without.metrics["ratio:mean" if name != "stable_reinforce" else "kl_sampler:mean"] == pytest.approx(
        1.01005 if name != "stable_reinforce" else -0.01, rel=1e-4
    )
    if name == "gspo":
        assert without.metrics["loss:sum"] == pytest.approx(-0.5 * sampled.sum() * math.exp(0.01), rel=1e-5)
    got = without.loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(got[sampled], base[sampled], rtol=1e-5)


def test_metrics_of_a_step_do_not_hide_the_clients_own(training: tinker.TrainingClient) -> None:
    """The cookbook puts them into rows that it finds again by its own "step", when it resumes."""
    training.forward_backward([plain()], "cross_entropy").result()
    metrics = training.optim_step(types.AdamParams()).result().metrics or {}
    assert "step" not in metrics
    assert metrics["optimizer_steps"] == 1.0


def test_two_dimensional_targets(training: tinker.TrainingClient) -> None:
    """Soft targets, dense and sparse: the loss is the weighted sum, log-probs have their shape."""
    n, k = len(IDS) - 1, 6
    targets, weights = np.tile(np.arange(k), (n, 1)), np.zeros((n, k), dtype=np.float32)
    targets[:, 0], weights[:, 0] = IDS[1:], 1.0
    dense = types.Datum(
        model_input=types.ModelInput.from_ints(IDS[:-1]),
        loss_fn_inputs={"target_tokens": types.TensorData.from_numpy(targets), "weights": types.TensorData.from_numpy(weights)},
    )
    sparse = types.Datum(
        model_input=types.ModelInput.from_ints(IDS[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch_sparse(torch.from_numpy(np.where(weights > 0, targets, 0))),
            "weights": types.TensorData.from_torch_sparse(torch.from_numpy(weights)),
        },
    )
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    values = [training.forward([one], "cross_entropy").result() for one in (plain(), dense, sparse)]
    assert values[1].metrics["loss:sum"] == pytest.approx(values[0].metrics["loss:sum"], rel=1e-5)
    assert values[2].metrics["loss:sum"] == pytest.approx(values[0].metrics["loss:sum"], rel=1e-5)
    assert values[1].loss_fn_outputs[0]["logprobs"].shape == [n, k]


def test_large_batches_go_in_chunks(training: tinker.TrainingClient) -> None:
    """More data than a chunk takes: the SDK sends the chunks in any order."""
    made = training.forward_backward([plain()] * 1500, "cross_entropy").result()
    assert len(made.loss_fn_outputs) == 1500
    assert made.metrics["loss:sum"] == pytest.approx(1500 * training.forward([plain()], "cross_entropy").result().metrics["loss:sum"], rel=1e-4)


def test_failures_are_the_callers(training: tinker.TrainingClient) -> None:
    """A request that makes no sense fails alone, as the user's; the step after it fails too, then all is well."""
    with pytest.raises(tinker.RequestFailedError, match="logprobs") as caught:
        training.forward_backward([plain()], "ppo").result()
    assert caught.value.category is types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="not taken"):
        training.optim_step(types.AdamParams()).result()
    with pytest.raises(tinker.RequestFailedError, match="betta"):
        training.forward_backward([plain()], "dro", {"betta": 1.0}).result()
    with pytest.raises(tinker.RequestFailedError, match="not taken"):
        training.optim_step(types.AdamParams()).result()
    with pytest.raises(tinker.RequestFailedError, match="AdamW"):
        training.optim_step(types.DimuonParams(learning_rate=0.1)).result()
    assert len(losses(training, 1)) == 1


def test_unknown_base_model(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="no-such-model"):
        service.create_lora_training_client("no-such-model").result()
    with pytest.raises(tinker.BadRequestError, match="no-such-model"):
        service.create_sampling_client(base_model="no-such-model").result()


def test_samples(training: tinker.TrainingClient, service: tinker.ServiceClient) -> None:
    """Ephemeral, named and base samplers; log-probs of the prompt; a stop token is part of the answer."""
    losses(training, 2)
    path = training.save_weights_for_sampler("named", ttl_seconds=3600).result().path
    samplers = [training.save_weights_and_get_sampling_client().result(), service.create_sampling_client(model_path=path).result()]
    scores = [sampler.compute_logprobs(PROMPT).result() for sampler in samplers]
    assert scores[0] == scores[1]
    assert scores[0][0] is None
    base = service.create_sampling_client(base_model="tiny").result()
    assert base.compute_logprobs(PROMPT).result() != scores[0]
    last = base.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result()
    assert [value is None for value in last] == [True] * 4 + [False] * 2
    (one,) = base.sample(PROMPT, 1, types.SamplingParams(max_tokens=30, seed=1)).result().sequences
    stopped = base.sample(PROMPT, 1, types.SamplingParams(max_tokens=30, seed=1, stop=[one.tokens[3]])).result().sequences[0]
    assert stopped.stop_reason == "stop"
    assert stopped.tokens[-1] == one.tokens[3]
    assert len(stopped.tokens) == len(stopped.logprobs or ())


def test_no_stop_at_all(service: tinker.ServiceClient) -> None:
    """An empty list of stops means that nothing ends an answer but its length."""
    base = service.create_sampling_client(base_model="tiny").result()
    answers = base.sample(PROMPT, 16, types.SamplingParams(max_tokens=120, seed=3, stop=[])).result().sequences
    assert {len(one.tokens) for one in answers} == {120}
    assert {one.stop_reason for one in answers} == {"length"}
    ended = base.sample(PROMPT, 16, types.SamplingParams(max_tokens=120, seed=3)).result().sequences
    assert {one.stop_reason for one in ended} == {"stop", "length"}, "some end by themselves"


@pytest.mark.parametrize("adapted", [False, True])
def test_likeliest_tokens(service: tinker.ServiceClient, training: tinker.TrainingClient, *, adapted: bool) -> None:
    """Top-k of the prompt and of the answer, on a base model and on an adapter."""
    losses(training, 2)
    sampler = training.save_weights_and_get_sampling_client().result() if adapted else service.create_sampling_client(base_model="tiny").result()
    params = types.SamplingParams(max_tokens=4, seed=1, temperature=0.5)
    made = sampler.sample(PROMPT, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=261 // 3, topk_sample_logprobs=5).result()
    scores, top = made.prompt_logprobs, made.topk_prompt_logprobs_np
    assert scores is not None
    assert top is not None
    assert top.token_ids.shape == (6, 87)
    assert (top.logprobs[0] == -99999.0).all()
    seen = 0
    for place in range(1, 6):
        likeliest = dict(zip(top.token_ids[place].tolist(), top.logprobs[place].tolist(), strict=True))
        if IDS[place] in likeliest:
            seen += 1
            assert likeliest[IDS[place]] == pytest.approx(scores[place], abs=1e-4)
    assert seen
    for one in made.sequences:
        drawn = one.topk_logprobs_np
        assert drawn is not None
        assert drawn.token_ids.shape == (4, 5)
        for place, (token, logprob) in enumerate(zip(one.tokens, one.logprobs or (), strict=True)):
            row = dict(zip(drawn.token_ids[place].tolist(), drawn.logprobs[place].tolist(), strict=True))
            assert logprob <= max(row.values()) + 1e-5
            if token in row:
                assert row[token] == pytest.approx(logprob, abs=1e-4)


def test_log_probs_of_given_tokens(service: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
    """Dense and sparse cells come back in their layout; a cell of −1 asks nothing; the prompt's own tokens have its own log-probs."""
    losses(training, 2)
    sampler = training.save_weights_and_get_sampling_client().result()
    own = np.array([[token, -1, 7] for token in IDS[1:6]])
    params = types.SamplingParams(max_tokens=1, seed=1)
    made = sampler.sample(PROMPT, 1, params, include_prompt_logprobs=True, target_prompt_logprobs=types.TensorData.from_numpy(own)).result()
    assert made.target_prompt_logprobs is not None
    dense = np.array(made.target_prompt_logprobs.data).reshape(5, 3)
    assert dense[:, 0] == pytest.approx(np.array(made.prompt_logprobs[1:], dtype=np.float64), abs=1e-4)  # type: ignore[index]
    assert (dense[:, 1] == 0).all()
    sparse = types.TensorData(data=[IDS[2], 7], dtype="int64", shape=[5, 3], sparse_crow_indices=[0, 0, 1, 1, 2, 2], sparse_col_indices=[0, 2])
    answer = sampler.sample(PROMPT, 1, params, target_prompt_logprobs=sparse).result().target_prompt_logprobs
    assert answer is not None
    assert (answer.sparse_crow_indices, answer.sparse_col_indices) == ([0, 0, 1, 1, 2, 2], [0, 2])
    assert np.array(answer.data) == pytest.approx(np.array([dense[1, 0], dense[3, 2]]), abs=1e-5)
    for wrong in (own[:-1], own + 5000, own.astype(np.float32)):
        with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError, ValueError)):
            sampler.sample(PROMPT, 1, params, target_prompt_logprobs=types.TensorData.from_numpy(wrong)).result()


def test_draws_beside_the_prompt(service: tinker.ServiceClient) -> None:
    """Independent draws at each position after the first, with their log-probs, as often as their chances say."""
    base = service.create_sampling_client(base_model="tiny").result()
    params = types.SamplingParams(max_tokens=1, seed=5)
    made = base.sample(PROMPT, 1, params, prompt_alt_tokens_k=128, topk_prompt_logprobs=1).result()
    assert made.prompt_alt_tokens is not None
    tokens, scores = (np.array(part.data).reshape(5, 128) for part in (made.prompt_alt_tokens.tokens, made.prompt_alt_tokens.logprobs))
    best = made.topk_prompt_logprobs_np
    assert best is not None
    for place in range(5):
        assert scores[place].max() <= best.logprobs[place + 1, 0] + 1e-5
        hit = (tokens[place] == best.token_ids[place + 1, 0]).mean()
        assert abs(hit - np.exp(best.logprobs[place + 1, 0])) < 0.2
    again = base.sample(PROMPT, 1, params, prompt_alt_tokens_k=128).result().prompt_alt_tokens
    assert again is not None
    assert list(again.tokens.data) == list(made.prompt_alt_tokens.tokens.data)


@pytest.mark.parametrize("flag", ["sample_use_retrieve_futures", "pjwt_auth_enabled", "proto_compress_fwdbwd"])
def test_what_the_sdk_can_switch_on(start: Start, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """Waiting for all of a sampler's requests at once, tokens instead of keys, packed bodies: the same answers."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    service = tinker.ServiceClient(base_url=start(client={flag: True}).url, api_key="tml-local")
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    seen = losses(client, 3)
    sampler = client.save_weights_and_get_sampling_client().result()
    asked = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=3, seed=i)) for i in range(20)]
    assert all(one.result().sequences[0].tokens for one in asked)
    assert seen[-1] < seen[0]
    with pytest.raises(tinker.RequestFailedError):
        sampler.sample(types.ModelInput.from_ints([10**6]), 1, types.SamplingParams(max_tokens=3)).result()
    service.close("success").result()


def test_weights_are_copied(serving: Serving, training: tinker.TrainingClient, service: tinker.ServiceClient) -> None:
    """Into a project, or into the client's own, each once; a copy trains on to the numbers of its source."""
    losses(training, 2)
    path = training.save_state("source").result().path
    expected = losses(training, 2)
    rest = tinker.RestClient(base_url=serving.url, api_key="tml-local")
    copy = rest.copy_weights(path, "mine").result()
    assert copy != path
    assert losses(service.create_training_client_from_state_with_optimizer(copy).result(), 2) == expected
    assert [one.training_run_id for one in rest.list_training_runs(project_id="mine").result().training_runs] == [copy.split("/")[2]]
    own = tinker.ServiceClient(base_url=serving.url, api_key="tml-local", project_id="other")
    assert own.copy_weights(path).result() not in (copy, path)
    session = training.model_id.partition(":")[0]
    rest.assign_session_project(session, "third").result()
    assert training.model_id in {one.training_run_id for one in rest.list_training_runs(project_id="third").result().training_runs}
    own.close("success").result()
    audit = tinker.AdminClient(base_url=serving.url, api_key="tml-local").get_audit_log().result()
    assert [entry.event for entry in audit.entries] == ["checkpoint.copied", "checkpoint.copied", "project.session_assigned"]


def test_aliases(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model under a name that a recipe knows, with the tokenizer of the model behind it, or of the folder that is named for it."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    serving = start(aliases={"org/model": "tiny"})
    service = tinker.ServiceClient(base_url=serving.url, api_key="tml-local")
    client = service.create_lora_training_client("org/model", rank=4, seed=1).result()
    assert client.get_info().model_name == "org/model"
    assert client.get_tokenizer().encode("Hi", add_special_tokens=False) == list(b"Hi")
    path = client.save_weights_for_sampler("weights").result().path
    assert service.create_sampling_client(model_path=path).result().get_base_model() == "org/model"
    assert service.create_sampling_client(base_model="org/model").result().sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result().sequences
    service.close("success").result()
    other = start(aliases={"org/model": "tiny"}, tokenizers={"org/model": "/somewhere/else"}, only_listed=True, folder="other", models=())
    second = tinker.ServiceClient(base_url=other.url, api_key="tml-local")
    assert second.create_lora_training_client("org/model", rank=4).result().get_info().model_data.tokenizer_id == "/somewhere/else"
    with pytest.raises(tinker.BadRequestError, match="org/model"):
        second.create_lora_training_client("tiny", rank=4).result()
    second.close("success").result()


def test_many_samples_at_once(service: tinker.ServiceClient) -> None:
    """Three hundred, each answered once, those of one seed alike."""
    base = service.create_sampling_client(base_model="tiny").result()

    async def ask() -> list[types.SampleResponse]:
        return list(await asyncio.gather(*(base.sample(PROMPT, 1, types.SamplingParams(max_tokens=4, seed=i % 10)) for i in range(300))))

    answers = [tuple(one.sequences[0].tokens) for one in asyncio.run(ask())]
    assert len(answers) == 300
    for seed in range(10):
        assert len(set(answers[seed::10])) == 1
    assert len(set(answers)) > 5


def test_a_checkpoint_name_is_taken_once(training: tinker.TrainingClient) -> None:
    first = training.save_state("same", user_metadata={"step": "0"}).result().path
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        training.save_state("same").result()
    assert training.save_state("same", overwrite=True).result().path == first
    with pytest.raises(tinker.RequestFailedError, match="cannot be called"):
        training.save_state("../../etc/passwd").result()
    with pytest.raises(tinker.RequestFailedError, match="ttl_seconds"):
        training.save_state("soon", ttl_seconds=0).result()


def test_weights_of_another_kind_cannot_be_trained(training: tinker.TrainingClient, service: tinker.ServiceClient) -> None:
    path = training.save_weights_for_sampler("only").result().path
    client = service.create_training_client_from_state
    with pytest.raises(tinker.TinkerError, match="sampling only"):
        client(path).result().forward([plain()], "cross_entropy").result()
    with pytest.raises(tinker.NotFoundError):
        client(path.replace("only", "none")).result()
    assert math.isfinite(losses(training, 1)[0])

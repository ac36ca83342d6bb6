"""The engine on a device that is not the processor: pretended, because the machines that run the tests have no GPU.

What mixes devices, or takes a processor for granted, raises on it, and its numbers are compared with the processor's; see `pretended.py` for what it
refuses and what it cannot know. CUDA itself (its kernels, their rounding and speed, streams, out of memory) is not tested anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crucible_framework.backends.local import LocalBackend, sizes
from crucible_framework.backends.local.bases import load_base
from crucible_framework.backends.local.export import export_checkpoint
from crucible_framework.backends.local.session import LocalSession
from crucible_framework.backends.local.walks import STEPS, Drop
from crucible_framework.errors import BackendError
from crucible_framework.losses import losses, resolve
from crucible_framework.protocols import Backend, GradientHook, Gradients, Loss, Report
from crucible_framework.records import AdamConfig, Batch, Checkpoint, LoraConfig, Prompt, SamplingParams
from crucible_framework.server.looks import Look, Tails
from crucible_framework.testing import BackendContract
from crucible_framework.testing.backend_parts import observe
from crucible_framework.training import edits
from crucible_framework.training.examplewise import example_norms, measure_noise_scale
from crucible_framework.training.gradients import chain, gradient_hooks
from crucible_framework.training.privacy import PrivacyConfig, train_privately

from .models_for_tests import CE_FROM_LOGITS, batch, datum
from .pretended import Pretended, pretended_device

LORA = LoraConfig(rank=4, dropout=0.0, seed=1, target_modules=("all-linear",))
ADAM = AdamConfig(lr=0.01, eps=0.01)  # Adam's own eps would make whole steps of what is rounding in a gradient near 0
CE = resolve("cross_entropy")
MODELS: list[tuple[str, Literal["torch", "plain"]]] = [("tiny", "torch"), ("qwen", "torch"), ("qwen", "plain")]
ONE, OURS = (pytest.mark.parametrize("pair", some, indirect=True, ids="-".join) for some in (MODELS[:1], MODELS[:2]))
"""Where transformers' modules have no part in it, or another model's shapes none either."""


# --------------------------------------------------------------------------------------------------------------- a pair
@dataclass(frozen=True)
class Pair:
    """The same engine on the processor and on the device."""

    here: LocalBackend
    there: LocalBackend
    model: str

    def both(self, asked: Callable[[LocalBackend, str], object]) -> None:
        """Asserts that what is asked of the two is the same up to rounding."""
        same(asked(self.there, self.model), asked(self.here, self.model))


def same(ours: object, theirs: object, tolerance: float = 1e-5) -> None:
    """Nested numbers agree; arrays relative to their greatest entry."""
    if isinstance(theirs, Mapping):
        assert isinstance(ours, Mapping)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            same(ours[key], value, tolerance)
    elif isinstance(theirs, str | int | None):
        assert ours == theirs
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other, tolerance)
    else:
        wanted = np.asarray(theirs, dtype=np.float64)
        finite = np.abs(wanted[np.isfinite(wanted)])
        np.testing.assert_allclose(np.asarray(ours), wanted, rtol=tolerance, atol=tolerance * max(1.0, float(finite.max(initial=0.0))))


def _as_the_device_draws(self: Drop, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The masks of other devices, on the processor too."""
    if device.type != "cpu":
        return _kept(self, shape, device)
    return torch.rand(shape, generator=torch.Generator().manual_seed(self.start >> 1)) >= self.threshold / STEPS


_kept = Drop.kept


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def pair(request: pytest.FixtureRequest, qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model, engine = request.param
    cache = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch, pretended_device() as name:
        patch.setattr(Drop, "kept", _as_the_device_draws)
        made = partial(LocalBackend, engine=engine, threads=1, cache=cache, dtype="float32")
        with made(device="cpu") as here, made(device=name) as there:
            yield Pair(here, there, str(qwen) if model == "qwen" else model)


def family(common: int, *lengths: int, candidates: int = 0) -> Batch:
    """Data with a common start."""
    start = datum("start", common, seed=50).tokens
    made = [datum(f"f{i}", common + length, seed=51 + i, weighted=4, candidates=candidates) for i, length in enumerate(lengths)]
    return Batch(data=tuple(replace(one, tokens=np.concatenate([start, one.tokens[common:]])) for one in made))


def trained(backend: LocalBackend, model: str, lora: LoraConfig = LORA, steps: int = 2) -> LocalSession:
    """A session whose adapter is not zero."""
    session = backend.train(model, lora)
    for step in range(steps):
        session.forward_backward(batch(7, 12, seed=step), CE)
        session.optim_step(ADAM)
    return session


def passes(session: LocalSession, data: Batch, loss: Loss) -> list[object]:
    """What a forward and a backward pass give, with the gradient and the weights after a step."""
    gradients: dict[str, np.ndarray] = {}
    before = session.forward(data, loss).result()
    output = session.forward_backward(data, loss).result()
    optim = session.optim_step(ADAM, observe(gradients)).result()
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in session._adapter.items()}
    return [before.loss, output.loss, list(output.logprobs), output.metrics, gradients, optim.grad_norm, weights]


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    ("data", "loss"),
    [
        (batch(7, 12, 9), CE),
        (batch(5, 30, 31), CE_FROM_LOGITS),
        (batch(6, 9, candidates=3), CE),
        (family(20, 4, 6, 5), CE),
        (batch(4, 8), resolve({"cross_entropy": 1.0, "l2": 0.1, "gradient_penalty": 0.1})),
    ],
    ids=["plain", "logits", "candidates", "common start", "penalties"],
)
def test_training(pair: Pair, data: Batch, loss: Loss) -> None:
    pair.both(lambda backend, model: passes(trained(backend, model), data, loss))


def test_weights_and_gradients_are_the_devices(pair: Pair) -> None:
    session, seen = trained(pair.there, pair.model), list[Tensor]()

    def hook(gradients: Gradients, report: Report) -> Gradients:
        del report
        seen.extend(gradients.values())
        return {name: torch.ones(gradient.shape) for name, gradient in gradients.items()}  # from elsewhere: the engine brings them back

    session.forward_backward(batch(5), CE)
    assert session.optim_step(ADAM, hook).result().step == 3
    moments = [*session._optimizer.exp_avg.values(), *session._optimizer.exp_avg_sq.values()]
    parameters = [*session.base.model.parameters(), *session.base.model.buffers()]
    assert all(isinstance(tensor, Pretended) for tensor in [*session._adapter.values(), *moments, *seen, *parameters])


@pytest.mark.parametrize("data", [batch(9, 14), family(20, 4, 6)], ids=["plain", "common start"])
def test_dropout(pair: Pair, data: Batch) -> None:
    pair.both(lambda backend, model: passes(trained(backend, model, replace(LORA, dropout=0.3)), data, CE))


def test_a_batch_that_goes_through_twice(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (pair.here, pair.there):
        base = backend._base(pair.model)
        monkeypatch.setitem(backend._bases, base.name, replace(base, limit=24, keeps=24))
    pair.both(lambda backend, model: passes(trained(backend, model, replace(LORA, dropout=0.2)), batch(20, 12, 9, 5), CE))


@OURS
def test_activations_are_computed_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (pair.here, pair.there):
        decoder = backend._base(pair.model).decoder
        assert decoder is not None
        monkeypatch.setattr(decoder, "recompute_above", 10)
    pair.both(lambda backend, model: passes(trained(backend, model, replace(LORA, dropout=0.2)), batch(20, 17), CE))


def test_norms_of_examples(pair: Pair) -> None:
    data = batch(6, 9, 14, 30)

    def asked(backend: LocalBackend, model: str) -> list[object]:
        session = trained(backend, model, replace(LORA, target_modules=("all-linear", "lm_head")))
        found = session.forward_backward_examples(data, CE).result().example_norms
        session.optim_step(ADAM)
        scale = measure_noise_scale(session, data.data)
        return [found, example_norms(session, data.data), scale.trace, scale.signal]

    pair.both(asked)


@ONE
def test_hooks(pair: Pair) -> None:
    shapes = {name: tensor.shape for name, tensor in trained(pair.here, pair.model, steps=0)._adapter.items()}
    elsewhere = {name: torch.full(shape, -0.1) for name, shape in shapes.items()}
    first = next(iter(shapes))
    made: Sequence[Callable[[], GradientHook]] = [
        *(gradient_hooks.get(name) for name in gradient_hooks.names()),
        lambda: edits.clip_layers(0.1),
        lambda: edits.freeze("*q_proj*"),
        lambda: edits.mask({first: torch.zeros(shapes[first])}),
        lambda: edits.project(elsewhere),
        lambda: edits.pcgrad(elsewhere),
    ]

    def asked(backend: LocalBackend, model: str) -> list[object]:
        session, found = trained(backend, model), list[object]()
        for each in made:
            hook, gradients = each(), dict[str, np.ndarray]()
            for seed in range(2):
                session.forward_backward(batch(9, 6, seed=seed), CE)
                found.append(session.optim_step(AdamConfig(lr=0.0), chain(hook, observe(gradients))).result().grad_norm)
            found.append(gradients)
        return found

    pair.both(asked)
    noisy = trained(pair.there, pair.model)
    noisy.forward_backward(batch(9, 6), CE)
    assert noisy.optim_step(ADAM, edits.add_noise(0.01, relative=True)).result().metrics["noise_std"] > 0  # of a seed made of the gradient's last bits


@ONE
def test_training_privately(pair: Pair) -> None:
    config = PrivacyConfig(steps=2, sampling_rate=0.9, seed=3)

    def asked(backend: LocalBackend, model: str) -> list[object]:
        session = trained(backend, model)
        spent = train_privately(session, batch(6, 9, 7).data, config).epsilon
        return [spent, session.forward(batch(6), CE).result().loss]

    pair.both(asked)


def test_small_batches_share_a_pass(qwen: Path, tmp_path: Path) -> None:
    made = partial(LocalBackend, engine="torch", threads=1, cache=tmp_path, dtype="float32", share_passes=True)
    with pytest.MonkeyPatch.context() as patch, pretended_device() as name:
        patch.setattr(Drop, "kept", _as_the_device_draws)
        with made(device="cpu") as here, made(device=name) as there:

            def asked(backend: LocalBackend, model: str) -> list[object]:
                sessions = [trained(backend, model, replace(LORA, rank=2 + i, seed=i, dropout=0.1 * i)) for i in range(3)]
                gate = backend.submit(lambda: [session.forward(batch(4), CE) for session in sessions])  # the passes behind it wait together
                futures = [session.forward_backward(batch(9, 5 + i), CE) for i, session in enumerate(sessions)]
                gate.result()
                steps = [session.optim_step(ADAM) for session in sessions]
                return [[future.result().loss for future in futures], [step.result().grad_norm for step in steps]]

            Pair(here, there, str(qwen)).both(asked)


# --------------------------------------------------------------------------------------------------------------- losses
@pytest.fixture
def device() -> Iterator[str]:
    with pretended_device() as name:
        yield name


def _extras(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name in ("closure", "citation", "polarity"):
        return np.tile(np.array([1.0, -1.0, 1.0, 0.0], np.float32), (shape[0], 1))
    if name == "nodes":
        return np.tile(np.array([1.0, 2.0, 3.0, 0.0], np.float32), (shape[0], 1))
    if name == "source":
        return (1 + np.arange(shape[0]) % 3).astype(np.float32)
    if name == "evidence":
        return np.full(shape[0], 0.7, np.float32)
    return (-rng.uniform(0.5, 3.0, shape)).astype(np.float32)


@pytest.mark.parametrize("name", [*losses.names(), "topological(variant='dagma')"])
def test_every_loss(device: str, name: str) -> None:
    loss, rng = resolve(name), np.random.default_rng(0)
    wide = any(extra in loss.extras for extra in ("closure", "citation", "polarity", "nodes")) or name == "distillation"
    ends = ("#view1", "#view2") if name == "consistency" else ("#chosen", "#rejected")
    one = datum("q", 6, seed=1, candidates=4 if wide else 0)
    data = [replace(one, id=f"q{end}", extras={extra: _extras(extra, one.targets.shape, rng) for extra in loss.extras}) for end in ends]
    inputs = [torch.from_numpy(rng.normal(size=(6, 300) if loss.needs == "logits" else one.targets.shape)).float().log_softmax(-1) for _ in data]

    def asked(place: str) -> list[object]:
        leaves = [values.to(place).requires_grad_() for values in inputs]
        value, metrics = loss.fn(data, leaves)
        return [float(value.detach()), metrics, [gradient.cpu().numpy() for gradient in torch.autograd.grad(value, leaves)]]

    same(asked(device), asked("cpu"))


# ------------------------------------------------------------------------------------------------------------- sampling
def test_sampling(pair: Pair) -> None:
    prompts: tuple[Prompt, ...] = ("hi", "a rather longer prompt", (5, 6, 7), "a rather longer prompt of somebody else")
    kinds = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0), SamplingParams(temperature=0.8, top_k=7), SamplingParams(top_p=0.8)]

    def asked(backend: LocalBackend, model: str) -> list[object]:
        samplers = [backend.sampler(model), trained(backend, model).sampler(), trained(backend, model, replace(LORA, rank=2, seed=7)).sampler()]
        futures = [
            sampler.sample(prompt, replace(kinds[i], max_tokens=3 + 5 * i, seed=i), n=1 + i % 2)  # they leave the batch at other times
            for sampler in samplers
            for i, prompt in enumerate(prompts)
        ]
        return [[(one.tokens, one.text, one.stop_reason, one.logprobs) for one in future.result()] for future in futures]

    pair.both(asked)


def test_logprobs(pair: Pair) -> None:
    def asked(backend: LocalBackend, model: str) -> list[object]:
        samplers = [backend.sampler(model), trained(backend, model, replace(LORA, target_modules=("all-linear", "lm_head"))).sampler()]
        pairs = (("hi", "there"), ("a common start, and", "one"), ("a common start, and", "another"))
        return [sampler.compute_logprobs(*one).result() for sampler in samplers for one in pairs]

    pair.both(asked)


def test_likeliest_tokens_of_a_prompt(pair: Pair) -> None:
    prompt, params = tuple(range(20, 40)), SamplingParams(seed=1)

    def asked(backend: LocalBackend, model: str) -> list[object]:
        sampler = trained(backend, model).sampler()
        look = Look(prompt, first=1, top_k=3, alternatives=2, params=params, targets=None)
        tails = Tails(len(prompt), 3, 0.7, [3, 2])
        backend.look(sampler, [prompt], look).result()
        backend.look(sampler, [(*prompt, 1, 2), (*prompt, 3)], tails).result()
        tops = [top for top in (look.top, look.drawn, *tails.tops) if top is not None]
        return [[top.ids, top.logprobs] for top in tops]

    pair.both(asked)


# ---------------------------------------------------------------------------------------------------------- checkpoints
def _saved(backend: LocalBackend, session: LocalSession, folder: Path) -> Checkpoint:
    return backend.download(session.save("c").result(), folder)


@pytest.mark.parametrize("way", ["here to there", "there to here", "there to there"])
def test_checkpoints_resume_on_any_device(pair: Pair, tmp_path: Path, way: str) -> None:
    ends = {"here": pair.here, "there": pair.there}
    first, second = (ends[name] for name in way.split(" to "))
    session = trained(first, pair.model, replace(LORA, dropout=0.3))
    resumed = second.resume(_saved(first, session, tmp_path / "c"))
    assert second.sampler(_saved(first, session, tmp_path / "d")).sample("hi", SamplingParams(max_tokens=2)).result()
    same(passes(resumed, batch(9, 14), CE), passes(session, batch(9, 14), CE), 1e-4)


def test_export(pair: Pair, tmp_path: Path) -> None:
    written = []
    for name, backend in (("here", pair.here), ("there", pair.there)):
        checkpoint = _saved(backend, trained(backend, pair.model), tmp_path / name)
        export_checkpoint(checkpoint, tmp_path / f"{name}-merged", "merged")
        written.append({key: tensor.numpy() for key, tensor in load_file(tmp_path / f"{name}-merged" / "model.safetensors").items()})
    same(written[1], written[0])


# ------------------------------------------------------------------------------------------------------------- bfloat16
@pytest.mark.parametrize("engine", ["torch", "plain"])
def test_bfloat16_with_common_starts(qwen: Path, tmp_path: Path, engine: Literal["torch", "plain"]) -> None:
    """bfloat16 is the default of a GPU, where attention takes no mask of another dtype."""
    made = partial(LocalBackend, engine=engine, threads=1, cache=tmp_path)
    with pretended_device() as name, made(device="cpu", dtype="float32") as here, made(device=name, dtype="bfloat16") as there:
        ours, theirs = (trained(backend, str(qwen)).forward_backward(family(20, 4, 6, 5), CE).result().loss for backend in (there, here))
        assert ours == pytest.approx(theirs, rel=3e-2)
        sampler = there.sampler(str(qwen))
        futures = [sampler.sample(f"a common start of prompts, {end}", SamplingParams(max_tokens=4)) for end in ("one", "two")]
        assert all(future.result()[0].tokens for future in futures)


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize(("free", "reserved", "fits"), [(1000, 0, False), (1000, 2**30, True), (2**30, 0, True)])
def test_a_model_that_is_too_large_for_the_gpu(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, *, fits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    cuda = torch.device("cuda")
    if fits:
        sizes.check_memory("model", 2**20, cuda)
        return
    with pytest.raises(BackendError, match=r"needs 0\.0 GiB for its weights; 0\.0 GiB of the GPU's memory are free"):
        load_base(str(qwen), cache=tmp_path, dtype=torch.bfloat16, device=cuda)
    with pytest.raises(BackendError, match=r"'big' needs 3\.0 GiB for its weights; 0\.0 GiB of the GPU's memory"):
        sizes.check_memory("big", 3 * 2**30, cuda)


# ------------------------------------------------------------------------------------------------------------- contract
@pytest.mark.slow
class TestOnTheDevice(BackendContract):
    """The whole contract of a backend."""

    @pytest.fixture(params=["torch", "plain"])
    def backend(self, request: pytest.FixtureRequest) -> Iterator[Backend]:
        with pretended_device() as name, LocalBackend(device=name, engine=request.param, threads=1) as opened:
            yield opened

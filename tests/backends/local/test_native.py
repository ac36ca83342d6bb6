"""The compiled step against the torch path: the same logits in every situation, the same draws, and what happens without a compiler."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from crucible_framework import events
from crucible_framework.backends.local import LocalBackend, compiled, engine, prepared
from crucible_framework.backends.local import native as compiling
from crucible_framework.backends.local.bases import Base, load_base
from crucible_framework.backends.local.compiled import NativeSteps
from crucible_framework.backends.local.draws import draw, generator
from crucible_framework.backends.local.kv import PAGE, Pages
from crucible_framework.backends.local.lora import Active, init_adapter, layer_names, tensor_shapes
from crucible_framework.backends.local.steps import Chunk, Steps
from crucible_framework.backends.local.torch_steps import TorchSteps
from crucible_framework.config import places
from crucible_framework.errors import BackendError, CapabilityError
from crucible_framework.records import LoraConfig, SamplingParams

from .models_for_tests import VOCAB, make_qwen, save_model

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB - 3, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
MODELS = ("qwen2", "qwen3", "llama", "tiny")
pytestmark = pytest.mark.skipif(compiling.library("step.cpp", places().cache / "native") is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models with biases, norms of heads, odd sizes, tied and own heads."""
    folder = tmp_path_factory.mktemp("models")
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True))
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**(SMALL | {"num_attention_heads": 6}), head_dim=20, tie_word_embeddings=False))
    return {
        "tiny": "tiny",
        "qwen2": str(make_qwen(folder / "qwen2")),
        "llama": str(save_model(folder / "llama", llama, 6)),
        "qwen3": str(save_model(folder / "qwen3", qwen3, 5)),
    }


@pytest.fixture(params=MODELS)
def base(request: pytest.FixtureRequest, folders: dict[str, str], tmp_path: Path) -> Base:
    return load_base(folders[request.param], cache=tmp_path, dtype=torch.float32, device=CPU)


def native(base: Base, **options: Any) -> NativeSteps:
    found = NativeSteps.of(base, threads=2, **options)
    assert found is not None
    return found


def adapters(base: Base) -> list[Active | None]:
    """None, and adapters of different ranks on different layers."""
    found: list[Active | None] = [None]
    for seed, (rank, targets) in enumerate(((3, ("all-linear",)), (20, ("k_proj", "v_proj", "down_proj")), (1, ("up_proj", "lm_head")))):
        shapes = tensor_shapes(base.layers, layer_names(base.layers, LoraConfig(target_modules=targets), base.head), rank)
        source = torch.Generator().manual_seed(seed)
        found.append(Active({name: torch.randn(t.shape, generator=source) * 0.1 for name, t in init_adapter(shapes, 1, CPU).items()}, 1.5))
    return found


def played(steps: Steps, script: Sequence[Sequence[tuple[int, int]]], sequences: Sequence[Sequence[int]], actives: Sequence[Active | None]) -> list[Tensor]:
    """The logits of each step; a script's step says how many tokens of which sequences are computed."""
    pages: Pages = steps.pages(4096)
    tables, done, found = [list[int]() for _ in sequences], [0] * len(sequences), []
    for step in script:
        chunks = []
        for which, many in step:
            while len(tables[which]) * PAGE < done[which] + many:
                page = pages.take()
                assert page is not None
                tables[which].append(page)
            chunks.append(Chunk(sequences[which][done[which] : done[which] + many], done[which], tables[which], actives[which], which != 3))
            done[which] += many
        found.append(steps.logits(chunks, pages).clone())
    return found


SCRIPT = (((0, 37), (1, 5), (3, 9)), ((1, 1), (0, 20), (2, 40)), ((0, 1), (1, 1), (2, 1), (3, 1)), ((3, 30), (2, 1)), ((2, 1), (1, 1), (0, 1)))


def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 250, 90).tolist() for _ in range(4)]


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_are_those_of_torch(base: Base, adapted: bool) -> None:
    actives = adapters(base) if adapted else [None] * 4
    ours, theirs = (played(steps, SCRIPT, sequences(), actives) for steps in (native(base), TorchSteps(base)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_any_number_of_rows(folders: dict[str, str], tmp_path: Path, kind: str) -> None:
    """Products go another way for few rows, for many, and for what is left over of blocks of 8 and 16: each sequence gives what it gives alone."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    base = load_base(folders["llama"], cache=tmp_path, dtype=dtype, device=CPU)
    steps, rng, actives = native(base, int8=kind == "int8"), np.random.default_rng(1), adapters(base)
    given = [rng.integers(3, 250, 3).tolist() for _ in range(35)]
    alone = [played(steps, [[(0, 2)], [(0, 1)]], [tokens], [actives[i % 3]])[1][0] for i, tokens in enumerate(given)]
    near = 1e-5 if kind == "float32" else 0.02
    for count in (2, 3, 4, 5, 8, 9, 13, 15, 16, 17, 24, 25, 33, 35):
        asked = [actives[i % 3] for i in range(count)]
        order = sorted((i for i in range(count) if i != 3), key=lambda i: i % 3)  # neighbours of one adapter are a group; the fourth asks for no logits
        rows = played(steps, [[(i, 2) for i in order], [(i, 1) for i in order]], given[:count], asked)[1]
        for row, i in zip(rows, order, strict=True):
            torch.testing.assert_close(row, alone[i], rtol=near, atol=near)


def test_rows_do_not_depend_on_who_shares_the_step(base: Base) -> None:
    actives, steps, given = adapters(base), native(base), sequences()
    together = played(steps, [[(which, 17) for which in range(3)]], given, actives)[0]
    for which in range(3):
        torch.testing.assert_close(together[which], played(steps, [[(which, 17)]], given, actives)[0][0], rtol=1e-5, atol=1e-5)


def rounded(base: Base) -> Base:
    """The model with bf16 numbers in its matrices."""
    for matrix in matrices(base):
        matrix.copy_(matrix.bfloat16().float())
    return base


def matrices(base: Base) -> list[Tensor]:
    assert base.decoder is not None
    parts = base.decoder.parts
    joints = [joint for layer in parts.layers for joint in (layer.qkv, layer.out, layer.up, layer.down)]
    return [parts.embedding, parts.head.weight, *(joint.frozen.weight for joint in joints)]


def kinds(steps: NativeSteps) -> set[int]:
    model = steps._model
    return {matrix.kind for layer in steps._layers for matrix in (layer.qkv, layer.out, layer.up, layer.down)} | {model.head.kind}


MANY = ((((0, 33), (1, 1), (2, 20), (3, 30))), *[[(which, 1) for which in range(many)] for many in (4, 3, 2, 1)], [(1, 60)])


@pytest.mark.parametrize("adapted", [False, True])
def test_matrices_of_bf16_numbers_are_read_in_half_the_bytes_and_give_the_same_bits(base: Base, monkeypatch: pytest.MonkeyPatch, adapted: bool) -> None:
    """Whether the model is large enough for short copies or not: with many rows, few, and one, and with adapters."""
    base = rounded(base)
    actives = adapters(base) if adapted else [None] * 4
    plain = native(base)
    monkeypatch.setattr(compiled, "SMALL", 1)
    short = native(base)
    assert (kinds(plain), kinds(short)) == ({0}, {3})
    assert (plain._model.embedding_kind, short._model.embedding_kind) == (0, 3)
    for one, other in zip(*(played(steps, MANY, sequences(), actives) for steps in (plain, short)), strict=True):
        assert torch.equal(one, other)
    matrices(base)[2][3, 5] += 2.0**-20
    assert 0 in kinds(native(base))


@pytest.mark.parametrize("form", ["bf16", "grouped"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_short_form_of_a_prepared_file_gives_the_same_bits(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, name: str
) -> None:
    """From 1 row to 35, with adapters, whichever way products go; qwen3 has matrices whose rows end within a group."""
    folder = shutil.copytree(folders[name], tmp_path / "model")
    given = load_file(folder / "model.safetensors")
    few = {key: (tensor * 64).round() / 64 + 2.0**-10 for key, tensor in given.items()}  # 12 bits: no bf16 numbers, and few in each group
    save_file(few if form == "grouped" else {key: tensor.bfloat16().float() for key, tensor in given.items()}, folder / "model.safetensors", {"format": "pt"})
    with_file = load_base(str(folder), cache=tmp_path / "cache", dtype=torch.float32, device=CPU)
    monkeypatch.setattr(prepared, "_MOST_BYTES", 1000)
    without = load_base(str(folder), cache=tmp_path / "cache", dtype=torch.float32, device=CPU)
    into = [matrix.shape[1] % 32 for matrix in matrices(with_file)]
    assert kinds(native(without)) == {0}
    assert kinds(native(with_file)) == ({3} if form == "bf16" else {0} if any(into) else {4})
    many = [[(which, 2) for which in range(35)], *[[(which, 1) for which in range(count)] for count in (35, 12, 9, 8, 5, 4, 3, 2, 1)]]
    given_tokens = [np.random.default_rng(which).integers(3, 250, 20).tolist() for which in range(35)]
    actives = sorted((adapters(with_file) * 9)[:35], key=id)
    for options in ({}, {"int8": True}):
        found = [played(native(base, **options), many, given_tokens, actives) for base in (with_file, without)]
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_step_that_asks_for_no_logits_leaves_keys_and_values(base: Base) -> None:
    steps, tokens, active = native(base), sequences()[0], adapters(base)[1]
    pages, table = steps.pages(256), list[int]()
    for page in (pages.take(), pages.take()):
        assert page is not None
        table.append(page)
    assert steps.logits([Chunk(tokens[:20], 0, table, active, False)], pages).shape[0] == 0
    found = steps.logits([Chunk(tokens[20:23], 20, table, active, True)], pages)[0]
    torch.testing.assert_close(found, played(steps, [[(0, 23)]], [tokens], [active])[0][0], rtol=1e-5, atol=1e-5)


def test_bfloat16_is_nearer_to_float32_than_torch_is(folders: dict[str, str], tmp_path: Path) -> None:
    """The same products of bf16 numbers with fp32 sums between them: the error is that of the weights and the inputs of products."""
    exact = played(TorchSteps(load_base(folders["llama"], cache=tmp_path, dtype=torch.float32, device=CPU)), SCRIPT, sequences(), [None] * 4)
    base = load_base(folders["llama"], cache=tmp_path, dtype=torch.bfloat16, device=CPU)
    ours, theirs = (played(steps, SCRIPT, sequences(), [None] * 4) for steps in (native(base), TorchSteps(base)))
    errors = [max(float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max()) for a, b in zip(found, exact, strict=True)) for found in (ours, theirs)]
    assert errors[0] < errors[1]
    assert errors[0] < 0.05


def test_bfloat16_with_adapters(folders: dict[str, str], tmp_path: Path) -> None:
    base = load_base(folders["qwen2"], cache=tmp_path, dtype=torch.bfloat16, device=CPU)
    ours, theirs = (played(steps, SCRIPT, sequences(), adapters(base)) for steps in (native(base), TorchSteps(base)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), rtol=0.03, atol=0.15)


def test_int8_matrices_are_near(base: Base) -> None:
    actives, given = adapters(base), sequences()
    exact, rounded = (played(steps, SCRIPT, given, actives) for steps in (native(base), native(base, int8=True)))
    for one, other in zip(rounded, exact, strict=True):
        difference = (one.log_softmax(-1) - other.log_softmax(-1)).abs()
        assert 0 < float(difference.mean()) < 0.1


def test_int8_products_are_those_of_the_rounded_weights(folders: dict[str, str], tmp_path: Path) -> None:
    """The same model with weights that int8 can say: what is left is the rounding of activations."""
    for name in ("tiny", "llama"):
        base = load_base(folders[name], cache=tmp_path, dtype=torch.float32, device=CPU)
        assert base.decoder is not None
        parts = base.decoder.parts
        for frozen in [parts.head, *(joint.frozen for layer in parts.layers for joint in (layer.qkv, layer.out, layer.up, layer.down))]:
            steps = frozen.weight.abs().amax(dim=1, keepdim=True) / 127
            frozen.weight.copy_((frozen.weight / steps).round() * steps)
        actives = adapters(base)
        ours, theirs = (played(way, SCRIPT, sequences(), actives) for way in (native(base, int8=True), native(base)))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), rtol=0.01, atol=0.03)


def test_scores_are_those_of_training(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeSteps, "chunk", 20)
    tokens = sequences()
    pairs = [(tokens[0][:30], tokens[0][30:75]), (tokens[1][:1], tokens[1][1:3]), (tokens[2][:70], tokens[2][70:71])]
    for active in adapters(base)[:2]:
        ours, theirs = native(base).scores(active, pairs), engine.completion_logprobs(base, active, pairs)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_an_int8_backend_samples_and_scores_one_policy(tmp_path: Path) -> None:
    with LocalBackend(dtype="int8", threads=1, cache=tmp_path) as backend:
        sampler = backend.sampler("tiny")
        done = sampler.sample("hello", SamplingParams(max_tokens=9, seed=1)).result()[0]
        assert sampler.compute_logprobs("hello", done.tokens).result() == pytest.approx(done.logprobs, abs=1e-4)
        with pytest.raises(CapabilityError, match="samples only"):
            backend.train("tiny", LoraConfig())
    with LocalBackend(dtype="int8", threads=1, cache=tmp_path, engine="torch") as backend, pytest.raises(BackendError, match="cannot be sampled with int8"):
        backend.sampler("tiny").sample("hello", SamplingParams()).result()


def test_draws_are_those_of_torch(base: Base) -> None:
    vocabulary = base.vocab_size
    logits = 3 * torch.randn((40, vocabulary), generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=(0.0, 0.5, 1.0, 2.0)[i % 4], top_k=(0, 5)[i % 8 > 5], top_p=(1.0, 0.8)[i % 16 > 12]) for i in range(40)]
    ours, theirs = (steps(logits, params, [generator(7, i, (1,)) for i in range(40)]) for steps in (native(base).draw, draw))
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


class Fixed:
    """A generator that gives one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def test_draws_at_the_edges(base: Base) -> None:
    logits = torch.full((3, base.vocab_size), -1000.0)
    logits[:, [5, 9]] = 1.0
    drawn = native(base).draw(logits, [SamplingParams()] * 3, [Fixed(value) for value in (0.0, 0.4999, 1 - 2**-53)])  # type: ignore[misc]
    assert drawn[0] == [5, 5, 9]
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    found = native(base).draw(logits, [SamplingParams()] * 3, [Fixed(0.5)] * 3)[1]  # type: ignore[list-item]
    assert np.isfinite(found).tolist() == [True, False, False]


# ------------------------------------------------------------------------------------------------------ without a compiler
def test_without_a_compiler_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiling, "_LOADED", {})
    with events.collect() as seen, LocalBackend(threads=1, cache=tmp_path) as backend:
        assert backend.sampler("tiny").sample("hello", SamplingParams(max_tokens=3)).result()
    reasons = [str(event["reason"]) for event in seen if event["name"] == "native.unavailable" and event["source"] == "step.cpp"]
    assert reasons == ["no C++ compiler; looked for no-such-compiler"]


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(compiling, "FOLDER", tmp_path)
    monkeypatch.setattr(compiling, "_LOADED", {})
    with events.collect() as seen:
        for _ in range(2):
            library = compiling.library("one.cpp", tmp_path / "native")
            assert library is not None
            assert library.one() == 1
            compiling._LOADED.clear()
    assert [(event["name"], event["source"]) for event in seen] == [("native.compiled", "one.cpp")]


def test_what_is_not_covered(tmp_path: Path) -> None:
    base = load_base("tiny", cache=tmp_path, dtype=torch.float32, device=CPU, engine="torch")
    assert NativeSteps.of(base, threads=1) is None
    plain = load_base("tiny", cache=tmp_path, dtype=torch.float32, device=CPU, engine="plain")
    assert NativeSteps.of(plain, threads=1) is None


# ------------------------------------------------------------------------------------------------------------------ pages
def test_pages_are_shared_found_again_and_given_back() -> None:
    pages = Pages(2, 6, dtype=torch.float32, device=CPU, limit=3)
    first, second = pages.take(), pages.take()
    assert first is not None
    assert second is not None
    pages.tensor[:, first] = 1.0
    pages.remember(b"a", first)
    pages.share([first])
    assert pages.shared(first)
    assert not pages.shared(second)
    pages.drop([first, second])
    assert (pages.used, pages.left) == (1, 2)
    pages.drop([first])
    assert (pages.used, pages.left) == (0, 3)
    assert pages.known([b"a", b"b"]) == 1
    assert pages.find([b"a", b"b"]) == [first]
    pages.drop([first])
    taken = [pages.take() for _ in range(3)]
    assert sorted(page for page in taken if page is not None) == [0, 1, 2]  # what was kept goes last
    assert taken[-1] == first
    assert pages.known([b"a"]) == 0
    assert pages.take() is None
    beyond = pages.take(beyond=True)
    assert beyond is not None
    pages.copy(first, beyond)
    assert float(pages.tensor[:, beyond].sum()) == 12.0

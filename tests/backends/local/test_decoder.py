"""Our own decoder against transformers' modules: the same logits, log-probs, losses and gradients in every situation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from crucible_framework.backends.local import engine, kernels, layout
from crucible_framework.backends.local.bases import Base, load_base
from crucible_framework.backends.local.linear import Linear
from crucible_framework.backends.local.lora import Active, init_adapter, layer_names, tensor_shapes
from crucible_framework.backends.local.walks import STEPS, Drop, Walks
from crucible_framework.errors import ConfigError
from crucible_framework.records import Batch, Datum, LoraConfig

from .models_for_tests import CE, CE_FROM_LOGITS, VOCAB, batch, make_qwen, save_model

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ALL = ("all-linear",)


def _qwen3(folder: Path) -> Path:
    """Its heads have a size that attending.py covers."""
    return save_model(folder, Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=False)), 5)


def _llama(folder: Path) -> Path:
    return save_model(folder, LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)), 6)


MAKERS = {"qwen2": make_qwen, "qwen3": _qwen3, "llama": _llama}


@pytest.fixture(scope="module", params=[*MAKERS, "tiny"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    """The same model with our decoder and with transformers' modules."""
    folder = tmp_path_factory.mktemp("models")
    name = request.param if request.param == "tiny" else str(MAKERS[request.param](folder / request.param))
    fast = load_base(name, cache=folder, dtype=torch.float32, device=CPU, engine="fast")
    plain = load_base(name, cache=folder, dtype=torch.float32, device=CPU, engine="plain")
    assert fast.decoder is not None
    assert plain.decoder is None
    return fast, plain


def adapter(base: Base, targets: tuple[str, ...] = ALL, rank: int = 3) -> dict[str, Tensor]:
    """An adapter whose every tensor is random."""
    shapes = tensor_shapes(base.layers, layer_names(base.layers, LoraConfig(target_modules=targets), base.head), rank)
    made = init_adapter(shapes, 1, CPU)
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in made.items()}


def active(base: Base, targets: tuple[str, ...] = ALL, dropout: float = 0.0) -> Active:
    return Active(adapter(base, targets), 1.5, dropout, torch.Generator().manual_seed(9))


def evaluated(base: Base, given: Batch, targets: tuple[str, ...] = ALL, dropout: float = 0.0, **kwargs: Any) -> tuple[Any, Mapping[str, Tensor]]:
    return engine.evaluate(base, given, kwargs.get("loss", CE), active(base, targets, dropout), train=True)


def check(fast: tuple[Any, Mapping[str, Tensor]], plain: tuple[Any, Mapping[str, Tensor]]) -> None:
    assert fast[0].loss == pytest.approx(plain[0].loss, rel=1e-5)
    for ours, theirs in zip(fast[0].logprobs, plain[0].logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert fast[1].keys() == plain[1].keys()
    for name, theirs in plain[1].items():
        torch.testing.assert_close(fast[1][name], theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-7)


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("up_proj",), ("layers.1.self_attn.o_proj",), ("down_proj", "lm_head")])
@pytest.mark.parametrize("lengths", [(20,), (7, 12, 9, 12, 30)])
def test_loss_and_gradients(pair: tuple[Base, Base], targets: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    fast, plain = pair
    check(evaluated(fast, batch(*lengths), targets), evaluated(plain, batch(*lengths), targets))


def test_losses_that_need_logits_or_several_targets(pair: tuple[Base, Base]) -> None:
    fast, plain = pair
    check(evaluated(fast, batch(9, 14), loss=CE_FROM_LOGITS), evaluated(plain, batch(9, 14), loss=CE_FROM_LOGITS))
    several = batch(9, 14, candidates=3)
    check(evaluated(fast, several), evaluated(plain, several))


def alike(ends: int, start: int = 30) -> Batch:
    """Data that begin alike, and one that does not."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 200, start)
    data = []
    for number in range(ends + 1):
        tokens = np.concatenate([first if number < ends else first[::-1], rng.integers(0, 200, 4 + number)]).astype(np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[-3:] = 1.0
        data.append(Datum(id=f"a{number}", tokens=tokens, targets=np.roll(tokens, -1).astype(np.int64), weights=weights))
    return Batch(data=tuple(data))


def test_common_starts(pair: tuple[Base, Base]) -> None:
    fast, plain = pair
    given = alike(5)
    (one,) = layout.lay_out([datum.tokens for datum in given.data], CPU, **fast.layout)
    assert one.spans is not None
    assert [(span.length < 40, span.skip) for span in one.spans] == [(True, 0), (False, 30), (True, 0)]
    assert one.tokens < 0.6 * given.tokens
    check(evaluated(fast, given), evaluated(plain, given))


def test_data_that_are_the_same(pair: tuple[Base, Base]) -> None:
    """All alike to the end, and one that ends where the others go on."""
    fast, plain = pair
    one, *others = alike(2).data
    short = replace(one, id="short", tokens=one.tokens[:31], targets=one.targets[:31], weights=one.weights[3:])
    for data in ((one, replace(one, id="again")), (one, replace(one, id="again"), *others), (one, short)):
        check(evaluated(fast, Batch(data=data)), evaluated(plain, Batch(data=data)))


@pytest.mark.parametrize("targets", [ALL, ("k_proj", "lm_head")])
def test_dropout_draws_the_same_masks(pair: tuple[Base, Base], targets: tuple[str, ...]) -> None:
    """With one sequence both lay it out alike; the masks are then the same bits, also in the second pass of a large batch."""
    fast, plain = pair
    check(evaluated(fast, batch(25), targets, 0.3), evaluated(plain, batch(25), targets, 0.3))
    without = evaluated(fast, batch(25), targets)
    assert evaluated(fast, batch(25), targets, 0.3)[0].loss != without[0].loss


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_passes_and_recomputed_layers_change_nothing(pair: tuple[Base, Base], dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = pair
    given = alike(3)
    expected = evaluated(fast, given, dropout=dropout)
    assert fast.decoder is not None
    monkeypatch.setattr(fast.decoder, "recompute_above", 0)
    check(evaluated(fast, given, dropout=dropout), expected)
    check(evaluated(replace(fast, limit=16, keeps=16), given), evaluated(fast, given))


def test_masks_places_and_caches(pair: tuple[Base, Base]) -> None:
    """Prefill, single tokens after pasts of several lengths, several tokens after a past, and a float mask of its own."""
    ids = torch.randint(0, 200, (3, 14), generator=torch.Generator().manual_seed(0))
    found = []
    for base in pair:
        outputs = []
        with torch.no_grad(), base.slot.using(active(base)):
            outputs.append(base.hidden(ids))
            cache = DynamicCache()
            outputs.append(base.hidden(ids[:, :8], cache))
            outputs.append(base.hidden(ids[:, 8:], cache))
            seen = torch.ones(14, 14).tril()
            seen[7:, 2:5] = 0
            outputs.append(base.hidden(ids[:1], mask=torch.where(seen > 0, 0.0, torch.finfo(torch.float32).min)[None, None], places=torch.arange(14)[None] + 3))
            cache, padded = DynamicCache(), torch.ones(3, 14, dtype=torch.bool)
            padded[1, 9:13] = False
            base.hidden(ids[:, :13], cache)
            outputs.append(base.hidden(ids[:, 13:], cache, mask=padded, places=torch.tensor([[13], [9], [13]])))
            outputs.append(base.logits(outputs[0]))
        found.append(outputs)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_the_decoder_does_not_do_is_refused(pair: tuple[Base, Base]) -> None:
    ids = torch.arange(6)[None]
    with torch.no_grad(), pytest.raises(NotImplementedError, match="padding before single tokens"):
        pair[0].hidden(ids, mask=torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="without a gradient"):
        pair[0].hidden(ids, DynamicCache())


def test_completion_logprobs(pair: tuple[Base, Base]) -> None:
    fast, plain = pair
    pairs = [([1, 2, 3, 4, 5, 6], [7, 8]), ([1, 2, 3, 4, 5, 9], [3]), ([100, 3], [4, 5, 6, 7, 8, 9])]
    ours, theirs = (engine.completion_logprobs(base, active(base), pairs) for base in pair)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert fast.layout != plain.layout


# ------------------------------------------------------------------------------------------------------------- structure
def test_the_weights_are_not_held_twice(pair: tuple[Base, Base]) -> None:
    fast, _ = pair
    attention = fast.model.get_submodule("model.layers.0.self_attn")
    parts = [attention.get_submodule(f"{name}_proj").weight for name in "qkv"]
    assert len({cast("Tensor", part).untyped_storage().data_ptr() for part in parts}) == 1


def test_no_gradient_below_the_first_adapted_layer(pair: tuple[Base, Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is multiplied backwards in the adapted layer and above only."""
    fast, _ = pair
    asked, back, run = list[str](), kernels.Frozen.back, Linear._run

    def counted(self: kernels.Frozen, g: Tensor) -> Tensor:
        asked.append("back")
        return back(self, g)

    def compiled(self: Linear, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        asked.extend([name] * sum(1 for call in arguments if getattr(getattr(call, "_obj", None), "dh", None) or (name == "gated_back")))
        run(self, name, dtype, *arguments)

    monkeypatch.setattr(kernels.Frozen, "back", counted)
    monkeypatch.setattr(Linear, "_run", compiled)
    last = len(cast("Any", fast.decoder)._layers) - 1
    evaluated(fast, batch(9), (f"layers.{last}.mlp.down_proj",))
    assert len(asked) == 1  # the head's
    asked.clear()
    evaluated(fast, batch(9), (f"layers.{last}.self_attn.q_proj",))
    assert len(asked) == 4


def test_other_families_stay_with_transformers(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    mistral = MistralForCausalLM(MistralConfig(**SMALL, head_dim=12))
    for name, model in (("mistral", mistral), ("dynamic", LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=dynamic)))):
        folder = save_model(tmp_path / name, model, 1)
        assert load_base(str(folder), cache=tmp_path, dtype=torch.float32, device=CPU, engine="fast").decoder is None


def test_bfloat16_stays_near(tmp_path: Path, qwen: Path) -> None:
    """bf16 rounds at other places than transformers' modules do: both are within 3 % of the fp32 gradient."""
    exact = load_base(str(qwen), cache=tmp_path, dtype=torch.float32, device=CPU, engine="plain")
    expected = evaluated(exact, batch(20, 30))
    names: tuple[Literal["fast"], Literal["plain"]] = ("fast", "plain")
    for name in names:
        base = load_base(str(qwen), cache=tmp_path, dtype=torch.bfloat16, device=CPU, engine=name)
        output, gradients = evaluated(base, batch(20, 30))
        assert output.loss == pytest.approx(expected[0].loss, rel=0.01)
        error = sum(float((gradients[key] - value).square().sum()) for key, value in expected[1].items())
        assert error < 0.05**2 * sum(float(value.square().sum()) for value in expected[1].values())


# ---------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("maker", [_llama, _qwen3])
def test_what_a_pass_keeps_is_what_was_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, maker: Callable[[Path], Path]) -> None:
    base = load_base(str(maker(tmp_path / "m")), cache=tmp_path, dtype=torch.float32, device=CPU)
    assert base.decoder is not None
    monkeypatch.setattr(base.decoder, "recompute_above", 0 if again else 10_000)
    kept = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    frozen = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    used = active(base)
    used = replace(used, adapter={name: tensor.requires_grad_() for name, tensor in used.adapter.items()})
    ids = torch.randint(0, 200, (1, 100))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), base.slot.using(used):
        hidden = base.hidden(ids)
    total = sum(size for pointer, size in kept.items() if pointer not in frozen)
    foreseen = base.decoder.kept_bytes(100, 100, again=again)
    assert hidden.requires_grad
    assert (0.05 if again else 0.4) * foreseen < total <= foreseen


def test_a_budget_sets_the_passes(tmp_path: Path) -> None:
    folder = str(_llama(tmp_path / "m"))
    free = load_base(folder, cache=tmp_path, dtype=torch.float32, device=CPU)
    assert free.decoder is not None
    for tokens in (512, 1024):
        budget = free.decoder.kept_bytes(tokens, 512, again=False)
        found = load_base(folder, cache=tmp_path, dtype=torch.float32, device=CPU, activations_bytes=budget)
        assert found.decoder is not None
        assert found.layout["limit"] == found.decoder.recompute_above == tokens
        check(evaluated(found, batch(90, 60)), evaluated(free, batch(90, 60)))
    least = free.decoder.kept_bytes(256, 256, again=True)
    small = load_base(folder, cache=tmp_path, dtype=torch.float32, device=CPU, activations_bytes=least)
    assert small.decoder is not None
    assert small.decoder.recompute_above == 0
    with pytest.raises(ConfigError, match=f"keeps {least} bytes"):
        load_base(folder, cache=tmp_path, dtype=torch.float32, device=CPU, activations_bytes=least - 1)
    with pytest.raises(ConfigError, match="our own decoder"):
        load_base(folder, cache=tmp_path, dtype=torch.float32, device=CPU, engine="plain", activations_bytes=least)


# --------------------------------------------------------------------------------------------------------------- kernels
@pytest.mark.parametrize(
    ("norm", "gated", "residual", "rows"),
    [(True, False, False, 5), (False, True, True, 5), (False, False, True, 0), (True, False, False, 0), (True, False, True, 3)],
)
def test_a_step_is_what_autograd_says(norm: bool, gated: bool, residual: bool, rows: int) -> None:
    """`rows` of five go through dropout; the second part has a scale for every token."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    width, out = 6, 8
    weight = random(out, width).detach()
    h, extra = random(5, 2 * width if gated else width), random(5, out) if residual else None
    frozen, parts = kernels.Frozen(weight, random(out).detach()), [kernels.Part(0, 5, 0.7), kernels.Part(5, 8, random(5, 3).detach())]
    drops = [(slice(5 - rows, 5), Drop(1, 2, STEPS // 3))] if rows else []
    step = kernels.Matmul(frozen, Walks(None), parts, drops, random(width).detach() if norm else None, 1e-6, gated)
    pairs = [random(2, width), random(5, 2), random(3, width), random(3, 3)]
    apply = cast("Any", kernels.LoraMatmul.apply)
    assert torch.autograd.gradcheck(lambda *tensors: apply(tensors[0], tensors[1], step, *tensors[2:]), cast("Any", (h, extra, *pairs)), atol=1e-4)


def test_packed_matrices_give_the_same_products() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator), torch.randn(20, 32, generator=generator)
    packed, plain = kernels.Frozen(weight, bias, pack=kernels.can_pack(weight)), kernels.Frozen(weight, bias)
    for rows in (1, 20):
        torch.testing.assert_close(packed.times(x[:rows]), plain.times(x[:rows]))
    g = torch.randn(20, 48, generator=generator)
    torch.testing.assert_close(packed.back(g), plain.back(g))
    assert not kernels.can_pack(weight.double())


def test_scores_of_many_rows_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head = kernels.Frozen(torch.randn(50, 8, generator=generator))
    hidden, targets = torch.randn(23, 8, generator=generator, requires_grad=True), torch.randint(0, 50, (23,), generator=generator)
    sizes, times = list[int](), kernels.Frozen.times

    def counted(self: kernels.Frozen, x: Tensor) -> Tensor:
        sizes.append(x.shape[0])
        return times(self, x)

    monkeypatch.setattr(kernels.Frozen, "times", counted)
    monkeypatch.setattr(kernels, "_CHUNK", 10)
    found = kernels.target_scores(hidden, head, targets, Walks(None))
    assert sizes == [10, 10, 3]
    expected = (hidden @ head.weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    up = torch.randn(23, generator=generator)
    torch.testing.assert_close(*(torch.autograd.grad(scores, hidden, up)[0] for scores in (found, expected)))

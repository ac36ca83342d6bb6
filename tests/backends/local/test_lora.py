"""Which layers a configuration means, and how adapters start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crucible_framework.backends.local.adapters import _targets
from crucible_framework.backends.local.lora import Active, init_adapter, install, layer_names, tensor_name, tensor_shapes
from crucible_framework.errors import UnknownNameError
from crucible_framework.records import LoraConfig

LAYERS = {
    **{f"model.layers.{i}.self_attn.{p}": (8, 4) for i in (0, 1) for p in ("q_proj", "v_proj")},
    **{f"model.layers.{i}.mlp.up_proj": (6, 4) for i in (0, 1)},
    "lm_head": (9, 4),
}


def names(*targets: str) -> tuple[str, ...]:
    return layer_names(LAYERS, LoraConfig(target_modules=targets), "lm_head")


def test_targets() -> None:
    assert names("q_proj") == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert names("mlp.up_proj") == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert names("layers.1.mlp.up_proj", "lm_head") == ("model.layers.1.mlp.up_proj", "lm_head")
    assert set(names("all-linear")) == LAYERS.keys() - {"lm_head"}
    assert set(names("all-linear", "lm_head")) == LAYERS.keys()


@pytest.mark.parametrize(("target", "near"), [("q_prj", "q_proj"), ("proj", "_proj"), ("all_linear", "all-linear"), ("embed_tokens", "Known: all-linear")])
def test_unknown_target_names_the_nearest(target: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near):
        names("q_proj", target)


@given(st.sets(st.sampled_from(sorted(LAYERS)), min_size=1))
def test_what_is_written_for_peft_means_the_same_layers(chosen: set[str]) -> None:
    wanted = tuple(name for name in LAYERS if name in chosen)
    assert names(*(str(target) for target in _targets(LAYERS, wanted))) == wanted


def test_init_is_kaiming_uniform_and_zero_and_private() -> None:
    shapes = tensor_shapes(LAYERS, names("q_proj"), 2)
    before = torch.get_rng_state()
    first, again, other = (init_adapter(shapes, seed, torch.device("cpu")) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    a, b = tensor_name("model.layers.0.self_attn.q_proj", "A"), tensor_name("model.layers.0.self_attn.q_proj", "B")
    assert first[a].shape == (2, 4)
    assert first[b].shape == (8, 2)
    assert torch.equal(first[a], again[a])
    assert not torch.equal(first[a], other[a])
    assert not first[b].any()
    wide = init_adapter({tensor_name("x", "A"): (64, 100)}, 0, torch.device("cpu"))[tensor_name("x", "A")]
    assert 0.09 < float(wide.abs().max()) <= 0.1  # the bound of kaiming_uniform with a = √5 is 1/√in
    assert float(wide.std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_layers_add_the_active_adapter_and_dropout_is_unbiased() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    model = nn.Sequential(first, second)
    x = torch.randn(5, 4)
    plain = model(x).detach()
    slot, layers = install(model)
    assert layers == {"0": (3, 4), "1": (2, 3)}
    assert torch.equal(model(x), plain)
    adapter = {tensor_name("0", "A"): torch.randn(2, 4), tensor_name("0", "B"): torch.randn(3, 2)}
    with slot.using(Active(adapter, scale=0.5)):
        found = model(x)
    merged = first.weight + 0.5 * adapter[tensor_name("0", "B")] @ adapter[tensor_name("0", "A")]
    expected = second(x @ merged.T + first.bias)
    torch.testing.assert_close(found, expected)
    assert torch.equal(model(x), plain)
    generator = torch.Generator().manual_seed(1)
    with slot.using(Active(adapter, scale=0.5, dropout=0.5, generator=generator)):
        mean = torch.stack([model(x) for _ in range(4000)]).mean(0)
    assert not torch.equal(mean, found)
    torch.testing.assert_close(mean, found, atol=0.15, rtol=0.05)


def test_an_error_inside_leaves_the_slot_as_it_was() -> None:
    slot, _ = install(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(KeyError), slot.using(Active({}, 1.0)):
        raise KeyError
    assert slot.active is None

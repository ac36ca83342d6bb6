"""AdamW and clipping give torch's numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_framework.backends.local.optim import adamw, first_not_finite, fresh, global_norm
from crucible_framework.records import AdamConfig

configs = st.builds(
    AdamConfig,
    lr=st.floats(0, 1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-10, 1e-2),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    max_grad_norm=st.one_of(st.none(), st.floats(1e-3, 100)),
)


@given(configs, st.integers(0, 1000), st.floats(1e-6, 1e4))
@settings(max_examples=60)
def test_steps_are_those_of_torch(config: AdamConfig, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)}
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in ours.values()]
    oracle = torch.optim.AdamW(
        theirs, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay, foreach=False, fused=False
    )
    state = fresh(ours)
    for _ in range(3):
        gradients = {name: torch.randn(tensor.shape, generator=generator) * size for name, tensor in ours.items()}
        for parameter, gradient in zip(theirs, gradients.values(), strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, config.max_grad_norm if config.max_grad_norm is not None else float("inf"))
        oracle.step()
        kept = {name: tensor.clone() for name, tensor in ours.items()}
        found = global_norm(gradients)
        assert torch.equal(found, norm)
        new, state = adamw(ours, gradients, state, config, found)
        assert all(torch.equal(ours[name], kept[name]) for name in ours)  # nothing is written in place
        ours = new
        for mine, parameter in zip(ours.values(), theirs, strict=True):
            assert torch.equal(mine, parameter.detach())
    assert state.step == 3


def test_first_moments_share_no_memory() -> None:
    state = fresh({"a": torch.ones(2)})
    assert state.exp_avg["a"].data_ptr() != state.exp_avg_sq["a"].data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_first_not_finite_names_the_tensor(bad: float) -> None:
    good = torch.ones(4)
    assert first_not_finite({"a": good, "b": torch.tensor([1.0, bad]), "c": torch.tensor([bad])}) == "b"
    assert first_not_finite({"a": good}) is None

"""The pretended device catches what a GPU would, lets through what it lets through, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from .pretended import DEVICE, Pretended, pretended_device


@pytest.fixture
def device() -> Iterator[str]:
    with pretended_device() as name:
        yield name


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3),
        lambda x: x.mul_(torch.ones(3)),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: torch.stack([x.sum(), torch.zeros(())]),
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x),
        lambda x: x.gather(0, torch.tensor([0])),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: torch.ones(3)[x.long()],
        lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1)),
        lambda x: torch.nn.functional.embedding(torch.tensor([1]), x[:, None]),
        lambda x: torch.ones(2, 3) @ x,
        lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
        lambda x: torch.rand(3, generator=torch.Generator(x.device)),
        lambda x: torch.nn.functional.scaled_dot_product_attention(
            x[None, :, None].half(), x[None, :, None].half(), x[None, :, None].half(), torch.zeros((3, 3), device=x.device)
        ),
        lambda x: torch.ops.mkldnn._reorder_linear_weight(x[None], 1),
    ],
)
def test_what_mixes_devices_is_caught(device: str, mixed: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match=r"same device|indices of the device|generator|bias|no kernel"):
        mixed(torch.ones(3, device=device))


def test_numpy_wants_the_processor_first(device: str) -> None:
    x = torch.tensor([1.0, 2.0], device=device)
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        x.numpy()
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        np.asarray(x)
    assert x.cpu().numpy().tolist() == x.tolist() == [1.0, 2.0]
    assert type(x.to("cpu")) is Tensor


def test_what_cuda_allows_is_allowed(device: str) -> None:
    x = torch.arange(3.0, device=device)
    x[1:].mul_(2.0)
    x[[0]] = torch.tensor(7.0)
    assert (x + torch.ones(())).tolist() == [8.0, 3.0, 5.0]
    assert x[torch.tensor([2, 0])].tolist() == [4.0, 7.0]
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad((leaf.square() * 0.5).sum(), leaf)
    assert isinstance(gradient, Pretended)
    assert gradient.tolist() == [7.0, 2.0, 4.0]
    assert torch.zeros(2).copy_(x[:2]).tolist() == [7.0, 2.0]


def test_it_is_gone_afterwards() -> None:
    with pretended_device():
        pass
    assert type(torch.ones(2, device=DEVICE)) is Tensor
    assert torch.Generator().device.type == "cpu"

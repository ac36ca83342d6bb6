"""The compiled steps in bf16 against the same formulas in float64, and what they do not cover."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from crucible_framework.backends.local import kernels
from crucible_framework.backends.local.buffers import Buffers
from crucible_framework.backends.local.linear import Linear, Step
from crucible_framework.backends.local.walks import STEPS, Drop, Walks

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Linear:
    found = Linear.of(tmp_path_factory.mktemp("native"), Buffers())
    if found is None:
        assert not torch.cpu.get_capabilities().get("avx512_bf16")
        pytest.skip("no bf16 products")
    return found


@dataclass(frozen=True)
class Case:
    """A step; `parts` are (low, high, rank, first row, row after the last) of adapters, low and high in blocks of 32 outputs."""

    rows: int
    inputs: int
    outputs: int
    before: str
    residual: bool
    bias: bool
    parts: tuple[tuple[int, int, int, int, int], ...]
    drops: tuple[tuple[int, int], ...]
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, blocks = draw(st.integers(1, 300)), draw(st.integers(1, 4))
    cuts = sorted(draw(st.sets(st.integers(0, blocks), max_size=blocks + 1)))
    parts = list[tuple[int, int, int, int, int]]()
    for low, high in pairwise(cuts):
        turns = sorted(draw(st.sets(st.integers(0, rows), max_size=5)))
        parts += [(low, high, draw(st.integers(1, 40)), begin, end) for begin, end in pairwise(turns)]
    ends = sorted(draw(st.sets(st.integers(0, rows), max_size=4)))
    drops = tuple((low, high) for low, high in zip(ends[::2], ends[1::2], strict=False))
    before = draw(st.sampled_from(["norm", "gate", "nothing"]))
    inputs, seed = 32 * draw(st.integers(1, 5)), draw(st.integers(0, 99))
    return Case(rows, inputs, 32 * blocks, before, draw(st.booleans()), draw(st.booleans()), tuple(parts), drops, seed)


@dataclass(eq=False)
class Given:
    """A case's tensors."""

    step: kernels.Matmul
    h: Tensor
    residual: Tensor | None
    pairs: list[Tensor]
    g: Tensor


def made(case: Case, linear: Linear) -> Given:
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weight, bias = random(case.outputs, case.inputs, scale=case.inputs**-0.5).to(BF16), random(case.outputs).to(BF16)
    frozen = kernels.Frozen(weight, bias if case.bias else None, pack=True, linear=linear)
    parts = [kernels.Part(32 * low, 32 * high, 0.7 + place, slice(begin, end)) for place, (low, high, _, begin, end) in enumerate(case.parts)]
    drops = [(slice(low, high), Drop(case.seed, low, STEPS // 3)) for low, high in case.drops]
    norm = random(case.inputs).to(BF16) if case.before == "norm" else None
    step = kernels.Matmul(frozen, Walks(None), parts, drops, norm, 1e-5, case.before == "gate")
    pairs = list[Tensor]()
    for low, high, rank, _, _ in case.parts:
        pairs += random(rank, case.inputs, scale=case.inputs**-0.5), random(32 * (high - low), rank, scale=rank**-0.5)
    width = 2 * case.inputs if case.before == "gate" else case.inputs
    residual = random(case.rows, case.outputs).to(BF16) if case.residual else None
    return Given(step, random(case.rows, width).to(BF16), residual, pairs, random(case.rows, case.outputs).to(BF16))


def expected(asked: Given) -> tuple[Tensor, list[Tensor]]:
    """The result and the gradients of h and the pairs, in float64."""
    step, h = asked.step, asked.h.double().requires_grad_()
    pairs = [pair.to(BF16).double().requires_grad_() for pair in asked.pairs]
    x = h
    if step.norm is not None:
        x = h * (h.square().mean(-1, keepdim=True) + step.eps).rsqrt() * step.norm.double()
    elif step.gated:
        a, b = h.chunk(2, -1)
        x = functional.silu(a) * b
    y = functional.linear(x, step.frozen.weight.double(), None if step.frozen.bias is None else step.frozen.bias.double())
    mask = torch.ones_like(x)
    for rows, drop in step.drops:
        mask[rows] = drop.kept((rows.stop - rows.start, x.shape[1]), x.device).double()
    for part, a, b in zip(step.parts, pairs[::2], pairs[1::2], strict=True):
        mine = torch.zeros(len(x), 1, dtype=torch.float64)
        mine[part.rows] = part.factor
        added = ((x * mask * mine) @ a.t()) @ b.t()
        y = y + functional.pad(added, (part.low, y.shape[1] - part.high))
    if asked.residual is not None:
        y = y + asked.residual.double()
    return y.detach(), list(torch.autograd.grad(y, [h, *pairs], asked.g.double()))


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within what a few roundings to bf16 give."""
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs).abs().max()) <= 0.02 * max(1.0, float(theirs.abs().max()))


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_step_and_its_gradients(linear: Linear, case: Case) -> None:
    asked = made(case, linear)
    step = asked.step
    assert step.compiled(asked.h) is linear
    whole = Step(step, asked.pairs)
    y = linear.forward(whole, asked.h, asked.residual)
    right, gradients = expected(asked)
    close(y, right)
    told = list[Tensor]()
    found = list[Tensor]()
    for note in (None, lambda left, right, factor: told.append(left.float().t() @ right.float() * factor)):
        step.note = cast("Any", note)
        dh, found = linear.backward(whole, asked.h, asked.g, wanted=True)
        for ours, theirs in zip([cast("Tensor", dh), *found], gradients, strict=True):
            close(ours, theirs)
    firsts = [torch.cat(gradients[1::2])] if asked.pairs else []
    for ours, theirs in zip(told, gradients[2::2] + firsts, strict=True):
        close(ours, theirs)
    step.note = None
    below, same = linear.backward(whole, asked.h, asked.g, wanted=False)
    assert below is None
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_threads_change_no_result(linear: Linear) -> None:
    asked = made(Case(300, 96, 128, "norm", True, True, ((0, 1, 16, 0, 300), (1, 4, 8, 0, 300)), ((0, 200),), 1), linear)
    step, threads = Step(asked.step, asked.pairs), torch.get_num_threads()
    results = list[Tensor]()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = linear.forward(step, asked.h, asked.residual)
            dh, found = linear.backward(step, asked.h, asked.g, wanted=True)
            assert dh is not None
            results += [y, dh, *found]
    finally:
        torch.set_num_threads(threads)
    half = len(results) // 2
    for one, two in zip(results[:2], results[half:][:2], strict=True):
        assert torch.equal(one, two)
    for one, two in zip(results[2:half], results[half + 2 :], strict=True):  # sums over rows are added up by thread
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_the_residual_s_gradient_joins_that_of_the_norm(linear: Linear) -> None:
    asked = made(Case(70, 64, 64, "norm", False, False, ((0, 2, 4, 0, 70),), (), 2), linear)
    step, more = Step(asked.step, asked.pairs), torch.randn(70, 64).to(BF16)
    linear.forward(step, asked.h)
    alone, _ = linear.backward(step, asked.h, asked.g, wanted=True)
    both, _ = linear.backward(step, asked.h, asked.g, wanted=True, extra=more)
    assert alone is not None
    assert both is not None
    close(both, alone.double() + more.double())


def test_what_is_not_covered_goes_another_way(linear: Linear) -> None:
    weight = torch.randn(64, 32).to(BF16)
    frozen = kernels.Frozen(weight, pack=True, linear=linear)
    step = kernels.Matmul(frozen, Walks(None), [kernels.Part(0, 16, 1.0), kernels.Part(16, 64, 1.0)])
    assert step.compiled(torch.randn(3, 32).to(BF16)) is None
    even = kernels.Matmul(frozen, Walks(None))
    assert even.compiled(torch.randn(3, 32)) is None
    assert even.compiled(torch.randn(0, 32).to(BF16)) is None
    assert even.compiled(torch.randn(3, 32).to(BF16)) is not None
    for other in (weight.float(), weight[:48], weight[:, :24]):
        assert kernels.Frozen(other, pack=True, linear=linear).panels is None
    assert kernels.Frozen(weight, pack=False, linear=linear).panels is None
    assert Linear.of(None, Buffers()) is None
    h, pairs = torch.randn(9, 32).to(BF16), [torch.randn(4, 32), torch.randn(16, 4), torch.randn(4, 32), torch.randn(48, 4)]
    apply = cast("Any", kernels.LoraMatmul.apply)
    whole = replace(step, parts=[kernels.Part(0, 64, 1.0)])
    joined = [torch.cat([pairs[0], pairs[2]]), functional.pad(pairs[1], (0, 4, 0, 48)) + functional.pad(pairs[3], (4, 0, 16, 0))]
    close(apply(h, None, step, *pairs), linear.forward(Step(whole, joined), h).double())


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 300), inner=st.integers(1, 5), rank=st.integers(1, 20), drops=st.booleans(), adapted=st.booleans())
def test_a_gated_pair_of_steps_is_both_of_them(linear: Linear, rows: int, inner: int, rank: int, drops: bool, adapted: bool) -> None:
    dropped = ((0, (rows + 1) // 2),) if drops else ()
    up = made(
        Case(rows, 64, 64 * inner, "norm", False, True, ((0, inner, rank, 0, rows), (inner, 2 * inner, 3, 0, rows)) if adapted else (), dropped, 3), linear
    )
    down = made(Case(rows, 32 * inner, 64, "gate", False, False, ((0, 2, rank, 0, rows),), dropped, 4), linear)
    apart, joint = ((Step(up.step, up.pairs), Step(down.step, down.pairs)) for _ in range(2))
    both = linear.forward(apart[0], up.h)
    y = linear.forward(apart[1], both, up.h)
    slope, of_down = linear.backward(apart[1], both, down.g, wanted=True)
    assert slope is not None
    dh, of_up = linear.backward(apart[0], up.h, slope, wanted=True, extra=down.g)
    found, result = linear.gated(*joint, up.h)
    assert torch.equal(found, both)
    assert torch.equal(result, y)
    again, *others = linear.gated_back(*joint, up.h, both, down.g, wanted=True)
    for one, two in zip([again, *others[0], *others[1]], [dh, *of_up, *of_down], strict=True):
        assert torch.equal(cast("Tensor", one), cast("Tensor", two))
    told = list[int]()
    up.step.note = down.step.note = lambda left, right, factor: told.append(len(left))
    seen, *_ = linear.gated_back(*joint, up.h, both, down.g, wanted=True)
    assert torch.equal(cast("Tensor", seen), cast("Tensor", dh))
    assert len(told) == (5 if adapted else 2)
    none, *rest = linear.gated_back(*joint, up.h, both, down.g, wanted=False)
    assert none is None
    assert [len(one) for one in rest] == [len(up.pairs), len(down.pairs)]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 300), vocabulary=st.integers(1, 80), seed=st.integers(0, 9))
def test_scores_of_targets(linear: Linear, rows: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32 * vocabulary, 64, generator=generator).to(BF16)
    frozen = kernels.Frozen(weight, pack=True, linear=linear)
    h, targets = (torch.randn(rows, 64, generator=generator) * 0.5).to(BF16), torch.randint(0, 32 * vocabulary, (rows,), generator=generator)
    exact = h.double().requires_grad_()
    theirs = (exact @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert frozen.panels is not None
    ours, slope = linear.scores(frozen.panels, h, targets, slope=True)
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-4, atol=1e-4)
    assert slope is not None
    (gradient,) = torch.autograd.grad(theirs.sum(), exact)
    close(slope, gradient)
    alone, none = linear.scores(frozen.panels, h, targets, slope=False)
    assert none is None
    assert torch.equal(alone, ours)
    close(frozen.times(h), h.double() @ weight.double().t())
    up = torch.randn(rows, 32 * vocabulary, generator=generator).to(BF16)
    close(frozen.back(up), up.double() @ weight.double())


def test_no_rows_and_other_kinds_of_rows(linear: Linear) -> None:
    frozen = kernels.Frozen(torch.randn(64, 32).to(BF16), pack=True, linear=linear)
    none = torch.empty(0, 32, dtype=BF16)
    assert frozen.times(none).shape == (0, 64)
    assert frozen.back(torch.empty(0, 64, dtype=BF16)).shape == (0, 32)
    assert kernels.target_scores(none, frozen, torch.empty(0, dtype=torch.int64), Walks(None)).shape == (0,)
    with pytest.raises(RuntimeError):  # fp32 rows are not read as bf16
        frozen.times(torch.randn(3, 32))


def test_a_score_that_is_no_number_is_told(linear: Linear) -> None:
    frozen = kernels.Frozen(torch.randn(64, 32).to(BF16), pack=True, linear=linear)
    h = torch.randn(3, 32).to(BF16)
    h[1, 4] = float("nan")
    assert frozen.panels is not None
    scores, _ = linear.scores(frozen.panels, h, torch.tensor([0, 1, 2]), slope=False)
    assert scores.isnan().tolist() == [False, True, False]

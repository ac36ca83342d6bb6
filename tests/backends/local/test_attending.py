"""Attention as one compiled call in each direction, against its formula in fp64 and against torch's operations."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crucible_framework.backends.local import attending, native
from crucible_framework.backends.local.attention import Attention, Pattern, Rotation, Span
from crucible_framework.backends.local.walks import Walks

TORCH = Walks(None)
BITS = {torch.float32: 24, torch.bfloat16: 8}
"""Of a number's significand."""
HEADS = {1: (2, 2), 3: (6, 2), 4: (4, 1)}
"""Query heads and key-value heads by how many query heads share one."""


@pytest.fixture(scope="module", params=BITS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found = request.param
    assert isinstance(found, torch.dtype)
    return found


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> Walks:
    return compiled(tmp_path_factory.getbasetemp() / "native", dtype)


def compiled(folder: Path, dtype: torch.dtype) -> Walks:
    found = Walks(folder)
    if not attending.is_there(found.folder, dtype, 64):
        pytest.skip("no compiler, or a processor without bf16 dot products")
    return found


def family(start: int, common: int, ends: Sequence[int]) -> list[Span]:
    """Sequences with a common start as layout.py lays them out: one span for the start, one for the ends."""
    owner = torch.tensor([0] * common + [k for k, end in enumerate(ends, 1) for _ in range(end)])
    order = torch.arange(len(owner))
    seen = (order[:, None] >= order) & ((owner[:, None] == owner) | (owner == 0))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    return [Span(start, 1, common), Span(start, 1, len(owner), mask[:, :, common:].contiguous(), common)]


def random(spans: Sequence[Span], heads: tuple[int, int], size: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Heads and an upstream gradient; one token in seven has keys that many look at."""
    generator, tokens = torch.Generator().manual_seed(seed), max(span.stop for span in spans)
    x = torch.randn(tokens, heads[0] + 2 * heads[1], size, generator=generator)
    x[::7, heads[0] : heads[0] + heads[1]] *= 3
    return x.to(dtype), torch.randn(tokens, heads[0], size, generator=generator).to(dtype)


def formula(x: Tensor, g: Tensor, queries: int, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """The result and the gradient of x by softmax's formula in fp64."""
    x = x.double().requires_grad_()
    keys, o = (x.shape[1] - queries) // 2, torch.zeros(g.shape, dtype=torch.float64)
    for span in spans:
        for start in range(span.start, span.stop, span.length):
            run = x[start : start + span.length].transpose(0, 1)
            q, (k, v) = run[:queries, span.skip :], (part.repeat_interleave(queries // keys, 0) for part in torch.split(run[queries:], keys))
            causal = torch.full((span.length - span.skip, span.length), -torch.inf).triu(span.skip + 1)
            scores = q @ k.mT / x.shape[2] ** 0.5 + (causal if span.mask is None else span.mask[0, 0])
            o[start + span.skip : start + span.length] = (scores.softmax(-1) @ v).transpose(0, 1)
    (dx,) = torch.autograd.grad(o, x, g.double())
    return o.detach(), dx


def attended(x: Tensor, g: Tensor, queries: int, spans: Sequence[Span], walks: Walks) -> tuple[Tensor, Tensor]:
    """What `Attention` gives, with angles of 0."""
    cos = torch.ones(x.shape[0], 1, x.shape[2] // 2, dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    o = cast("Tensor", Attention.apply(leaf * 1, Pattern(queries, Rotation(cos, torch.zeros_like(cos), walks), spans)))  # type: ignore[no-untyped-call]
    (dx,) = torch.autograd.grad(o, leaf, g)
    return o.detach(), dx


SINGLE = st.tuples(st.integers(1, 3), st.integers(1, 130)).map(lambda given: lambda start: [Span(start, *given)])
FAMILY = st.tuples(st.integers(1, 70), st.lists(st.integers(1, 50), min_size=1, max_size=4)).map(lambda given: lambda start: family(start, *given))
SKIPPING = st.tuples(st.integers(1, 60), st.integers(1, 70)).map(lambda n: lambda start: [Span(start, 1, n[0]), Span(start, 1, sum(n), None, n[0])])


@st.composite
def layouts(draw: st.DrawFn) -> list[Span]:
    spans: list[Span] = []
    for make in draw(st.lists(st.one_of(SINGLE, FAMILY, SKIPPING), min_size=1, max_size=4)):
        spans += make(max((span.stop for span in spans), default=0))
    return spans


def near(walks: Walks, spans: Sequence[Span], heads: tuple[int, int], *, size: int, seed: int, dtype: torch.dtype) -> None:
    """Compiled numbers are as near to the formula's as those of torch's operations, to 1.5 times, the worst one to 2.5 times.

    Slopes of a row that sees hardly more than one token are next to 0, from which the rounding of o keeps ours away: hence the rest.
    """
    x, g = random(spans, heads, size, seed, dtype)
    exact = formula(x, g, heads[0], spans)
    theirs, ours = (attended(x, g, heads[0], spans, walk) for walk in (TORCH, walks))
    rest = max(1.0, float(exact[1].abs().max())) * 2.0 ** (5 - BITS[dtype] if dtype == torch.float32 else 3 - BITS[dtype])
    borders = ((0, 0, heads[0]), (1, 0, heads[0]), (1, heads[0], sum(heads)), (1, sum(heads), x.shape[1]))
    for which, first, last in borders:  # o, dq, dk, dv
        a, b = (found[which][:, first:last].double() - exact[which][:, first:last] for found in (ours, theirs))
        assert float(a.square().mean().sqrt()) <= 1.5 * float(b.square().mean().sqrt()) + (rest / 80 if max(span.length for span in spans) > 250 else rest)
        assert float(a.abs().max()) <= 2.5 * float(b.abs().max()) + 3 * rest


@settings(deadline=None, max_examples=40)
@given(spans=layouts(), groups=st.sampled_from([1, 3, 4]), size=st.sampled_from([32, 64, 128]), seed=st.integers(0, 1000))
def test_numbers_are_those_of_the_formula(walks: Walks, dtype: torch.dtype, spans: list[Span], groups: int, size: int, seed: int) -> None:
    near(walks, spans, HEADS[groups], size=size, seed=seed, dtype=dtype)


LONG = {"plain": [Span(0, 1, 700)], "family": family(0, 400, [150, 33, 120]), "both": [Span(0, 2, 300), *family(600, 65, [3, 300])]}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("groups", [1, 3])
def test_long_runs(walks: Walks, dtype: torch.dtype, name: str, groups: int) -> None:
    near(walks, LONG[name], HEADS[groups], size=64, seed=1, dtype=dtype)


@pytest.mark.parametrize("name", LONG)
def test_threads_change_no_bit(walks: Walks, dtype: torch.dtype, name: str) -> None:
    x, g = random(LONG[name], (6, 2), 64, 2, dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attended(x, g, 6, LONG[name], walks))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_stands_beside_changes_no_bit(walks: Walks, dtype: torch.dtype) -> None:
    spans = [Span(5, 2, 45), *family(100, 70, [20, 5])]
    x, g = random(spans, (6, 2), 64, 3, dtype)
    x, g = torch.cat([x, x[:9]]), torch.cat([g, g[:9]])
    outside = torch.ones(len(x), dtype=torch.bool)
    for span in spans:
        outside[span.start : span.stop] = False
    x[outside], g[outside] = torch.nan, torch.nan
    both = attended(x, g, 6, spans, walks)
    assert all(part[~outside].isfinite().all() for part in both)
    for some in (spans[:1], spans[1:]):
        rows = slice(some[0].start, some[-1].stop)
        alone = attended(x, g, 6, some, walks)
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(both, alone, strict=True))


def test_masks_of_other_kinds(walks: Walks, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(1, 1, 90, 90, generator=generator)
    bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.5, -torch.inf)
    bias[..., 0] = 1.0
    near(walks, [Span(0, 1, 90, bias)], (4, 2), size=32, seed=5, dtype=dtype)
    shut = bias.clone()
    shut[:, :, 40] = -torch.inf
    x, g = random([Span(0, 1, 90)], (4, 2), 32, 6, dtype)
    o, dx = attended(x, g, 4, [Span(0, 1, 90, shut)], walks)
    assert not o[40].any()  # it sees nothing
    assert not dx[40, :4].any()
    assert dx.isfinite().all()


def test_great_scores(walks: Walks, dtype: torch.dtype) -> None:
    x, g = random([Span(0, 1, 600)], (2, 1), 64, 7, dtype)
    x[:, :3] *= 40
    x[:, :2] = x[:, :2].abs()
    x[:, 2] = x[:, 2].abs() * torch.linspace(0.1, 2, 600)[:, None].to(dtype)  # scores rise all the way
    o, dx = attended(x, g, 2, [Span(0, 1, 600)], walks)
    exact, _ = formula(x, g, 2, [Span(0, 1, 600)])
    assert dx.isfinite().all()
    torch.testing.assert_close(o.double(), exact, atol=0.05 if dtype == torch.bfloat16 else 0.002, rtol=0.02)
    bad = x.clone()
    bad[100, 2, 5] = torch.nan
    o, _ = attended(bad, g, 2, [Span(0, 1, 600)], walks)
    assert o[100:].isnan().all()  # nothing hides it
    assert o[:96].isfinite().all()


def test_what_is_covered(walks: Walks, dtype: torch.dtype) -> None:
    x = torch.zeros(8, 4, 64, dtype=dtype)
    assert attending.covers(walks, x, [Span(0, 2, 4, torch.zeros(1, 1, 4, 4))])
    assert not attending.covers(walks, x, [Span(0, 2, 4, torch.zeros(2, 1, 4, 4))])  # a mask of each run
    assert not attending.covers(walks, x.double(), [Span(0, 2, 4)])
    assert not attending.covers(walks, x[:, :, :48].contiguous(), [Span(0, 2, 4)])
    assert not attending.covers(walks, x[:, ::2], [Span(0, 2, 4)])
    assert not attending.covers(Walks(None), x, [Span(0, 2, 4)])


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v4", "cooperlake", "sapphirerapids"])
def test_it_compiles_for_other_processors(march: str, tmp_path: Path) -> None:
    program = shutil.which("g++")
    if program is None:
        pytest.skip("no g++")
    source, target = native.FOLDER / "attend.cpp", tmp_path / "attend.o"
    command = [program, "-std=c++17", "-O1", "-fPIC", f"-march={march}", "-c", str(source), "-o", str(target)]
    done = subprocess.run([*command, "-w"], capture_output=True, text=True, check=False)
    if "bad value" in done.stderr:
        pytest.skip("an older compiler, or another family of processors")
    assert done.returncode == 0, done.stderr
    code = target.read_bytes()
    assert b"crucible_attend_back_float32" in code
    assert (b"crucible_attend_back_bfloat16" in code) == (not march.startswith("x86"))

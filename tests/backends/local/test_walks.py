"""The compiled walks against torch's own operations, and what happens where nothing can be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crucible_framework import events
from crucible_framework.backends.local import native, walks
from crucible_framework.backends.local.walks import STEPS, Drop, Span, Walks

TORCH = Walks(None)
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Relative tolerance: bfloat16 rounds at other places."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Walks:
    found = Walks(tmp_path_factory.mktemp("native"))
    if not found.compiled:
        assert not any(shutil.which(name) for name in native.COMPILERS)
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found = request.param
    assert isinstance(found, torch.dtype)
    return found


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    tolerance = DTYPES[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=tolerance * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (7, 48), (40, 576)])
def test_norm_and_gate(compiled: Walks, dtype: torch.dtype, rows: int, width: int) -> None:
    h, weight, g = random(rows, width, dtype=dtype), random(width, dtype=dtype, seed=1), random(rows, width, dtype=dtype, seed=2)
    (ours, r), (theirs, other) = (walk.norm(h, weight, 1e-5) for walk in (compiled, TORCH))
    same(ours, theirs)
    torch.testing.assert_close(r, other)
    same(compiled.norm_back(g, h, weight, r), TORCH.norm_back(g, h, weight, r))
    both = random(rows, 2 * width, dtype=dtype, seed=3) * 4
    same(compiled.gate(both), TORCH.gate(both))
    same(compiled.gate_back(g.clone(), both), TORCH.gate_back(g.clone(), both))


def test_the_gate_at_its_ends(compiled: Walks) -> None:
    both = torch.tensor([[-1e4, -100.0, -0.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(compiled.gate(both), TORCH.gate(both), atol=1e-30, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 2**63 - 1), key=st.integers(0, 2**32 - 1), part=st.floats(0, 0.99))
def test_dropout_is_a_function_of_its_names(tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, seed: int, key: int, part: float) -> None:
    walk = Walks(tmp_path_factory.getbasetemp() / "native")
    drop = Drop(seed, key, round(part * STEPS))
    x = random(rows, width, dtype=torch.float32, seed=seed % 1000)
    kept = drop.kept((rows, width), x.device)
    assert torch.equal(walk.drop(x, drop), torch.where(kept, x, 0.0))
    y = x + 1
    walk.drop_add(y, x, drop)
    torch.testing.assert_close(y, x + 1 + torch.where(kept, x, 0.0))
    more = drop.kept((rows + 3, width), x.device)
    assert torch.equal(more[:rows], kept)


def test_dropout_zeroes_its_share_and_masks_differ() -> None:
    shape = (400, 256)
    masks = [Drop(seed, key, STEPS // 10).kept(shape, torch.device("cpu")) for seed, key in ((1, 1), (1, 2), (2, 1))]
    for mask in masks:
        assert float(mask.float().mean()) == pytest.approx(0.9, abs=0.005)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((masks[one] & masks[other]).float().mean()) == pytest.approx(0.81, abs=0.008)


SPANS = [Span(0, 1, 20), Span(3, 2, 7), Span(2, 1, 18, None, 5)]


@pytest.mark.parametrize("span", SPANS, ids=["one", "two", "skipping"])
def test_attention_parts(compiled: Walks, dtype: torch.dtype, span: Span) -> None:
    x, cos, sin = random(21, 6, 8, dtype=dtype), random(21, 1, 4, dtype=dtype, seed=1), random(21, 1, 4, dtype=dtype, seed=2)
    for back in (False, True):
        ours, theirs = x.clone(), x.clone()
        compiled.rotate(ours, 4, cos, sin, back=back)
        TORCH.rotate(theirs, 4, cos, sin, back=back)
        same(ours, theirs)
        assert torch.equal(ours[:, 4:], x[:, 4:])
    folded = compiled.fold(x, span, 1, 3, scale=0.5)
    assert torch.equal(folded, TORCH.fold(x, span, 1, 3, scale=0.5))
    ours, theirs = x.clone(), x.clone()
    compiled.unfold(folded, ours, span, 2, scale=2.0, add=1)
    TORCH.unfold(folded, theirs, span, 2, scale=2.0, add=1)
    same(ours, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_sees_what_it_may(compiled: Walks, dtype: torch.dtype, masked: bool) -> None:
    length, skip = 12, 4
    seen = torch.rand(length - skip, length, generator=torch.Generator().manual_seed(1)) > 0.5
    seen[:, 0] = True
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None] if masked else None
    span = Span(0, 1, length, mask, skip)
    scores, g = random(3, 2 * (length - skip), length, dtype=dtype), random(3, 2 * (length - skip), length, dtype=dtype, seed=4)
    ours, theirs = compiled.softmax(scores.clone(), span), TORCH.softmax(scores.clone(), span)
    same(ours, theirs)
    allowed = seen if masked else torch.ones(length - skip, length).tril(skip).bool()
    assert not ours.view(3, 2, length - skip, length)[:, :, ~allowed].any()
    torch.testing.assert_close(ours.float().sum(-1), torch.ones(3, 2 * (length - skip)), atol=DTYPES[dtype], rtol=0)
    same(compiled.softmax_back(g.clone(), theirs, span), TORCH.softmax_back(g.clone(), theirs, span))


def test_scores(compiled: Walks, dtype: torch.dtype) -> None:
    logits, targets = random(9, 301, dtype=dtype) * 5, torch.arange(9) * 30
    (ours, slope), (theirs, other) = (walk.score(logits.clone(), targets, slope=True) for walk in (compiled, TORCH))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    same(slope, other)
    exact = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_scores_of_what_is_not_finite_are_not_finite(compiled: Walks) -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 20)
        logits[1, 3] = bad
        found, _ = compiled.score(logits, torch.zeros(2, dtype=torch.long), slope=False)
        assert torch.isfinite(found).tolist() == [True, False]


def test_what_is_not_covered_goes_through_torch(compiled: Walks) -> None:
    wide = torch.randn(3, 8, dtype=torch.float64)
    assert not compiled.covers(wide)
    assert not compiled.covers(torch.randn(4, 8).t())
    assert compiled.gate(wide).dtype == torch.float64


def test_without_a_compiler_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LOADED", {})
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    with events.collect() as seen:
        assert not Walks(tmp_path).compiled
    assert "no-such-compiler" in str(next(event for event in seen if event["name"] == "native.unavailable")["reason"])


def test_code_that_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Walks) -> None:
    assert compiled.compiled
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "train.cpp").write_text("this is no C++")
    monkeypatch.setattr(native, "_LOADED", {})
    monkeypatch.setattr(native, "FOLDER", sources)
    with events.collect() as seen:
        assert not Walks(tmp_path / "cache").compiled
    assert any("could not compile" in str(event.get("reason")) for event in seen)
    assert list((tmp_path / "cache").glob("*.so")) == []


def test_compiled_once_and_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Walks) -> None:
    assert compiled.compiled
    monkeypatch.setattr(native, "_LOADED", {})
    assert Walks(tmp_path).compiled
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(native, "_LOADED", {})
    monkeypatch.setattr(native, "_run", None)  # compiling again would call it
    assert Walks(tmp_path).compiled
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_random_words_are_splitmix64s() -> None:
    """The published first outputs of splitmix64 seeded with 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert walks._random(1234567, 5).tolist() == expected
    assert np.uint64(walks._mixed(1234567 + walks._GOLDEN)) == expected[0]

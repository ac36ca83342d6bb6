"""Memory for activations: pieces never overlap, come back when nobody holds them, and go back to the system."""

from __future__ import annotations

import gc
import mmap
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crucible_framework.backends.local import buffers
from crucible_framework.backends.local.buffers import Buffers

MB = 1 << 20


def span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@settings(max_examples=40, deadline=None)
@given(moves=st.lists(st.one_of(st.integers(1, 3 * MB), st.floats(0, 1, exclude_max=True)), max_size=60))
def test_pieces_never_overlap_and_all_come_back(moves: list[int | float]) -> None:
    """A whole number takes so many bytes, a fraction gives the tensor at that place of those held back."""
    given_out, held = Buffers(keep_s=0), list[tuple[Tensor, int]]()
    for number, move in enumerate(moves):
        if isinstance(move, int):
            held.append((given_out.empty((move,), torch.uint8).fill_(number), number))
        elif held:
            held.pop(int(move * len(held)))
        ends = sorted(span(tensor) for tensor, _ in held)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert all(bool((tensor == mark).all()) for tensor, mark in held)
    held.clear()
    given_out.trim()
    assert given_out.held == 0


def test_memory_is_used_again_and_views_hold_it() -> None:
    given_out = Buffers()
    first = given_out.empty((300, 200), torch.bfloat16)
    assert first.shape == (300, 200)
    assert first.dtype == torch.bfloat16
    assert first.data_ptr() % 256 == 0
    place, view = first.data_ptr(), first[10:].t()
    del first
    assert given_out.empty((300, 200), torch.bfloat16).data_ptr() != place
    del view
    gc.collect()
    assert given_out.empty((300, 200), torch.bfloat16).data_ptr() == place
    assert given_out.held == 64 * MB


def test_what_is_in_use_stays_and_large_pieces_have_room() -> None:
    given_out = Buffers(keep_s=0)
    small, large = given_out.empty((MB,), torch.uint8), given_out.empty((100 * MB,), torch.uint8)
    assert given_out.held == 164 * MB
    del large
    given_out.trim()
    assert given_out.held == 64 * MB
    small.fill_(7)
    assert bool((small == 7).all())


def test_what_may_be_needed_soon_is_kept() -> None:
    given_out = Buffers(keep_s=1000)
    del_me = given_out.empty((MB,), torch.uint8)
    del del_me
    given_out.trim()
    assert given_out.held == 64 * MB


def test_few_bytes_are_torchs_own() -> None:
    given_out = Buffers()
    assert given_out.empty((100,), torch.float32).shape == (100,)
    assert given_out.held == 0


def test_threads_take_and_give_at_once() -> None:
    given_out, wrong = Buffers(keep_s=0), list[int]()

    def work(mark: int) -> None:
        generator = torch.Generator().manual_seed(mark)
        held = list[Tensor]()
        for _ in range(300):
            size = int(torch.randint(1 << 14, 1 << 18, (), generator=generator))
            held.append(given_out.empty((size,), torch.uint8).fill_(mark))
            if len(held) > 8:
                wrong.extend(mark for tensor in (held.pop(0), held[-1]) if not bool((tensor == mark).all()))

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    given_out.trim()
    assert given_out.held == 0


def test_without_large_pages_there_is_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert buffers.Buffers().empty((MB,), torch.uint8).fill_(1).sum() == MB

"""Sequences laid out for the model: every token exactly once or shared, and the numbers of each sequence alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crucible_framework.backends.local.bases import Base, load_base
from crucible_framework.backends.local.layout import lay_out, slices

CPU = torch.device("cpu")
SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=8)


@given(sequences=SEQUENCES, share=st.booleans(), limit=st.integers(1, 64))
def test_every_sequence_is_in_one_pass_with_its_own_tokens(sequences: list[list[int]], share: bool, limit: int) -> None:
    passes = lay_out(sequences, CPU, share=share, limit=limit)
    assert sorted(i for one in passes for i in one.members) == list(range(len(sequences)))
    for one in passes:
        flat = one.ids.flatten().numpy()
        for i, where in zip(one.members, one.where, strict=True):
            assert flat[where].tolist() == sequences[i]
            if one.places is not None:
                assert one.places.flatten().numpy()[where].tolist() == list(range(len(sequences[i])))
        assert one.tokens <= limit or len(one.members) == 1
        assert one.tokens <= len(one.members) * max(len(sequences[i]) for i in one.members)


@given(sequences=SEQUENCES)
def test_a_token_sees_its_own_sequence_and_nothing_else(sequences: list[list[int]]) -> None:
    for one in lay_out(sequences, CPU, share=True):
        if one.mask is None:
            continue
        seen = one.mask[0, 0].numpy() == 0
        for where in one.where:
            for place, row in enumerate(where):
                assert np.flatnonzero(seen[row]).tolist() == sorted(where[: place + 1].tolist())


@given(sequences=SEQUENCES, share=st.booleans(), limit=st.integers(1, 64))
def test_packed_spans_let_a_token_see_its_own_sequence_only(sequences: list[list[int]], share: bool, limit: int) -> None:
    passes = lay_out(sequences, CPU, share=share, pack=True, limit=limit)
    assert sorted(i for one in passes for i in one.members) == list(range(len(sequences)))
    for one in passes:
        assert one.spans is not None
        assert one.places is not None
        assert one.tokens <= limit or len(one.members) == 1
        flat, places = one.ids[0].numpy(), one.places[0].numpy()
        seen = np.zeros((one.tokens, one.tokens), dtype=int)
        for span in one.spans:
            for run in range(span.count):
                first = span.start + run * span.length
                mask = -torch.ones(span.length, span.length).triu(1) if span.mask is None else span.mask[0, 0]
                seen[first + span.skip : first + span.length, first : first + span.length] += (mask == 0).numpy()
        assert seen.max() == 1
        for i, where in zip(one.members, one.where, strict=True):
            assert flat[where].tolist() == sequences[i]
            assert places[where].tolist() == list(range(len(where)))
            for place, row in enumerate(where):
                assert np.flatnonzero(seen[row]).tolist() == sorted(where[: place + 1].tolist())


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 100))
def test_slices_take_each_index_once_within_the_limit(lengths: list[int], limit: int) -> None:
    groups = slices(lengths, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit for group in groups)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The built-in model."""
    return load_base("tiny", cache=tmp_path_factory.mktemp("cache"), dtype=torch.float32, device=CPU)


def test_a_common_start_changes_no_number(tiny: Base) -> None:
    start = list(range(40, 100))
    sequences = [[*start, *range(k, k + 5 + k)] for k in range(6)] + [[7, 8, 9]]
    shared = lay_out(sequences, CPU, share=True)
    assert sum(one.tokens for one in shared) < 0.5 * sum(map(len, sequences))
    with torch.no_grad():
        alone = [tiny.hidden(torch.tensor([tokens]))[0] for tokens in sequences]
        for one in shared:
            flat = tiny.hidden(one.ids, mask=one.mask, places=one.places).flatten(0, 1)
            for i, where in zip(one.members, one.where, strict=True):
                torch.testing.assert_close(flat[torch.from_numpy(where)], alone[i], atol=1e-5, rtol=1e-5)

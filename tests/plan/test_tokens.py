"""Layout and frame dealing as arithmetic, and the mask coverage of the zigzag ring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.plan.frames import deal_frames, frame_owner
from megatron_vila.plan.grid import AXES_OF_KIND, GridShape
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.tokens import (
    ALL,
    BACK,
    FRONT,
    half_indices,
    local_positions,
    owners,
    plan_reshard,
    ring_step,
    ulysses_permutation,
)

sizes = st.integers(1, 4)


@st.composite
def rows(draw, multiple: int):
    """cu_seqlens of a few documents, each a multiple of ``multiple``."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64) * multiple


@given(data=st.data(), ulysses=sizes, ring=sizes)
@settings(max_examples=60, deadline=None)
def test_each_allowed_pair_is_computed_exactly_once_and_no_forbidden_one(data, ulysses, ring):
    """Over all ranks and ring steps, from the very functions that the attention uses, positions mapped back to the row."""
    cu_seqlens = data.draw(rows(2 * ulysses * ring))
    total = int(cu_seqlens[-1])
    count = np.zeros((total, total), dtype=np.int64)
    for r in range(ring):
        # What a ring rank holds after the all-to-all and the permutation.
        shards = [local_positions(cu_seqlens, ulysses * ring, r * ulysses + u) for u in range(ulysses)]
        held = np.concatenate(shards)[ulysses_permutation(cu_seqlens, ulysses, ring, r)]
        for step in range(ring):
            block = ring_step(ring, r, step)
            source = local_positions(cu_seqlens, ring, block.source)
            _count_block(count, cu_seqlens, ring, held, source, block)
    document = np.searchsorted(cu_seqlens, np.arange(total), side="right")
    allowed = (document[:, None] == document[None, :]) & (np.arange(total)[:, None] >= np.arange(total)[None, :])
    np.testing.assert_array_equal(count, allowed)


def _count_block(count, cu_seqlens, ring, held, source, block) -> None:
    halves = dict(zip((FRONT, BACK), half_indices(cu_seqlens, ring), strict=True))
    halves[ALL] = np.arange(len(held))
    queries, keys = halves[block.queries], halves[block.keys]
    local = cu_seqlens // ring
    # Kernel segment i pairs the queries and keys of document i; causal blocks compare local places.
    segment_q = np.searchsorted(local, queries, side="right")
    segment_k = np.searchsorted(local, keys, side="right")
    pairs = segment_q[:, None] == segment_k[None, :]
    if block.causal:
        pairs &= queries[:, None] >= keys[None, :]
    q, k = np.nonzero(pairs)
    np.add.at(count, (held[queries[q]], source[keys[k]]), 1)


@given(data=st.data(), ring=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_every_ring_step_of_every_rank_costs_the_same(data, ring):
    cu_seqlens = data.draw(rows(2 * ring))
    halves = {FRONT: 0.5, BACK: 0.5, ALL: 1.0}
    for step in range(1, ring):
        blocks = [ring_step(ring, r, step) for r in range(ring)]
        assert {halves[b.queries] * halves[b.keys] for b in blocks} == {0.5}
    assert sum(len(local_positions(cu_seqlens, ring, r)) for r in range(ring)) == cu_seqlens[-1]


@given(data=st.data(), cp=st.integers(1, 6), tp=sizes)
@settings(max_examples=60, deadline=None)
def test_owners_invert_the_local_order(data, cp, tp):
    cu_seqlens = data.draw(rows(2 * cp * tp))
    per_rank = int(cu_seqlens[-1]) // (cp * tp)
    for c in range(cp):
        positions = local_positions(cu_seqlens, cp, c)
        owner, slot = owners(cu_seqlens, cp, tp, positions)
        np.testing.assert_array_equal(owner, c * tp + np.arange(len(positions)) // per_rank)
        np.testing.assert_array_equal(slot, np.arange(len(positions)) % per_rank)


@given(data=st.data(), ulysses=st.integers(1, 8), ring=sizes)
@settings(max_examples=60, deadline=None)
def test_the_ulysses_permutation_yields_the_zigzag_of_the_ring(data, ulysses, ring):
    cu_seqlens = data.draw(rows(2 * ulysses * ring))
    for r in range(ring):
        gathered = np.concatenate([local_positions(cu_seqlens, ulysses * ring, r * ulysses + u) for u in range(ulysses)])
        ordered = gathered[ulysses_permutation(cu_seqlens, ulysses, ring, r)]
        np.testing.assert_array_equal(ordered, local_positions(cu_seqlens, ring, r))


def test_a_document_that_cannot_be_cut_is_refused_with_the_multiple():
    with pytest.raises(ValueError, match="document 1 has 6 tokens, not a multiple of 4.*document_multiple=4"):
        local_positions(np.array([0, 8, 14]), 2, 0)
    with pytest.raises(ValueError, match="not a multiple of 2.cp.tp = 12"):
        owners(np.array([0, 8]), 2, 3, np.array([0]))


@given(costs=st.lists(st.integers(1, 50), max_size=40), ranks=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_frames_are_dealt_in_contiguous_ranges_of_balanced_cost(costs, ranks):
    boundaries = deal_frames(costs, ranks)
    assert boundaries[0] == 0 and boundaries[-1] == len(costs) and (np.diff(boundaries) >= 0).all()
    if costs:
        loads = [sum(costs[a:b]) for a, b in zip(boundaries[:-1], boundaries[1:], strict=True)]
        assert max(loads) <= sum(costs) / ranks + max(costs)
        np.testing.assert_array_equal(np.bincount(frame_owner(boundaries), minlength=ranks), np.diff(boundaries))


@given(frames=st.integers(0, 50), ranks=st.integers(1, 12))
def test_equal_frames_are_dealt_within_one_of_each_other(frames, ranks):
    counts = np.diff(deal_frames([7] * frames, ranks))
    assert counts.max() - counts.min() <= 1


@given(data=st.data(), cp=st.integers(1, 4), tp=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_reshard_plan_brings_every_visual_token_to_its_slot_and_sends_nothing_else(data, cp, tp):
    cu_seqlens = data.draw(rows(4 * cp * tp))
    total = int(cu_seqlens[-1])
    tokens = data.draw(st.integers(1, 3))
    starts = np.array(sorted(data.draw(st.sets(st.integers(0, total // tokens - 1), max_size=8)))) * tokens
    starts = starts.astype(np.int64)
    costs = data.draw(st.lists(st.integers(1, 9), min_size=len(starts), max_size=len(starts)))
    plan = plan_reshard(cu_seqlens, starts, [tokens] * len(starts), costs, cp, tp)
    made = np.concatenate([s + np.arange(tokens) for s in starts]) if len(starts) else np.zeros(0, dtype=np.int64)
    row_of = {(o, s): p for p in range(total) for o, s in [tuple(int(x[0]) for x in owners(cu_seqlens, cp, tp, np.array([p])))]}
    of_ranks = [plan.of_rank(e) for e in range(cp * tp)]
    sent = [made[plan.maker == e][of_ranks[e].send_order] for e in range(cp * tp)]
    offsets = [np.cumsum([0, *of_ranks[e].send_counts]) for e in range(cp * tp)]
    for rank in range(cp * tp):
        arriving = np.concatenate([sent[e][offsets[e][rank] : offsets[e][rank + 1]] for e in range(cp * tp)])
        assert of_ranks[rank].recv_counts == [int(offsets[e][rank + 1] - offsets[e][rank]) for e in range(cp * tp)]
        assert [row_of[rank, int(s)] for s in of_ranks[rank].slots] == arriving.tolist()
    assert plan.moved == int((plan.maker != plan.owner).sum())


@given(heads=st.integers(1, 30), group=st.integers(1, 6), ulysses=st.integers(1, 12))
def test_each_rank_gets_just_the_key_value_heads_of_its_query_heads(heads, group, ulysses):
    heads *= group
    if heads % ulysses:
        with pytest.raises(AssertionError):
            HeadSplit(heads, heads // group, ulysses)
        return
    split = HeadSplit(heads, heads // group, ulysses)
    for rank in range(ulysses):
        needed = [h // group for h in range(rank * split.per_rank, (rank + 1) * split.per_rank)]
        assert list(split.kv_range(rank)) == sorted(set(needed))
        expansion = split.expansion(rank) or list(range(len(split.kv_range(rank))))
        share = split.per_rank // len(expansion)
        assert [split.kv_range(rank)[expansion[h // share]] for h in range(split.per_rank)] == needed


@given(tp=sizes, ulysses=sizes, ring=sizes, dp=sizes, pp=sizes)
@settings(max_examples=40, deadline=None)
def test_groups_partition_the_grid(tp, ulysses, ring, dp, pp):
    grid = GridShape(tp, ulysses, ring, dp, pp)
    for kind in AXES_OF_KIND:
        groups = grid.groups(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        assert all(grid.group(kind, group[0]) == group for group in groups)
    assert [grid.encoder_rank(rank) for rank in grid.group("tp_cp", 0)] == list(range(grid.encoders))


def test_a_world_that_the_sizes_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"world size 6 is not a multiple of tp\*pp\*ulysses\*ring = 1\*1\*2\*2 = 4"):
        GridShape.of(6, ulysses=2, ring=2)

"""A row's plan against the plain definition of each of its parts, on every rank of every small grid."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from megatron_vila.plan.frames import deal_frames
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, pack
from megatron_vila.plan.row_plan import AttentionPlan, RowPlan
from megatron_vila.plan.tokens import NO_PART
from tests import samples

DOCUMENTS = [
    samples.document("a", "ttFttFFttt", slice(10, None)),
    samples.document("b", "t" * 11, slice(0, 0)),
    samples.document("c", "FTP" + "t" * 9 + "VF"),
]
GRIDS = [GridShape(), GridShape(tp=2), GridShape(ulysses=2, ring=2), GridShape(tp=2, ulysses=2, ring=3, dp=2, pp=2)]


def plan_of(grid: GridShape) -> RowPlan:
    return RowPlan.of(pack(DOCUMENTS, grid.document_multiple, grid.row_multiple), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_ranks_of_a_block_hold_every_token_of_the_row_once_with_its_id_position_and_label(grid):
    plan = plan_of(grid)
    row = plan.row
    ids, positions, labels, documents = (np.full(row.length, -7) for _ in range(4))
    for rank in grid.group("tp_cp", 0):
        shard, places = plan.shard(rank), plan.places(rank)
        tp = slice(grid.coordinates(rank).tp * len(places), (grid.coordinates(rank).tp + 1) * len(places))
        assert (ids[places] == -7).all()
        ids[places], positions[places] = shard.token_ids[tp], shard.positions[tp]
        labels[places[shard.selected]] = shard.labels
        documents[places[shard.selected]] = shard.documents
        assert shard.counts[grid.coordinates(rank).tp] == len(shard.selected)
    assert np.array_equal(ids, np.where(row.token_ids == MEDIA_TOKEN, 0, row.token_ids))
    assert np.array_equal(positions, row.positions)
    supervised = row.labels != IGNORE
    assert np.array_equal(labels[supervised], row.labels[supervised]) and (labels[~supervised] == -7).all()
    of_tokens = np.repeat(np.arange(len(DOCUMENTS)), np.diff(row.cu_seqlens))
    assert np.array_equal(documents[supervised], of_tokens[supervised])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_frame_belongs_to_one_rank_of_the_first_stage_whose_stage_2_is_that_of_the_block(grid):
    plan = plan_of(grid)
    frames = []
    for rank in grid.group("tp_cp", 0):
        shard = plan.shard(rank)
        frames += shard.frames
        assert shard.reshard.send_counts == plan.reshard.traffic[grid.encoder_rank(rank)].tolist()
        assert len(shard.reshard.send_order) == sum(shard.row.frames[i].tokens for i in shard.frames)
    assert frames == list(range(len(plan.row.frames)))
    bounds = deal_frames([unit.cost for unit in plan.row.units], grid.encoders).tolist()
    assert [plan.shard(rank).frames for rank in grid.group("tp_cp", 0)] == [range(*pair) for pair in pairwise(bounds)]
    if grid.pp > 1:
        later = plan.shard(grid.rank(pp=1))
        assert later.frames == range(0) and later.reshard is NO_PART


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_order_of_attention_and_its_inverse_undo_each_other(grid):
    for rank in range(grid.world_size):
        attention = plan_of(grid).shard(rank).attention
        if grid.ulysses == 1:
            assert len(attention.order) == len(attention.inverse) == 0
        else:
            assert np.array_equal(attention.order[attention.inverse], np.arange(len(attention.order)))


def test_a_row_of_one_document_needs_no_index_for_its_halves():
    assert AttentionPlan.of(np.array([0, 16]), GridShape(ring=2), 0).halves is None
    front, back = AttentionPlan.of(np.array([0, 8, 16]), GridShape(ring=2), 0).halves
    assert (front.tolist(), back.tolist()) == ([0, 1, 4, 5], [2, 3, 6, 7])

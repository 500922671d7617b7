"""Stage 2 on real processes: what is sent, what comes back, and how much memory it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.parallel.reshard import Reshard
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import pack
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.tokens import RankReshard, owners
from tests import samples
from tests.ranks import pool

HIDDEN = 6
LAYOUTS = [ParallelConfig(tp=2, ulysses=2), ParallelConfig(tp=1, ulysses=2, ring=2), ParallelConfig(tp=2, ring=2)]
ROW = [
    samples.document("a", "tt" + "Ft" * 5 + "PTt"),
    samples.document("b", "t" * 20),
    samples.document("c", "FVP" + "t" * 9 + "F"),
]


def _plan(grid: GridShape):
    row = pack(ROW, grid.document_multiple, grid.row_multiple)
    return row, RowPlan.of(row, grid).reshard


def _exchange(rank: int, parallel: ParallelConfig):
    """Send tokens that hold their row position; returns what arrived, the gradient at the makers, and bytes on the wire."""
    topology = ParallelTopology.create(parallel)
    row, plan = _plan(topology.grid)
    places = np.concatenate([s + np.arange(f.tokens) for s, f in zip(row.frame_starts, row.frames, strict=True)])
    mine = places[plan.maker == topology.grid.encoder_rank(topology.rank)]
    reshard = Reshard.of(plan.of_rank(topology.grid.encoder_rank(topology.rank)), topology.tp_cp, torch.device("cpu"))
    sent = []
    original = dist.all_to_all_single

    def counting(out, x, recv, send, group):
        me = group.rank()
        others = sum(n for peer, n in enumerate(send) if peer != me)
        sent.append((others * HIDDEN * x.element_size(), out.numel(), x.numel()))
        return original(out, x, recv, send, group=group)

    dist.all_to_all_single = counting
    try:
        made = torch.from_numpy(mine).double()[:, None].repeat(1, HIDDEN).requires_grad_()
        arrived = reshard(made)
        weight = torch.arange(HIDDEN, dtype=torch.float64)
        (arrived * arrived.detach() * weight).sum().backward()
    finally:
        dist.all_to_all_single = original
    topology.destroy()
    return arrived.detach()[:, 0].tolist(), reshard.slots.tolist(), made.grad.tolist(), mine.tolist(), sent


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_every_token_reaches_its_slot_and_every_gradient_returns_to_the_rank_that_encoded_the_frame(parallel):
    grid = GridShape.of(4, parallel.tp, 1, parallel.ulysses, parallel.ring)
    row, _ = _plan(grid)
    results = pool.run(4, _exchange, parallel)
    seen = []
    for rank, (arrived, slots, grad, mine, _) in enumerate(results):
        owner, slot = owners(row.cu_seqlens, grid.cp, grid.tp, np.array(arrived, dtype=np.int64))
        assert set(owner) <= {rank} and slot.tolist() == slots
        assert grad == [[place * w for w in range(HIDDEN)] for place in mine]
        seen += arrived
    assert sorted(seen) == np.flatnonzero(row.token_ids == -1).tolist()


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_bytes_sent_equal_the_lower_bound_forward_and_backward(parallel):
    grid = GridShape.of(4, parallel.tp, 1, parallel.ulysses, parallel.ring)
    _, plan = _plan(grid)
    wires = [wire for *_, wire in pool.run(4, _exchange, parallel)]
    bound = plan.moved * HIDDEN * torch.float64.itemsize
    assert bound > 0
    assert sum(wire[0][0] for wire in wires) == bound
    assert sum(wire[1][0] for wire in wires) == bound
    assert all(len(wire) == 2 for wire in wires)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_no_buffer_is_larger_than_what_a_rank_makes_or_owns(parallel):
    grid = GridShape.of(4, parallel.tp, 1, parallel.ulysses, parallel.ring)
    row, plan = _plan(grid)
    per_rank = row.length // grid.encoders
    for rank, (*_, wire) in enumerate(pool.run(4, _exchange, parallel)):
        received, sent = sum(plan.of_rank(rank).recv_counts), sum(plan.of_rank(rank).send_counts)
        assert received <= per_rank
        assert {wire[0][1], wire[1][2]} == {received * HIDDEN}
        assert {wire[0][2], wire[1][1]} == {sent * HIDDEN}


def test_a_wrong_number_of_tokens_is_refused_before_anything_is_sent():
    order = np.zeros(3, dtype=np.int64)
    reshard = Reshard.of(RankReshard([2, 1], [0, 3], order, order, moved=3), None, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 visual tokens were made here but the plan has 3"):
        reshard(torch.zeros(2, HIDDEN))

"""What the forward pass of 2D attention gives besides its output: keys and values for more queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.parallel.attention2d import Attention2D, HeadAttention, RowIndices
from megatron_vila.parallel.kernels import Segments, select_kernel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.row_plan import AttentionPlan
from megatron_vila.plan.tokens import local_positions
from tests.ranks import pool

HEADS, KV_HEADS, DIM, LENGTH, SCALE = 8, 4, 6, 24, 0.4
CPU = torch.device("cpu")


def whole() -> list[torch.Tensor]:
    """q, k and v of a document of LENGTH tokens and one more, whose query comes after them."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(LENGTH + 1, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def one_more(rank: int, parallel: ParallelConfig, kernel_name: str) -> float:
    """Largest error on this rank of a forward pass, and of the last token's attention over the keys and values that it left."""
    topology = ParallelTopology.create(parallel)
    grid = topology.grid
    kernel = select_kernel(kernel_name, DIM, torch.float64, CPU)
    split = HeadSplit(HEADS, KV_HEADS, grid.ulysses, parallel.ulysses_chunks)
    attention = Attention2D.of(split, kernel, SCALE, ulysses_group=topology.ulysses, ring_group=topology.ring, device=CPU)
    cu_seqlens = np.array([0, LENGTH])
    mine = local_positions(cu_seqlens, grid.cp, topology.grid.cp_rank(topology.rank))
    row = RowIndices.of(AttentionPlan.of(cu_seqlens, grid, topology.place.ring), CPU)
    q, k, v = whole()
    prefill, chunks = attention.forward(q[mine], k[mine], v[mine], row)
    is_last_shard = topology.place.ring == grid.ring - 1
    found = [_step(attention, topology, c, i, is_last_shard) for i, c in enumerate(chunks)]
    wanted, _ = kernel.forward(q, k, v, Segments((LENGTH + 1,), (LENGTH + 1,)), True, SCALE)
    topology.destroy()
    errors = [(prefill - wanted[mine]).abs().max()]
    errors += [(out - wanted[-1, heads.start : heads.stop]).abs().max() for heads, out in found]
    return max(errors).item()


def _step(attention: Attention2D, topology: ParallelTopology, cached: HeadAttention, chunk: int, holds_new: bool):
    """Query heads of a chunk and their output [h, D] for the token after the cached ones, merged over the ring."""
    split, rank = attention.ulysses.split, topology.place.ulysses
    heads, kv_heads = split.query_range(rank, chunk), split.kv_range(rank, chunk)
    q, k_new, v_new = (x[-1:, r.start : r.stop] for x, r in zip(whole(), (heads, kv_heads, kv_heads), strict=True))
    k, v = cached.k_TkD, cached.v_TkD
    if holds_new:
        k, v = torch.cat([k, k_new]), torch.cat([v, v_new])
    out_1hD, lse_h1 = attention.ring.kernel.forward(q, k, v, Segments((1,), (len(k),)), False, SCALE)
    outs, lses = ([torch.empty_like(x) for _ in range(topology.grid.ring)] for x in (out_1hD, lse_h1))
    dist.all_gather(outs, out_1hD, group=topology.ring)
    dist.all_gather(lses, lse_h1, group=topology.ring)
    weights_Rh = torch.cat(lses, dim=1).t().softmax(0)
    return heads, (torch.cat(outs) * weights_Rh[..., None]).sum(0)


LAYOUTS = {
    "u2-r2": ParallelConfig(ulysses=2, ring=2),
    "r4": ParallelConfig(ring=4),
    "u4": ParallelConfig(ulysses=4),
    "u2-chunks": ParallelConfig(ulysses=2, ulysses_chunks=2),
}


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_one_more_query_over_the_keys_and_values_of_a_forward_pass_is_attention_over_the_whole_document(parallel, kernel):
    errors = pool.run(parallel.ulysses * parallel.ring, one_more, parallel, kernel)
    assert max(errors) < 1e-14

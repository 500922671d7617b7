"""What a layer works in, in the backward pass of attention: every tensor that is alive then, against the memory model.

On a CPU, with the kernel that takes memory and computes nothing. Norms and SwiGLU are not compiled there and make float32 copies,
so only the moments in which attention's gradients are formed are looked at, and two configurations are compared.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import unfilled
from megatron_vila.config.schema import MemoryConfig, ParallelConfig
from megatron_vila.parallel.attention2d import Attention2D, RowIndices
from megatron_vila.parallel.kernels import select_kernel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.activations import decoder_bytes, local_tokens, ring_backward_bytes
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.row import pack
from megatron_vila.plan.row_plan import AttentionPlan
from tests import samples
from tests.parallel import contract
from tests.ranks import pool

LENGTH, WIDTH = 2048, 64
CPU = torch.device("cpu")


class AliveInAttention(TorchDispatchMode):
    """The most bytes of tensors, but for ``old`` ones, that are alive while attention's backward pass makes its results."""

    def __init__(self, old=()):
        super().__init__()
        self.old = {x.untyped_storage()._cdata for x in old}
        self.sizes, self.on_host, self.most = {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not x.is_sparse:
                self.see(x)
        if func is torch.ops.aten.zeros_like.default:
            self.most = max(self.most, sum(self.sizes.values()))
        return out

    def see(self, x):
        storage = x.untyped_storage()
        key = storage._cdata
        if x.dtype == torch.uint8:
            self.on_host[key] = storage  # a page of host memory, on a CPU a tensor like others
        # Copies that a norm makes because it is not compiled.
        uncompiled = x.dtype == torch.float32 and x.shape[1:] == (1, WIDTH)
        if key not in self.old | self.sizes.keys() | self.on_host.keys() and not uncompiled:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)


def most_alive(rank, parallel, memory):
    """Measured and predicted, in hidden states of this rank's tokens."""
    unfilled.register()
    config = samples.config(layers=2, heads=8, kv_heads=4)
    llm = config.model.llm
    llm.hidden_size, llm.head_dim, llm.ffn_hidden_size = WIDTH, WIDTH // 8, 3 * WIDTH
    config.model.attention, config.memory, config.parallel = unfilled.NAME, memory, parallel
    config.train.seq_length, config.optim.grad_reduce_fp32 = LENGTH, False
    topology, model, _ = contract.build(config, parallel, torch.bfloat16)
    grid = topology.grid
    row = pack([samples.document("long", "t" * LENGTH, slice(0, 1))], grid.document_multiple, grid.row_multiple)
    shard = contract.shard_of(row, topology, llm, torch.bfloat16)
    found = []
    # The threads that move data on a CPU let go of it a little later than a stream of a GPU does.
    for _ in range(3):
        gc.collect()
        with AliveInAttention() as alive:
            model(shard, contract.made(model, samples.pixels([]))).loss_sum.backward()
        found.append(alive.most)
    topology.destroy()
    unit = local_tokens(config) * WIDTH * 2
    return min(found) / unit, decoder_bytes(config, 1, 2)[1] / unit


def test_the_exchange_in_chunks_holds_no_more_than_the_model_says():
    """Weights and all that does not depend on the setting cancel."""
    memory = MemoryConfig(recompute="attention_output", mlp_tile=256, offload_gib=1.0)
    (whole, expected_whole), *_ = pool.run(2, most_alive, ParallelConfig(ulysses=2), memory)
    (chunks, expected_chunks), *_ = pool.run(2, most_alive, ParallelConfig(ulysses=2, ulysses_chunks=2), memory)
    assert chunks - whole == pytest.approx(expected_chunks - expected_whole, abs=0.3)


def alive_in_ring(rank, ring, documents, heads, kv_heads, dim):
    """Bytes, beside what the forward pass saved."""
    unfilled.register()
    topology = ParallelTopology.create(ParallelConfig(ring=ring))
    kernel = select_kernel(unfilled.NAME, dim, torch.bfloat16, CPU)
    split, groups = HeadSplit(heads, kv_heads, 1), {"ulysses_group": topology.ulysses, "ring_group": topology.ring}
    attention = Attention2D.of(split, kernel, 1.0, **groups, device=CPU)
    row = RowIndices.of(AttentionPlan.of(np.cumsum([0, *documents]), topology.grid, topology.place.ring), CPU)
    tokens = sum(documents) // ring
    q, k, v = (torch.randn(tokens, n, dim).bfloat16().requires_grad_() for n in (heads, kv_heads, kv_heads))
    out = attention(q, k, v, row)
    dout = torch.randn_like(out)
    with AliveInAttention([q, k, v, dout, out, *out.grad_fn.saved_tensors]) as alive:
        torch.autograd.grad(out, (q, k, v), dout)
    topology.destroy()
    return alive.most


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 4), (4, 4)])
@pytest.mark.parametrize("documents", [[8192], [2048, 6144]])
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_the_backward_pass_of_a_ring_holds_what_the_model_says(ring, documents, heads, kv_heads):
    dim = 64
    q, k = (sum(documents) // ring * n * dim * 2 for n in (heads, kv_heads))
    found = max(pool.run(ring, alive_in_ring, ring, documents, heads, kv_heads, dim))
    assert found == pytest.approx(ring_backward_bytes(q, k, ring, len(documents) > 1), rel=0.02)

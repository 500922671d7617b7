"""Ranks that write into each other's memory bring what the collectives bring, bit for bit."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from megatron_vila import accelerator
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.models.decoder.saved import HostStore
from megatron_vila.parallel import peers
from megatron_vila.parallel.attention2d import Attention2D, RowIndices, SavedAttention
from megatron_vila.parallel.kernels import select_kernel
from megatron_vila.parallel.peers import PeerMemory
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.parallel.ulysses import Pending, Ulysses, as_vectors, copy_vectors
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.row_plan import AttentionPlan
from tests import samples
from tests.gpu import on_gpus
from tests.parallel import contract
from tests.parallel.shared_files import SharedFiles
from tests.parallel.test_gradient_contract import MIXED_ROWS, TOLERANCE
from tests.ranks import pool

CPU = torch.device("cpu")
ROWS = ([48], [24], [24, 72])  # the second needs smaller buffers than the first, the last larger ones


def both_ways(rank, parallel, heads, kv_heads, dim, most_bytes=2**30, dtype=torch.float32, unit=1, repeats=1):
    """Whether outputs and gradients are the same with and without peers, and how many exchanges went by them.

    On GPUs each repetition lets the ranks start a random time apart.
    """
    usual, peers.MOST_PEER_BYTES = peers.MOST_PEER_BYTES, most_bytes
    topology, device = ParallelTopology.create(parallel), accelerator.device()
    grid = topology.grid
    split = HeadSplit(heads, kv_heads, grid.ulysses)
    kernel = select_kernel("reference", dim, dtype, device)
    direct = PeerMemory.of(topology.ulysses, device) if device.type == "cuda" else SharedFiles(topology.ulysses)
    plain, written = (
        Attention2D.of(
            split, kernel, 0.3, ulysses_group=topology.ulysses, ring_group=topology.ring, device=device, peers=memory
        )
        for memory in (None, direct)
    )
    host = HostStore(0, device)
    same, generator = True, torch.Generator().manual_seed(rank)
    for documents in ROWS * repeats:
        cu_seqlens = unit * np.concatenate([[0], np.cumsum(documents)])
        row = RowIndices.of(AttentionPlan.of(cu_seqlens, grid, topology.place.ring), device)
        tokens = int(cu_seqlens[-1]) // grid.cp
        q, k, v, dout = (
            torch.randn(tokens, n, dim, generator=generator).to(device, dtype) for n in (heads, kv_heads, kv_heads, heads)
        )
        found = []
        for attention in (plain, written):
            for upstream in (dout, dout[:1, :1, :1].expand_as(dout)):
                if device.type == "cuda":
                    torch.cuda._sleep(int(torch.randint(10**7, (), generator=generator)))
                parts = [x.clone().requires_grad_() for x in (q, k, v)]
                saved = SavedAttention(host.save)
                out = attention(*parts, row, saved)
                grads = torch.autograd.grad(out, parts, upstream)
                again = attention(*parts, row, saved)
                found.append([out, *grads, again, *torch.autograd.grad(again, parts, upstream)])
        same = same and all(torch.equal(a, b) for i in (0, 1) for a, b in zip(found[i], found[i + 2], strict=True))
    topology.destroy()
    peers.MOST_PEER_BYTES = usual
    return same, None if device.type == "cuda" else direct.exchanges


@pytest.mark.parametrize(
    ("parallel", "heads", "kv_heads", "dim"),
    [
        (ParallelConfig(ulysses=2), 4, 2, 8),
        (ParallelConfig(ulysses=4), 8, 2, 4),
        (ParallelConfig(ulysses=2, ring=2), 4, 2, 8),
        (ParallelConfig(ulysses=3), 6, 2, 8),
        (ParallelConfig(ulysses=2), 2, 1, 3),
    ],
    ids=["u2", "u4 with fewer key heads", "u2-r2", "u3 cuts a group", "odd heads"],
)
def test_an_exchange_by_peers_brings_what_the_collective_brings(parallel, heads, kv_heads, dim):
    results = pool.run(parallel.ulysses * parallel.ring, both_ways, parallel, heads, kv_heads, dim)
    # Of a row, twice: two each forward and backward, and three more where the output was kept.
    assert results == [(True, 2 * 3 * (2 + 2 + 3))] * len(results)


@pytest.mark.parametrize("kv_heads", [on_gpus(4, kernel="cudnn", gpus=2), on_gpus(1, kernel="cudnn", gpus=2)])
def test_gpus_write_to_their_peers_what_the_collective_brings_however_they_are_late(kv_heads):
    results = pool.run(2, both_ways, ParallelConfig(ulysses=2), 8, kv_heads, 64, 2**30, torch.bfloat16, 16, 20)
    assert results == [(True, None)] * 2


def fill(rank):
    """Reserve where PyTorch's allocator holds all memory without need, and where tensors do."""
    topology, device = ParallelTopology.create(ParallelConfig(ulysses=2)), accelerator.device()
    memory = PeerMemory.of(topology.ulysses, device)
    free, _ = torch.cuda.mem_get_info()
    torch.empty(free - 2**28, dtype=torch.uint8, device=device)
    fits = memory.reserve(2**28)
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 2**28, dtype=torch.uint8, device=device)
    try:
        memory.reserve(2**30)
        said = ""
    except torch.OutOfMemoryError as error:
        said = str(error)
    del held, memory
    topology.destroy()
    torch.cuda.empty_cache()
    return fits, said


@pytest.mark.parametrize("gpus", [on_gpus(2, kernel="cudnn", gpus=2)])
def test_a_gpu_without_room_for_the_buffer_says_so(gpus):
    for fits, said in pool.run(gpus, fill):
        assert fits and "no room for the 1024 MiB through which GPUs exchange heads" in said


def test_what_is_larger_than_the_buffers_may_be_goes_by_the_collective():
    [(same, _), _] = pool.run(2, both_ways, ParallelConfig(ulysses=2), 4, 2, 8, 4000)
    assert same


def read_late(rank) -> tuple[bool, str]:
    """Whether what an exchange by peers brought is there in time, and what is said of it after another one has begun."""
    topology = ParallelTopology.create(ParallelConfig(ulysses=2))
    row = RowIndices.of(AttentionPlan.of(np.array([0, 8]), topology.grid, 0), CPU)
    ulysses = Ulysses(HeadSplit(2, 2, 2), topology.place.ulysses, topology.ulysses, SharedFiles(topology.ulysses))
    out_sHD = torch.arange(4 * 2 * 3, dtype=torch.float32).view(4, 2, 3)

    def start():
        return ulysses.outputs_to_heads([out_sHD], row.order, row.inverse, 0)

    (in_time,) = start().wait()
    own_ThD = out_sHD[:, rank : rank + 1]
    arrived = bool((in_time[row.inverse[4 * rank : 4 * rank + 4]] == own_ThD).all())
    late, _ = start(), start().wait()
    with pytest.raises(RuntimeError) as error:
        late.wait()
    topology.destroy()
    return arrived, str(error.value)


def test_what_an_exchange_brought_is_refused_once_the_next_one_may_have_written_over_it():
    for arrived, said in pool.run(2, read_late):
        assert arrived
        assert "what exchange 2 brought was asked for after exchange 3 had begun, which writes to the same memory" in said


def compare(rank, *case):
    """As ``contract.compare``, every exchange by peers; and their number."""
    made, usual = [], PeerMemory.of
    PeerMemory.of = classmethod(lambda cls, group, device: made.append(SharedFiles(group)) or made[-1])
    errors = contract.compare(rank, *case)
    PeerMemory.of = usual
    return errors, sum(memory.exchanges for memory in made)


@pytest.mark.parametrize("recompute", ["none", "attention_output", "full"])
@pytest.mark.parametrize("parallel", [ParallelConfig(ulysses=2, tp=2), ParallelConfig(ulysses=4)], ids=["tp2-u2", "u4"])
def test_the_gradient_contract_holds_when_ranks_write_to_their_peers(tmp_path, parallel, recompute):
    config = samples.config(heads=8, kv_heads=2, layers=2)
    pool.run(1, contract.write_truth, config, MIXED_ROWS[:3], tmp_path / "truth.pt")
    config.memory.recompute = recompute
    for errors, exchanges in pool.run(4, compare, config, MIXED_ROWS[:3], parallel, tmp_path / "truth.pt"):
        assert max(errors.values()) < TOLERANCE
        assert exchanges >= 3 * 2 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [3, 8, 72])
def test_heads_are_copied_whatever_their_layout(dtype, dim):
    def layouts():
        whole = torch.randn(10, 7, dim).to(dtype)
        shifted = whole.flatten()[1 : 1 + 9 * 7 * dim].view(9, 7, dim)
        return whole[:9, :1], whole[1:, 2:3], shifted[:, 6:], whole.transpose(0, 1).contiguous().transpose(0, 1)[1:, :1]

    for i in range(4):
        for source in (*layouts(), layouts()[0][:1, :1, :1].expand(9, 1, dim)):
            target = layouts()[i]
            copy_vectors(target, source)
            assert torch.equal(target, source)


def test_an_exchange_that_is_over_holds_nothing_of_what_was_sent():
    sent = torch.zeros(3)
    held = weakref.ref(sent)
    pending = Pending(lambda: 7, None, sent)
    del sent
    assert held() is None and pending.wait() == 7


def test_heads_move_as_vectors_of_16_bytes_where_they_can():
    assert as_vectors(torch.zeros(4, 6, 72, dtype=torch.bfloat16)[:, 1:3]).shape == (4, 2, 9)
    assert as_vectors(torch.zeros(4, 6, 4, dtype=torch.bfloat16)).shape == (4, 6, 4)
    assert as_vectors(torch.zeros(4, 6, 9, dtype=torch.bfloat16)[:, :, 1:]).shape == (4, 6, 8)

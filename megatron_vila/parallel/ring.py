"""The outer level of 2D attention: a zigzag ring over packed documents with float32 log-sum-exp merge (LongVILA 3.3).

In step i a rank attends to the keys of the rank i places before it. Each rank sends its own keys and values straight to the
rank that needs them next, and only their front halves if the causal mask hides the rest. The gradients dK, dV of a block go
straight back to its owner. Compared with passing blocks from neighbor to neighbor this moves a quarter less data, sends no
partial sums, and every transfer runs while the attention of the current block is computed.

Legend: T local tokens (S/R), h query heads, k key/value heads, D head dim, R ring size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vila import accelerator
from megatron_vila.accelerator import compiled_on_cuda
from megatron_vila.parallel.kernels import AttentionKernel, Segments
from megatron_vila.plan.row_plan import AttentionPlan
from megatron_vila.plan.tokens import ALL, BACK, FRONT, RingStep, ring_step

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class RingLayout:
    """Segments and halves of one row's local tokens; the same on every rank of the ring.

    ``halves`` maps front and back to a slice (one document) or an int64 index on the device (several documents).
    """

    whole: Segments
    half: Segments
    all_to_front: Segments
    back_to_all: Segments
    halves: dict[str, slice | torch.Tensor]

    @classmethod
    def of(cls, plan: AttentionPlan, device: torch.device) -> RingLayout:
        lengths, shorter = plan.lengths, tuple(n // 2 for n in plan.lengths)
        if plan.halves is None:
            halves: dict[str, slice | torch.Tensor] = {FRONT: slice(0, shorter[0]), BACK: slice(shorter[0], lengths[0])}
        else:
            front, back = (accelerator.to_device(torch.from_numpy(x), device) for x in plan.halves)
            halves = {FRONT: front, BACK: back}
        return cls(
            whole=Segments(lengths, lengths),
            half=Segments(shorter, shorter),
            all_to_front=Segments(lengths, shorter),
            back_to_all=Segments(shorter, lengths),
            halves=halves,
        )

    def segments(self, block: RingStep) -> Segments:
        pairs = {(ALL, ALL): self.whole, (ALL, FRONT): self.all_to_front, (BACK, ALL): self.back_to_all}
        return pairs[block.queries, block.keys]

    def take(self, x: torch.Tensor, part: str, dim: int = 0) -> torch.Tensor:
        """The tokens of ``part`` of ``x`` along ``dim``."""
        if part == ALL:
            return x
        index = self.halves[part]
        if isinstance(index, slice):
            return x.narrow(dim, index.start, index.stop - index.start)
        return x.index_select(dim, index)

    def add(self, total: torch.Tensor, x: torch.Tensor, part: str) -> None:
        """``total[part] += x`` in place along the first dimension."""
        index = slice(None) if part == ALL else self.halves[part]
        if isinstance(index, slice):
            total[index] += x
        else:
            _add_at(total, index, x)

    def merge(self, out_ThD: torch.Tensor, lse_hT: torch.Tensor, part_out, part_lse, part: str) -> None:
        """Add a block's normalized output and log-sum-exp to the running ones of the queries ``part``, in place.

        Computed in the dtype of ``lse_hT`` and rounded once to that of ``out_ThD``.
        """
        index = slice(None) if part == ALL else self.halves[part]
        if isinstance(index, slice):
            merge(out_ThD[index], lse_hT[:, index], part_out, part_lse)
            return
        mine_hn, other_hn, total_hn = _weights(lse_hT[:, index], part_lse)
        _add_weighted_at(out_ThD, index, mine_hn, part_out, other_hn)
        lse_hT[:, index] = total_hn


def merge(out_nhD: torch.Tensor, lse_hn: torch.Tensor, part_out, part_lse) -> None:
    """Add the normalized output and log-sum-exp of attention to further keys to those of the same queries so far, in place.

    Computed in the dtype of ``lse_hn`` and rounded once to that of ``out_nhD``.
    """
    # Two functions: from a single one the compiler writes the outputs twice, as it still does if they are taken by index.
    mine_hn, other_hn, total_hn = _weights(lse_hn, part_lse)
    _add_weighted(out_nhD, mine_hn, part_out, other_hn)
    lse_hn.copy_(total_hn)


@compiled_on_cuda
def _add_at(total, index, x):
    total[index] = total[index] + x


@compiled_on_cuda
def _weights(lse_hn, part_lse):
    """Weights of the running outputs and of the block's, and the new log-sum-exp."""
    total = torch.logaddexp(lse_hn, part_lse)
    return (lse_hn - total).exp(), (part_lse - total).exp(), total


def _weighted(out, mine_hn, part_out, other_hn):
    mine, other = (x.t().unsqueeze(-1) for x in (mine_hn, other_hn))
    return (out.to(mine.dtype) * mine + part_out.to(mine.dtype) * other).to(out.dtype)


@compiled_on_cuda
def _add_weighted(out_nhD, mine_hn, part_out, other_hn):
    out_nhD.copy_(_weighted(out_nhD, mine_hn, part_out, other_hn))


@compiled_on_cuda
def _add_weighted_at(out_ThD, index, mine_hn, part_out, other_hn):
    out_ThD[index] = _weighted(out_ThD[index], mine_hn, part_out, other_hn)


@dataclass(frozen=True)
class Ring:
    """Ring attention of one rank over ``group`` with one attention kernel."""

    kernel: AttentionKernel
    scale: float
    size: int
    rank: int
    group: dist.ProcessGroup

    def forward(self, q_ThD, k_TkD, v_TkD, layout: RingLayout, expansion: torch.Tensor | None):
        """Causal attention of each document over the whole ring: out [T, h, D] and log-sum-exp [h, T] (float32 at least).

        ``expansion`` int64 repeats key/value heads for the kernel (``HeadSplit.expansion``). Point-to-point over the ring
        group: at most one block of keys and values is in flight while the current one is computed.
        """
        blocks = _KeyValueBlocks(self, layout, k_TkD, v_TkD)

        def attend():
            block, (k, v) = blocks.next()
            out_nhD, lse_hn = self.kernel.forward(
                layout.take(q_ThD, block.queries),
                _expand(k, expansion),
                _expand(v, expansion),
                layout.segments(block),
                block.causal,
                self.scale,
            )
            return out_nhD, lse_hn, block.queries

        out, lse, _ = attend()
        if self.size > 2:  # an output that is merged once is rounded once, without a wider copy
            out = out.to(lse.dtype)
        for _ in range(1, self.size):
            layout.merge(out, lse, *attend())
        return out.to(q_ThD.dtype), lse

    def backward(self, dout_ThD, q_ThD, k_TkD, v_TkD, out_ThD, lse_hT, layout: RingLayout, expansion: torch.Tensor | None):
        """Gradients dq [T, h, D], dk and dv [T, k, D] from the merged output and log-sum-exp.

        Keys and values travel again; each block's dK and dV return to its owner while the next block is computed.
        """
        blocks = _KeyValueBlocks(self, layout, k_TkD, v_TkD)

        def attend():
            block, (k, v) = blocks.next()
            dq, dk, dv = self.kernel.backward(
                layout.take(dout_ThD, block.queries),
                layout.take(q_ThD, block.queries),
                _expand(k, expansion),
                _expand(v, expansion),
                layout.take(out_ThD, block.queries),
                layout.take(lse_hT, block.queries, dim=1),
                segments=layout.segments(block),
                causal=block.causal,
                scale=self.scale,
            )
            return block.queries, dq, _contract(dk, expansion, k.shape[1]), _contract(dv, expansion, v.shape[1])

        # 16-bit blocks are summed in float32, as one kernel over all keys would; a sum of two is rounded once anyway.
        wide = q_ThD.dtype if self.size <= 2 else torch.promote_types(q_ThD.dtype, torch.float32)
        totals = [x.to(wide) for x in attend()[1:]]
        returning = None
        for step in range(1, self.size):
            queries, dq, *dkv = attend()
            layout.add(totals[0], dq, queries)
            if returning is not None:
                returning.collect(totals[1:])
            returning = _Return(self, layout, step, dkv)
            del dq, dkv  # not beside those of the next block
        if returning is not None:
            returning.collect(totals[1:])
        return tuple(x.to(q_ThD.dtype) for x in totals)

    def exchange(self, sent: Tensors, to: int, received: Tensors, source: int) -> list[dist.Work]:
        """Start sending to ring rank ``to`` and receiving from ``source``, all in one batch."""
        directions = (dist.isend, sent, to), (dist.irecv, received, source)
        return dist.batch_isend_irecv(
            [
                dist.P2POp(operation, x, group=self.group, group_peer=peer, tag=tag)
                for operation, tensors, peer in directions
                for tag, x in enumerate(tensors)
            ]
        )


class _KeyValueBlocks:
    """The blocks of keys and values in ring order; the next one is on its way while the current one is used."""

    def __init__(self, ring: Ring, layout: RingLayout, k: torch.Tensor, v: torch.Tensor) -> None:
        self._ring, self._layout, self._step = ring, layout, 0
        self._own = k, v
        self._arriving: tuple[Tensors, Tensors, list[dist.Work]] = self._own, (), []

    def next(self):
        ring, step = self._ring, self._step
        block, _, works = self._arriving
        for work in works:
            work.wait()
        self._arriving = self._start(step + 1) if step + 1 < ring.size else ((), (), [])
        self._step += 1
        return ring_step(ring.size, ring.rank, step), block

    def _start(self, step: int):
        ring = self._ring
        to, source = (ring.rank + step) % ring.size, (ring.rank - step) % ring.size
        keys = ring_step(ring.size, to, step).keys
        sent = [self._layout.take(x, keys).contiguous() for x in self._own]
        tokens = _tokens(self._layout, ring_step(ring.size, ring.rank, step).keys)
        received = [x.new_empty(tokens, *x.shape[1:]) for x in self._own]
        # What is sent is kept until the transfer is over.
        return received, sent, ring.exchange(sent, to, received, source)


class _Return:
    """dK and dV of a block on their way to its owner, and the matching ones of our keys on their way to us."""

    def __init__(self, ring: Ring, layout: RingLayout, step: int, dkv: Tensors) -> None:
        owner, helper = (ring.rank - step) % ring.size, (ring.rank + step) % ring.size
        self._layout, self._part = layout, ring_step(ring.size, helper, step).keys
        self._sent = [x.contiguous() for x in dkv]
        tokens = _tokens(layout, self._part)
        self._received = [x.new_empty(tokens, *x.shape[1:]) for x in dkv]
        self._works = ring.exchange(self._sent, owner, self._received, helper)

    def collect(self, totals: list[torch.Tensor]) -> None:
        for work in self._works:
            work.wait()
        for total, x in zip(totals, self._received, strict=True):
            self._layout.add(total, x, self._part)


def _tokens(layout: RingLayout, keys: str) -> int:
    return layout.whole.tokens_k if keys == ALL else layout.half.tokens_k


def _expand(x: torch.Tensor, expansion: torch.Tensor | None) -> torch.Tensor:
    return x if expansion is None else x.index_select(1, expansion)


def _contract(dx: torch.Tensor, expansion: torch.Tensor | None, heads: int) -> torch.Tensor:
    if expansion is None:
        return dx
    return dx.new_zeros(dx.shape[0], heads, dx.shape[2]).index_add_(1, expansion, dx)

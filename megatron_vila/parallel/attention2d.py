"""2D attention of packed documents: Ulysses inside, zigzag ring outside (LongVILA section 3.3).

q, k, v [s, heads, D] after the rotary embedding -> all-to-all over the Ulysses group -> zigzag ring -> all-to-all back
(``Attention2D.forward``). One autograd function saves its q, k, v, output and log-sum-exp; where a layer is run again for its
gradients, another one gets the saved output, so that attention never runs twice. With several chunks of heads the exchanges of
one chunk run under the attention of another. It knows neither Megatron-Core nor Transformers; the adapters to both use it
(``parallel/megatron_attention.py``, ``hf/mm_sp/enable.py``).

Legend: S tokens of a row, s local tokens (S/cp), T = U*s, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_vila import accelerator
from megatron_vila.parallel.kernels import AttentionKernel
from megatron_vila.parallel.peers import PeerMemory
from megatron_vila.parallel.ring import Ring, RingLayout
from megatron_vila.parallel.ulysses import Pending, Ulysses
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.row_plan import AttentionPlan


@dataclass(frozen=True)
class RowIndices:
    """A row's ``AttentionPlan`` on the device.

    ``order`` and ``inverse`` int64 [T] permute tokens at the Ulysses exchange (empty when ulysses = 1).
    """

    layout: RingLayout
    order: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, plan: AttentionPlan, device: torch.device) -> RowIndices:
        """Copies to the device only. No collective, no synchronization."""
        order, inverse = (accelerator.to_device(torch.from_numpy(x), device) for x in (plan.order, plan.inverse))
        return cls(RingLayout.of(plan, device), order, inverse)


class SavedAttention:
    """Output and log-sum-exp of one layer's attention for one row, from the forward pass to the backward pass.

    ``save`` stores a tensor and returns an object with ``prefetch()`` and ``take()``, as ``models.decoder.saved.HostStore.save``.
    """

    def __init__(self, save: Callable[[torch.Tensor], Any]) -> None:
        self._save = save
        self._held: tuple[Any, ...] = ()

    @property
    def is_filled(self) -> bool:
        return bool(self._held)

    def fill(self, out_sHD: torch.Tensor, lse_hT: torch.Tensor) -> None:
        self._held = self._save(out_sHD), self._save(lse_hT)

    def prefetch(self) -> None:
        for held in self._held:
            held.prefetch()

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [s, H, D] and log-sum-exp [h, T], on the device from now on."""
        return self._taken

    @cached_property
    def _taken(self) -> tuple[torch.Tensor, torch.Tensor]:
        out_sHD, lse_hT = (held.take() for held in self._held)
        return out_sHD, lse_hT

    def output(self) -> torch.Tensor:
        """What the layer's output projection gets: [s, 1, H*D]."""
        return self.take()[0].flatten(1).unsqueeze(1)


class HeadAttention(NamedTuple):
    """Attention of a chunk of heads over this rank's tokens after the exchange: its inputs, its output and their log-sum-exp."""

    q_ThD: torch.Tensor
    k_TkD: torch.Tensor
    v_TkD: torch.Tensor
    out_ThD: torch.Tensor
    lse_hT: torch.Tensor


@dataclass(frozen=True)
class Attention2D:
    """Causal self-attention of one rank of a (ulysses x ring) group with one kernel.

    ``expansion`` int64 repeats key/value heads for the kernel where the split cuts a group of query heads.
    """

    ulysses: Ulysses
    ring: Ring
    expansion: torch.Tensor | None

    @classmethod
    def of(
        cls,
        split: HeadSplit,
        kernel: AttentionKernel,
        scale: float,
        *,
        ulysses_group: dist.ProcessGroup,
        ring_group: dist.ProcessGroup,
        device: torch.device,
        peers: PeerMemory | None = None,
    ) -> Attention2D:
        """``split`` for as many ranks as ``ulysses_group`` has; ``scale`` multiplies the scores. ``peers`` belong to
        ``ulysses_group``; attentions that run one after the other may share them."""
        expansion = split.expansion(ulysses_group.rank())
        return cls(
            ulysses=Ulysses(split, ulysses_group.rank(), ulysses_group, peers),
            ring=Ring(kernel, scale, ring_group.size(), ring_group.rank(), ring_group),
            expansion=None if expansion is None else torch.tensor(expansion, device=device),
        )

    def __call__(
        self,
        q_sHD: torch.Tensor,
        k_sKD: torch.Tensor,
        v_sKD: torch.Tensor,
        row: RowIndices,
        saved: SavedAttention | None = None,
    ) -> torch.Tensor:
        """q [s, H, D], k and v [s, K, D] to the output [s, H, D].

        An empty ``saved`` is filled; a filled one gives the output, and only the backward pass is computed. All-to-all over the
        Ulysses group and point-to-point over the ring group, forward (unless ``saved`` is filled) and backward.
        """
        if saved is not None and saved.is_filled:
            return _SavedAttention2D.apply(q_sHD, k_sKD, v_sKD, row, self, saved)
        return _Attention2D.apply(q_sHD, k_sKD, v_sKD, row, self, saved)

    def forward(
        self, q_sHD: torch.Tensor, k_sKD: torch.Tensor, v_sKD: torch.Tensor, row: RowIndices
    ) -> tuple[torch.Tensor, list[HeadAttention]]:
        """The forward pass outside autograd: the output [s, H, D], and the attention of each chunk of heads it is made of.

        The chunks' k and v, side by side, are what a cache keeps: the keys and values of this ring rank's tokens (those of both
        ends of each document) for the query heads of this Ulysses rank. Collectives as in a call.
        """
        ulysses, ring, chunks = self.ulysses, self.ring, range(self.ulysses.split.chunks)
        attended, returning = [], Pending(lambda: None)
        coming = ulysses.to_heads(q_sHD, k_sKD, v_sKD, row.order, 0)
        for chunk in chunks:
            q, k, v = coming.wait()
            if chunk + 1 in chunks:
                coming = ulysses.to_heads(q_sHD, k_sKD, v_sKD, row.order, chunk + 1)
            # Without an exchange v may be a view, which would keep the whole tensor that it is a part of.
            v = v.contiguous()
            out, lse = ring.forward(q, k, v, row.layout, self.expansion)
            attended.append(HeadAttention(q, k, v, out, lse))
            if ulysses.split.ulysses == 1:
                return out, attended
            if chunk == 0:
                out_sHD = torch.empty_like(q_sHD)
            returning.wait()  # the transfer of the chunk before ran under this one's attention
            returning = ulysses.to_sequence(out, row.inverse, out_sHD, chunk)
        returning.wait()
        return out_sHD, attended


class _Attention2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_sHD, k_sKD, v_sKD, row: RowIndices, attention: Attention2D, saved: SavedAttention | None):
        out_sHD, chunks = attention.forward(q_sHD, k_sKD, v_sKD, row)
        ctx.save_for_backward(*(x for chunk in chunks for x in chunk))
        ctx.row, ctx.attention = row, attention
        if saved is not None:
            saved.fill(out_sHD, chunks[0].lse_hT if len(chunks) == 1 else torch.cat([chunk.lse_hT for chunk in chunks]))
        return out_sHD

    @staticmethod
    def backward(ctx, dout_sHD):
        saved, row = ctx.saved_tensors, ctx.row

        def start(chunk: int) -> Callable[[], tuple]:
            dout = ctx.attention.ulysses.outputs_to_heads([dout_sHD], row.order, row.inverse, chunk)
            fields = len(HeadAttention._fields)
            return lambda: (*dout.wait(), *saved[fields * chunk : fields * (chunk + 1)])

        return _gradients(ctx.attention, row, dout_sHD, start)


class _SavedAttention2D(torch.autograd.Function):
    """Attention whose output is known. q, k and v go through the Ulysses exchange in the backward pass, and so does the output
    together with its gradient."""

    @staticmethod
    def forward(ctx, q_sHD, k_sKD, v_sKD, row: RowIndices, attention: Attention2D, saved: SavedAttention):
        ctx.save_for_backward(q_sHD, k_sKD, v_sKD.contiguous())
        ctx.row, ctx.attention, ctx.saved = row, attention, saved
        out_sHD, _ = saved.take()
        return out_sHD.view_as(out_sHD)

    @staticmethod
    def backward(ctx, dout_sHD):
        ulysses, row = ctx.attention.ulysses, ctx.row
        out_sHD, lse = ctx.saved.take()
        lses = lse.chunk(ulysses.split.chunks)
        saved = ctx.saved_tensors

        def start(chunk: int) -> Callable[[], tuple]:
            inputs = ulysses.to_heads(*saved, row.order, chunk)
            outputs = ulysses.outputs_to_heads([dout_sHD, out_sHD], row.order, row.inverse, chunk)

            def finish():
                q, k, v = inputs.wait()
                dout, out = outputs.wait()
                return dout, q, k, v, out, lses[chunk]

            return finish

        return _gradients(ctx.attention, row, dout_sHD, start)


def _gradients(attention: Attention2D, row: RowIndices, dout_sHD: torch.Tensor, start: Callable[[int], Callable[[], tuple]]):
    """Gradients of q, k and v in the sequence layout, and nothing for the other three arguments.

    ``start(chunk)`` starts the exchange of a chunk; the function it returns gives dout, q, k, v, out and the log-sum-exp there.
    """
    ulysses, chunks = attention.ulysses, range(attention.ulysses.split.chunks)
    coming, returning = start(0), Pending(lambda: None)
    for chunk in chunks:
        given = coming()
        if chunk + 1 in chunks:
            coming = start(chunk + 1)
        grads = attention.ring.backward(*given, row.layout, attention.expansion)  # type: ignore[call-arg]
        del given
        if ulysses.split.ulysses == 1:
            return *grads, None, None, None
        if chunk == 0:
            tokens, kv_heads, dim = len(dout_sHD), ulysses.split.kv_heads, dout_sHD.shape[2]
            totals = tuple(dout_sHD.new_empty(tokens, n, dim) for n in (dout_sHD.shape[1], kv_heads, kv_heads))
        returning.wait()  # the transfer of the chunk before ran under this one's attention
        returning = ulysses.grads_to_sequence(grads, row.inverse, totals, chunk)
        del grads
    returning.wait()
    return *totals, None, None, None

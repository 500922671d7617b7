"""Sliding-window attention in the ring: any kernel computes the blocks of ``plan/windows.py``, which merge by log-sum-exp.

Legend: T query tokens and U key tokens of a step, n queries of a part, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from megatron_vila import accelerator
from megatron_vila.parallel.attention2d import RowIndices
from megatron_vila.parallel.kernels import AttentionKernel, Segments
from megatron_vila.parallel.ring import RingLayout
from megatron_vila.plan.row_plan import AttentionPlan
from megatron_vila.plan.tokens import RingStep
from megatron_vila.plan.windows import window_parts


class Part(NamedTuple):
    """A ``WindowPart`` on the device."""

    queries: torch.Tensor
    keys: torch.Tensor
    segments: Segments
    causal: bool


@dataclass(frozen=True)
class WindowedSegments(Segments):
    """A step's segments, and the parts of them that lie in the window."""

    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class WindowedLayout(RingLayout):
    """A ``RingLayout`` in which a token attends to itself and the ``window`` - 1 tokens before it.

    ``parts`` are those of each source rank.
    """

    parts: tuple[tuple[Part, ...], ...]

    def segments(self, block: RingStep) -> Segments:
        whole = super().segments(block)
        return WindowedSegments(whole.lengths_q, whole.lengths_k, parts=self.parts[block.source])


def windowed(row: RowIndices, plan: AttentionPlan, ring: int, rank: int, window: int) -> RowIndices:
    """``row``, made of ``plan``, for attention in a window on ring rank ``rank``. Copies to the device only."""
    layout = row.layout
    device = row.order.device

    def on_device(source: int) -> tuple[Part, ...]:
        return tuple(
            Part(
                accelerator.to_device(torch.from_numpy(part.queries), device),
                accelerator.to_device(torch.from_numpy(part.keys), device),
                Segments(part.lengths_q, part.lengths_k),
                part.causal,
            )
            for part in window_parts(plan.lengths, ring, rank, source, window)
        )

    plain = {field.name: getattr(layout, field.name) for field in fields(RingLayout)}
    return RowIndices(WindowedLayout(**plain, parts=tuple(map(on_device, range(ring)))), row.order, row.inverse)


class WindowedKernel:
    """An ``AttentionKernel`` for ``WindowedSegments`` that calls ``kernel`` for each of their parts."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self._kernel, self.name = kernel, kernel.name

    def forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        """As ``AttentionKernel.forward``; the parts say what is causal."""
        assert isinstance(segments, WindowedSegments)
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        out_THD = torch.zeros_like(q_THD, dtype=wide, memory_format=torch.contiguous_format)
        lse_HT = out_THD.new_full((q_THD.shape[1], q_THD.shape[0]), -torch.inf)
        for part in segments.parts:
            q_nHD, k_mKD, v_mKD = q_THD[part.queries], k_UKD[part.keys], v_UKD[part.keys]
            part_out, part_lse = self._kernel.forward(q_nHD, k_mKD, v_mKD, part.segments, part.causal, scale)
            before_Hn = lse_HT[:, part.queries]
            total_Hn = torch.logaddexp(before_Hn, part_lse)
            kept, added = ((lse - total_Hn).exp().t().unsqueeze(-1) for lse in (before_Hn, part_lse))
            out_THD[part.queries] = out_THD[part.queries] * kept + part_out.to(wide) * added
            lse_HT[:, part.queries] = total_Hn
        return out_THD.to(q_THD.dtype), lse_HT

    def backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        """As ``AttentionKernel.backward``; the parts say what is causal."""
        assert isinstance(segments, WindowedSegments)
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        totals = [torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q_THD, k_UKD, v_UKD)]
        for part in segments.parts:
            grads = self._kernel.backward(
                dout_THD[part.queries],
                q_THD[part.queries],
                k_UKD[part.keys],
                v_UKD[part.keys],
                out_THD[part.queries],
                lse_HT[:, part.queries],
                segments=part.segments,
                causal=part.causal,
                scale=scale,
            )
            for total, tokens, grad in zip(totals, (part.queries, part.keys, part.keys), grads, strict=True):
                # Keys are in one part twice where two blocks share them.
                total.index_add_(0, tokens, grad.to(wide))
        return tuple(total.to(x.dtype) for total, x in zip(totals, (q_THD, k_UKD, v_UKD), strict=True))

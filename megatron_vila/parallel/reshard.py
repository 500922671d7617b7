"""Stage 2 of MM-SP: every visual token goes straight from the rank that made it to the rank that owns its place.

One variable all-to-all forward, its opposite backward (LongVILA section 3.2, without the all-gather of all tokens on all
ranks). Counts come from the row's plan (``plan/row_plan.py``): no metadata is exchanged and nothing waits for the device.

Legend: N visual tokens made here, M visual tokens owned here, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vila import accelerator
from megatron_vila.plan.tokens import RankReshard


@dataclass(frozen=True)
class Reshard:
    """One row's exchange on one rank of ``group``: its ``plan``, with ``send_order`` [N] and ``slots`` [M] on the device."""

    plan: RankReshard
    group: dist.ProcessGroup
    send_order: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, plan: RankReshard, group: dist.ProcessGroup, device: torch.device) -> Reshard:
        """``group`` are the tp*cp ranks of one block, tp fastest; ``plan`` is of this rank."""
        order, slots = (accelerator.to_device(torch.from_numpy(x), device) for x in (plan.send_order, plan.slots))
        return cls(plan, group, order, slots)

    def __call__(self, made_NH: torch.Tensor) -> torch.Tensor:
        """Visual tokens made here [N, H] to the visual tokens owned here [M, H], in the order of ``slots``.

        All-to-all over the tp_cp group, forward and backward; called by every rank of the block, those without frames or
        without visual tokens included. Raises ``ValueError`` if the number of tokens is not the planned one.
        """
        if made_NH.shape[0] != sum(self.plan.send_counts):
            raise ValueError(f"{made_NH.shape[0]} visual tokens were made here but the plan has {sum(self.plan.send_counts)}")
        return _Exchange.apply(made_NH, self)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, made_NH: torch.Tensor, reshard: Reshard) -> torch.Tensor:
        ctx.reshard, plan = reshard, reshard.plan
        return _all_to_all(made_NH.index_select(0, reshard.send_order), plan.send_counts, plan.recv_counts, reshard)

    @staticmethod
    def backward(ctx, grad_MH: torch.Tensor) -> tuple[torch.Tensor, None]:
        reshard, plan = ctx.reshard, ctx.reshard.plan
        sent_NH = _all_to_all(grad_MH.contiguous(), plan.recv_counts, plan.send_counts, reshard)
        return torch.empty_like(sent_NH).index_copy_(0, reshard.send_order, sent_NH), None


def _all_to_all(x: torch.Tensor, send: list[int], recv: list[int], reshard: Reshard) -> torch.Tensor:
    if reshard.plan.moved == 0:
        return x
    out = x.new_empty(sum(recv), x.shape[1])
    dist.all_to_all_single(out, x, recv, send, group=reshard.group)
    return out

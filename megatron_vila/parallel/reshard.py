"""Stage 2 of MM-SP: every visual token goes straight from the rank that made it to the rank that owns its place.

One variable all-to-all forward, its opposite backward (LongVILA section 3.2, without the all-gather of all tokens on all
ranks). Counts come from ``layout.plan_reshard``: no metadata is exchanged and nothing waits for the device.

Legend: N visual tokens made here, M visual tokens owned here, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vila.plan.tokens import ReshardPlan


@dataclass(frozen=True)
class Reshard:
    """One row's exchange as one rank sees it.

    ``send_order`` int64 [N] and ``slots`` int64 [M] are on the device; ``moved`` counts the tokens that change rank in the
    whole block: at 0 no rank communicates.
    """

    group: dist.ProcessGroup
    send_counts: list[int]
    recv_counts: list[int]
    send_order: torch.Tensor
    slots: torch.Tensor
    moved: int

    @classmethod
    def of(cls, plan: ReshardPlan, rank: int, group: dist.ProcessGroup, device: torch.device) -> Reshard:
        """``rank`` is the rank in ``group``: the tp*cp ranks of one block, tp fastest."""
        return cls(
            group=group,
            send_counts=plan.send_counts(rank),
            recv_counts=plan.recv_counts(rank),
            send_order=torch.from_numpy(plan.send_order(rank)).to(device, non_blocking=True),
            slots=torch.from_numpy(plan.recv_slots(rank)).to(device, non_blocking=True),
            moved=plan.moved,
        )

    def __call__(self, made_NH: torch.Tensor) -> torch.Tensor:
        """Visual tokens made here [N, H] to the visual tokens owned here [M, H], in the order of ``slots``.

        All-to-all over the tp_cp group, forward and backward; called by every rank of the block, those without frames or
        without visual tokens included. Raises ``ValueError`` if the number of tokens is not the planned one.
        """
        if made_NH.shape[0] != sum(self.send_counts):
            raise ValueError(f"{made_NH.shape[0]} visual tokens were made here but the plan has {sum(self.send_counts)}")
        return _Exchange.apply(made_NH, self)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, made_NH: torch.Tensor, reshard: Reshard) -> torch.Tensor:
        ctx.reshard = reshard
        return _all_to_all(made_NH.index_select(0, reshard.send_order), reshard.send_counts, reshard.recv_counts, reshard)

    @staticmethod
    def backward(ctx, grad_MH: torch.Tensor) -> tuple[torch.Tensor, None]:
        reshard = ctx.reshard
        sent_NH = _all_to_all(grad_MH.contiguous(), reshard.recv_counts, reshard.send_counts, reshard)
        return torch.empty_like(sent_NH).index_copy_(0, reshard.send_order, sent_NH), None


def _all_to_all(x: torch.Tensor, send: list[int], recv: list[int], reshard: Reshard) -> torch.Tensor:
    if reshard.moved == 0:
        return x
    out = x.new_empty(sum(recv), x.shape[1])
    dist.all_to_all_single(out, x, recv, send, group=reshard.group)
    return out

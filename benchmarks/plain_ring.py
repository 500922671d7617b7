"""Ring attention as LongVILA's comparison has it, for benchmarks only: blocks go from neighbor to neighbor.

Each rank holds one contiguous piece of the sequence; keys and values, and in the backward pass their gradients as well, travel
once around the ring, and every rank waits for the one that has all blocks to compute (Ring Attention, arXiv 2310.01889).

Legend: s local tokens (S/R), H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_vila.parallel.kernels import AttentionKernel, Segments


def plain_ring_attention(
    q_sHD: torch.Tensor,
    k_sKD: torch.Tensor,
    v_sKD: torch.Tensor,
    kernel: AttentionKernel,
    scale: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Causal attention [s, H, D] of one sequence cut into contiguous pieces. Point-to-point over ``group``."""
    return _PlainRing.apply(q_sHD, k_sKD, v_sKD, kernel, scale, group)


class _PlainRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_sHD, k_sKD, v_sKD, kernel, scale, group):
        rank, size = group.rank(), group.size()
        segments = Segments((len(q_sHD),), (len(q_sHD),))
        blocks = torch.stack((k_sKD, v_sKD))
        out = lse = None
        for step in range(size):
            arriving = _pass_on(blocks, group) if step + 1 < size else None
            if step <= rank:
                part, part_lse = kernel.forward(q_sHD, blocks[0], blocks[1], segments, step == 0, scale)
                if out is None:
                    out, lse = part.to(part_lse.dtype), part_lse
                else:
                    new = torch.logaddexp(lse, part_lse)
                    old_share, new_share = ((x - new).exp().t().unsqueeze(-1) for x in (lse, part_lse))
                    out, lse = out * old_share + part * new_share, new
            blocks = _arrived(arriving)
        out = out.to(q_sHD.dtype)
        ctx.save_for_backward(q_sHD, k_sKD, v_sKD, out, lse)
        ctx.kernel, ctx.scale, ctx.group = kernel, scale, group
        return out

    @staticmethod
    def backward(ctx, dout_sHD):
        q_sHD, k_sKD, v_sKD, out_sHD, lse_Hs = ctx.saved_tensors
        rank, size = ctx.group.rank(), ctx.group.size()
        segments = Segments((len(q_sHD),), (len(q_sHD),))
        wide = torch.promote_types(q_sHD.dtype, torch.float32)
        blocks, grads = torch.stack((k_sKD, v_sKD)), torch.zeros(2, *k_sKD.shape, dtype=wide, device=k_sKD.device)
        dq = torch.zeros_like(q_sHD, dtype=wide)
        for step in range(size):
            arriving = _pass_on(blocks, ctx.group) if step + 1 < size else None
            if step <= rank:
                part = ctx.kernel.backward(
                    dout_sHD, q_sHD, blocks[0], blocks[1], out_sHD, lse_Hs, segments=segments, causal=step == 0, scale=ctx.scale
                )
                dq += part[0]
                grads += torch.stack(part[1:])
            # The gradients of a block go with it, and after the last step home.
            grads = _arrived(_pass_on(grads, ctx.group))
            blocks = _arrived(arriving)
        dk, dv = grads.to(q_sHD.dtype)
        return dq.to(q_sHD.dtype), dk, dv, None, None, None


def _pass_on(x: torch.Tensor, group: dist.ProcessGroup):
    rank, size = group.rank(), group.size()
    received = torch.empty_like(x)
    sending = dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size)
    receiving = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size)
    return x, received, dist.batch_isend_irecv([sending, receiving])


def _arrived(transfer) -> torch.Tensor | None:
    if transfer is None:
        return None
    _, received, works = transfer
    for work in works:
        work.wait()
    return received

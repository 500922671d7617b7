"""MMSPAttention: LongVILA's 2D attention as a Megatron-Core ``core_attention`` submodule.

q, k, v [S/cp, 1, heads, D] -> rotary embedding from explicit positions -> all-to-all over the Ulysses group -> zigzag ring
-> all-to-all back. One autograd function saves q, k, v, the output and its log-sum-exp.

Legend: s local tokens (S/cp), T = U*s, H query heads of this tensor-parallel rank, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import nn

from megatron_vila.parallel.kernels import select_kernel
from megatron_vila.parallel.layout import ulysses_permutation
from megatron_vila.parallel.ring import Ring, RingLayout
from megatron_vila.parallel.rope import apply_rotary
from megatron_vila.parallel.ulysses import HeadSplit, Ulysses


@dataclass
class RowParams(PackedSeqParams):
    """What every attention layer needs to know of a row; travels in Megatron's ``packed_seq_params``.

    ``cos_SD``, ``sin_SD`` [s, D] belong to the local tokens. ``order`` and ``inverse`` int64 [T] permute tokens at the
    Ulysses exchange (None when ulysses = 1).
    """

    cos_SD: torch.Tensor | None = None
    sin_SD: torch.Tensor | None = None
    layout: RingLayout | None = None
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: np.ndarray, cos_SD, sin_SD, ulysses: int, ring: int, ring_rank: int) -> RowParams:
        """Index tensors for one row on the device of ``cos_SD``; ``cu_seqlens`` int64 [D+1] on the host."""
        device = cos_SD.device
        order = inverse = None
        if ulysses > 1:
            permutation = torch.from_numpy(ulysses_permutation(cu_seqlens, ulysses, ring, ring_rank))
            order = permutation.to(device, non_blocking=True)
            inverse = torch.argsort(permutation).to(device, non_blocking=True)
        return cls(
            qkv_format="sbhd",  # rows have batch 1; Megatron must not re-slice the documents
            cos_SD=cos_SD,
            sin_SD=sin_SD,
            layout=RingLayout.of(cu_seqlens, ring, device),
            order=order,
            inverse=inverse,
        )


class MMSPAttention(nn.Module):
    """Causal self-attention of packed documents over a 2D (ulysses x ring) context-parallel group.

    Built by Megatron's ``SelfAttention`` with its usual keywords; ``ulysses_group``, ``ring_group`` and ``kernel_name`` come
    from ``functools.partial`` in the layer spec. Raises ``ValueError`` if ulysses does not divide the query heads of this
    tensor-parallel rank or the kernel cannot run here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        *,
        ulysses_group: dist.ProcessGroup,
        ring_group: dist.ProcessGroup,
        kernel_name: str,
        device: torch.device,
        deterministic: bool = False,
        softmax_scale: float | None = None,
        **_unused,
    ) -> None:
        super().__init__()
        if attention_type != "self":
            raise ValueError(f"MMSPAttention is causal self-attention; a layer asked for attention_type={attention_type!r}")
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        kv_heads = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
        split = HeadSplit(heads, kv_heads, ulysses_group.size())
        self.ulysses = Ulysses(split, ulysses_group.rank(), ulysses_group)
        self.ring = Ring(
            kernel=select_kernel(kernel_name, config.kv_channels, config.params_dtype, device, deterministic),
            scale=softmax_scale if softmax_scale is not None else config.kv_channels**-0.5,
            size=ring_group.size(),
            rank=ring_group.rank(),
            group=ring_group,
        )
        expansion = split.expansion(ulysses_group.rank())
        self.expansion = None if expansion is None else torch.tensor(expansion, device=device)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None = None,
        attn_mask_type=None,
        attention_bias: None = None,
        packed_seq_params: RowParams | None = None,
        **_unused,
    ) -> torch.Tensor:
        """query [s, 1, H, D], key and value [s, 1, K, D] before the rotary embedding; returns [s, 1, H*D]."""
        row = packed_seq_params
        q_sHD = apply_rotary(query.squeeze(1), row.cos_SD, row.sin_SD)
        k_sKD = apply_rotary(key.squeeze(1), row.cos_SD, row.sin_SD)
        out_sHD = _Attention2D.apply(q_sHD, k_sKD, value.squeeze(1), row, self.ulysses, self.ring, self.expansion)
        return out_sHD.flatten(1).unsqueeze(1)


class _Attention2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_sHD, k_sKD, v_sKD, row: RowParams, ulysses: Ulysses, ring: Ring, expansion):
        q, k, v = ulysses.to_heads(q_sHD, k_sKD, v_sKD, row.order)
        out, lse = ring.forward(q, k, v, row.layout, expansion)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.row, ctx.ulysses, ctx.ring, ctx.expansion = row, ulysses, ring, expansion
        return ulysses.to_sequence(out, row.inverse)

    @staticmethod
    def backward(ctx, dout_sHD):
        row, ulysses, ring = ctx.row, ctx.ulysses, ctx.ring
        dout = ulysses.grad_to_heads(dout_sHD, row.order)
        dq, dk, dv = ring.backward(dout, *ctx.saved_tensors, row.layout, ctx.expansion)
        return *ulysses.grads_to_sequence(dq, dk, dv, row.inverse), None, None, None, None

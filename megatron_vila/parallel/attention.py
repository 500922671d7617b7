"""MMSPAttention: LongVILA's 2D attention as a Megatron-Core ``core_attention`` submodule.

q, k, v [S/cp, 1, heads, D] -> rotary embedding from explicit positions -> 2D attention (``attention2d.py``).

Legend: s local tokens (S/cp), H query heads of this tensor-parallel rank, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import nn

from megatron_vila.parallel.attention2d import Attention2D, KeptAttention, RowIndices
from megatron_vila.parallel.kernels import select_kernel
from megatron_vila.parallel.peers import PeerMemory
from megatron_vila.parallel.rope import apply_rotary
from megatron_vila.parallel.ulysses import HeadSplit


@dataclass
class RowParams(PackedSeqParams):
    """What every attention layer needs to know of a row; travels in Megatron's ``packed_seq_params``.

    ``cos_SD``, ``sin_SD`` [s, D] belong to the local tokens; ``kept`` to the layer that is being run (``keeping``).
    """

    cos_SD: torch.Tensor | None = None
    sin_SD: torch.Tensor | None = None
    indices: RowIndices | None = None
    kept: KeptAttention | None = None

    def keeping(self, kept: KeptAttention | None) -> RowParams:
        """The same row for one layer, whose attention fills ``kept`` or, once it is filled, is taken from it."""
        return replace(self, kept=kept)

    @classmethod
    def of(cls, cu_seqlens: np.ndarray, cos_SD, sin_SD, ulysses: int, ring: int, ring_rank: int) -> RowParams:
        """Index tensors for one row on the device of ``cos_SD``; ``cu_seqlens`` int64 [D+1] on the host."""
        return cls(
            qkv_format="sbhd",  # rows have batch 1; Megatron must not re-slice the documents
            cos_SD=cos_SD,
            sin_SD=sin_SD,
            indices=RowIndices.of(cu_seqlens, ulysses, ring, ring_rank, cos_SD.device),
        )


class MMSPAttention(nn.Module):
    """Causal self-attention of packed documents over a 2D (ulysses x ring) context-parallel group.

    Built by Megatron's ``SelfAttention`` with its usual keywords; ``ulysses_group``, ``ring_group``, ``peers`` and
    ``kernel_name`` come from ``functools.partial`` in the layer spec. Raises ``ValueError`` if ulysses does not divide the query
    heads of this tensor-parallel rank or the kernel cannot run here.
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
        peers: PeerMemory | None,
        kernel_name: str,
        device: torch.device,
        ulysses_chunks: int = 1,
        deterministic: bool = False,
        softmax_scale: float | None = None,
        **_unused,
    ) -> None:
        super().__init__()
        if attention_type != "self":
            raise ValueError(
                f"MMSPAttention is causal self-attention; a layer asked for attention_type={attention_type!r}"
            )
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        kv_heads = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
        self.attention = Attention2D.of(
            HeadSplit(heads, kv_heads, ulysses_group.size(), ulysses_chunks),
            select_kernel(kernel_name, config.kv_channels, config.params_dtype, device, deterministic),
            softmax_scale if softmax_scale is not None else config.kv_channels**-0.5,
            ulysses_group,
            ring_group,
            device,
            peers,
        )

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
        out_sHD = self.attention(q_sHD, k_sKD, value.squeeze(1), row.indices, row.kept)
        return out_sHD.flatten(1).unsqueeze(1)

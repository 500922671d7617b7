"""MMSPAttention: LongVILA's 2D attention as the ``core_attention`` of a Megatron-Core layer.

Queries, keys and values as Megatron's product leaves them -> rotary embedding from explicit positions -> 2D attention
(``attention2d.py``).

Legend: s local tokens (S/cp), H query heads of this tensor-parallel rank, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import nn

from megatron_vila.parallel.attention2d import Attention2D, RowIndices, SavedAttention
from megatron_vila.parallel.kernels import select_kernel
from megatron_vila.parallel.peers import PeerMemory
from megatron_vila.parallel.rope import rotary_qkv
from megatron_vila.plan.heads import HeadSplit


@dataclass(frozen=True)
class RowParams:
    """What every attention layer needs to know of a row.

    ``cos_SD``, ``sin_SD`` [s, D] belong to the local tokens; ``saved`` to the layer that is being run (``with_saved``).
    """

    cos_SD: torch.Tensor
    sin_SD: torch.Tensor
    indices: RowIndices
    saved: SavedAttention | None = None

    def with_saved(self, saved: SavedAttention | None) -> RowParams:
        """The same row for one layer, whose attention fills ``saved`` or, once it is filled, is taken from it."""
        return replace(self, saved=saved)


class MMSPAttention(nn.Module):
    """Causal self-attention of packed documents over a 2D (ulysses x ring) context-parallel group.

    Built by Megatron's ``SelfAttention`` with its usual keywords; ``ulysses_group``, ``ring_group``, ``peers`` and
    ``kernel_name`` come from ``functools.partial`` in the layer spec. ``models/decoder/decoder.py`` calls it. Raises
    ``ValueError`` if ulysses does not divide the query heads of this tensor-parallel rank or the kernel cannot run here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        *,
        pg_collection: ProcessGroupCollection,
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
        self._tp_rank, self._per_group = pg_collection.tp.rank(), heads // kv_heads
        self.attention = Attention2D.of(
            HeadSplit(heads, kv_heads, ulysses_group.size(), ulysses_chunks),
            select_kernel(kernel_name, config.kv_channels, config.params_dtype, device, deterministic),
            softmax_scale if softmax_scale is not None else config.kv_channels**-0.5,
            ulysses_group=ulysses_group,
            ring_group=ring_group,
            device=device,
            peers=peers,
        )

    def forward(self, qkv_s1KX: torch.Tensor, row: RowParams) -> torch.Tensor:
        """Megatron's product of query, key and value [s, 1, K, (H/K + 2) * D], for each key/value head its query heads, the key
        and the value, to [s, 1, H*D]. Collectives: those of ``Attention2D``."""
        q_sHD, k_sKD, v_sKD = self.rotated(qkv_s1KX, row.cos_SD, row.sin_SD)
        return self.attention(q_sHD, k_sKD, v_sKD, row.indices, row.saved).flatten(1).unsqueeze(1)

    def rotated(
        self, qkv_s1KX: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [s, H, D] and k [s, K, D] turned by the angles of their positions, and v [s, K, D], from ``forward``'s product."""
        qkv_sKGD = qkv_s1KX.squeeze(1).unflatten(2, (-1, cos_SD.shape[1]))
        ranks = (qkv_sKGD.shape[2] - 2) // self._per_group
        if ranks > 1:  # share a key/value head: Megatron gives each of them the query heads of all
            queries = qkv_sKGD.narrow(2, self._tp_rank % ranks * self._per_group, self._per_group)
            qkv_sKGD = torch.cat([queries, qkv_sKGD[:, :, -2:]], dim=2)
        return rotary_qkv(qkv_sKGD, cos_SD, sin_SD)

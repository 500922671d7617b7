"""One rank's view of a packed row: its tokens, positions and labels, and how it exchanges the rest.

Legend: S tokens of the row, s = S/cp tokens of a CP rank, n supervised tokens held here (in this rank's tp slice of s).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_vila import accelerator
from megatron_vila.config.schema import LanguageConfig
from megatron_vila.parallel.megatron_attention import RowParams
from megatron_vila.parallel.reshard import Reshard
from megatron_vila.parallel.rope import rotary_angles
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.frames import deal_frames
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Row
from megatron_vila.plan.tokens import local_positions, plan_reshard


@dataclass(frozen=True)
class RowShard:
    """What the model needs of a row on one rank.

    ``token_ids_1s`` int64 [1, s] with 0 at visual places; ``reshard`` brings the visual tokens to theirs (first stage).
    ``selected_n`` int64 [n] are the slots (in this rank's tp slice) of supervised tokens, ``labels_n`` their labels,
    ``documents_n`` (host) their document in the row; ``counts`` the n of each tp rank. ``supervised`` counts the CP rank's.
    """

    params: RowParams
    token_ids_1s: torch.Tensor
    reshard: Reshard | None
    selected_n: torch.Tensor
    labels_n: torch.Tensor
    documents_n: np.ndarray
    counts: list[int]

    @property
    def supervised(self) -> int:
        return sum(self.counts)

    @classmethod
    def of(
        cls, row: Row, topology: ParallelTopology, llm: LanguageConfig, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> RowShard:
        """Cut ``row`` for this rank. Host arithmetic and copies to the device only; no collective, no synchronisation."""
        grid = topology.grid
        mine = local_positions(row.cu_seqlens, grid.cp, topology.cp_rank)
        token_ids, labels = row.token_ids[mine], row.labels[mine]
        cos_SD, sin_SD = rotary_angles(
            _to(row.positions[mine], device), head_dim, llm.rope_theta, llm.rope_scaling_factor, dtype
        )
        slices = np.split(labels != IGNORE, grid.tp)
        selected = np.flatnonzero(slices[topology.place.tp])
        held = mine[topology.place.tp * len(slices[0]) + selected]
        reshard = None
        if topology.is_first_stage:
            plan = plan_reshard(
                row.cu_seqlens,
                row.frame_starts,
                [frame.tokens for frame in row.frames],
                [frame.cost for frame in row.frames],
                grid.cp,
                grid.tp,
            )
            reshard = Reshard.of(plan, topology.encoder_rank, topology.tp_cp, device)
        return cls(
            params=RowParams.of(row.cu_seqlens, cos_SD, sin_SD, grid.ulysses, grid.ring, topology.place.ring),
            token_ids_1s=_to(np.where(token_ids == MEDIA_TOKEN, 0, token_ids)[None], device),
            reshard=reshard,
            selected_n=_to(selected, device),
            labels_n=_to(row.labels[held], device),
            documents_n=np.searchsorted(row.cu_seqlens, held, side="right") - 1,
            counts=[int(part.sum()) for part in slices],
        )


def local_frames(row: Row, topology: ParallelTopology) -> range:
    """The frames of ``row`` that this rank decodes and encodes: none after the first pipeline stage."""
    if not topology.is_first_stage:
        return range(0)
    boundaries = deal_frames([frame.cost for frame in row.frames], topology.grid.encoders)
    rank = topology.encoder_rank
    return range(int(boundaries[rank]), int(boundaries[rank + 1]))


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return accelerator.to_device(torch.from_numpy(np.ascontiguousarray(array)), device)

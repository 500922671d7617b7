"""One rank's part of a packed row on its device, copied from the plan that ``plan/row_plan.py`` has made.

Legend: s tokens of a CP rank, n supervised tokens held here (in this rank's tp slice of s).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_vila import accelerator
from megatron_vila.config.schema import LanguageConfig
from megatron_vila.parallel.attention2d import RowIndices
from megatron_vila.parallel.megatron_attention import RowParams
from megatron_vila.parallel.reshard import Reshard
from megatron_vila.parallel.rope import rotary_angles
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row_plan import ShardPlan
from megatron_vila.plan.sizes import head_dim


@dataclass(frozen=True)
class RowShard:
    """What the model needs of a row on one rank.

    ``token_ids_1s`` int64 [1, s] is 0 at the places of visual tokens; ``reshard`` brings those to their places (on the first
    stage). ``selected_n`` int64 [n] are the indices of the supervised tokens in this rank's tp slice, ``labels_n`` their labels;
    ``counts`` has the n of each tp rank, on the host.
    """

    params: RowParams
    token_ids_1s: torch.Tensor
    reshard: Reshard
    selected_n: torch.Tensor
    labels_n: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls, plan: ShardPlan, topology: ParallelTopology, llm: LanguageConfig, dtype: torch.dtype, device: torch.device
    ) -> RowShard:
        """``plan`` is of this rank; ``dtype`` is the model's. Copies to the device and the rotary angles there; no collective, no
        synchronization."""

        def there(array: np.ndarray) -> torch.Tensor:
            return accelerator.to_device(torch.from_numpy(array), device)

        angles = rotary_angles(there(plan.positions), head_dim(llm), llm.rope_theta, llm.rope_scaling_factor, dtype)
        return cls(
            params=RowParams(*angles, RowIndices.of(plan.attention, device)),
            token_ids_1s=there(plan.token_ids)[None],
            reshard=Reshard.of(plan.reshard, topology.tp_cp, device),
            selected_n=there(plan.selected),
            labels_n=there(plan.labels),
            counts=plan.counts,
        )

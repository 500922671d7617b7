"""ParallelTopology: (tp, pp, ulysses, ring; dp follows) on Megatron-Core's own process groups.

The only file that touches ``megatron.core.parallel_state``. MM-SP is Megatron's context-parallel group of size
cp = ulysses x ring; its two levels are Megatron's hierarchical CP groups, ulysses innermost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vila import processes
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.plan.grid import Coordinates, GridShape

# Groups that parallel_state.destroy_model_parallel leaves (0.16.1 and 0.19.2): their threads would live on.
_NOT_DESTROYED = (
    "_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO",
)


@dataclass(frozen=True)
class ParallelTopology:
    """This rank's place in the grid and its groups.

    ``block_cpu`` is a gloo group over the block (tp x cp x pp) that shares one sample: the loader agrees on broken files
    there without touching the device. ``world_cpu`` is one over all ranks of the run, which share the stream of samples.
    """

    grid: GridShape
    rank: int
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    tp_cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    block_cpu: dist.ProcessGroup
    world_cpu: dist.ProcessGroup
    collection: ProcessGroupCollection

    @classmethod
    def create(cls, parallel: ParallelConfig, timeout_minutes: float = 30.0) -> ParallelTopology:
        """Make Megatron's groups over the initialized default group (collective over all ranks). Collectives of all of them
        wait ``timeout_minutes`` for a rank.

        Raises ``ValueError`` on every rank, before any group is made, if the sizes do not divide the world size.
        """
        grid = GridShape.of(dist.get_world_size(), parallel.tp, parallel.pp, parallel.ulysses, parallel.ring)
        timeout = processes.collective_timeout(timeout_minutes)
        processes.before_end(cls.destroy)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=grid.tp,
            pipeline_model_parallel_size=grid.pp,
            context_parallel_size=grid.cp,
            hierarchical_context_parallel_sizes=[grid.ulysses, grid.ring],
            distributed_timeout_minutes=timeout.total_seconds() / 60,
        )
        rank = dist.get_rank()
        block_cpu, _ = dist.new_subgroups_by_enumeration(grid.groups("block"), timeout, backend="gloo")
        world_cpu = block_cpu if grid.dp == 1 else dist.new_group(timeout=timeout, backend="gloo")
        cp = parallel_state.get_context_parallel_group()
        ulysses, ring = parallel_state.get_hierarchical_context_parallel_groups()
        tp_cp = parallel_state.get_tensor_and_context_parallel_group()
        return cls(
            grid=grid,
            rank=rank,
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            cp=cp,
            # Groups of the same ranks are one: each has buffers of its own on the device.
            ulysses=cp if grid.ring == 1 else ulysses,
            ring=cp if grid.ulysses == 1 else ring,
            tp_cp=cp if grid.tp == 1 else tp_cp,
            dp=parallel_state.get_data_parallel_group(),
            dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
            block_cpu=block_cpu,
            world_cpu=world_cpu,
            collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

    @staticmethod
    def destroy() -> None:
        """Forget Megatron's groups, so that another grid can be made in this process, or it can end."""
        parallel_state.destroy_model_parallel()
        for name in _NOT_DESTROYED:
            setattr(parallel_state, name, None)

    @property
    def place(self) -> Coordinates:
        return self.grid.coordinates(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.place.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place.pp == self.grid.pp - 1

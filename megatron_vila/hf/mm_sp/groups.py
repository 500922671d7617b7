"""The process groups of MM-SP under Transformers: who shares a sample, and who shares it how."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_vila.plan.grid import GridShape


@dataclass(frozen=True)
class MMSPGroups:
    """This rank's place and groups.

    ``everyone`` trains together. ``sample`` are the ulysses x ring ranks that share each sample, consecutive ranks of
    ``everyone``; ``ulysses`` and ``ring`` are its two levels, ``alone`` is this rank by itself. The
    axis dp of ``grid`` numbers the samples' groups.
    """

    grid: GridShape
    everyone: dist.ProcessGroup
    sample: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    alone: dist.ProcessGroup

    @classmethod
    def of(cls, ulysses: int, ring: int, everyone: dist.ProcessGroup) -> MMSPGroups:
        """Make the groups; collective over ``everyone``. Raises ``ValueError`` on every rank if the sizes do not fit."""
        size = everyone.size()
        if ulysses < 1 or ring < 1 or size % (ulysses * ring):
            raise ValueError(
                f"ulysses={ulysses} times ring={ring} does not divide the {size} ranks of group; start a multiple of "
                f"{max(ulysses, 1) * max(ring, 1)} processes or choose sizes of at least 1 whose product divides {size}"
            )
        grid = GridShape.of(size, ulysses=ulysses, ring=ring)
        ranks = dist.get_process_group_ranks(everyone)

        def make(members: list[int]) -> dist.ProcessGroup:
            return dist.new_group([ranks[member] for member in members], use_local_synchronization=True)

        mine = everyone.rank()
        sample, inner, outer = (make(grid.group(kind, mine)) for kind in ("cp", "ulysses", "ring"))
        return cls(grid, everyone, sample, inner, outer, make([mine]))

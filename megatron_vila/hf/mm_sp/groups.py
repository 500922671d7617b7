"""The process groups of MM-SP under Transformers: which ranks share a sample, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_vila.plan.grid import GridShape


@dataclass(frozen=True)
class MMSPGroups:
    """This rank's place and groups.

    ``everyone`` holds the ranks that train together. ``sample`` holds the ulysses x ring ranks that share each sample, which are
    consecutive in ``everyone``. ``ulysses`` and ``ring`` are this rank's groups inside ``sample``, ``alone`` holds this rank
    only. ``host`` holds the ranks of ``sample`` and exchanges host memory (gloo). The axis dp of ``grid`` numbers the sample
    groups.
    """

    grid: GridShape
    everyone: dist.ProcessGroup
    sample: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    alone: dist.ProcessGroup
    host: dist.ProcessGroup

    @classmethod
    def of(cls, ulysses: int, ring: int, everyone: dist.ProcessGroup) -> MMSPGroups:
        """Make the groups. Collective over ``everyone``. Raises ``ValueError`` on every rank if the sizes do not fit, or are not
        the same on all."""
        size = everyone.size()
        ranks = dist.get_process_group_ranks(everyone)
        # Of host memory: no rank need have chosen its GPU yet.
        host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        told: list[Any] = [None] * size
        dist.all_gather_object(told, (ulysses, ring), group=host)
        if other := next((rank for rank in range(size) if told[rank] != told[0]), 0):
            given = ", ".join(f"rank {rank} has ulysses={told[rank][0]} and ring={told[rank][1]}" for rank in (0, other))
            raise ValueError(f"the ranks of group ask for different layouts: {given}; give all the same sizes")
        if ulysses < 1 or ring < 1 or size % (ulysses * ring):
            raise ValueError(
                f"ulysses={ulysses} times ring={ring} does not divide the {size} ranks of group; start a multiple of "
                f"{max(ulysses, 1) * max(ring, 1)} processes or choose sizes of at least 1 whose product divides {size}"
            )
        grid = GridShape.of(size, ulysses=ulysses, ring=ring)

        def make(members: list[int], backend: str | None = None) -> dist.ProcessGroup:
            return dist.new_group([ranks[member] for member in members], backend=backend, use_local_synchronization=True)

        mine = everyone.rank()
        sample, inner, outer = (make(grid.group(kind, mine)) for kind in ("cp", "ulysses", "ring"))
        return cls(grid, everyone, sample, inner, outer, make([mine]), make(grid.group("cp", mine), "gloo"))

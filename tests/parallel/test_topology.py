"""The groups of a topology on real gloo ranks."""

import pytest
import torch.distributed as dist

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.parallel.topology import ParallelTopology
from tests.ranks import pool

AXES = ("tp", "cp", "ulysses", "ring", "tp_cp", "dp", "dp_cp")


def groups_of(rank: int, parallel: ParallelConfig) -> dict[str, tuple[list[int], int]]:
    """The ranks of each group in order, and which object it is."""
    topology = ParallelTopology.create(parallel)
    found = {axis: (dist.get_process_group_ranks(getattr(topology, axis)), id(getattr(topology, axis))) for axis in AXES}
    topology.destroy()
    return found


@pytest.mark.parametrize(
    ("parallel", "one"),
    [
        (ParallelConfig(ulysses=4), ("cp", "ulysses", "tp_cp")),
        (ParallelConfig(ring=4), ("cp", "ring", "tp_cp")),
        (ParallelConfig(ulysses=2, ring=2), ("cp", "tp_cp")),
        (ParallelConfig(tp=2, ulysses=2), ("cp", "ulysses")),
    ],
    ids=str,
)
def test_exchanges_of_the_same_ranks_share_one_group(parallel, one):
    for rank, groups in enumerate(pool.run(4, groups_of, parallel)):
        assert len({groups[axis][1] for axis in one}) == 1
        # Gradients are reduced while hidden states travel: in a group of their own.
        assert groups["dp_cp"][1] != groups["cp"][1]
        for axis in ("tp", "cp", "ulysses", "ring", "tp_cp"):
            ranks, size = groups[axis][0], {"cp": parallel.ulysses * parallel.ring, "tp_cp": 4}.get(axis)
            assert rank in ranks and len(ranks) == (size or getattr(parallel, axis))

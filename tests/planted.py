"""The trainer with a fault in its second step, as real processes: ``python -m tests.planted ARGUMENTS`` is a rank, of any
launcher, and ``python -m tests.planted launch ARGUMENTS`` starts two by our own.

Rank 0 meets the consequence, and has left its file when rank 1 meets the cause.
"""

import sys
import time
from pathlib import Path

from megatron_vila import train

CAUSE = "CUDA error: an illegal memory access was encountered (the cause)"
CONSEQUENCE = "NCCL: Connection closed by peer (the consequence)"


def plant() -> None:
    from megatron_vila.training.trainer import Trainer

    step = Trainer._train_step

    def fail(self, rows):
        if self.step == 0:
            return step(self, rows)
        if self.topology.rank == 0:
            raise RuntimeError(CONSEQUENCE)
        while not Path(self.config.train.output, "failures/rank-0.txt").exists():
            time.sleep(0.01)
        raise RuntimeError(CAUSE)

    Trainer._train_step = fail


def rank(arguments: list[str]) -> int:
    """As ``launch.train_rank`` around a trainer with the fault."""
    from megatron_vila import accelerator, launch

    accelerator.prepare()
    plant()
    return launch.train_rank(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        from megatron_vila import launch

        sys.exit(launch.launch(launch.World(ranks_per_node=2), rank, sys.argv[2:]))
    from megatron_vila import accelerator

    accelerator.prepare()
    plant()
    train.leave(train.main(sys.argv[1:]))

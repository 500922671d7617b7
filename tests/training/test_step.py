"""What the thread that trains does and does not do in a step."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megatron_vila.config.schema import Config, ParallelConfig
from megatron_vila.plan import row_plan
from tests import samples
from tests.parallel import contract
from tests.ranks import pool

ROWS = [[samples.document("a", "ttFtFFttt")], [samples.document("b", "tFttt"), samples.document("c", "ttttttt")]]


def planning(rank: int, config: Config, parallel: ParallelConfig) -> set[str]:
    """Planning functions of ``plan/`` that this thread calls in a step over rows that are planned."""
    topology, *_, step = contract.steps(config, ROWS, parallel, torch.float64)
    folder, called = Path(row_plan.__file__).parent, set()
    files = {str(folder / name) for name in ("row_plan.py", "tokens.py", "frames.py")}

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename in files:
            called.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    topology.destroy()
    return called


def test_the_thread_that_trains_plans_no_row():
    for called in pool.run(4, planning, samples.config(layers=2), ParallelConfig(ulysses=2, ring=2)):
        assert called == {"ring_step"}, "which block comes next in the ring is no plan of a row"

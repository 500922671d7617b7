"""Runs started as a user does, by torchrun: every rank imports everything itself."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.endure.forks import Run
from tests.training.real_run import children, command, environment


class Torchrun:
    """Starts runs of at least two ranks; the same surface as ``forks.Zygote``."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen] = {}

    def start(self, arguments: Sequence[str], world: int, log: Path) -> Run:
        """Start the run; returns when its ranks are there."""
        settings = environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
        with open(log, "ab") as said:
            process = subprocess.Popen(command(*arguments, processes=world), env=settings, stdout=said, stderr=said)
        self._processes[process.pid] = process
        while len(ranks := children(process.pid)) < world:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        return Run(process.pid, tuple(ranks[:world]), log)

    def status(self, run: Run) -> int:
        """Exit code of torchrun, which has ended; minus the number of the signal that killed it."""
        return self._processes.pop(run.launcher).wait()

"""The ``Watch`` of a run, which its trainer tells where it is."""

from __future__ import annotations

from megatron_vila.failing.failures import Reporter
from megatron_vila.failing.watch import Watch
from megatron_vila.training.lock import release_all
from megatron_vila.training.roles import Watcher


class RunWatch(Watch, Watcher):
    """A ``Watch`` that lets go of the run's folder where it has to end the process."""

    def __init__(self, timeout_minutes: float, reporter: Reporter) -> None:
        super().__init__(timeout_minutes, reporter, before_end=release_all)

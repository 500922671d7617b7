"""Where each rank of a run is, so that the one that does not come is named instead of a raw trace after a silence.

Each rank notes its step and phase; a thread writes them to the store that all ranks share, with a count that shows that the
process lives. When a collective times out (``train.timeout_minutes``), or this rank stands in one phase for longer than that,
the ranks that are behind or no longer respond are the answer.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import torch.distributed as dist

from megatron_vila.errors import PeerError, StallError
from megatron_vila.training import failures
from megatron_vila.training.failures import within
from megatron_vila.training.lock import release_all

PHASES = (
    "starting",
    "reading samples",
    "in the forward and backward pass or the update",
    "adding up what was measured",
    "saving a checkpoint",
    "evaluating",
    "ending",
)
"""in the order of a step"""
_ROOM_S = 5.0
"""a collective that times out in the main thread comes first"""
_PEER_FAILED_S = 30.0
"""what a rank has to end in after another one wrote down why it failed"""
_NAMED = 8


@dataclass(frozen=True)
class Seen:
    """What a rank last wrote: its place, and a count that grows while its process lives."""

    rank: int
    step: int
    phase: int
    beat: int
    process: str

    @property
    def place(self) -> tuple[int, int]:
        return self.step, self.phase

    def __str__(self) -> str:
        return f"step {self.step}, {PHASES[self.phase]}"


class Watch:
    """One rank's view of all ranks. Use it as a context manager within the default process group; alone it does nothing.

    ``at`` costs no communication. The thread ends the process if another rank failed and this one does not get out of a
    collective, or if it stands still for ``timeout_minutes`` while others are missing.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self._timeout_s = timeout_minutes * 60
        self.interval_s = min(10.0, max(0.2, self._timeout_s / 10))
        self._place, self._since, self._beat = (0, 0), time.monotonic(), 0
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._done = threading.Event()
        # a connection of its own: the main thread may wait in the other one
        self._store = dist.distributed_c10d._get_default_store().clone() if self._world > 1 else None

    def __enter__(self) -> Watch:
        if self._store is not None:
            threading.Thread(target=self._keep, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises ``StallError`` in the place of a timeout if ranks are missing."""
        stall = self.describe_stall() if self._store is not None and failures.is_late(error) else None
        self._done.set()
        if stall is not None:
            raise StallError(stall) from error

    def at(self, step: int, phase: str) -> None:
        """This rank is now in ``phase`` (one of ``PHASES``) of ``step`` (from 1)."""
        self._place, self._since = (step, PHASES.index(phase)), time.monotonic()

    def describe_stall(self) -> str | None:
        """Who did not come, as a message; None if all ranks respond and are where this one is. Takes some intervals."""
        first = within(10.0, self._read)
        for _ in range(3):
            time.sleep(self.interval_s)
            within(10.0, self._write)  # ranks that ask at the same time must see this one alive
        second = within(10.0, self._read)
        if not first or not second:
            return self._message(["the process that keeps the ranks' store (rank 0's node) does not respond"])
        beats = {seen.rank: seen.beat for seen in first}
        silent = [seen for seen in second if beats.get(seen.rank) == seen.beat and seen.rank != self._rank]
        last, front = min(seen.place for seen in second), max(seen.place for seen in second)
        behind = [seen for seen in second if seen.place == last < front]
        never = sorted(set(range(self._world)) - {seen.rank for seen in second})
        gone = "it is stopped, or its node is gone"
        lines = [f"rank {seen.rank} ({seen.process}) does not respond: it was at {seen}; {gone}" for seen in silent]
        lines += [f"rank {rank} has not come as far as the start of the run" for rank in never]
        if not lines:  # else these wait as well
            lines = [f"rank {seen.rank} ({seen.process}) is still at {seen}" for seen in behind]
        return self._message(lines) if lines else None

    def _message(self, missing: list[str]) -> str:
        shown = missing[:_NAMED] + [f"and {len(missing) - _NAMED} more"] * (len(missing) > _NAMED)
        step, phase = self._place
        return (
            f"{'; '.join(shown)}. Other ranks waited for train.timeout_minutes={self._timeout_s / 60:g} at step {step}, "
            f"{PHASES[phase]}. Look at that process and its node; if it only needs longer, raise train.timeout_minutes. The "
            "same command goes on from the last checkpoint"
        )

    def _keep(self) -> None:
        peer_failed_at = None
        while not self._done.wait(self.interval_s):
            try:
                self._write()
                if peer_failed_at is None and self._store.check([failures.PLACE]):
                    peer_failed_at = time.monotonic()
            except RuntimeError:
                return  # the store has ended with the launcher, and the ranks end too
            now = time.monotonic()
            if peer_failed_at is not None and now - peer_failed_at > _PEER_FAILED_S:
                self._end(PeerError("another rank has failed"))
            if now - self._since > self._timeout_s + _ROOM_S and (stall := self.describe_stall()):
                if not self._is_behind():
                    self._end(StallError(stall))
                self._since = time.monotonic()

    def _is_behind(self) -> bool:
        return any(seen.place > self._place for seen in within(10.0, self._read) or ())

    def _end(self, error: Exception) -> None:
        """Leave from this thread: the main one waits in a collective that nobody will complete."""
        status = failures.report(error)
        release_all()
        sys.stderr.flush()
        os._exit(status)

    def _write(self) -> None:
        self._beat += 1
        self._store.set(f"megatron_vila/at/{self._rank}", json.dumps([*self._place, self._beat, self._process]))

    def _read(self) -> list[Seen]:
        keys = {rank: f"megatron_vila/at/{rank}" for rank in range(self._world)}
        there = [rank for rank, key in keys.items() if self._store.check([key])]
        values = self._store.multi_get([keys[rank] for rank in there])
        return [Seen(rank, *json.loads(value)) for rank, value in zip(there, values, strict=True)]

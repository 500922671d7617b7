"""Keeps where each rank of a run is, so that a run that hangs ends with the names of the ranks that are missing.

Each rank notes its step and phase; a thread writes them to the store that all ranks share, with a count that shows that the
process lives. When a collective times out (``train.timeout_minutes``), or this rank stays in one phase for longer than that,
the ranks that are behind or no longer respond are named.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist

from megatron_vila import processes
from megatron_vila.errors import PeerError, StallError
from megatron_vila.failing import failures
from megatron_vila.failing.failure_board import FIRST, within

_ROOM_S = 5.0
"""what the thread waits beyond the timeout, so that a collective that times out in the main thread comes first"""
_PEER_FAILED_S = 20.0
"""how long a rank may take to end after another one failed: a launcher kills it after 30 s, and it has to write its file"""
_NAMED = 8


class Place(NamedTuple):
    """Where a rank is; a later place is greater. ``earlier`` counts the phases of the step before this one."""

    step: int = 0
    earlier: int = 0
    phase: str = "starting"

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


@dataclass(frozen=True)
class Seen:
    """What a rank last wrote: its place, and a count that grows while its process lives."""

    rank: int
    place: Place
    beat: int
    process: str


class Watch:
    """One rank's view of all ranks, from their meeting (``processes.meet``) to the end of the process. A context manager; for a
    lone rank it only keeps where the rank is.

    ``at`` costs no communication. The thread ends the process if another rank failed and this one does not get out of a
    collective, or if it stands still for ``timeout_minutes`` while others are missing; ``before_end`` is called then.
    ``setting`` is what messages call the timeout.
    """

    def __init__(
        self,
        timeout_minutes: float,
        reporter: failures.Reporter,
        before_end: Callable[[], None] = lambda: None,
        setting: str = "train.timeout_minutes",
    ) -> None:
        self._reporter, self._before_end = reporter, before_end
        reporter.doing = lambda: str(self._place)
        self._timeout_s, self._setting = timeout_minutes * 60, setting
        self.interval_s = min(4.0, max(0.2, self._timeout_s / 10))
        self._place, self._since, self._beat = Place(), time.monotonic(), 0
        self._rank, self._world = processes.rank_and_world()
        self._done = threading.Event()
        self._store = processes.shared_store()
        # A second connection, for ``part``, which waits while the thread writes. Made now, because connecting to a store that has
        # ended takes a whole timeout.
        self._parting = processes.shared_store()
        self._here: list[Seen] = []
        """ranks that responded when ``_describe_stall`` last looked"""

    def __enter__(self) -> Self:
        if self._store is not None:
            threading.Thread(target=self._keep, args=(self._store,), name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises ``StallError`` in the place of a timeout if ranks are missing.

        A rank that lost its connections responds until the cause is known, so that others do not take it for the missing one.
        """
        stall = None
        if error is not None:
            self._reporter.note()
        if self._store is not None and error is not None:
            if failures.is_late(error):
                stall = self._describe_stall(self._store)
            else:
                self._reporter.await_cause(error)
        self._done.set()
        if stall is not None:
            raise StallError(stall) from error

    def at(self, step: int, phase: str) -> None:
        """This rank is now in ``phase`` (in words) of ``step``. All ranks go through the same phases."""
        earlier = self._place.earlier + 1 if step == self._place.step else 0
        self._place, self._since = Place(step, earlier, phase), time.monotonic()

    def part(self) -> None:
        """Wait until all ranks have come to their end.

        Otherwise a launcher would wait forever for a rank that hangs after its last collective. Raises ``RuntimeError`` after
        ``timeout_minutes``, which ``__exit__`` turns into a ``StallError`` with the missing ranks.
        """
        if self._parting is None:
            return
        keys = [f"megatron_vila/ended/{rank}" for rank in range(self._world)]
        try:
            self._parting.set(keys[self._rank], "yes")
            self._parting.wait(keys, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            if failures.is_late(error):
                raise
            # Else the store has ended, whose process ends as the last rank or after it: no rank is missing.

    def _describe_stall(self, store: dist.Store) -> str | None:
        """A message that names the missing ranks; None if all respond and are where this one is. Takes some intervals."""
        first = within(10.0, lambda: self._read(store))
        for _ in range(3):
            time.sleep(self.interval_s)
            within(10.0, lambda: self._write(store))  # ranks that ask at the same time must see this one alive
        second = within(10.0, lambda: self._read(store))
        if not first or not second:
            self._here = []
            keeper = "the process that keeps the ranks' store, the launcher on rank 0's node,"
            return self._message([f"{keeper} has ended or does not respond"])
        beats = {seen.rank: seen.beat for seen in first}
        silent = [seen for seen in second if beats.get(seen.rank) == seen.beat and seen.rank != self._rank]
        self._here = [seen for seen in second if seen not in silent]
        last, front = min(seen.place for seen in second), max(seen.place for seen in second)
        behind = [seen for seen in second if seen.place == last < front]
        gone = "it is stopped, or its node is gone"
        lines = [f"rank {seen.rank} ({seen.process}) does not respond: it was at {seen.place}; {gone}" for seen in silent]
        if not lines:  # if some do not respond, those behind may only wait for them
            lines = [f"rank {seen.rank} ({seen.process}) is still at {seen.place}" for seen in behind]
        return self._message(lines) if lines else None

    def _message(self, missing: list[str]) -> str:
        shown = missing[:_NAMED] + [f"and {len(missing) - _NAMED} more"] * (len(missing) > _NAMED)
        return (
            f"{'; '.join(shown)}. Other ranks waited for {self._setting}={self._timeout_s / 60:g} at "
            f"{self._place}. Look at that process and its node; if it only needs longer, raise {self._setting}. "
            f"{self._reporter.goes_on[0].upper()}{self._reporter.goes_on[1:]}"
        )

    def _keep(self, store: dist.Store) -> None:
        peer_failed_at = None
        while True:
            try:
                self._write(store)
                if peer_failed_at is None and store.check([FIRST]):
                    peer_failed_at = time.monotonic()
            except RuntimeError:
                return  # the store has ended with the launcher, and the ranks end too
            if self._done.wait(self.interval_s):
                return
            now = time.monotonic()
            if peer_failed_at is not None and now - peer_failed_at > _PEER_FAILED_S:
                self._end(PeerError("another rank has failed"))
            if now - self._since > self._timeout_s + _ROOM_S and (stall := self._describe_stall(store)):
                # A rank that responds and is ahead waits as well, and names this one if no other is missing.
                if not any(seen.place > self._place for seen in self._here):
                    self._end(StallError(stall))
                self._since = time.monotonic()

    def _end(self, error: Exception) -> None:
        """Leave from this thread: the main one waits in a collective that nobody will complete."""
        status = self._reporter.report(error)
        self._before_end()
        sys.stderr.flush()
        os._exit(status)

    def _write(self, store: dist.Store) -> None:
        self._beat += 1
        store.set(f"megatron_vila/at/{self._rank}", json.dumps([self._place, self._beat, processes.this_process()]))

    def _read(self, store: dist.Store) -> list[Seen]:
        """Of all ranks; one that has not written yet is at the start."""
        keys = [f"megatron_vila/at/{rank}" for rank in range(self._world)]
        if store.check(keys):
            values = store.multi_get(keys)
        else:
            values = [store.get(key) if store.check([key]) else b"" for key in keys]
        return [self._seen(store, rank, value) for rank, value in enumerate(values)]

    def _seen(self, store: dist.Store, rank: int, value: bytes) -> Seen:
        if not value:
            return Seen(rank, Place(), 0, self._started(store, rank))
        place, beat, process = json.loads(value)
        return Seen(rank, Place(*place), beat, process)

    def _started(self, store: dist.Store, rank: int) -> str:
        key = f"{processes.STARTED}/{rank}"
        return store.get(key).decode() if store.check([key]) else "not known"

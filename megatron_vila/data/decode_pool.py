"""Threads that decode: one pool for all rows of a rank. The row that is needed first goes first.

Most threads work on the host's cores, one each; ``engines`` more of them do nothing but keep the GPU's video engines busy
(``data/video_engines.py``) and take only jobs that these can do. All take the next job when they have done one, so that cores and
engines share the work by how fast each of them is at the time.

There should be fewer threads at work than cores. A thread that holds Python's interpreter lock when the system gives its core to
another one halts all others, the one that trains too. That is the likely reason for what was measured on 16 cores, with 16
threads on them and 8 on engines: both together decoded less than either alone, and training took twice as long. So some threads
of cores stand aside while engines are in use, and all are less urgent to the system than the rest of the process.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

NICENESS = 5
"""What makes a decoding thread less urgent than the thread that trains."""


@dataclass(frozen=True)
class Help:
    """What a job may use: ``threads`` of the host (more than one where others are idle), or ``on_engine`` a video engine."""

    threads: int = 1
    on_engine: bool = False


@dataclass(frozen=True)
class Job:
    """``run`` is called once by a thread and must not raise. Jobs of a lower ``turn`` go first, then those of a lower ``place``.

    ``for_engine``: a video engine may do it. ``uses_threads``: it gains from more than one thread.
    """

    turn: int
    place: int
    run: Callable[[Help], None] = field(repr=False)
    for_engine: bool = False
    uses_threads: bool = False


class DecodePool:
    """``workers`` threads on cores and ``engines`` on video engines; all end with ``close``.

    ``cores_do_all``: cores take jobs that an engine can do as well; otherwise they leave these to the engines. Engines begin once
    they are told to (``use_engines``).
    """

    def __init__(self, workers: int, engines: int = 0, cores_do_all: bool = True) -> None:
        self._change = threading.Condition()
        # Jobs that only cores can do, and those that an engine can do too.
        self._queues: tuple[list, list] = [], []
        self._count = itertools.count()
        self._idle, self._lent, self._closed = 0, 0, False
        self._engines_on = False
        cores_take = (0, 1) if cores_do_all or not engines else (0,)
        # Assumed: a thread of an engine is at work on a core for half of its time.
        aside = min(engines // 2, max(1, workers) - 1)
        takes = [_Takes(cores_take)] * (max(1, workers) - aside) + [_Takes(cores_take, stands_aside=True)] * aside
        takes += [_Takes((1,), on_engine=True)] * engines
        self._threads = [
            threading.Thread(target=self._work, args=(each,), name=f"decode-{number}", daemon=True)
            for number, each in enumerate(takes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue ``jobs``, all at once. After ``close`` they are not done."""
        with self._change:
            for job in jobs:
                heapq.heappush(self._queues[job.for_engine], (job.turn, job.place, next(self._count), job))
            self._change.notify_all()

    def use_engines(self, on: bool) -> None:
        """Whether engines take jobs from now on; some threads of cores stand aside for them then."""
        with self._change:
            self._engines_on = on
            self._change.notify_all()

    def close(self) -> None:
        """Drop the jobs that have not begun and wait for the others."""
        with self._change:
            self._closed = True
            for queue in self._queues:
                queue.clear()
            self._change.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _work(self, takes: _Takes) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            job, threads = self._next(takes)
            if job is None:
                return
            job.run(Help(threads, takes.on_engine))
            with self._change:
                self._lent -= threads - 1
            del job  # it holds the pixels of its row

    def _next(self, takes: _Takes) -> tuple[Job | None, int]:
        """The first job that this thread may do, and how many threads it may use; None once the pool is closed."""
        with self._change:
            self._idle += not takes.on_engine
            self._change.wait_for(lambda: self._closed or self._finds(takes))
            self._idle -= not takes.on_engine
            if self._closed:
                return None, 1
            kind = min((kind for kind in takes.kinds if self._queues[kind]), key=lambda kind: self._queues[kind][0])
            job = heapq.heappop(self._queues[kind])[-1]
            # What waits will wake idle threads; the rest of these would do nothing.
            spare = self._idle - self._lent - sum(map(len, self._queues))
            lends = job.uses_threads and not takes.on_engine and not self._engines_on
            threads = 1 + max(0, spare) if lends else 1
            self._lent += threads - 1
            return job, threads

    def _finds(self, takes: _Takes) -> bool:
        may = self._engines_on if takes.on_engine else not (takes.stands_aside and self._engines_on)
        return may and any(self._queues[kind] for kind in takes.kinds)


@dataclass(frozen=True)
class _Takes:
    """The queues that a thread takes jobs from, and when."""

    kinds: tuple[int, ...]
    on_engine: bool = False
    stands_aside: bool = False

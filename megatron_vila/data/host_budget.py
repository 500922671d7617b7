"""A bound on the host memory of decoded rows: a row begins once there is room for it, in the order of turns."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import weakref
from collections import deque
from typing import Protocol

import numpy as np


class Waiting(Protocol):
    """What waits for ``size`` bytes; ``begin`` is given them as zeros, and returns at once."""

    turn: int
    size: int

    def begin(self, memory: np.ndarray) -> None: ...


class HostBudget:
    """Gives out arrays of at most ``limit`` bytes in all (None: any number). An array counts until nothing refers to it.

    Safe for threads, and for the garbage collector, which may free an array in the middle of any call.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._queue: list[tuple[int, int, Waiting]] = []
        self._held: dict[int, tuple[int, int]] = {}  # turn and bytes of each array
        self._freed: deque[int] = deque()
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._due = False

    def add(self, row: Waiting) -> None:
        """Let ``row`` begin once those of lower turns have begun and there is room: at once if there is."""
        with self._lock:
            heapq.heappush(self._queue, (row.turn, next(self._count), row))
        self._go_on()

    def remove(self, row: Waiting) -> None:
        """Let ``row`` not begin, if it has not yet."""
        self._take_back(row)
        self._go_on()

    def need(self, row: Waiting) -> int | None:
        """``row`` is needed now: it begins, whatever rows of higher turns hold. If it does not fit beside those of lower turns it
        never begins, and the bytes that these hold are returned. Raises ``MemoryError`` where the machine has none for it."""
        self._go_on()
        if not self._take_back(row):
            return None
        with self._lock:
            self._count_freed()
            before = sum(size for turn, size in self._held.values() if turn < row.turn)
            fits = self.limit is None or before + row.size <= self.limit
            memory = self._memory(row) if fits else None
        if memory is not None:
            row.begin(memory)
        self._go_on()  # for what was freed in the meantime
        return before if memory is None else None

    def _take_back(self, row: Waiting) -> bool:
        with self._lock:
            before = len(self._queue)
            self._queue = [entry for entry in self._queue if entry[-1] is not row]
            heapq.heapify(self._queue)
            return len(self._queue) < before

    def _go_on(self) -> None:
        """Begin with what there is room for. Where another thread, or this one further out, is at it, that one looks again.

        Where the machine has no memory for a row, the row stays until it is needed: then that is an error of the one who asks.
        """
        self._due = True
        while self._due and self._lock.acquire(blocking=False):
            begun = []
            try:
                self._due = False
                self._count_freed()
                held = sum(size for _, size in self._held.values())
                with contextlib.suppress(MemoryError):
                    while self._queue and (self.limit is None or held + self._queue[0][-1].size <= self.limit):
                        row = self._queue[0][-1]
                        begun.append((row, self._memory(row)))
                        heapq.heappop(self._queue)
                        held += row.size
            finally:
                self._lock.release()
            for row, memory in begun:
                row.begin(memory)

    def _count_freed(self) -> None:
        while self._freed:
            del self._held[self._freed.popleft()]

    def _memory(self, row: Waiting) -> np.ndarray:
        # The system gives its pages when they are written to.
        memory, number = np.zeros(row.size, dtype=np.uint8), next(self._count)
        self._held[number] = row.turn, row.size
        weakref.finalize(memory, self._free, number).atexit = False
        return memory

    def _free(self, number: int) -> None:
        self._freed.append(number)
        self._go_on()

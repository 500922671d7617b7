"""A row in work: what its tasks have put into it so far, and what becomes of it.

Legend: F squares that this rank decodes (frames, or tiles of frames), T of them of one frame, H = W side of a picture in pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from megatron_vila.data.failures import FailureReasons
from megatron_vila.data.host_budget import HostBudget
from megatron_vila.data.row_tasks import Task
from megatron_vila.errors import UserError
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.row import FrameRef


class ClosedError(RuntimeError):
    """The row was given up before it was done."""


class SquaresError(ValueError):
    """A frame became another number of squares than its unit has."""


class HostBudgetError(UserError, MemoryError):
    """The pixels of a row, or of the rows of a step, are more than the budget."""


@dataclass(frozen=True)
class DecodeWork:
    """What decoding took: ``frames`` of videos and pictures wanted, ``source_frames`` read for them, ``engine_frames`` of these
    by video engines, and seconds of threads: reading files, in decoders, and turning frames into squares."""

    frames: int = 0
    source_frames: int = 0
    engine_frames: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    preprocess_s: float = 0.0

    def __add__(self, other: DecodeWork) -> DecodeWork:
        return DecodeWork(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class DecodedRow:
    """``pixels`` uint8 [F, 3, H, W]; ``undecodable`` maps places in the list of documents to what is wrong with the sample, whose
    pixels are then zeros in part."""

    pixels: torch.Tensor
    undecodable: dict[int, str] = field(default_factory=dict)
    work: DecodeWork = DecodeWork()


class PendingRow:
    """The ``parts`` (units of each document, which is called as in ``names``) of a row, in work once ``budget`` has room; then
    ``start`` is called, and ``asked`` when its result is needed, with whether it is late.

    Keep no reference to it after ``result``: pixels count until nothing refers to them.
    """

    def __init__(
        self,
        turn: int,
        names: Sequence[str],
        parts: Sequence[Sequence[FrameRef]],
        *,
        image_size: int,
        budget: HostBudget,
        failures: FailureReasons,
        start: Callable[[PendingRow], None],
        asked: Callable[[bool], None],
    ) -> None:
        self.turn, self.parts = turn, parts
        self._shape = (sum(ref.unit.squares for part in parts for ref in part), 3, image_size, image_size)
        self.size = int(np.prod(self._shape))
        self._names, self._budget, self._failures = names, budget, failures
        self._start, self._asked = start, asked
        self._pixels: torch.Tensor | None = None
        self._future: Future[DecodedRow] = Future()
        self._lock = threading.Lock()
        self._left = 1  # cutting it into tasks is one
        self._work = DecodeWork()
        self._faults: dict[int, tuple[int, Exception]] = {}

    def result(self) -> DecodedRow:
        """Wait for the row. Raises ``HostBudgetError`` if it does not fit, beside rows of lower turns that are still referred to,
        ``MachineError`` where the machine is at its end, ``SquaresError``, and ``ClosedError`` if it was given up."""
        self._asked(not self._future.done())
        before = self._budget.need(self)
        if before is not None:
            self._end(HostBudgetError(self._too_large(before)))
        return self._future.result()

    def cancel(self) -> None:
        """Give the row up; what it holds is freed once its threads have seen it."""
        self._budget.remove(self)
        self._end(ClosedError("the row was given up"))

    def begin(self, memory: np.ndarray) -> None:
        self._pixels = torch.from_numpy(memory).view(self._shape)
        self._start(self)

    def cut_into(self, tasks: int) -> None:
        """As many tasks are to come."""
        with self._lock:
            self._left += tasks

    def wants(self, task: Task) -> bool:
        """Whether ``task`` still counts: the row is not given up, and nothing that comes before in its document has failed."""
        fault = self._faults.get(task.place)
        return not self._future.done() and (fault is None or task.number < fault[0])

    def put(self, squares: range, squares_T3HW: torch.Tensor) -> None:
        """Lay down the squares of one picture. Raises ``ClosedError`` if nobody wants them any more."""
        pixels_F3HW = self._pixels
        if pixels_F3HW is None:
            raise ClosedError("the row was given up")
        pixels_F3HW[squares.start : squares.stop].copy_(squares_T3HW)

    def fault(self, place: int, number: int, error: Exception) -> None:
        """Document ``place`` fails with ``error`` at task ``number``; the first by number counts."""
        with self._lock:
            if place not in self._faults or number < self._faults[place][0]:
                self._faults[place] = number, error

    def work_at(self, action: Callable[[], DecodeWork]) -> None:
        """Do a task, or the cutting into tasks; after the last of them the row is done. An error ends the row."""
        try:
            if not self._future.done():
                work = action()
                with self._lock:
                    self._work += work
        except Exception as error:
            self._end(error)
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._finish()

    def _finish(self) -> None:
        pixels = self._pixels
        if pixels is None:
            return
        try:
            undecodable = {
                place: self._failures.reason(error, self._names[place])
                for place, (_, error) in sorted(self._faults.items())
            }
            self._end(DecodedRow(pixels, undecodable, self._work))
        except Exception as error:
            self._end(error)

    def _end(self, result: DecodedRow | Exception) -> None:
        with self._lock:
            self._pixels = None
            if self._future.done():
                return
            if isinstance(result, Exception):
                self._future.set_exception(result)
            else:
                self._future.set_result(result)

    def _too_large(self, before: int) -> str:
        sizes = [sum(ref.unit.squares for ref in part) for part in self.parts]
        largest = int(np.argmax(sizes))
        frames = sum(ref.unit.frames for ref in self.parts[largest])
        limit, own = self._budget.limit or 0, self.size * sizes[largest] // max(1, sum(sizes))
        told = f"the {frames} frames of sample {self._names[largest]} that this rank encodes take {_gib(own)}"
        if len(self.parts) > 1:
            told += f", all of its row {_gib(self.size)}"
        cure = "more ranks for a row (parallel.ulysses, parallel.ring)"
        if self.size <= limit:
            told += f", and the rows before it in the same step {_gib(before)}"
            cure = "a smaller train.global_batch_size"
        return (
            f"{told} as pixels: more than data.host_memory_gib={limit / GIB:.3g} allows on a rank; raise it, or use fewer frames "
            f"(data.num_frames) or {cure}"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"

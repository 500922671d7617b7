"""One rank's part of a row: documents of given records, packed, with the pixels that this rank encodes.

Every rank of a model-parallel block makes the same row by itself and decodes only its own frames.

Legend: F squares that this rank decodes (frames, or tiles of frames), H = W side of a picture in pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from megatron_vila.data.dataset import BrokenSampleError, Sample, TooLongError, VilaDataset
from megatron_vila.data.pending_row import DecodedRow, DecodeWork, PendingRow
from megatron_vila.data.reports import broken_report, error_report
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import Row, pack
from megatron_vila.plan.row_plan import RowPlan, ShardPlan

BUILDERS = 2
"""Threads that make documents of samples; their work is small beside decoding."""


@dataclass(frozen=True)
class RowStats:
    """What it took to load a row.

    ``documents``, of which ``truncated`` lost frames to fit and ``unsupervised`` train nothing, are the same on all ranks of a
    block; ``work`` belongs to this rank.
    """

    documents: int = 0
    truncated: int = 0
    unsupervised: int = 0
    work: DecodeWork = DecodeWork()


@dataclass(frozen=True)
class LoadedRow:
    """A row with this rank's plan of it and ``pixels`` uint8 [F, 3, H, W] of the units ``plan.frames``.

    ``number`` counts the rows of a training step over all replicas, and held-out samples from the first.
    """

    number: int
    plan: ShardPlan
    pixels: torch.Tensor
    stats: RowStats = RowStats()

    @property
    def row(self) -> Row:
        return self.plan.row


@dataclass(frozen=True)
class MadeRow:
    """What became of the records of a row on this rank: ``samples`` are in it.

    ``broken`` and ``too_long`` map records without a place in it to the reason. First the row is ``pending``, then ``done``: this
    rank's plan of it with its pixels, which are None where no sample is left and after an ``error``, which is none of a sample's.
    """

    samples: tuple[Sample, ...] = ()
    broken: dict[int, str] = field(default_factory=dict)
    too_long: dict[int, str] = field(default_factory=dict)
    pending: tuple[ShardPlan, PendingRow] | None = None
    done: tuple[ShardPlan, DecodedRow] | None = None
    error: Exception | None = None

    def decoded(self) -> MadeRow:
        """Wait for the pixels. Errors are kept, not raised."""
        if self.pending is None:
            return self
        plan, pending = self.pending
        try:
            decoded = pending.result()
        except Exception as error:
            return replace(self, pending=None, error=error)
        undecodable = {self.samples[place].index: reason for place, reason in decoded.undecodable.items()}
        return replace(self, pending=None, done=(plan, decoded), broken=self.broken | undecodable)

    def reports(self) -> list[str]:
        """What the other ranks must know, as text."""
        if self.error is not None:
            samples = ", ".join(sample.document.sample_id for sample in self.samples)
            return [error_report(self.error, f"samples of the row: {samples}" if samples else "")]
        return [broken_report(index, reason) for index, reason in self.broken.items()]

    def loaded(self, number: int) -> LoadedRow | None:
        """The row as number ``number``; None if no sample is left. Only once it is ``decoded`` without ``error``."""
        if self.done is None:
            return None
        plan, decoded = self.done
        stats = RowStats(
            documents=len(self.samples),
            truncated=sum(sample.dropped_frames > 0 for sample in self.samples),
            unsupervised=sum(not sample.supervised for sample in self.samples),
            work=decoded.work,
        )
        return LoadedRow(number, plan, decoded.pixels, stats)


class RowMaker:
    """Makes this rank's part of rows of ``dataset``. It owns threads, and ``decoder``: ``close`` it.

    With ``decode`` false no pixel is read.
    """

    def __init__(
        self, dataset: VilaDataset, grid: GridShape, rank: int, decoder: RowDecoder, *, decode: bool = True
    ) -> None:
        self._dataset, self._grid, self._rank = dataset, grid, rank
        self._decoder, self._decodes = decoder, decode
        self._pool = ThreadPoolExecutor(BUILDERS, thread_name_prefix="build")
        self._last = threading.Event()
        self._last.set()

    def close(self) -> None:
        """Stop the threads: rows not begun are given up, a row in work ends at its next picture."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()

    def begin(self, turn: int, records: Sequence[int], lengths: Sequence[int] | None = None) -> Future[MadeRow]:
        """The row of ``records``, which are all tried, so that what is found does not depend on the layout. Rows of a lower
        ``turn`` are decoded first; call it in the order of turns.

        A sample that has not its length in ``lengths`` (tokens), by which the row was planned, counts as broken.
        """
        job = self._pool.submit(self._make, turn, records, lengths, self._last)
        # An event, not the job: that would hold the pixels of a row that is long done.
        self._last = done = threading.Event()
        job.add_done_callback(lambda _: done.set())
        return job

    @staticmethod
    def give_up(job: Future[MadeRow]) -> None:
        """Stop working at a row that was begun."""

        def cancel(job: Future[MadeRow]) -> None:
            if not job.cancelled() and (pending := job.result().pending) is not None:
                pending[1].cancel()

        job.cancel()
        job.add_done_callback(cancel)

    def _make(
        self, turn: int, records: Sequence[int], lengths: Sequence[int] | None, before: threading.Event
    ) -> MadeRow:
        """Make the documents of a row and begin to decode it, once the row ``before`` has begun; runs in a thread."""
        samples: list[Sample] = []
        broken: dict[int, str] = {}
        too_long: dict[int, str] = {}
        try:
            for place, record in enumerate(records):
                try:
                    sample = self._dataset.build(record)
                    if lengths is not None and len(sample.document) != lengths[place]:
                        raise BrokenSampleError(
                            f"its files have changed: it had {lengths[place]} tokens and has {len(sample.document)}"
                        )
                    samples.append(sample)
                except BrokenSampleError as error:
                    broken[record] = str(error)
                except TooLongError as error:
                    too_long[record] = str(error)
            before.wait()
            if not samples:
                return MadeRow((), broken, too_long)
            documents = [sample.document for sample in samples]
            row = pack(documents, self._grid.document_multiple, self._grid.row_multiple)
            plan = RowPlan.of(row, self._grid).shard(self._rank)
            pending = self._decoder.submit(turn, documents, plan.frames if self._decodes else range(0))
            return MadeRow(tuple(samples), broken, too_long, (plan, pending))
        except Exception as error:
            return MadeRow(tuple(samples), error=error)

"""Rows with the pixels that this rank encodes, decoded ahead by threads.

Row g of a run goes to data-parallel replica ``(g % global_batch_size) % dp_size``. Every rank of the replica's model-parallel
block holds the same row and decodes only its own frames. A sample that one rank cannot decode is made known to the whole block,
and every rank puts the same other sample in its place.

Legend: F squares that this rank decodes (frames, or tiles of frames), H = W side of a picture in pixels.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import torch

from megatron_vila.data.dataset import BrokenSampleError, Choice, NoUsableSampleError, TooLongError, VilaDataset
from megatron_vila.data.order import RowOrder
from megatron_vila.data.pending_row import DecodedRow, DecodeWork, PendingRow
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.errors import PeerError
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import Row, pack
from megatron_vila.plan.row_plan import RowPlan, ShardPlan

logger = logging.getLogger(__name__)

BUILDERS = 2
"""Threads that make documents of samples; their work is small beside decoding."""


class LoaderError(PeerError):
    """Loading failed on a rank of the model-parallel block; raised on every rank of it."""


@dataclass(frozen=True)
class RowStats:
    """What it took to load a row.

    The counts of documents are the same on all ranks of a block: ``replaced_broken`` and ``replaced_too_long`` stand in for
    another sample, ``truncated`` lost frames to fit, ``unsupervised`` train nothing, ``left_out`` cannot be used and have no
    replacement that fits into the packed row. ``work`` and ``wait_s`` (seconds that the training loop stood still for this row)
    belong to this rank.
    """

    documents: int = 0
    replaced_broken: int = 0
    replaced_too_long: int = 0
    truncated: int = 0
    unsupervised: int = 0
    left_out: int = 0
    work: DecodeWork = DecodeWork()
    wait_s: float = 0.0

    @property
    def drawn(self) -> int:
        """Samples that the order of rows asked for."""
        return self.documents + self.left_out


@dataclass(frozen=True)
class LeftOut:
    """A sample without a place in its row: ``kind`` is "broken" or "too_long", ``reason`` says what is wrong in words."""

    index: int
    kind: str
    reason: str


@dataclass(frozen=True)
class LoadedRow:
    """Row ``number`` of the run with this rank's plan of it and ``pixels`` uint8 [F, 3, H, W] of the units ``plan.frames``."""

    number: int
    plan: ShardPlan
    pixels: torch.Tensor
    stats: RowStats = RowStats()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def row(self) -> Row:
        return self.plan.row


@dataclass(frozen=True)
class EmptyRow:
    """Row ``number`` of the run, all samples of which are ``left_out``. There are none where bad samples are replaced."""

    number: int
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Attempt:
    """A row built with the broken samples known at a time, and the samples found broken on this rank while building it.

    ``made`` is this rank's part of the row, first ``pending``; both are None for a row without documents and after an ``error``.
    """

    choices: tuple[Choice, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    found: dict[int, str] = field(default_factory=dict)
    pending: tuple[ShardPlan, PendingRow] | None = None
    made: tuple[ShardPlan, DecodedRow] | None = None
    error: Exception | None = None

    def reports(self) -> list[str]:
        """What the other ranks of the block must know, as text."""
        if self.error is not None:
            samples = ", ".join(choice.document.sample_id for choice in self.choices)
            told = f"{type(self.error).__name__}: {self.error}"
            return [json.dumps(["error", f"{told} (samples of the row: {samples})" if samples else told])]
        return sorted(json.dumps(["broken", index, reason]) for index, reason in self.found.items())


class RowLoader:
    """The rows of one rank. Use it as a context manager, or call ``close``: it owns threads.

    * ``order``: which samples form row g; the same on every rank.
    * ``grid`` and this ``rank`` in it: its replica, how rows are padded, and the rank's part of each (``plan/row_plan.py``).
    * ``agree(reports)``: the union, in one order, of the reports of all ranks of the model-parallel block. A collective: it is
      called in the thread of the caller, once per row and round, in the same order on every rank of the block.
    * ``workers`` threads decode up to ``prefetch`` rows ahead, within ``budget_bytes`` and by ``video_decoder`` (``RowDecoder``).
    * ``replace_bad``: whether another sample takes the place of one that cannot be used, as in training. Held-out samples are
      left out instead, each in a row of its own.
    * ``decode``: whether pixels are read; without them rows have none.

    What the loader gives depends on the step alone: a run resumed at any step gets the same rows.
    """

    def __init__(
        self,
        dataset: VilaDataset,
        order: RowOrder,
        grid: GridShape,
        rank: int,
        *,
        global_batch_size: int,
        agree: Callable[[list[str]], list[str]],
        image_size: int,
        aspect: str,
        workers: int,
        prefetch: int,
        budget_bytes: int | None = None,
        video_decoder: str = "cpu",
        replace_bad: bool = True,
        decode: bool = True,
    ) -> None:
        assert global_batch_size % grid.dp == 0, (global_batch_size, grid)  # judged by plan/validate.py
        if order.samples != len(dataset):
            raise ValueError(f"the row order is made for {order.samples} samples, the data set has {len(dataset)}")
        self._dataset, self._order = dataset, order
        self._grid, self._rank, self._agree = grid, rank, agree
        self._global_batch_size, self._decodes = global_batch_size, decode
        self._prefetch, self._replace_bad = max(0, prefetch), replace_bad
        self._pool = ThreadPoolExecutor(max(1, min(BUILDERS, workers)), thread_name_prefix="build")
        self._decoder = RowDecoder(
            dataset.probe,
            dataset.failures,
            image_size=image_size,
            aspect=aspect,
            workers=workers,
            budget_bytes=budget_bytes,
            video_decoder=video_decoder,
        )
        self._jobs: dict[int, tuple[list[int], Future[_Attempt]]] = {}
        self._broken: dict[int, str] = dict(dataset.records.bad)
        self._warned: set[int] = set()

    def __enter__(self) -> RowLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads: rows not begun are given up, a row in work ends at its next picture."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()
        self._jobs.clear()

    @property
    def broken(self) -> Mapping[int, str]:
        """The bad records, and the broken samples met so far by this block: record index to reason."""
        return dict(self._broken)

    def rows(self, step: int) -> list[LoadedRow]:
        """``outcomes`` without the empty ones: all of them where bad samples are replaced."""
        return [row for row in self.outcomes(step) if isinstance(row, LoadedRow)]

    def outcomes(self, step: int) -> list[LoadedRow | EmptyRow]:
        """The rows of this replica in optimizer step ``step``, one per micro-batch.

        Collective: ``agree``, over the model-parallel block. Raises ``LoaderError`` on all ranks of the block if any of them
        failed for another reason than a broken sample.
        """
        per_step = self._global_batch_size // self._grid.dp
        first = step * per_step
        for place in [p for p in self._jobs if not first <= p < first + per_step + self._prefetch]:
            self._give_up(self._jobs.pop(place)[1])
        return [self._load(place) for place in range(first, first + per_step)]

    def _load(self, place: int) -> LoadedRow | EmptyRow:
        """The row at ``place`` in this replica's sequence of rows."""
        for ahead in range(place, place + self._prefetch + 1):
            if ahead not in self._jobs:
                slots = list(self._order.row(self._number(ahead)))
                # Every rank starts from the samples known to be broken now, so all of them try the same row.
                before = self._jobs[ahead - 1][1] if ahead - 1 in self._jobs else None
                job = self._pool.submit(self._attempt, ahead, slots, dict(self._broken), before=before)
                self._jobs[ahead] = (slots, job)
        started_s = time.perf_counter()
        slots, job = self._jobs.pop(place)
        attempt = _decoded(job.result())
        while reports := self._agree(attempt.reports()):
            self._learn(reports, attempt.error)
            attempt = _decoded(self._attempt(place, slots, dict(self._broken), attempt))
        self._warn(attempt)
        if attempt.made is None:  # an error has been raised by now
            return EmptyRow(self._number(place), attempt.left_out)
        plan, decoded = attempt.made
        stats = _stats(attempt, decoded, wait_s=time.perf_counter() - started_s)
        return LoadedRow(self._number(place), plan, decoded.pixels, stats, attempt.left_out)

    def _give_up(self, job: Future[_Attempt]) -> None:
        def cancel(job: Future[_Attempt]) -> None:
            if not job.cancelled() and (pending := job.result().pending) is not None:
                pending[1].cancel()

        job.cancel()
        job.add_done_callback(cancel)

    def _number(self, place: int) -> int:
        dp_size, dp_rank = self._grid.dp, self._grid.coordinates(self._rank).dp
        step, micro_batch = divmod(place, self._global_batch_size // dp_size)
        return step * self._global_batch_size + micro_batch * dp_size + dp_rank

    def _learn(self, reports: Sequence[str], own_error: Exception | None) -> None:
        """Take in what the ranks of the block found; each broken sample is logged once."""
        for kind, *report in map(json.loads, reports):
            if kind == "error":
                raise LoaderError(f"loading a row failed on a rank: {report[0]}") from own_error
            index, reason = report
            if index not in self._broken:
                self._broken[index] = reason
                fate = "replaced by the next good one" if self._replace_bad else "left out"
                logger.warning("sample %s is broken and %s: %s", self._dataset.name(index), fate, reason)

    def _warn(self, attempt: _Attempt) -> None:
        """Name samples that train nothing, each once."""
        for left in attempt.left_out if self._replace_bad else ():
            if left.index not in self._warned:
                self._warned.add(left.index)
                name = self._dataset.name(left.index)
                logger.warning("sample %s is left out, no other fits its place in a packed row: %s", name, left.reason)
        for choice in attempt.choices:
            if not choice.supervised and choice.index not in self._warned:
                self._warned.add(choice.index)
                logger.warning("sample %s has no answer to learn: it trains nothing", choice.document.sample_id)

    def _attempt(
        self,
        place: int,
        slots: Sequence[int],
        broken: Mapping[int, str],
        previous: _Attempt | None = None,
        before: Future[_Attempt] | None = None,
    ) -> _Attempt:
        """Build the row of the samples ``slots`` and begin to decode this rank's frames, after the row ``before`` has begun; runs
        in a thread. Errors are returned."""
        choices: Sequence[Choice] = ()
        try:
            choices, left_out, found = self._choose(slots, broken)
            if not choices:
                return _Attempt((), left_out, found)
            if previous is not None and [c.index for c in choices] == [c.index for c in previous.choices]:
                return replace(previous, choices=choices, left_out=left_out, found=found)
            row = pack([choice.document for choice in choices], self._grid.document_multiple, self._grid.row_multiple)
            plan = RowPlan.of(row, self._grid).shard(self._rank)
            local = plan.frames if self._decodes else range(0)
            if before is not None:
                wait([before])
            pending = self._decoder.submit(place, [choice.document for choice in choices], local)
            return _Attempt(choices, left_out, found, (plan, pending))
        except Exception as error:
            return _Attempt(choices=tuple(choices), error=error)

    def _choose(
        self, slots: Sequence[int], broken: Mapping[int, str]
    ) -> tuple[tuple[Choice, ...], tuple[LeftOut, ...], dict[int, str]]:
        """The samples of a row, those left out, and the broken ones met; what nothing can replace in a packed row is left out."""
        if not self._replace_bad:
            return self._choose_asked(slots[0], broken)
        choices: list[Choice] = []
        left_out: list[LeftOut] = []
        found: dict[int, str] = {}
        lengths = self._order.lengths
        limits = [] if lengths is None or len(slots) == 1 else [int(lengths[slot]) for slot in slots]
        for slot, limit in zip(slots, limits, strict=False):
            try:
                choices.append(self._dataset.choose(slot, broken, limit, lengths))
            except NoUsableSampleError as error:
                found.update(error.found)
                reason = {**broken, **error.found}.get(slot)
                left_out.append(LeftOut(slot, "broken" if reason else "too_long", reason or str(error)))
        if not choices:
            choices.append(self._dataset.choose(slots[0], broken))
            left_out = [left for left in left_out if left.index != slots[0]]
        return tuple(choices), tuple(left_out), found | {k: v for choice in choices for k, v in choice.found.items()}

    def _choose_asked(
        self, index: int, broken: Mapping[int, str]
    ) -> tuple[tuple[Choice, ...], tuple[LeftOut, ...], dict[int, str]]:
        """Sample ``index`` itself, or nothing."""
        if index in broken:
            return (), (LeftOut(index, "broken", broken[index]),), {}
        try:
            document, dropped_frames = self._dataset.build(index)
        except BrokenSampleError as error:
            return (), (LeftOut(index, "broken", str(error)),), {index: str(error)}
        except TooLongError as error:
            return (), (LeftOut(index, "too_long", str(error)),), {}
        return (Choice(index, document, "", {}, dropped_frames),), (), {}


def _decoded(attempt: _Attempt) -> _Attempt:
    """``attempt`` with its pixels, or with what went wrong with them."""
    if attempt.pending is None:
        return attempt
    plan, pending = attempt.pending
    try:
        decoded = pending.result()
    except Exception as error:
        return replace(attempt, pending=None, error=error)
    found = {attempt.choices[place].index: reason for place, reason in decoded.undecodable.items()}
    return replace(attempt, pending=None, made=(plan, decoded), found=attempt.found | found)


def _stats(attempt: _Attempt, decoded: DecodedRow, wait_s: float) -> RowStats:
    choices = attempt.choices
    return RowStats(
        documents=len(choices),
        replaced_broken=sum(c.replaced == "broken" for c in choices),
        replaced_too_long=sum(c.replaced == "too_long" for c in choices),
        truncated=sum(c.dropped_frames > 0 for c in choices),
        unsupervised=sum(not c.supervised for c in choices),
        left_out=len(attempt.left_out),
        work=decoded.work,
        wait_s=wait_s,
    )

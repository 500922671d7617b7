"""The pixels of one rank's part of a row, decoded by all threads of the rank together.

A row becomes tasks of similar work (``data/row_tasks.py``). One pool does those of all rows (``data/decode_pool.py``), on cores
and on the GPU's video engines. However a row is cut and whoever decodes it, its pixels are the same to the bit, and so is what
is said of a sample that cannot be decoded, except that engines do not see all damage (``data/video_engines.py``). The pixels of
all rows together stay within a budget (``data/host_budget.py``).

Legend: F squares that this rank decodes (frames, or tiles of frames), T of them of one frame, H = W side of a picture in pixels.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from megatron_vila import accelerator
from megatron_vila.config.schema import DataConfig
from megatron_vila.data.decode_pool import DecodePool, Help, Job
from megatron_vila.data.failures import FailureReasons
from megatron_vila.data.host_budget import HostBudget
from megatron_vila.data.images import load_image, preprocess
from megatron_vila.data.media import MediaSource, name_of
from megatron_vila.data.pending_row import ClosedError, DecodeWork, PendingRow, SquaresError
from megatron_vila.data.row_tasks import Probe, Task, cut, part_of
from megatron_vila.data.video import VideoReader
from megatron_vila.data.video_engines import MEMORY_BYTES, Need, VideoEngines, engines_of
from megatron_vila.data.video_engines import THREADS as ENGINE_THREADS
from megatron_vila.host_memory import decoding_threads, most_bytes, ranks_here
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.row import Document

logger = logging.getLogger(__name__)

LARGE_TASK = 60 * 10**6
"""Pixels of source frames from which on a task is worth a video engine, or frame threads where cores would stand idle."""


class RowDecoder:
    """Decodes and preprocesses units of documents to squares of ``image_size``. Safe for threads. It owns threads: ``close`` it.

    * ``probe`` gives the frame table of a video; ``failures`` puts errors into words.
    * ``workers`` threads on cores.
    * ``budget_bytes``: most pixels of the rows that are begun and not yet freed by whoever took them; None: no limit.
    * ``video_decoder``: cpu, nvdec (video engines do what they can, cores the rest) or auto (engines help while rows are late).

    Raises ``SettingError`` for nvdec where there is none.
    """

    def __init__(
        self,
        probe: Probe,
        failures: FailureReasons,
        *,
        image_size: int,
        aspect: str,
        workers: int = 1,
        budget_bytes: int | None = None,
        video_decoder: str = "cpu",
    ) -> None:
        self._probe, self._failures, self._workers = probe, failures, max(1, workers)
        self._image_size, self._aspect = image_size, aspect
        self._engines = engines_of(video_decoder)
        self._unsuited: set[MediaSource] = set()
        engine_threads = ENGINE_THREADS if self._engines is not None else 0
        self._pool = DecodePool(self._workers, engine_threads, cores_do_all=video_decoder != "nvdec")
        self._need = Need() if self._engines is not None and video_decoder == "auto" else None
        self._pool.use_engines(self._engines is not None and self._need is None)
        self._budget = HostBudget(budget_bytes)
        self._rows: weakref.WeakSet[PendingRow] = weakref.WeakSet()
        self._closed = self._has_used_engines = False

    @classmethod
    def of(cls, data: DataConfig, image_size: int, probe: Probe, failures: FailureReasons) -> RowDecoder:
        """With the threads and the host memory that ``data`` gives a rank."""
        share = most_bytes() // ranks_here()
        return cls(
            probe,
            failures,
            image_size=image_size,
            aspect=data.image_aspect,
            workers=data.workers or decoding_threads(),
            budget_bytes=int(data.host_memory_gib * GIB) or share // 4,
            video_decoder=data.video_decoder,
        )

    def close(self) -> None:
        """Give up all rows that are not done; those in work end at their next picture."""
        self._closed = True
        for row in list(self._rows):
            row.cancel()
        self._pool.close()

    def submit(self, turn: int, documents: Sequence[Document], local: range) -> PendingRow:
        """Begin with the units ``local``, counted over all ``documents``, once there is room for their squares.

        Rows of a lower ``turn`` go first. Call it in the order in which the rows are needed.
        """
        names, parts = [document.sample_id for document in documents], part_of(documents, local)
        row = PendingRow(
            turn,
            names,
            parts,
            image_size=self._image_size,
            budget=self._budget,
            failures=self._failures,
            start=self._start,
            asked=self._asked,
        )
        self._rows.add(row)
        if self._closed:
            row.cancel()
        else:
            self._budget.add(row)
        return row

    def _asked(self, late: bool) -> None:
        if self._need is None or not self._need.note(late):
            return
        if self._need.is_there and accelerator.free_device_bytes() < MEMORY_BYTES and not self._has_used_engines:
            self._need = None
            logger.info("videos are decoded on the host alone: the GPU has too little free memory for its video engines")
            return
        self._has_used_engines = True
        self._pool.use_engines(self._need.is_there)

    def _start(self, row: PendingRow) -> None:
        self._pool.submit([Job(row.turn, -1, lambda _: row.work_at(lambda: self._plan(row)))])

    def _plan(self, row: PendingRow) -> DecodeWork:
        tasks, faults = cut(row.parts, self._probe, self._workers)
        for fault in faults:
            row.fault(fault.place, fault.number, fault.error)
        row.cut_into(len(tasks))
        self._pool.submit(self._job(row, task) for task in tasks)
        return DecodeWork()

    def _job(self, row: PendingRow, task: Task) -> Job:
        large = task.info is not None and task.cost >= LARGE_TASK
        suits = task.info is not None and large and task.info.source not in self._unsuited
        return Job(row.turn, task.number, partial(self._run, row, task), for_engine=suits, uses_threads=large)

    def _run(self, row: PendingRow, task: Task, chosen: Help) -> None:
        def work() -> DecodeWork:
            try:
                return self._decode(row, task, chosen) if row.wants(task) else DecodeWork()
            except (ClosedError, SquaresError):
                raise
            except Exception as error:
                row.fault(task.place, task.number, error)
                return DecodeWork()

        row.work_at(work)

    def _decode(self, row: PendingRow, task: Task, chosen: Help) -> DecodeWork:
        """Decode a task as fast as ``chosen`` allows, or plainly where that fails: what is wrong with a file is found by a single
        thread of the host, whoever came upon it."""
        if task.info is None:
            return self._put_all(row, task, map(load_image, task.files))
        engines = self._engines if chosen.on_engine else None
        if engines is not None or chosen.threads > 1:
            try:
                return self._read(row, task, chosen.threads, engines)
            except (ClosedError, SquaresError):
                raise
            except Exception as error:
                if engines is not None:
                    self._unsuited.add(task.info.source)
                    logger.info("decoded on the host: %s: %s", name_of(task.info.source), error)
        return self._read(row, task)

    def _read(self, row: PendingRow, task: Task, threads: int = 1, engines: VideoEngines | None = None) -> DecodeWork:
        assert task.info is not None
        with VideoReader(task.info, task.indices, threads=threads, engines=engines) as reader:
            done = self._put_all(row, task, map(reader.frame, task.indices))
            return DecodeWork(
                frames=done.frames,
                source_frames=reader.packets,
                engine_frames=reader.packets if engines is not None else 0,
                read_s=reader.read_s,
                decode_s=reader.decode_s,
                preprocess_s=done.decode_s + done.preprocess_s - reader.read_s - reader.decode_s,
            )

    def _put_all(self, row: PendingRow, task: Task, pictures: Iterable[Image.Image]) -> DecodeWork:
        """Preprocess picture by picture, so that a thread holds no more than one of full size."""
        marks = [time.perf_counter()]
        for picture, squares in zip(pictures, task.squares, strict=True):
            marks.append(time.perf_counter())
            squares_T3HW = preprocess([picture], self._image_size, self._aspect)
            if len(squares_T3HW) != len(squares):
                raise SquaresError(f"a frame became {len(squares_T3HW)} squares, and its unit has {len(squares)} tiles")
            row.put(squares, squares_T3HW)
            marks.append(time.perf_counter())
        spans = np.diff(marks)
        frames = len(task.squares)
        decode_s, preprocess_s = float(spans[::2].sum()), float(spans[1::2].sum())
        return DecodeWork(frames=frames, source_frames=frames, decode_s=decode_s, preprocess_s=preprocess_s)

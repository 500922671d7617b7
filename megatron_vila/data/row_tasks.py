"""A rank's part of a row, cut into tasks of similar work: slices of videos between key frames, and handfuls of pictures.

Legend: a square is a picture as the tower takes it; the part's squares lie one after the other, unit by unit and frame by frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_vila.data.groups import slices
from megatron_vila.data.media import MediaSource
from megatron_vila.data.video_info import VideoInfo
from megatron_vila.plan.row import Document, FrameRef

SMALLEST_TASK = 8 * 10**6
"""Pixels of source frames that a task has at least, if there are so many: opening a file costs about as much as some of them."""

PICTURE_PIXELS = 2 * 10**6
"""What a picture with a file of its own counts as: its size is not known before it is opened."""

Probe = Callable[[MediaSource], VideoInfo]


@dataclass(frozen=True)
class Task:
    """Decode ``indices`` of the video ``info``, or ``files`` that hold a picture each, to ``squares`` (places for each).

    ``place`` is that of the document, ``number`` counts the tasks of a row in the order in which one thread would do them,
    ``cost`` is in pixels of source frames.
    """

    place: int
    number: int
    squares: tuple[range, ...]
    cost: int
    info: VideoInfo | None = None
    indices: tuple[int, ...] = ()
    files: tuple[MediaSource, ...] = ()


@dataclass(frozen=True)
class Fault:
    """What comes in the place of task ``number`` of a document: its video cannot be probed."""

    place: int
    number: int
    error: Exception


def part_of(documents: Sequence[Document], local: range) -> list[Sequence[FrameRef]]:
    """The units ``local``, counted over all ``documents``, of each of them."""
    parts: list[Sequence[FrameRef]] = []
    first = 0
    for document in documents:
        frames = document.frames
        parts.append(frames[max(0, local.start - first) : max(0, local.stop - first)])
        first += len(frames)
    return parts


def cut(parts: Sequence[Sequence[FrameRef]], probe: Probe, threads: int) -> tuple[list[Task], list[Fault]]:
    """The tasks of the units ``parts`` (one list for each document), small enough to keep ``threads`` busy."""
    sizes = [sum(ref.unit.squares for ref in units) for units in parts]
    firsts = [0, *itertools.accumulate(sizes)]
    runs = [run for place, units in enumerate(parts) for run in _runs(place, units, firsts[place])]
    infos = [_probed(run, probe) for run in runs]
    costs = [_cost(run, info) for run, info in zip(runs, infos, strict=True) if not isinstance(info, Exception)]
    target = max(SMALLEST_TASK, sum(costs) // (2 * threads))
    tasks: list[Task] = []
    faults: list[Fault] = []
    number = 0
    for run, info in zip(runs, infos, strict=True):
        if isinstance(info, Exception):
            faults.append(Fault(run.place, number, info))
            number += 1
            continue
        for task in run.tasks(info, target, number):
            tasks.append(task)
            number += 1
    return tasks, faults


@dataclass(frozen=True)
class _Run:
    """Ascending frames of the video ``source``, or pictures with files of their own (then it is None)."""

    place: int
    source: MediaSource | None
    indices: tuple[int, ...]
    files: tuple[MediaSource, ...]
    squares: tuple[range, ...]

    def tasks(self, info: VideoInfo | None, target: int, number: int) -> Iterator[Task]:
        if info is None:
            step = max(1, target // PICTURE_PIXELS)
            for count, first in enumerate(range(0, len(self.files), step)):
                files = self.files[first : first + step]
                squares, cost = self.squares[first : first + step], len(files) * PICTURE_PIXELS
                yield Task(self.place, number + count, squares, cost, files=files)
            return
        pixels = max(1, info.width * info.height)
        for count, part in enumerate(slices(info, self.indices, target / pixels)):
            of, cost = slice(part.first, part.last), part.frames * pixels
            yield Task(self.place, number + count, self.squares[of], cost, info=info, indices=self.indices[of])


def _probed(run: _Run, probe: Probe) -> VideoInfo | Exception | None:
    if run.source is None:
        return None
    try:
        return probe(run.source)
    except Exception as error:
        return error


def _cost(run: _Run, info: VideoInfo | None) -> int:
    if info is None:
        return len(run.files) * PICTURE_PIXELS
    return sum(part.frames for part in slices(info, run.indices, 0)) * max(1, info.width * info.height)


def _runs(place: int, units: Sequence[FrameRef], first_square: int) -> Iterator[_Run]:
    """The pictures of ``units`` in runs: frames that ascend in one video, or pictures that follow each other."""
    pictures = []
    for ref in units:
        for frame, index in enumerate(ref.indices):
            squares = range(first_square, first_square + ref.unit.tiles)
            file = ref.pictures[frame] if ref.pictures else None if ref.is_video else ref.source
            pictures.append((None if file is not None else ref.source, index, file, squares))
            first_square = squares.stop
    first = 0
    for end in range(1, len(pictures) + 1):
        source, index = pictures[end - 1][:2]
        following = pictures[end] if end < len(pictures) else None
        if following is not None and following[0] == source and (source is None or following[1] > index):
            continue
        sources, indices, files, places = zip(*pictures[first:end], strict=True)
        yield _Run(place, sources[0], indices, files if sources[0] is None else (), places)
        first = end

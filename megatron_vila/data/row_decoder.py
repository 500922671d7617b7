"""The pixels of one rank's part of a row.

Legend: F squares that this rank decodes (frames, or tiles of frames), T of them of one frame, H = W side of a picture in pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from megatron_vila.data.failures import FailureReasons
from megatron_vila.data.images import load_image, preprocess
from megatron_vila.data.media import MediaSource
from megatron_vila.data.video import VideoReader
from megatron_vila.data.video_info import VideoInfo
from megatron_vila.plan.row import Document, FrameRef


class ClosedError(RuntimeError):
    """The decoder was closed while it worked at a row."""


@dataclass(frozen=True)
class DecodedRow:
    """``pixels`` uint8 [F, 3, H, W]; ``undecodable`` maps places in the list of documents to what is wrong with the sample, whose
    pixels are then zeros in part. ``frames`` counts frames of videos and pictures, ``decode_s`` seconds of a thread."""

    pixels: torch.Tensor
    undecodable: dict[int, str] = field(default_factory=dict)
    frames: int = 0
    decode_s: float = 0.0


class RowDecoder:
    """Decodes and preprocesses units of documents to squares of ``image_size``. Safe for threads.

    ``probe`` gives the frame table of a video; ``failures`` puts errors into words.
    """

    def __init__(
        self, probe: Callable[[MediaSource], VideoInfo], failures: FailureReasons, *, image_size: int, aspect: str
    ) -> None:
        self._probe, self._failures = probe, failures
        self._image_size, self._aspect = image_size, aspect
        self._closing = threading.Event()

    def close(self) -> None:
        """End the rows in work at their next picture, with ``ClosedError``."""
        self._closing.set()

    def decode(self, documents: Sequence[Document], local: range) -> DecodedRow:
        """Squares of the units ``local``, counted over all ``documents``, one after the other.

        Raises ``MachineError`` where the machine is at its end, ``ClosedError``, and ``ValueError`` for a frame that became
        another number of squares than its unit has.
        """
        started_s = time.perf_counter()
        parts, first = [], 0
        for document in documents:
            frames = document.frames
            parts.append(frames[max(0, local.start - first) : max(0, local.stop - first)])
            first += len(frames)
        sizes = [sum(ref.unit.squares for ref in part) for part in parts]
        pixels = torch.zeros(sum(sizes), 3, self._image_size, self._image_size, dtype=torch.uint8)
        undecodable = {}
        for place, (part, out_F3HW) in enumerate(zip(parts, pixels.split(sizes), strict=True)):
            try:
                self._decode_units(part, out_F3HW)
            except (ClosedError, SquaresError):
                raise
            except Exception as error:
                undecodable[place] = self._failures.reason(error, documents[place].sample_id)
        decoded = sum(ref.unit.frames for part in parts for ref in part)
        return DecodedRow(pixels, undecodable, decoded, time.perf_counter() - started_s)

    def _decode_units(self, units: Sequence[FrameRef], out_F3HW: torch.Tensor) -> None:
        """Decode and preprocess picture by picture, so that no more than one picture of full size is held."""
        outputs = iter(out_F3HW.split([ref.unit.tiles for ref in units for _ in ref.indices]))
        for run in _runs([_Picture(ref, place) for ref in units for place in range(len(ref.indices))]):
            for picture in self._pictures(run):
                self._put(picture, next(outputs))

    def _pictures(self, run: Sequence[_Picture]) -> Iterator[Image.Image]:
        """The pictures of a run; those of a video in one pass."""
        if run[0].file:
            yield load_image(run[0].file)
            return
        with VideoReader(self._probe(run[0].ref.source), [picture.index for picture in run]) as reader:
            for picture in run:
                yield reader.frame(picture.index)

    def _put(self, picture: Image.Image, out_T3HW: torch.Tensor) -> None:
        if self._closing.is_set():
            raise ClosedError("the loader was closed")
        squares_T3HW = preprocess([picture], self._image_size, self._aspect)
        if len(squares_T3HW) != len(out_T3HW):
            raise SquaresError(f"a frame became {len(squares_T3HW)} squares, and its unit has {len(out_T3HW)} tiles")
        out_T3HW.copy_(squares_T3HW)


class SquaresError(ValueError):
    """A frame became another number of squares than its unit has."""


@dataclass(frozen=True)
class _Picture:
    """Frame ``place`` of a unit."""

    ref: FrameRef
    place: int

    @property
    def index(self) -> int:
        return self.ref.indices[self.place]

    @property
    def file(self) -> MediaSource | None:
        """The picture's own file; None for a frame of a video file."""
        if self.ref.pictures:
            return self.ref.pictures[self.place]
        return None if self.ref.is_video else self.ref.source


def _runs(pictures: Sequence[_Picture]) -> Iterator[Sequence[_Picture]]:
    """``pictures`` in runs: frames that ascend in one video, or one picture with a file of its own."""
    first = 0
    for end in range(1, len(pictures) + 1):
        following = pictures[end] if end < len(pictures) else None
        last = pictures[end - 1]
        if (
            following is None
            or last.file
            or following.file
            or following.ref.source != last.ref.source
            or following.index <= last.index
        ):
            yield pictures[first:end]
            first = end

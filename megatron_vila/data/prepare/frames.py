"""Which frames of a video are kept, and when each is shown: what training reads at the same rate, at its original times.

The frames are those that the trainer itself takes from the source with ``data.fps`` at this rate and ``data.fps_rule=first``:
at each 1 / fps seconds the frame that is shown then. A clip (``start``, ``end`` of the record) is cut out, and counts from its
first frame, as in training.

Legend: n frames kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.clips import picture_files, take_frames
from megatron_vila.data.fields import Media
from megatron_vila.data.images import load_image
from megatron_vila.data.media import MediaSource
from megatron_vila.data.video import VideoReader, probe_video

MOST_FRAMES = 2**31 - 1

TICKS = (1_000_000, 90_000, 1_000, 1)
"""Units of a second in which times may be written where those of the source do not go."""

LARGEST_STEP = 2**31 - 1
"""Most units from one frame to the next: mp4 has 32 bits for it."""


@dataclass(frozen=True, eq=False)
class KeptFrames:
    """``indices`` int64 [n] of the source, ascending; ``pts`` int64 [n] from 0 in units of ``time_base`` seconds, empty
    where nothing is known of time; ``pictures`` are the files of all frames where each has its own; ``source`` is what is
    read."""

    source: MediaSource
    indices: np.ndarray
    pts: np.ndarray
    time_base: Fraction
    pictures: tuple[MediaSource, ...]
    info: Any = None

    def reader(self) -> FrameReader:
        return FrameReader(self)

    @property
    def seconds(self) -> np.ndarray:
        """When each frame is shown, float64 [n]."""
        return self.pts * float(self.time_base)


def keep_frames(medium: Media, fps: float) -> KeptFrames:
    """The frames of a video that are kept at ``fps`` frames a second (0: all). Raises ``MediaError``."""
    probed: list[Any] = []

    def probe(source: MediaSource) -> Any:
        probed.append(probe_video(source))
        return probed[-1]

    data = DataConfig(num_frames=MOST_FRAMES, fps=fps, fps_rule="first")
    indices, pictures = take_frames(medium, data, probe, picture_files)
    if pictures:
        if medium.fps is None:
            return KeptFrames(medium.path, indices, np.empty(0, np.int64), Fraction(1), pictures)
        rate = Fraction(medium.fps).limit_denominator(100_000)
        pts, time_base = _in_ticks([(int(i) - int(indices[0])) / rate for i in indices])
        return KeptFrames(medium.path, indices, pts, time_base, pictures)
    (info,) = probed
    if info.has_pts and len(info.parts) == 2:
        ticks = info.pts[indices] - info.pts[indices[0]]
        pts, time_base = _as_they_are(ticks, info.time_base)
    else:
        pts, time_base = _in_ticks((info.seconds[indices] - info.seconds[indices[0]]).tolist())
    return KeptFrames(medium.path, indices, pts, time_base, (), info)


def _as_they_are(ticks: np.ndarray, time_base: Fraction) -> tuple[np.ndarray, Fraction]:
    """The times in units that an mp4 file can hold, without rounding if these of the source are such."""
    pts, unit = ticks * time_base.numerator, Fraction(1, time_base.denominator)
    if time_base.denominator <= TICKS[0] and _longest_step(pts) <= LARGEST_STEP:
        return pts, unit
    return _in_ticks([int(tick) * unit for tick in pts])


def _in_ticks(seconds: list[float] | list[Fraction]) -> tuple[np.ndarray, Fraction]:
    """Times in the finest unit that goes, rounded down: a frame must not seem to come after the moment that it was chosen for."""
    for ticks in TICKS:
        # 1e-9: what a float loses must not take a whole unit.
        pts = np.array([math.floor(s * ticks + 1e-9) for s in seconds], dtype=np.int64)
        if _longest_step(pts) <= LARGEST_STEP:
            break
    return pts, Fraction(1, ticks)


def _longest_step(pts: np.ndarray) -> int:
    return int(np.diff(pts).max(initial=0))


class FrameReader:
    """Gives the kept frames in their order as RGB pictures, upright. A context manager: it may hold a decoder."""

    def __init__(self, kept: KeptFrames) -> None:
        self._kept = kept
        self._video = None if kept.pictures else VideoReader(kept.info, kept.indices.tolist())

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._video is not None:
            self._video.__exit__(*exc)

    def frame(self, place: int) -> Image.Image:
        """Frame ``place`` of those that are kept, after every one asked for before. Raises ``MediaError``."""
        index = int(self._kept.indices[place])
        return self._video.frame(index) if self._video is not None else load_image(self._kept.pictures[index])

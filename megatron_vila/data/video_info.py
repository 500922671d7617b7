"""What is known of a video before it is decoded.

Legend: N frames of the file, K key frames, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_vila.data.media import Member


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """The frame table of a video and its size.

    ``pts`` int64 [N] and ``key_pts`` int64 [K], ascending within a part, count ``time_base`` seconds. ``key_parts`` int64 [K] are
    the parts of the key frames, ``key_places`` int64 [K] the bytes of the file where they begin (-1: not known). ``parts`` int64
    [P + 1] are the places in ``pts`` where the parts begin, and N; ``skipped`` int64 [P] are the packets of each part before its
    first key frame, which are not decoded. ``fps`` is the mean rate, in frames per second, and
    ``duration_s = num_frames / fps``. ``width`` and ``height`` are pixels as stored, before the rotation that the file may ask
    for. ``has_pts`` is false where the container keeps no or not all presentation times: ``pts`` then counts frames, and decoding
    goes through the file from its start.
    """

    source: str | Member | bytes
    num_frames: int
    fps: float
    duration_s: float
    width: int
    height: int
    time_base: Fraction
    pts: np.ndarray
    key_pts: np.ndarray
    has_pts: bool
    key_parts: np.ndarray
    key_places: np.ndarray
    parts: np.ndarray
    skipped: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """When each frame is shown, in seconds after the first: float64 [N]. Parts follow each other at the mean rate."""
        if not self.has_pts:
            return self.pts / self.fps
        times, begin_s = np.empty(self.num_frames), 0.0
        for first, last in zip(self.parts[:-1], self.parts[1:], strict=True):
            if first == last:
                continue
            times[first:last] = begin_s + (self.pts[first:last] - self.pts[first]) * float(self.time_base)
            begin_s = times[last - 1] + 1 / self.fps
        return times

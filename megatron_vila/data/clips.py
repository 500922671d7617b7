"""What a record's video is made of: a file or pictures, the whole or a clip; and which of its frames are taken.

Legend: N frames of the video, n frames taken.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import PICTURE_ENDINGS, Media
from megatron_vila.data.media import MediaError, Member
from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.video_info import VideoInfo


def take_frames(
    medium: Media,
    data: DataConfig,
    probe: Callable[[str | Member | bytes], VideoInfo],
    list_folder: Callable[[str], tuple[str, ...]],
) -> tuple[np.ndarray, tuple[str | Member | bytes, ...]]:
    """Frames to take of a video by ``data``, int64 [n] ascending, and its N pictures if it is made of pictures, else ().

    ``probe`` and ``list_folder`` are ``probe_video`` and ``picture_files``, or remember what these found. Raises ``MediaError``.
    """
    is_folder = not medium.pictures and isinstance(medium.path, str) and os.path.isdir(medium.path)
    pictures = list_folder(str(medium.path)) if is_folder else medium.pictures
    clipped = medium.start_s is not None or medium.end_s is not None
    if not pictures:
        info = probe(medium.path)
        first, end = _clip(medium, info.seconds) if clipped else (0, info.num_frames)
        video = _as_video(info, first, end) if clipped else info
        return first + sample_frame_indices(video, data.num_frames, data.fps, data.fps_rule), ()
    if medium.fps is None and clipped:
        raise MediaError(medium.path, "a clip of pictures needs their rate: give the record's field 'fps'")
    rate = medium.fps or 1.0
    first, end = _clip(medium, np.arange(len(pictures)) / rate)
    # Without a rate nothing is known of the time between two pictures: they are spread over the whole.
    fps = data.fps if medium.fps else 0.0
    return first + sample_frame_indices((end - first, rate), data.num_frames, fps, data.fps_rule), pictures


def picture_files(folder: str) -> tuple[str, ...]:
    """The pictures in ``folder`` in natural order: numbers in names count as numbers. Raises ``MediaError``."""
    try:
        names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise MediaError(folder, f"the folder cannot be read: {error.strerror}") from error
    names = [name for name in names if os.path.splitext(name)[1].lower() in PICTURE_ENDINGS]
    if not names:
        raise MediaError(folder, "the folder holds no picture that could be a frame")
    return tuple(os.path.join(folder, name) for name in sorted(names, key=natural))


def natural(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """A key that sorts names in natural order."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part)) if part[0] in "0123456789" else (1, part) for part in parts], name


def _as_video(info: VideoInfo, first: int, end: int) -> VideoInfo:
    """Frames ``first`` to ``end`` of a video as a video of their own, for the rules of sampling."""
    times_s = info.seconds[first:end] - info.seconds[first]
    count, span_s = end - first, float(times_s[-1])
    fps = (count - 1) / span_s if span_s > 0 else info.fps
    return dataclasses.replace(
        info,
        num_frames=count,
        fps=fps,
        duration_s=count / fps,
        time_base=Fraction(1, 10**6),
        pts=np.round(times_s * 1e6).astype(np.int64),
        has_pts=True,
        parts=np.array([0, count]),
        skipped=np.zeros(1, dtype=np.int64),
    )


def _clip(medium: Media, times_s: np.ndarray) -> tuple[int, int]:
    """First frame of the medium's clip and the end of it; the frame shown at its start if the clip lies between two frames."""
    tolerance_s = 1e-6  # far below the time between frames, far above the rounding of seconds
    first, end = 0, len(times_s)
    if medium.start_s is not None:
        if medium.start_s > times_s[-1] + _last_step(times_s):
            raise MediaError(
                medium.path, f"the clip starts at {medium.start_s:g} s, the last frame stands at {times_s[-1]:g} s"
            )
        first = int(np.searchsorted(times_s, medium.start_s - tolerance_s))
    if medium.end_s is not None:
        end = int(np.searchsorted(times_s, medium.end_s + tolerance_s, side="right"))
    if first >= end:
        first = max(0, end - 1)
        end = first + 1
    return first, end


def _last_step(times_s: np.ndarray) -> float:
    """How long the last frame is shown: as long as the one before."""
    return float(times_s[-1] - times_s[-2]) if len(times_s) > 1 else 1.0

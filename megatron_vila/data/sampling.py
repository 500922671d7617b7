"""Which frames of a video are taken: VILA's rules, held to times where frames do not come at a constant rate.

Legend: N frames of the video, n frames taken.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_vila.data.video_info import VideoInfo
from megatron_vila.errors import SettingError

FPS_RULES = ("spread", "first")
"""Rules for a number of frames per second, see ``sample_frame_indices``."""

TOLERANCE_S = 1e-6
"""Seconds that a frame may come after a moment and still be the one that is shown then: what a time loses as a float."""


def sample_frame_indices(
    video: VideoInfo | tuple[int, float], num_frames: int, fps: float = 0.0, rule: str = "spread"
) -> np.ndarray:
    """Frames to take from a video: int64 [n], ascending, without duplicates.

    ``video`` is a ``VideoInfo`` or (frames, frames per second). The rules are VILA's:

    * ``fps`` = 0: ``round(linspace(0, N - 1, n))``, the rule of its inference code, with n = ``num_frames``.
    * ``fps`` > 0, ``rule`` = spread: at most ``fps`` frames per second of video. A video of at least ``num_frames / fps`` seconds
      gives ``num_frames``, a shorter one ``int(duration * fps)`` but at least 2; the places are ``linspace`` cut down to whole
      numbers, the rule of LongVILA's training code.
    * ``fps`` > 0, ``rule`` = first: the frames at 0, 1 / ``fps``, 2 / ``fps`` ... seconds, the first ``num_frames`` of them, the
      rule of VILA's main branch.

    Both rules for ``fps`` count frames, which stands for time at a constant rate. Of a ``VideoInfo``, which knows the times,
    first takes the frames that are shown at these moments; so does spread where a frame lies half an interval or more from where
    a constant rate would put it. A frame that is shown at several of them is taken once. So a file that keeps these frames alone,
    at their times, gives the same frames by first.

    n is never above N: VILA's inference repeats frames of a shorter video to fill the count, its training does not, and a
    repeated frame costs time and teaches nothing. Raises ``SettingError`` for a count, rate or video that makes no sense.
    """
    total, rate = (video.num_frames, video.fps) if isinstance(video, VideoInfo) else video
    if num_frames < 1 or total < 1 or fps < 0:
        raise SettingError(
            f"cannot take num_frames={num_frames} at fps={fps} from a video of {total} frames: all must be positive"
        )
    if rule not in FPS_RULES:
        raise SettingError(f"fps_rule={rule} is unknown; use one of {', '.join(FPS_RULES)}")
    if fps == 0:
        return np.round(np.linspace(0, total - 1, min(num_frames, total))).astype(np.int64)
    if rate <= 0:
        raise SettingError(f"fps={fps} needs a video with a frame rate, got {rate}; set fps=0 to take frames uniformly")
    duration_s = total / rate
    if rule == "first":
        count = max(1, min(num_frames, math.ceil(duration_s / (1.0 / fps))))
        times = np.arange(count) * (1.0 / fps)
        if isinstance(video, VideoInfo):
            return np.unique(shown_at(video.seconds, times + TOLERANCE_S))
        places = (times * rate).astype(np.int64)
        return np.unique(places[places < total])
    wanted = num_frames if duration_s >= num_frames / fps else max(2, int(duration_s * fps))
    count, seconds = min(wanted, num_frames, total), uneven_seconds(video)
    if seconds is None:
        return np.linspace(0, total - 1, count).astype(np.int64)
    return np.unique(shown_at(seconds, np.linspace(0, seconds[-1], count)))


def uneven_seconds(video: VideoInfo | tuple[int, float]) -> np.ndarray | None:
    """The times of the frames, float64 [N], of a video whose rate varies; None if all lie where a constant rate puts them."""
    if not isinstance(video, VideoInfo):
        return None
    seconds = video.seconds
    off = np.abs(seconds * video.fps - np.arange(video.num_frames))
    return seconds if (off >= 0.5).any() else None


def shown_at(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The frames that are shown at ``times`` (float64, not before the first frame) if frame i is shown from ``seconds[i]`` on."""
    return np.maximum(np.searchsorted(seconds, times, side="right") - 1, 0)


def thin_out(indices: np.ndarray, count: int, seconds: np.ndarray | None = None) -> np.ndarray:
    """``count`` frames spread evenly from the first to the last of ``indices`` (int64 [F], ascending): int64 [count].

    With ``seconds``, the times of all frames of the video, they are spread evenly in time, at most ``count``.
    """
    if count >= len(indices):
        return indices
    if seconds is None:
        return np.round(np.linspace(indices[0], indices[-1], count)).astype(np.int64)
    return np.unique(shown_at(seconds, np.linspace(seconds[indices[0]], seconds[indices[-1]], count)))

"""Frame tables kept on disk, for containers that do not hold one: such a file is read whole, once per user and not once per rank.

A table is small, and named by path, size and time of change of the video and by the version of FFmpeg (``kept.py``).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from megatron_vila.data.kept import kept, kept_folder
from megatron_vila.data.media import MediaSource, Member, state_of
from megatron_vila.data.video_info import VideoInfo

SMALLEST_FILE = 2**22
"""Bytes below which a video is simply read again."""

WAIT_S = 120.0
"""Seconds that a process waits for another one to make a table, before it makes it itself."""

_ARRAYS = ("pts", "key_pts", "key_parts", "key_places", "parts", "skipped")
_FORMAT = 2


def cached(source: MediaSource, make: Callable[[], VideoInfo]) -> VideoInfo:
    """The table of a video: the kept one, else ``make()``, which is kept. Raises what ``make`` raises."""
    try:
        if isinstance(source, bytes) or state_of(source)[0] < SMALLEST_FILE:
            return make()
        path = source.path if isinstance(source, Member) else source
        identity = repr((_FORMAT, os.path.realpath(path), *state_of(source), av.library_versions))
    except (OSError, ValueError):
        return make()
    return kept(
        kept_folder("videos"),
        f"{hashlib.sha256(identity.encode()).hexdigest()}.npz",
        lambda file: _read(file, source, identity),
        make,
        lambda stream, info: _write(stream, info, identity),
        WAIT_S,
    )


def _read(file: Path, source: MediaSource, identity: str) -> VideoInfo | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            if str(kept["identity"]) != identity:
                return None
            width, height, numerator, denominator, has_pts = map(int, kept["numbers"])
            arrays = {name: np.cumsum(kept[name], dtype=np.int64) for name in _ARRAYS}
            fps = float(kept["fps"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    frames = len(arrays["pts"])
    return VideoInfo(
        source=source if isinstance(source, Member) else os.fspath(source),
        num_frames=frames,
        fps=fps,
        duration_s=frames / fps,
        width=width,
        height=height,
        time_base=Fraction(numerator, denominator),
        has_pts=bool(has_pts),
        **arrays,
    )


def _write(stream: BinaryIO, info: VideoInfo, identity: str) -> None:
    # Differences are nearly all alike: a film's table takes a few KiB.
    arrays = {name: np.diff(getattr(info, name), prepend=0) for name in _ARRAYS}
    numbers = [info.width, info.height, info.time_base.numerator, info.time_base.denominator, info.has_pts]
    np.savez_compressed(stream, identity=identity, numbers=numbers, fps=info.fps, **arrays)

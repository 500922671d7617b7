"""Frame tables kept on disk, for containers that do not hold one: such a file is read whole, once a user and not once a rank.

Tables lie in ``~/.cache/megatron_vila/videos`` (``XDG_CACHE_HOME`` counts), one small file a video, named by the path, size and
time of change of the video and by the version of FFmpeg. They hold numbers only, and are written in one step. While one process
makes a table, the others wait for it. A folder that cannot be written switches this off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from megatron_vila.data.video_info import VideoInfo

SMALLEST_FILE = 2**22
"""Bytes below which a video is simply read again."""

WAIT_S = 120.0
"""Seconds that a process waits for another one to make a table, before it makes it itself."""

_ARRAYS = ("pts", "key_pts", "key_parts", "key_places", "parts", "skipped")
_FORMAT = 2


def cached(path: str | os.PathLike, make: Callable[[], VideoInfo]) -> VideoInfo:
    """The table of ``path``: the kept one, else ``make()``, which is kept. Raises what ``make`` raises."""
    try:
        status = os.stat(path)
        if status.st_size < SMALLEST_FILE:
            return make()
        identity = repr((_FORMAT, os.path.realpath(path), status.st_size, status.st_mtime_ns, av.library_versions))
        file = _folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.npz"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError):
        return make()
    known = _read(file, path, identity)
    if known is not None:
        return known
    with _alone(file.with_suffix(".lock")):
        known = _read(file, path, identity)
        if known is None:
            known = make()
            _write(file, known, identity)
    return known


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vila" / "videos"


def _read(file: Path, path: str | os.PathLike, identity: str) -> VideoInfo | None:
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
        path=os.fspath(path),
        num_frames=frames,
        fps=fps,
        duration_s=frames / fps,
        width=width,
        height=height,
        time_base=Fraction(numerator, denominator),
        has_pts=bool(has_pts),
        **arrays,
    )


def _write(file: Path, info: VideoInfo, identity: str) -> None:
    # Differences are nearly all alike: a film's table takes a few KiB.
    arrays = {name: np.diff(getattr(info, name), prepend=0) for name in _ARRAYS}
    numbers = [info.width, info.height, info.time_base.numerator, info.time_base.denominator, info.has_pts]
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as stream:
            np.savez_compressed(stream, identity=identity, numbers=numbers, fps=info.fps, **arrays)
        os.replace(stream.name, file)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold ``lock``, which ends with the process that holds it, or go on without it where locks do not work."""
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)

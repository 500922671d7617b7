"""What a media file may be: a regular file of a known format, with pictures within a budget; and one error for all that fails.

Files come from anywhere, so nothing in one may reach another file or the network, wait for ever, fill the memory or end a run.
FFmpeg gets an open file and may open nothing else (the ``fd`` protocol is the only one allowed, and playlists, patterns and
network formats are not among ``VIDEO_FORMATS``); Pillow gets an open file and tries ``IMAGE_FORMATS`` only, so that it starts no
other program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import stat
from collections.abc import Iterator

import av

MAX_PIXELS = 2**26
"""Most pixels of a picture or video frame (8192 x 8192): 256 MiB for each copy that is held while it is turned into RGB."""

MAX_SIDE = 65_535
"""Longest side of a picture or video frame in pixels."""

VIDEO_FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif")
"""FFmpeg's names of the containers that are read. ``mov`` is also mp4 and 3gp, ``matroska`` also WebM, ``asf`` also wmv."""

_CONTAINERS = "mp4, mov, 3gp, mkv, WebM, avi, MPEG transport and program streams, flv, asf/wmv, ogg, gif"

LARGEST_BLOCK = 2**28 + 2**24
"""Bytes of the largest block of memory that FFmpeg may ask for: a plane of four bytes a pixel, and an index of 12 million frames.
A file of 2 KB may claim to hold more frames than memory has room for, in the index, which is built when the file is opened."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's names of the formats that are read."""

LARGEST_PICTURE_FILE = 2**30
"""Bytes of the largest picture file, twice what the largest picture takes without compression: some readers take in all of it."""

MAX_SCANNED_PIXELS = 32 * MAX_PIXELS
"""Most pixels that the scans of a JPEG may go over together: each refines the whole picture, and a few bytes make one."""

TIME_LIMIT_S = 60.0
"""Seconds that opening a video, or reading one packet of it, may take. A read that hangs inside the kernel is not ended by it."""


def _limit_blocks() -> None:
    """Tell FFmpeg, which PyAV has loaded, the size of the largest block. PyAV has no call for it."""
    with open("/proc/self/maps") as maps:
        libraries = {line.split(maxsplit=5)[-1].strip() for line in maps if "/libavutil" in line}
    for library in libraries:
        ctypes.CDLL(library).av_max_alloc(ctypes.c_size_t(LARGEST_BLOCK))


_limit_blocks()


_TAGS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""Tags that are not UTF-8 make PyAV 18 refuse a file unless it is told to replace them; later versions take them as they are."""


class MediaError(Exception):
    """An image or video that cannot be used: ``path`` names the file, ``reason`` says what is wrong with it."""

    def __init__(self, path: str | os.PathLike, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        # Half a surrogate pair in a name or a tag cannot be written to a log.
        return f"{self.path}: {self.reason}".encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def errors_of(path: str | os.PathLike, failure: str) -> Iterator[None]:
    """Turn every exception about the file ``path`` into a ``MediaError`` that begins with ``failure``.

    A media library raises whatever its author did not foresee, lack of memory included. None of it may end a run.
    """
    try:
        yield
    except MediaError:
        raise
    except av.error.ExitError as error:
        raise MediaError(path, f"{failure}: it took longer than {TIME_LIMIT_S:.0f} s") from error
    except av.error.BlockingIOError as error:
        # What the reader of transport streams gives after 64 KiB without the byte that begins a packet.
        raise MediaError(path, f"{failure}: a stretch of it holds no packet (a hole, or overwritten bytes)") from error
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(path, f"{failure}: {text}") from error


def open_regular(path: str | os.PathLike) -> int:
    """A descriptor of ``path``, open for reading, which the caller closes. Links are followed.

    Raises ``MediaError`` for a file that is missing, empty or not a regular file. A pipe or device is not waited for; files of
    ``/proc``, of which some are, have no size and count as empty.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise MediaError(path, "no such file") from error
    except (OSError, ValueError) as error:
        raise MediaError(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(path, f"not a regular file but a {_kind(status.st_mode)}")
        if status.st_size == 0:
            raise MediaError(path, "the file is empty (0 bytes)")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_size(path: str | os.PathLike, width: int, height: int) -> None:
    """Raise ``MediaError`` if a picture or frame of ``width`` x ``height`` pixels is over the budget."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise MediaError(
            path,
            f"{width} x {height} pixels are more than a picture may have ({MAX_PIXELS:,} in all, {MAX_SIDE:,} a side)",
        )


def open_video(path: str | os.PathLike) -> tuple[av.container.InputContainer, av.VideoStream]:
    """The video file ``path``, open in FFmpeg, which can open nothing else from it, and its video stream.

    The stream is the first one that is no cover picture; the others are not read. It decodes in the calling thread alone.
    Raises ``MediaError``.
    """
    descriptor = open_regular(path)
    try:
        with errors_of(path, "not a video that can be read"), _container_told(path):
            container = av.open(
                "fd:",
                container_options={
                    "fd": str(descriptor),
                    "protocol_whitelist": "fd",
                    "format_whitelist": ",".join(VIDEO_FORMATS),
                },
                # Streams are looked at with this; a decoder gets it again when it is opened.
                options={"max_pixels": str(MAX_PIXELS)},
                **_TAGS,
                timeout=(TIME_LIMIT_S, TIME_LIMIT_S),
            )
    finally:
        os.close(descriptor)
    try:
        return container, _video_stream(container, path)
    except BaseException:
        container.close()
        raise


@contextlib.contextmanager
def _container_told(path: str | os.PathLike) -> Iterator[None]:
    """Say which containers are read where FFmpeg knows the format of a file and it is none of them: "Invalid argument" to it."""
    try:
        yield
    except av.error.ArgumentError as error:
        raise MediaError(
            path,
            f"not a video that can be read: its format is none of {_CONTAINERS}, or its header is damaged; "
            f"`ffmpeg -i {shlex.quote(os.path.basename(path))} -c copy out.mp4` makes an mp4 of a video (without `-c copy` if "
            "its codec cannot be copied)",
        ) from error


def _video_stream(container: av.container.InputContainer, path: str | os.PathLike) -> av.VideoStream:
    """The first stream of ``container`` with moving pictures."""
    attached = av.stream.Disposition.attached_pic
    stream = next((s for s in container.streams.video if not s.disposition & attached), None)
    if stream is None:
        raise MediaError(path, "the file holds no video stream")
    if stream.codec_context is None:
        raise MediaError(path, "no decoder is installed for the codec of this video")
    check_size(path, stream.codec_context.width, stream.codec_context.height)
    # Frames may change their size on the way: the decoder refuses to make room for one over the budget.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    # Frame threads before a fork can deadlock, and a loader decodes many files at once anyway.
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return stream


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")

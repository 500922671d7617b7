"""What a media file may be: a regular file of a known format, with pictures within a budget; and one error for all that fails.

A medium is named by its ``MediaSource``: the path of a file, a ``Member`` of a larger file (a shard), or its bytes. All are
opened by ``open_media``.

Files come from anywhere, so nothing in one may reach another file or the network, wait forever, fill the memory or end a run.
FFmpeg gets an open file and may open nothing else (the ``fd`` protocol is the only one allowed, and playlists, patterns and
network formats are not among ``VIDEO_FORMATS``); Pillow gets an open file and tries ``IMAGE_FORMATS`` only, so that it starts no
other program.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import av
from av.codec.hwaccel import HWAccel

from megatron_vila.errors import UserError

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

REMOTE_READ = 2**17
"""Bytes that are taken at once of a medium that lies elsewhere."""

TIME_LIMIT_S = 60.0
"""Seconds that opening a video, or reading one packet of it, may take. A read that hangs inside the kernel is not ended by it."""


def _limit_blocks() -> None:
    """Tell FFmpeg, which PyAV has loaded, the size of the largest block. PyAV has no call for it."""
    with open("/proc/self/maps") as maps:
        libraries = {line.split(maxsplit=5)[-1].strip() for line in maps if "/libavutil" in line}
    for library in libraries:
        ctypes.CDLL(library).av_max_alloc(ctypes.c_size_t(LARGEST_BLOCK))


_limit_blocks()


_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""Tags that are not UTF-8 make PyAV 18 refuse a file unless it is told to replace them; later versions take them as they are."""


class Storage(Protocol):
    """Reads a file that lies elsewhere. Safe for threads."""

    state: str
    """A text that is another one when the file has another content."""

    def read(self, offset: int, size: int) -> bytes:
        """These bytes of the file; fewer at its end."""


@dataclass(frozen=True)
class Member:
    """A medium inside a larger regular file, as in a tar file: ``size`` bytes from byte ``offset`` of the file ``path``.
    ``name`` is what it is called there. ``storage`` reads it where ``path`` is an address, not a path."""

    path: str
    offset: int
    size: int
    name: str
    storage: Storage | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.path}, {self.name}"


MediaSource = str | os.PathLike | Member | bytes
"""Where a medium lies. It can be a key of a dictionary."""


def name_of(source: MediaSource) -> str:
    """What a medium is called in messages."""
    return f"{len(source)} bytes in memory" if isinstance(source, bytes) else str(source)


class MediaError(UserError):
    """An image or video that cannot be used: ``path`` names it, ``reason`` says what is wrong with it."""

    def __init__(self, source: MediaSource, reason: str) -> None:
        self.path = name_of(source)
        super().__init__(self.path, reason)
        self.reason = reason

    def __str__(self) -> str:
        # Half a surrogate pair in a name or a tag cannot be written to a log.
        return f"{self.path}: {self.reason}".encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def errors_of(source: MediaSource, failure: str) -> Iterator[None]:
    """Turn every exception about the medium ``source`` into a ``MediaError`` that begins with ``failure``.

    A media library raises whatever its author did not foresee, lack of memory included. None of it may end a run.
    """
    try:
        yield
    except MediaError:
        raise
    except av.error.ExitError as error:
        raise MediaError(source, f"{failure}: it took longer than {TIME_LIMIT_S:.0f} s") from error
    except av.error.BlockingIOError as error:
        # What the reader of transport streams gives after 64 KiB without the byte that begins a packet.
        raise MediaError(source, f"{failure}: a stretch of it holds no packet (a hole, or overwritten bytes)") from error
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(source, f"{failure}: {text}") from error


def open_media(source: MediaSource) -> BinaryIO:
    """A medium, open for reading, which the caller closes: a file that can be sought in and holds the bytes of the medium alone.

    Links are followed. Raises ``MediaError`` for a file that is missing, empty or not a regular file, and for a member that its
    file does not hold in full. A pipe or device is not waited for, nor are files of ``/proc``, which have no size
    and count as empty. Only a file named by its path has a descriptor (``fileno``).
    """
    if isinstance(source, bytes):
        if not source:
            raise MediaError(source, "the file is empty (0 bytes)")
        return io.BytesIO(source)
    if not isinstance(source, Member):
        return os.fdopen(_open_regular(source, source), "rb")
    if not source.size:
        raise MediaError(source, "the file is empty (0 bytes)")
    if source.storage is not None:
        return io.BufferedReader(_StoredWindow(source.storage, source.offset, source.size), REMOTE_READ)
    descriptor = _open_regular(source.path, source)
    try:
        if source.offset + source.size > os.fstat(descriptor).st_size:
            raise MediaError(source, f"cut off: the file that holds it ends before byte {source.offset + source.size:,}")
        return io.BufferedReader(_Window(descriptor, source.offset, source.size))
    except BaseException:
        os.close(descriptor)
        raise


def state_of(source: MediaSource) -> tuple[int, *tuple[int | str, ...]]:
    """A value that changes when the content of a medium does; its first part is the size in bytes. Raises ``OSError``."""
    if isinstance(source, bytes):
        return len(source), hashlib.sha256(source).hexdigest()
    if isinstance(source, Member) and source.storage is not None:
        return source.size, source.offset, source.storage.state
    status = os.stat(source.path if isinstance(source, Member) else source)
    if isinstance(source, Member):
        return source.size, source.offset, status.st_size, status.st_mtime_ns
    return status.st_size, status.st_mtime_ns


def is_there(source: MediaSource) -> bool:
    """Whether the file of a medium exists, or the file that holds it; one that lies elsewhere is taken to be there."""
    if isinstance(source, Member):
        return source.storage is not None or os.path.exists(source.path)
    return isinstance(source, bytes) or os.path.exists(source)


class _Part(io.RawIOBase):
    """``size`` bytes from ``offset`` of something larger, which ``_read_at`` reads."""

    def __init__(self, offset: int, size: int) -> None:
        self._offset, self._size, self._place = offset, size, 0

    def _read_at(self, offset: int, room: memoryview) -> int:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._size - self._place)]
        count = self._read_at(self._offset + self._place, room) if room else 0
        self._place += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to byte {start + offset}")
        self._place = start + offset
        return self._place


class _Window(_Part):
    """A part of an open file, which is closed with it."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        super().__init__(offset, size)
        self._descriptor = descriptor

    def _read_at(self, offset: int, room: memoryview) -> int:
        return os.preadv(self._descriptor, [room], offset)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class _StoredWindow(_Part):
    """A part of a file that lies elsewhere."""

    def __init__(self, storage: Storage, offset: int, size: int) -> None:
        super().__init__(offset, size)
        self._storage = storage

    def _read_at(self, offset: int, room: memoryview) -> int:
        found = self._storage.read(offset, len(room))
        room[: len(found)] = found
        return len(found)


def _open_regular(path: str | os.PathLike, source: MediaSource) -> int:
    """A descriptor of the regular file ``path``, in which ``source`` lies."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise MediaError(source, "no such file") from error
    except (OSError, ValueError) as error:
        raise MediaError(source, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(source, f"not a regular file but a {_kind(status.st_mode)}")
        if status.st_size == 0:
            raise MediaError(source, "the file is empty (0 bytes)")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_size(source: MediaSource, width: int, height: int) -> None:
    """Raise ``MediaError`` if a picture or frame of ``width`` x ``height`` pixels is over the budget."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise MediaError(
            source,
            f"{width} x {height} pixels are more than a picture may have ({MAX_PIXELS:,} in all, {MAX_SIDE:,} a side)",
        )


def open_video(
    source: MediaSource, threads: int = 1, device: HWAccel | None = None
) -> tuple[av.container.InputContainer, av.VideoStream]:
    """The video ``source``, open in FFmpeg, which can open nothing else from it, and its video stream.

    The stream is the first one that is no cover picture; the others are not read. It decodes in the calling thread alone, or in
    ``threads`` of FFmpeg's own, or on ``device``; then damage that FFmpeg sees is an error, since only a single thread always
    mends it in the same way. Raises ``MediaError``.
    """
    file = open_media(source)
    try:
        with errors_of(source, "not a video that can be read"), _container_told(source):
            container = _open_container(file, device)
    except BaseException:
        file.close()
        raise
    try:
        stream = _video_stream(container, source)
        if threads > 1 or device is not None:
            stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}
        if threads > 1:
            stream.codec_context.thread_type = "FRAME"
            stream.codec_context.thread_count = threads
        return container, stream
    except BaseException:
        container.close()
        raise


def _open_container(file: BinaryIO, device: HWAccel | None) -> av.container.InputContainer:
    options = {"protocol_whitelist": "fd", "format_whitelist": ",".join(VIDEO_FORMATS)}
    named: Any = file
    with contextlib.suppress(io.UnsupportedOperation):
        # FFmpeg reads a whole file by itself and without Python, from a descriptor of its own.
        options["fd"], named = str(file.fileno()), "fd:"
    container: av.container.InputContainer = av.open(
        named,
        container_options=options,
        # Streams are looked at with this; a decoder gets it again when it is opened.
        options={"max_pixels": str(MAX_PIXELS)},
        **_TAGS,
        timeout=(TIME_LIMIT_S, TIME_LIMIT_S),
        hwaccel=device,
    )
    if named != file:
        file.close()
    return container


@contextlib.contextmanager
def _container_told(source: MediaSource) -> Iterator[None]:
    """Say which containers are read where FFmpeg knows the format of a file and it is none of them: "Invalid argument" to it."""
    try:
        yield
    except av.error.ArgumentError as error:
        name = shlex.quote(os.path.basename(name_of(source)))
        raise MediaError(
            source,
            f"not a video that can be read: its format is none of {_CONTAINERS}, or its header is damaged; "
            f"`ffmpeg -i {name} -c copy out.mp4` makes an mp4 of a video (without `-c copy` if its codec cannot be copied)",
        ) from error


def _video_stream(container: av.container.InputContainer, source: MediaSource) -> av.VideoStream:
    """The first stream of ``container`` with moving pictures."""
    attached = av.stream.Disposition.attached_pic
    stream = next((s for s in container.streams.video if not s.disposition & attached), None)
    if stream is None:
        raise MediaError(source, "the file holds no video stream")
    if stream.codec_context is None:
        raise MediaError(source, "no decoder is installed for the codec of this video")
    check_size(source, stream.codec_context.width, stream.codec_context.height)
    # Frames may change their size on the way: the decoder refuses to make room for one over the budget.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    # Frame threads before a fork can deadlock.
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return stream


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")

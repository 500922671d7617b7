"""The video engines of a GPU (NVDEC), through the FFmpeg that PyAV brings along: nothing else is installed for them.

FFmpeg reads the file and the headers of its frames as it does for a decoder on the host, so frames have the same numbers and come
out in the same order; the engine does what lies below. H.264, HEVC and VP9 say what a decoder gives to the bit. It is fetched as
it is and turned into RGB by the same code, so pictures are equal too. An engine does not tell that a frame is damaged inside,
which on the host makes a sample broken.

The engines work in a CUDA context of their own: in the one that trains, FFmpeg would queue its copies behind the layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Iterator

import av
from av.codec.hwaccel import HWAccel
from av.video.reformatter import VideoReformatter

from megatron_vila import accelerator
from megatron_vila.data.media import MediaSource, open_video
from megatron_vila.errors import SettingError
from megatron_vila.plan.budgets import GIB

logger = logging.getLogger(__name__)

CODECS = ("h264", "hevc", "vp9")
"""What the engines are used for."""

THREADS = 8
"""Threads that keep the engines of a GPU busy: an H200 has seven."""

MEMORY_BYTES = 6 * GIB
"""Memory of the GPU that must be free before engines are begun to be used: with 1080p they took 2.7 GiB."""

UNJUDGED_ROWS = 8
"""First rows of a run, which are waited for because nothing is decoded ahead yet."""

_BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC: a thread that waits for the GPU leaves its core to others


class VideoEngineError(RuntimeError):
    """There is no video engine, or it does not do this video."""


def engines_of(video_decoder: str) -> VideoEngines | None:
    """The engines that data.video_decoder asks for; None for cpu, and for auto on a machine without them.

    Raises ``SettingError`` for nvdec there.
    """
    device = accelerator.device()
    if video_decoder == "cpu" or (video_decoder == "auto" and device.type != "cuda"):
        return None
    try:
        return _of_device(device.index or 0)
    except VideoEngineError as error:
        if video_decoder == "nvdec":
            raise SettingError(
                f"data.video_decoder=nvdec: this machine has no video engine that can be used: {error}; use auto or cpu"
            ) from error
        logger.info("videos are decoded on the host alone: %s", error)
        return None


class Need:
    """Whether engines are needed, by whether rows were late: one that had to be waited for when it was needed is.

    Engines slow the layers down and take memory, so cores do what they can do in time.
    """

    def __init__(self) -> None:
        self.is_there = False
        self._rows, self._late = 0, 0

    def note(self, late: bool) -> bool:
        """Count a row; whether ``is_there`` has changed by it."""
        self._rows += 1
        if self._rows <= UNJUDGED_ROWS:
            return False
        self._late = min(8, self._late + 1) if late else max(0, self._late - 1)
        before = self.is_there
        self.is_there = self._late >= 2 or (before and self._late > 0)
        return self.is_there != before


@functools.cache
def _of_device(device: int) -> VideoEngines:
    """One for all loaders of the process: its context takes memory of the GPU."""
    return VideoEngines(device)


class VideoEngines:
    """The engines of GPU ``device`` (its number for this process). Safe for threads. Raises ``VideoEngineError`` without them."""

    def __init__(self, device: int) -> None:
        self._device = device
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
            ctypes.CDLL("libnvcuvid.so.1")
        except OSError as error:
            raise VideoEngineError(
                f"the driver's library cannot be loaded ({error}); in a container, NVIDIA_DRIVER_CAPABILITIES must name video"
            ) from error
        self._lock, self._context = threading.Lock(), ctypes.c_void_p()

    def open_video(self, source: MediaSource) -> tuple[av.container.InputContainer, av.VideoStream]:
        """As ``media.open_video``; frames stay on the GPU until ``fetch``. Raises ``VideoEngineError`` for other codecs than
        ``CODECS``, ``MediaError`` as there."""
        # A device of FFmpeg is made for each file; all of them share the context that is current here.
        device = HWAccel(
            "cuda",
            str(self._device),
            allow_software_fallback=False,
            options={"current_ctx": "1", "primary_ctx": "0"},
            is_hw_owned=True,
        )
        with self._current():
            container, stream = open_video(source, device=device)
        if stream.codec_context.codec.canonical_name not in CODECS:
            container.close()
            raise VideoEngineError(f"{stream.codec_context.codec.canonical_name} is not decoded by a video engine")
        return container, stream

    def fetch(self, frame: av.VideoFrame, size: tuple[int, int], reformatter: VideoReformatter) -> av.VideoFrame:
        """``frame`` in host memory, as a decoder there gives it. Raises ``VideoEngineError`` for other than 8 bits and 4:2:0, and
        other than the ``size`` (width, height) of the video."""
        kind = frame.sw_format or frame.format
        if kind.name != "nv12":
            raise VideoEngineError(f"a video engine does not decode format {kind.name} as the host does")
        if (frame.width, frame.height) != size:
            # FFmpeg cuts off what a stream does not show at the right and the bottom, on an engine not at the left and the top.
            raise VideoEngineError("a video engine does not cut its frames as the host does")
        return as_decoded(frame, reformatter)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._made_context())
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _made_context(self) -> ctypes.c_void_p:
        """The context, which takes memory of the GPU only once there is a video for it."""
        with self._lock:
            if not self._context:
                number = ctypes.c_int()
                self._call("cuInit", 0)
                self._call("cuDeviceGet", ctypes.byref(number), self._device)
                self._call("cuCtxCreate_v2", ctypes.byref(self._context), _BLOCKING_SYNC, number)
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
            return self._context

    def _call(self, name: str, *arguments: object) -> None:
        if error := getattr(self._driver, name)(*arguments):
            raise VideoEngineError(f"{name} failed with CUDA error {error}")


def as_decoded(frame: av.VideoFrame, reformatter: VideoReformatter) -> av.VideoFrame:
    """A frame of format nv12 with its two planes of color apart, as decoders on the host give them; no value changes."""
    return reformatter.reformat(frame, format="yuv420p", threads=1)

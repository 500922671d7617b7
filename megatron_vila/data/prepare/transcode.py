"""A video, encoded anew as training reads it: small frames, few of them, each quick to reach, at their original times.

Frames go from the decoder to the encoder one by one, so memory does not grow with the length of a video. What the encoder made
is read again: number and times of the frames must be those that were written, and a few frames are compared with the source as
the model sees both.

Legend: n frames kept.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from megatron_vila.data.media import MediaError, errors_of
from megatron_vila.data.prepare.frames import KeptFrames
from megatron_vila.data.prepare.options import Options
from megatron_vila.data.video import VideoReader, probe_video

CHECKED_FRAMES = 8
"""Frames of a video, spread over it, that are compared with the source."""

LONGEST_SIDE = 16_384
"""Pixels of the longest side that x264 takes."""


class Encoded(NamedTuple):
    """Frames of ``width`` x ``height`` pixels; ``psnr`` is that of the worst frame that was checked, in dB."""

    width: int
    height: int
    psnr: float


def transcode(kept: KeptFrames, options: Options, out: Path) -> Encoded:
    """Write the frames ``kept`` to the mp4 file ``out``. Raises ``MediaError`` for a source that cannot be read, ``OSError``."""
    checked = {int(place): None for place in np.linspace(0, len(kept.indices) - 1, CHECKED_FRAMES)}
    views: dict[int, np.ndarray] = {}
    with kept.reader() as reader, Encoder(kept, options, out) as encoder:
        for place in range(len(kept.indices)):
            picture = reader.frame(place)
            if place in checked:
                views[place] = model_view(picture, options.short_side)
            encoder.write(picture, int(kept.pts[place]))
    with errors_of(kept.source, "what was encoded of it cannot be read"):
        return Encoded(encoder.width, encoder.height, _compare(kept, views, options, out))


class Encoder:
    """An mp4 file in the making. As a context manager it is whole where the block ends without an error."""

    def __init__(self, kept: KeptFrames, options: Options, out: Path) -> None:
        self._kept, self._options, self._out = kept, options, out
        self._to_yuv = VideoReformatter()
        self._stream: Any = None

    def __enter__(self) -> Encoder:
        # The table of the frames stands before them: a reader of remote storage gets it with the first bytes.
        self._container = av.open(str(self._out), "w", format="mp4", options={"movflags": "+faststart"})
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, picture: Image.Image, pts: int) -> None:
        if self._stream is None:
            self._begin(picture)
        if picture.size != (self.width, self.height):
            # Bicubic as the loader, which scales what it finds to the model's square.
            picture = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        rgb = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        frame = self._to_yuv.reformat(
            rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
        )
        frame.pts, frame.time_base = pts, self._kept.time_base
        self._container.mux(self._stream.encode(frame))

    def _begin(self, picture: Image.Image) -> None:
        self.width, self.height = encoded_size(*picture.size, self._options.short_side)
        settings = {
            "crf": self._options.crf, "preset": self._options.preset, "g": self._options.key_distance, "sc_threshold": 0,
            "keyint_min": self._options.key_distance,
            # Without B-frames a frame is decoded as soon as it is read. With more threads the bytes depend on the machine.
            "bf": 0, "threads": 1,
        }  # fmt: skip
        self._stream = self._container.add_stream(
            "libx264", options={name: str(value) for name, value in settings.items()}
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = self.width, self.height, "yuv420p"
        codec = self._stream.codec_context
        codec.time_base = self._stream.time_base = self._kept.time_base
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries = codec.color_trc = _BT709


_BT709 = 1


def encoded_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height that a video of upright frames of this size gets: even numbers, as 4:2:0 needs, and never larger but to be
    even."""
    scale = min(1.0, short_side / min(width, height), LONGEST_SIDE / max(width, height))
    return _even(width * scale), _even(height * scale)


def _even(side: float) -> int:
    return max(2, 2 * math.floor(side / 2 + 0.5))


def model_view(picture: Image.Image, side: int) -> np.ndarray:
    """What a model of this side sees of a picture: uint8 [side, side, 3]."""
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def psnr_of(one: np.ndarray, other: np.ndarray) -> float:
    """The peak signal-to-noise ratio of two pictures of bytes in dB, 100 where they are the same."""
    error = float(np.mean((one.astype(np.float32) - other) ** 2))
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def _compare(kept: KeptFrames, views: dict[int, np.ndarray], options: Options, out: Path) -> float:
    """The PSNR of the worst of the frames ``views`` in the file ``out``, whose frames must have the times that are ``kept``."""
    info = probe_video(out)
    tick = float(kept.time_base)
    if info.num_frames != len(kept.indices) or np.abs(info.seconds - kept.seconds).max() > tick / 2:
        raise MediaError(
            kept.source, f"its {len(kept.indices)} frames came out as {info.num_frames}, or at other times"
        )
    with VideoReader(info, sorted(views)) as reader:
        return min(
            psnr_of(view, model_view(reader.frame(place), options.short_side)) for place, view in sorted(views.items())
        )

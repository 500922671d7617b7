"""A picture as it goes into a shard: its own bytes if it is small enough and of a common format, else a copy of it."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

from megatron_vila.data.images import load_image
from megatron_vila.data.media import MediaSource, open_media


class PreparedPicture(NamedTuple):
    """``content`` is a file with the ending ``ending``; ``width`` x ``height`` are its pixels, upright."""

    ending: str
    content: bytes
    width: int
    height: int


def prepare_picture(source: MediaSource, longest_side: int, quality: int) -> PreparedPicture:
    """A picture of at most ``longest_side`` pixels a side. It is decoded in any case, so that a broken one is found now.

    One that is too large becomes a JPEG of ``quality`` without loss of color resolution, one of a format that is not common a
    PNG. Raises ``MediaError``.
    """
    picture = load_image(source)
    kind = _common_kind(source)
    if max(picture.size) > longest_side:
        picture = smaller(picture, longest_side / max(picture.size))
        return PreparedPicture("jpg", as_jpeg(picture, quality), *picture.size)
    if kind:
        with open_media(source) as file:
            return PreparedPicture(kind, file.read(), *picture.size)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return PreparedPicture("png", content.getvalue(), *picture.size)


def prepare_frame(source: MediaSource, short_side: int, quality: int) -> PreparedPicture:
    """A picture that is a frame of a video without times: a JPEG of at most ``short_side`` pixels on its short side."""
    picture = load_image(source)
    if min(picture.size) > short_side:
        picture = smaller(picture, short_side / min(picture.size))
    return PreparedPicture("jpg", as_jpeg(picture, quality), *picture.size)


def smaller(picture: Image.Image, scale: float) -> Image.Image:
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def as_jpeg(picture: Image.Image, quality: int) -> bytes:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality, subsampling=0)
    return content.getvalue()


def _common_kind(source: MediaSource) -> str:
    """The ending of a picture file of a common format by its first bytes, "" for another format."""
    with open_media(source) as file:
        head = file.read(12)
    return next((ending for begin, end, ending in _COMMON if head.startswith(begin) and head.endswith(end)), "")


_COMMON = ((b"\xff\xd8\xff", b"", "jpg"), (b"\x89PNG\r\n\x1a\n", b"", "png"), (b"RIFF", b"WEBP", "webp"))
"""What files of the formats that every reader of shards knows begin with: first bytes, last of twelve, ending."""

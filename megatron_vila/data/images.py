"""Pictures as they go to the vision tower: bytes, which it scales itself on its device.

Legend: F pictures, H = W side in pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from megatron_vila.data.media import (
    IMAGE_FORMATS,
    LARGEST_PICTURE_FILE,
    MAX_PIXELS,
    MAX_SCANNED_PIXELS,
    MediaError,
    MediaSource,
    check_size,
    errors_of,
    open_media,
)

PAD_COLOR = (127, 127, 127)
"""SigLIP's mean color, 0.5, cut to a whole number: what the border of a padded picture becomes."""

BAND_PIXELS = 2**22
"""Pixels of a padded picture that are held at once while it is scaled."""

PADDED_SIDE = math.isqrt(MAX_PIXELS)
"""A picture with a longer side is scaled down to it before it is padded: its square would be over the budget."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation (1: nothing to do)."""

_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_BITS_TAG, _MEANING_TAG, _SAMPLE_FORMAT_TAG = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
# From one gray to the next, by Pillow's names of codings with 2 and 4 bits.
_GRAY_STEPS = {"L;2": 85, "L;4": 17}


def load_image(source: MediaSource) -> Image.Image:
    """Read an image as ``as_rgb`` shows it; of an animation, the first picture.

    Raises ``MediaError`` for a file that is missing, empty, not a regular file, cut off, of another format than
    ``IMAGE_FORMATS``, larger than ``MAX_PIXELS`` or a JPEG of more scans than it needs, and for values that ``as_rgb`` refuses;
    the size is taken from the header, before anything is decoded.
    """
    with _opened(source) as (picture, file):
        if picture.format in ("JPEG", "MPO"):
            _check_scans(source, file, picture.width * picture.height)
        _scale_hidden_color(picture)
        picture.load()
        return as_rgb(picture)


def picture_size(source: MediaSource) -> tuple[int, int]:
    """Width and height of an image as ``load_image`` gives it, in pixels, from its header. Raises ``MediaError`` as that does."""
    with _opened(source) as (picture, _):
        width, height = picture.size
        return (height, width) if _orientation(picture) in _SIDEWAYS else (width, height)


@contextlib.contextmanager
def _opened(source: MediaSource) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """An image of which no pixel is decoded yet, and its open file."""
    with open_media(source) as file, errors_of(source, "not an image that can be read"):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size > LARGEST_PICTURE_FILE:
            raise MediaError(source, f"{size:,} bytes are more than a picture file may have ({LARGEST_PICTURE_FILE:,})")
        try:
            opened = Image.open(file, formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:
            known = ", ".join(IMAGE_FORMATS)
            reason = f"none of {known}, a kind of them that is not read (as float colors), or its header is damaged"
            raise MediaError(source, f"not an image that can be read: {reason}") from error
        with opened as picture:
            check_size(source, *picture.size)
            yield picture, file


def _scale_hidden_color(picture: Any) -> None:
    """Bring the transparent color of a PNG file that is not loaded yet to 8 bits, as Pillow does with its pixels alone."""
    hidden = picture.info.get("transparency") if picture.format == "PNG" else None
    if isinstance(hidden, int):
        picture.info["transparency"] = hidden * _GRAY_STEPS.get(picture.tile[0].args, 1)
    elif isinstance(hidden, tuple) and picture.tile[0].args == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in hidden)


def _check_scans(source: MediaSource, file: BinaryIO, pixels: int) -> None:
    """Raise ``MediaError`` if the scans of a JPEG go over too many pixels. Coded data never hold the mark that begins a scan."""
    place, scans, last = file.tell(), 0, b""
    file.seek(0)
    while block := file.read(2**20):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    file.seek(place)
    if scans * pixels > MAX_SCANNED_PIXELS:
        raise MediaError(source, f"{scans} scans of {pixels:,} pixels are more than a JPEG may have")


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture as RGB, upright by its EXIF orientation.

    Transparent pixels are laid on white: dropping the alpha channel alone would show the color that hides under them, often
    black on black text. Gray of 16 bits (of 12 in some TIFF files) is scaled to 8, not clipped. Raises ``ValueError`` for values
    of which nobody says what is black and what is white: floats, signed numbers and gray of 32 bits.
    """
    turn = UPRIGHT.get(_orientation(picture))
    picture = _of_eight_bits(picture)
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _of_eight_bits(picture: Image.Image) -> Image.Image:
    """``picture`` with 8 bits a channel. Pillow by itself cuts off what is above 255, and takes signed numbers for unsigned."""
    tags = getattr(picture, "tag_v2", {})  # of a TIFF file
    signed = tags.get(_SAMPLE_FORMAT_TAG, (_UNSIGNED,))[0] != _UNSIGNED
    # Pillow scales PPM files to 16 bits and gives them in the mode for 32.
    if picture.mode == "F" or signed or (picture.mode == "I" and picture.format != "PPM"):
        kind = "floats" if picture.mode == "F" else "signed numbers" if signed else "whole numbers of 32 bits"
        raise ValueError(
            f"its values are {kind}, whose black and white are not known; save it with 8 or 16 unsigned bits a channel"
        )
    if not picture.mode.startswith("I"):
        return picture
    largest = 2 ** tags.get(_BITS_TAG, (16,))[0] - 1
    values_HW = np.asarray(picture).astype(np.uint32)
    hidden_HW = values_HW == picture.info["transparency"] if "transparency" in picture.info else None
    if tags.get(_MEANING_TAG) == _WHITE_IS_ZERO:
        np.subtract(largest, values_HW, out=values_HW)
    # Rounded, without another copy.
    values_HW *= 255
    values_HW += largest // 2
    values_HW //= largest
    if hidden_HW is not None:
        values_HW[hidden_HW] = 255
    return Image.fromarray(values_HW.astype(np.uint8))


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (as stored) where there are no EXIF data or they cannot be read: the pixels are good anyway."""
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def preprocess(images: Sequence[Image.Image], image_size: int, aspect: str = "resize") -> torch.Tensor:
    """Turn RGB pictures into the tower's input: uint8 [F, 3, image_size, image_size].

    ``aspect`` is ``resize`` (bicubic to the square, the proportions change) or ``pad`` (first centered on a square of the mean
    color). With ``scale_pixels`` behind it, equal to transformers' SigLIP image processor, which is bicubic on bytes too. No
    pictures give a tensor with F = 0. Raises ``ValueError`` for another ``aspect``.
    """
    if aspect not in ("resize", "pad"):
        raise ValueError(f"image aspect {aspect!r} is unknown; use resize or pad")
    side = (image_size, image_size)
    pixels = np.empty((len(images), *side, 3), dtype=np.uint8)
    for place, image in enumerate(images):
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        scaled = _scale_padded(rgb, image_size) if aspect == "pad" else rgb.resize(side, Image.Resampling.BICUBIC)
        pixels[place] = np.asarray(scaled)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _scale_padded(image: Image.Image, size: int) -> Image.Image:
    """``image`` centered on a square of ``PAD_COLOR``, the square scaled to ``size``, without ever holding the whole square.

    Pillow scales rows first and columns then, with whole numbers in between. So the rows can be scaled in bands, with equal
    results: a padded row of nothing but ``PAD_COLOR`` stays what it is.
    """
    if max(image.size) > PADDED_SIDE:
        ratio = PADDED_SIDE / max(image.size)
        image = image.resize([max(1, round(s * ratio)) for s in image.size], Image.Resampling.BICUBIC)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), PAD_COLOR)
    height = max(1, BAND_PIXELS // side)
    for first in range(0, image.height, height):
        last = min(first + height, image.height)
        band = Image.new("RGB", (side, last - first), PAD_COLOR)
        band.paste(image.crop((0, first, image.width, last)), (left, 0))
        narrow.paste(band.resize((size, last - first), Image.Resampling.BICUBIC), (0, top + first))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)

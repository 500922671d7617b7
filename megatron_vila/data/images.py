"""Pictures as the SigLIP tower wants them.

Legend: F pictures, H = W side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from megatron_vila.data.video import MediaError

PAD_COLOUR = (127, 127, 127)
"""SigLIP's mean colour, 0.5, cut to a whole number: what the border of a padded picture becomes."""


def load_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file as ``as_rgb`` shows it; of an animation, the first picture.

    Raises ``MediaError`` for a file that is missing, empty, cut off, too large to be safe (Pillow's limit) or no image.
    """
    try:
        with Image.open(path) as file:
            file.load()
            return as_rgb(file)
    except FileNotFoundError as error:
        raise MediaError(path, "no such file") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        reason = "the file is empty (0 bytes)" if empty else f"not an image that can be read: {error}"
        raise MediaError(path, reason) from error


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture as RGB, upright by its EXIF orientation.

    Transparent pixels are laid on white: dropping the alpha channel alone would show the colour that hides under them, often
    black on black text. 16-bit grey is scaled to 8 bits, not clipped.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def preprocess(images: Sequence[Image.Image], image_size: int, aspect: str = "resize") -> torch.Tensor:
    """Turn RGB pictures into the tower's input: float32 [F, 3, image_size, image_size], scaled to -1..1.

    ``aspect`` is ``resize`` (bicubic to the square, the proportions change) or ``pad`` (first centred on a square of the mean
    colour). Equal to transformers' SigLIP image processor: bicubic on bytes, times 1/255, mean = deviation = 0.5. No pictures
    give a tensor with F = 0. Raises ``ValueError`` for another ``aspect``.
    """
    if aspect not in ("resize", "pad"):
        raise ValueError(f"image aspect {aspect!r} is unknown; use resize or pad")
    pixels = np.empty((len(images), image_size, image_size, 3), dtype=np.uint8)
    for place, image in enumerate(images):
        square = _pad_to_square(image) if aspect == "pad" else image
        pixels[place] = np.asarray(square.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC))
    pixels_F3HW = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).contiguous()
    return pixels_F3HW.mul_(2 / 255).sub_(1)


def _pad_to_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square

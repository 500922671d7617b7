"""Pictures of a document as the tower gets them, for a page: decoded and preprocessed by the trainer's ``RowDecoder``.

Legend: F squares, H = W side of a picture in pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from megatron_vila.config.schema import Config
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.media import name_of
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.sampling import thin_out
from megatron_vila.plan.row import Document, FrameRef

QUALITY = 85
SMALL_SIDE = 128
"""Pictures up to this side are written without loss."""


@dataclass(frozen=True)
class Square:
    """One picture as the tower gets it, as a data URL, and where it comes from in words."""

    url: str
    caption: str


class Painter:
    """Decodes pictures of ``dataset`` by the settings of ``config``. Owns threads: use it as a context manager."""

    def __init__(self, config: Config, dataset: VilaDataset, workers: int) -> None:
        self._probe, self.side = dataset.probe, config.model.vision.image_size
        self._decoder = RowDecoder(
            dataset.probe,
            dataset.failures,
            image_size=self.side,
            aspect=config.data.image_aspect,
            workers=workers,
        )
        self._turn = 0

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._decoder.close()

    def squares(
        self, document: Document, runs: Sequence[Sequence[FrameRef]], rates: Sequence[float | None]
    ) -> tuple[list[list[Square]], str]:
        """The squares of each of ``runs``, units of ``document``, and why they cannot be decoded (empty: they can).

        ``rates`` are the frames per second of runs whose frames have files of their own.
        """
        units = tuple(unit for run in runs for unit in run)
        part = replace(document, frames=units)
        self._turn += 1
        decoded = self._decoder.submit(self._turn, [part], range(len(units))).result()
        if decoded.undecodable:
            return [[] for _ in runs], decoded.undecodable[0]
        pixels_FHW3, shown, first = decoded.pixels.permute(0, 2, 3, 1).numpy(), [], 0
        for run, rate in zip(runs, rates, strict=True):
            captions = [caption for unit in run for caption in self._captions(unit, rate)]
            squares_FHW3 = pixels_FHW3[first : first + len(captions)]
            shown.append(
                [Square(_data_url(square), caption) for square, caption in zip(squares_FHW3, captions, strict=True)]
            )
            first += len(captions)
        return shown, ""

    def _captions(self, unit: FrameRef, rate: float | None) -> list[str]:
        captions = []
        for place, index in enumerate(unit.indices):
            if not unit.is_video:
                caption = "picture"
            elif unit.pictures:
                at = f" · {index / rate:.2f} s" if rate else ""
                caption = f"{name_of(unit.pictures[place]).rsplit('/', 1)[-1]}{at}"
            else:
                caption = f"frame {index} · {self._probe(unit.source).seconds[index]:.2f} s"
            tiles = unit.unit.tiles
            captions += [f"{caption} · tile {tile + 1} of {tiles}" for tile in range(tiles)] if tiles > 1 else [caption]
        return captions


def some_units(units: Sequence[FrameRef], most: int) -> list[FrameRef]:
    """At most ``most`` of ``units``, spread evenly from the first to the last."""
    if most < 1:
        return []
    return [units[place] for place in thin_out(np.arange(len(units)), most).tolist()]


def _data_url(square_HW3: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(square_HW3).save(file, "WEBP", quality=QUALITY, lossless=len(square_HW3) <= SMALL_SIDE)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
